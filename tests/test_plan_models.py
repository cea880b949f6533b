"""Shapes of models: presets have the published numbers, files and config.json are read or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wrong_input import refused, toml

from seqmesh.planner.inputs.models import known_models, load_model
from seqmesh.planner.inputs.shape import LatentShape, MixtureShape, ModelShape

pytestmark = pytest.mark.fast


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SPARSE = MixtureShape(experts=8, active=2, intermediate=64)
LATENT = LatentShape(q_rank=8, kv_rank=4, rotary_dim=64)
QWEN = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}


def bare(shape: ModelShape) -> ModelShape:
    """Without what says where it came from."""
    return replace(shape, name="", source="")


def config(folder: Path, **changes: Any) -> str:
    """A folder with LLaMA3-8B's config.json, changed; ... removes a key."""
    values = {key: value for key, value in (LLAMA | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("llama3-405b", 405_853_388_800),
        ("llama3.2-1b", 1_235_814_400),
        ("mistral-7b", 7_248_023_552),
        # Published totals less what is not counted: biases of q, k and v, or the norms of every head.
        ("qwen2.5-7b", 7_615_616_512 - 28 * (28 + 2 * 4) * 128),
        ("qwen3-8b", 8_190_735_360 - 36 * 2 * 128),
        # Less positions, 11 hidden of biases in a layer, and the last norm's bias.
        ("gpt2-xl", 1_557_611_200 - 1024 * 1600 - 48 * 11 * 1600 - 1600),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert load_model(name).parameters == parameters


def test_parameters_of_a_block_and_of_the_output_head() -> None:
    gpt2 = load_model("gpt2-xl")
    assert gpt2.layer_parameters - 2 * gpt2.hidden == gpt2.layer_matmul_parameters == 12 * gpt2.hidden**2
    tied = load_model("llama3.2-1b")
    untied = replace(tied, tied_embeddings=False)
    assert (
        tied.matmul_parameters
        == untied.matmul_parameters
        == 16 * tied.layer_matmul_parameters + 128256 * 2048
    )
    assert untied.parameters - tied.parameters == tied.embedding_parameters


def test_presets_are_found_in_any_case_and_say_their_source() -> None:
    assert load_model("LLaMA3-8B") == load_model("llama3-8b")
    assert all(load_model(name).source for name in known_models())


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"kv_heads": 3}, "3 key/value heads do not divide 32 heads; use a divisor of 32"),
        ({"layers": 0}, "layers=0 is not a whole number"),
        ({"hidden": True}, "hidden=True is not a whole number"),
        ({"head_dim": 128.0}, "head_dim=128.0 is not a whole number"),
        ({"sliding_window": 0}, "sliding_window=0 is not a whole number"),
        ({"value_dim": 0}, "value_dim=0 is not a whole number"),
        ({"full_layers": 33}, "full_layers=33 of layers=32; use at most 32"),
        ({"mixture": replace(SPARSE, experts=0)}, "mixture.experts=0 is not a whole number from 1"),
        ({"mixture": replace(SPARSE, active=9)}, "mixture.active=9 of mixture.experts=8; use at most 8"),
        ({"mixture": replace(SPARSE, shared=-1)}, "mixture.shared=-1 is not a whole number from 0"),
        ({"mixture": replace(SPARSE, dense_layers=32)}, "mixture.dense_layers=32 of layers - 1=31"),
        ({"latent": replace(LATENT, kv_rank=0)}, "latent.kv_rank=0 is not a whole number from 1"),
        ({"latent": replace(LATENT, rotary_dim=129)}, "latent.rotary_dim=129 of head_dim=128"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, Any], rule: str) -> None:
    refused(rule, lambda: replace(load_model("llama3-8b"), **changes))


def test_as_many_parts_as_there_are_is_a_shape() -> None:
    parts = {"full_layers": 32, "sliding_window": 1, "latent": replace(LATENT, rotary_dim=128)}
    mixture = replace(SPARSE, active=8, dense_layers=31)
    assert replace(load_model("llama3-8b"), **parts, mixture=mixture).expert_parameters


