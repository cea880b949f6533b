"""`seqmesh generate`: text of a prompt that is spread over ranks, what is told beside it, and wrong input."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from train_command import one_line_error, seqmesh_command
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from seqmesh.generate.command import request

LONG = 32_768


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes, large enough in its weights for tokens to differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=40_000,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    made = tmp_path_factory.mktemp("model")
    model.save_pretrained(made)
    ByT5Tokenizer(extra_ids=0).save_pretrained(made)
    return made


def expected(folder: Path, text: str, new_tokens: int) -> str:
    """One rank's text by transformers alone."""
    tokenizer = ByT5Tokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_prompt_of_32k_tokens_on_4_ranks(folder: Path, tmp_path: Path) -> None:
    text = ("the quick brown fox " * LONG)[: LONG - 1]  # the tokenizer adds one token
    (tmp_path / "prompt.txt").write_text(text)
    mesh = ("--ulysses", "2", "--ring", "2", "--new-tokens", "12")
    files = ("--model", str(folder), "--prompt", "prompt.txt")
    done = seqmesh_command("generate", *files, *mesh, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(folder, text, 12) + "\n"
    assert f"prompt of {LONG:,} tokens on 4 ranks (ulysses 2 x ring 2)" in done.stderr
    assert re.search(rf"read {LONG:,} tokens in .* s \(.* tokens/s\); then 12 new ones", done.stderr)
    # 2 layers of keys and values of 2 heads of 8 fp32 numbers, a quarter of 32K rows, and an eighth to spare
    assert "K/V cache of a rank: 2.25 MiB to 2.25 MiB; of all 9 MiB" in done.stderr
    assert "made for" not in done.stderr


@pytest.mark.parametrize("more", [("--chunk", "100"), ("--temperature", "0.001", "--top-p", "0.9")])
def test_chunks_and_cold_samples_say_the_same(folder: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    text = "the quick brown fox " * 20
    (tmp_path / "prompt.txt").write_text(text)
    given = ("--model", str(folder), "--prompt", "prompt.txt", "--ring", "2", "--new-tokens", "8")
    done = seqmesh_command("generate", *given, *more, cwd=tmp_path)
    assert done.stdout == expected(folder, text, 8) + "\n", done.stderr


def test_positions_that_the_model_was_not_made_for_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a")
    given = ("--model", str(folder), "--prompt", "prompt.txt", "--new-tokens", "1")
    longer = tmp_path / "short"
    AutoModelForCausalLM.from_pretrained(folder, max_position_embeddings=2).save_pretrained(longer)
    ByT5Tokenizer(extra_ids=0).save_pretrained(longer)
    assert "made for" not in seqmesh_command("generate", *given, cwd=tmp_path).stderr
    given = ("--model", str(longer), "--prompt", "prompt.txt", "--new-tokens", "1")
    assert "the model was made for 2 positions" in seqmesh_command("generate", *given, cwd=tmp_path).stderr


WRONG = {
    "no prompt": ({"prompt": Path("none.txt")}, "--prompt none.txt is no text file"),
    "no model": ({"model": Path("none")}, "--model none is no folder; pass one that save_pretrained wrote"),
    "no rank": ({"ring": 0}, "--ring 0: use a number of at least 1"),
    "no new token": ({"new_tokens": 0}, "--new-tokens 0: use a number of at least 1"),
    "no chunk": ({"chunk": 0}, "--chunk 0: use a number of at least 1"),
    "top-p": ({"top_p": 1.5}, "use 0 < top-p <= 1"),
    "top-p of 0": ({"top_p": 0.0}, "use 0 < top-p <= 1"),
    "temperature": ({"temperature": -1.0}, "a temperature of at least 0"),
    "top-p of no sample": ({"top_p": 0.9}, "--top-p 0.9 without samples; give a --temperature above 0"),
    "dtype": ({"dtype": "int8"}, "--dtype int8: use auto, fp32, bf16, fp16"),
    "device": ({"device": "tpu"}, "--device tpu: use cpu, cuda"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused(folder: Path, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    (tmp_path / "prompt.txt").write_text("a")
    right = {
        "model": folder,
        "prompt": tmp_path / "prompt.txt",
        "ulysses": 1,
        "ring": 1,
        "new_tokens": 1,
        "chunk": None,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "device": "cpu",
        "dtype": "auto",
    }
    assert request(**right).prompt == "a"
    with pytest.raises(ValueError, match=re.escape(message)):
        request(**(right | given))


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a")
    done = seqmesh_command("generate", "--model", ".", "--prompt", "prompt.txt", cwd=tmp_path)
    assert "no tokenizer that transformers reads" in one_line_error(done)
