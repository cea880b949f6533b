"""Training on texts of every kind: what a rank reads; a real run of rows and a tokenizer, to its export."""

import json
import shutil
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import BASE
from meshes import mesh_of
from ranks import Ranks
from tiny_tokenizer import save_tokenizer
from train_command import TINY, one_line_error, seqmesh_command
from transformers import AutoTokenizer, LlamaForCausalLM

from seqmesh.bench.dealing import in_turn
from seqmesh.train.config import MeshConfig
from seqmesh.train.data import Corpus, area_of, sequences
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

MESH = MeshConfig(ring=1, ulysses=2, dp_shard=4)
TEXT = Corpus(source="test", documents=tuple(bytes(range(1, 1 + n * n % 97)) * 2 for n in range(2, 40)))


@dataclass
class Recorded:
    """A document that notes what is read of it."""

    number: int
    text: bytes
    read: list[tuple[int, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, tokens: slice, /) -> bytes:
        self.read.append((self.number, tokens.start, tokens.stop))
        return self.text[tokens]


def read_in_a_step() -> list[tuple[int, int, int]]:
    """(document, start, stop) of all that this rank reads for one step."""
    documents = [Recorded(number, bytes(text[:])) for number, text in enumerate(TEXT.documents)]
    corpus = Corpus(source="recorded", documents=documents)
    config = replace(BASE, mesh=MESH, train=replace(BASE.train, micro_batch=1))
    trainer = Trainer(config, corpus, mesh_of(dims_of(MESH)), peak_flops_per_s=1.0)
    trainer.step()
    return [piece for document in documents for piece in document.read]


@pytest.fixture(scope="module")
def reads(ranks: Ranks) -> list[list[tuple[int, int, int]]]:
    return ranks.run(8, read_in_a_step)


def test_ranks_of_a_sequence_read_it_and_no_other_rank_does(reads: list[list[tuple[int, int, int]]]) -> None:
    step = list(islice(sequences(TEXT, seq_len=101, seed=0), 8))
    everything = sorted(tuple(piece) for sequence in step for piece in sequence)
    for rank in range(0, 8, 2):
        assert reads[rank] == reads[rank + 1]
    assert sorted(piece for rank in reads[::2] for piece in rank) == everything
    assert min(map(len, reads)) > 0


def test_ranks_compute_more_evenly_than_in_turn(reads: list[list[tuple[int, int, int]]]) -> None:
    step = list(islice(sequences(TEXT, seq_len=101, seed=0), 8))
    turns = [sum(area_of(step[number]) for (number,) in rank) for rank in in_turn(8, 4, 2)]
    evened = [sum((stop - start) * (stop - start + 1) // 2 for _, start, stop in rank) for rank in reads[::2]]
    assert sum(evened) == sum(turns)
    assert max(evened) < max(turns)


def rows(folder: Path) -> Path:
    """A JSON lines file."""
    file = folder / "rows.jsonl"
    texts = (f"the quick brown fox jumps {n} times. " * (1 + n % 40) for n in range(300))
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return file


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a tokenizer and a finished run on 2 ranks."""
    home = tmp_path_factory.mktemp("rows")
    rows(home)
    save_tokenizer(home / "tokenizer")
    done = seqmesh_command(*TRAIN, "--steps=4", "--checkpoint_every=2", "--folder=run", cwd=home, **CACHE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return home


CACHE = {"XDG_CACHE_HOME": "cache"}
TRAIN = (
    *("train", *TINY, "--data=rows.jsonl", "--field=body", "--tokenizer=tokenizer", "--sequences=4"),
    *("--ulysses=1", "--ring=1", "--dp_shard=2", "--zero=2", "--warmup=1", "--compare_steps=2"),
)


def test_rows_and_a_tokenizer_train_and_match_one_rank(home: Path) -> None:
    report = json.loads((home / "run" / "report.json").read_text())
    assert report["matches_one_rank"] is True
    assert report["documents"] == 300
    assert report["last_loss"] < report["first_loss"]


def test_a_resumed_run_goes_on_with_the_same_text_from_another_source(home: Path) -> None:
    """Of the same tokens in a parquet file under another name, to the bit."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    begun = home / "begun"
    shutil.copytree(home / "run", begun)
    shutil.rmtree(begun / "checkpoints" / "step-4")
    texts = [json.loads(line)["body"] for line in (home / "rows.jsonl").read_text().splitlines()]
    parquet.write_table(pyarrow.table({"text": texts}), home / "rows.parquet")
    moved = ("--data=rows.parquet", "--field=text", "--cache=elsewhere", "--resume=begun", "--folder=on")
    done = seqmesh_command(*TRAIN, "--steps=4", *moved, cwd=home, **CACHE)
    assert done.returncode == 0, done.stderr
    assert [step["loss"] for step in metrics(home / "on")] == [step["loss"] for step in metrics(home / "run")]
    assert (home / "elsewhere").is_dir()


def test_another_tokenizer_is_no_way_to_go_on(home: Path) -> None:
    save_tokenizer(home / "other", text="another text altogether " * 9)
    changed = ("--tokenizer=other", "--resume=run", "--folder=no")
    done = seqmesh_command(*TRAIN, "--steps=4", *changed, cwd=home, **CACHE)
    assert "or data.tokenizer makes other tokens of it; use that text and that" in one_line_error(done)


def test_the_trained_model_and_its_export_come_with_the_tokenizer(home: Path) -> None:
    """Also where the folder that the recipe names is gone."""
    own = AutoTokenizer.from_pretrained(home / "tokenizer")
    hidden = home / "hidden"
    (home / "tokenizer").rename(hidden)
    done = seqmesh_command("export", "run", cwd=home)
    hidden.rename(home / "tokenizer")
    assert done.returncode == 0, done.stderr
    for folder in (home / "run" / "checkpoint", home / "run" / "export" / "step-4"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("the fox").input_ids == own("the fox").input_ids
        model = LlamaForCausalLM.from_pretrained(folder)
        assert model.config.vocab_size == model.lm_head.weight.shape[0] == len(own)
        assert model.config.eos_token_id == own.eos_token_id
        ids = torch.tensor([tokenizer("the quick brown fox").input_ids])
        assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--field=text", "line 1 of 'rows.jsonl' has no column 'text', its columns: body; name one with"),
        ("--tokenizer=gpt2", "data.tokenizer='gpt2' is no folder; nothing is downloaded"),
        ("--vocabulary=200", "model.vocabulary=200 for tokens of data.tokenizer='tokenizer', of which"),
        ("--field=", 'data.field="" is empty; name the column with the text, such as "text"'),
    ],
)
def test_wrong_settings_are_one_line(home: Path, argument: str, said: str) -> None:
    assert said in one_line_error(seqmesh_command(*TRAIN, argument, cwd=home, **CACHE))