def test_a_hugging_face_config_gives_the_preset(tmp_path: Path) -> None:
    shape = load_model(config(tmp_path))
    assert shape == load_model(str(tmp_path / "config.json"))
    assert shape.name == tmp_path.name
    assert "model_type llama" in shape.source
    assert bare(shape) == bare(load_model("llama3-8b"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": ...}, {"kv_heads": 32}),
        ({"num_attention_heads": 16, "head_dim": 64}, {"heads": 16, "head_dim": 64}),
        ({"num_attention_heads": 16}, {"head_dim": 256}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        # What transformers takes where a type's key is absent.
        ({"model_type": "gemma", "tie_word_embeddings": ...}, {"tied_embeddings": True, "head_dim": 256}),
        ({"model_type": "mistral"}, {"sliding_window": 4096}),
        ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": None}),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, {"sliding_window": None}),
        ({"model_type": "phi3", "sliding_window": 2047}, {"sliding_window": 2047}),
        (
            {"model_type": "ministral3", "sliding_window": 512, "layer_types": ["sliding_attention"] * 32},
            {"sliding_window": 512},
        ),
        (QWEN | {"max_window_layers": 0}, {"sliding_window": 4096}),
        (QWEN | {"max_window_layers": 32}, {"sliding_window": None}),
        (QWEN | {"max_window_layers": 28}, {"sliding_window": 4096, "full_layers": 28}),
        ({"model_type": "gemma2"}, {"sliding_window": 4096, "full_layers": 16}),
        (
            {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"] * 16},
            {"sliding_window": 4096, "full_layers": 16},
        ),
        (QWEN | {"use_sliding_window": None, "max_window_layers": 28}, {"sliding_window": None}),
        ({"num_experts": 1}, {"gated": True}),
    ],
)
def test_a_config_means_what_transformers_takes_it_to_mean(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    shape = load_model(config(tmp_path, **changes))
    assert {name: getattr(shape, name) for name in expected} == expected


def test_gpt2_and_its_kin_have_two_matrices_and_names_of_their_own(tmp_path: Path) -> None:
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "n_inner": None,
        "vocab_size": 50257,
    }
    (tmp_path / "config.json").write_text(json.dumps(gpt2))
    assert bare(load_model(str(tmp_path))) == bare(load_model("gpt2-xl"))
    falcon = {"model_type": "falcon", "intermediate_size": ..., "num_key_value_heads": 8}
    shape = load_model(config(tmp_path, **falcon))
    assert (shape.kv_heads, shape.intermediate, shape.gated) == (1, 4 * 4096, False)
    assert (
        load_model(config(tmp_path, **falcon, new_decoder_architecture=True, num_kv_heads=16)).kv_heads == 16
    )


def test_a_multimodal_config_gives_its_text_model(tmp_path: Path) -> None:
    text = LLAMA | {"tie_word_embeddings": None}
    shape = load_model(config(tmp_path, model_type="llava", tie_word_embeddings=True, text_config=text))
    assert bare(shape) == bare(replace(load_model("llama3-8b"), tied_embeddings=True))
    experts = config(tmp_path, model_type="llava", text_config=text | {"num_experts": 4})
    refused("text_config: the model is a mixture of experts (num_experts = 4)", load_model, experts)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"num_local_experts": 8},
            "is a mixture of experts (num_local_experts = 8)",
        ),
        ({"n_routed_experts": 256, "kv_lora_rank": 512}, "is a mixture of experts (n_routed_experts = 256)"),
        ({"kv_lora_rank": 512}, "has multi-head latent attention (kv_lora_rank)"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder (is_encoder_decoder = true)"),
        ({"model_type": "mamba"}, "has layers without attention (model_type mamba)"),
        ({"mamba_n_heads": 128}, "has layers without attention (mamba_n_heads)"),
        ({"model_type": "olmo3"}, "mixes kinds of layers (model_type olmo3)"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "mixes kinds of layers (layer_types full_attention, sliding_attention)",
        ),
        (
            {"layer_types": ["linear_attention"]},
            "has layers of an unknown kind (layer_types linear_attention)",
        ),
        ({"layer_types": "full"}, "has layers of an unknown kind (layer_types 'full')"),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 2 of 32 layers; name all",
        ),
        (
            {
                "model_type": "qwen3_moe",
                "num_experts": 8,
                "moe_intermediate_size": 64,
                "decoder_sparse_step": 2,
            },
            "has experts in some of its layers only (decoder_sparse_step = 2)",
        ),
        ({"layer_types": ["sliding_attention"]}, "sliding_window is missing; add it"),
        (
            {"model_type": "opt", "word_embed_proj_dim": 512},
            "embeds in another width than it computes (word_embed_proj_dim)",
        ),
        ({"model_type": "lama"}, "unknown model_type 'lama'; did you mean 'llama'? known: llama, phi3, "),
        ({"model_type": ...}, "model_type is missing; add it"),
        ({"model_type": "qwen2_vl", "tie_word_embeddings": ...}, "tie_word_embeddings is missing; add it"),
        ({"hidden_size": ...}, "hidden_size is missing; add it"),
        ({"hidden_size": 4096.0}, "hidden_size = 4096.0 is not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True is not a whole number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 is not true or false"),
        ({"num_attention_heads": 30}, "hidden size 4096 over 30 heads is not a whole head_dim; add head_dim"),
        ({"num_key_value_heads": 5}, "5 key/value heads do not divide 32 heads; use a divisor of 32"),
        ({"text_config": [1]}, "text_config = [1] is not a table"),
    ],
)
def test_a_config_that_the_plan_cannot_price_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    refused(rule, load_model, config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"{", "is not JSON: "),
        (b"[" * 100_000, "is not JSON: "),
        (b"[1]", "holds no JSON object at"),
        (b"\xff", "is not a text file: "),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, rule: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    refused(f"config.json' {rule}", load_model, str(tmp_path))


def test_a_path_without_a_config_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    refused(
        "config.json' does not exist; give a Hugging Face config.json or the folder",
        load_model,
        str(tmp_path),
    )
    refused(
        "'some/where' does not exist; give a Hugging Face config.json or the folder", load_model, "some/where"
    )
    (tmp_path / "config.json").mkdir()
    refused("cannot read ", load_model, str(tmp_path))
    refused("'models.toml' is no model but may hold some", load_model, "models.toml")
    refused("unknown model 'lama3-8b'; did you mean 'llama3-8b'? known: llama2-7b, ", load_model, "lama3-8b")
    for name in ("", "\0", "a/\0", "x" * 5000, "x" * 5000 + "/"):
        refused(";", load_model, name)


def test_a_users_file_adds_models_and_goes_before_the_presets(tmp_path: Path) -> None:
    shape = (
        "layers = 2\nhidden = 64\nheads = 4\nkv_heads = 2\nhead_dim = 16\n"
        "intermediate = 128\nvocabulary = 100\nsliding_window = 8\n"
    )
    file = toml(tmp_path, f'[model.Tiny]\n{shape}gated = false\n[model."llama3-8b"]\n{shape}[gpu.x]\n')
    tiny = load_model("tiny", [file])
    assert tiny == ModelShape(
        name="Tiny",
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=128,
        vocabulary=100,
        sliding_window=8,
        gated=False,
    )
    assert load_model("llama3-8b", [file]).layers == 2
    assert known_models([file]) == [*known_models(), "Tiny"]
    refused(
        "[model.t]: unknown key 'head'; did you mean 'heads'?",
        load_model,
        "t",
        [toml(tmp_path, "[model.t]\nhead = 1")],
    )
    refused("[model.t]: layers is missing; add it", load_model, "t", [toml(tmp_path, "[model.t]\nheads = 1")])
    refused(
        "put quotes around a name with a dot", load_model, "t1", [toml(tmp_path, "[model.t1.5b]\nheads = 1")]
    )
