"""What the planner is told: units, models and hardware.

Right inputs give the published numbers, wrong ones a line with the remedy.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqmesh.planner.inputs.hardware import Cluster, known_clusters, known_gpus, load_cluster, load_gpu
from seqmesh.planner.inputs.models import ModelShape, known_models, load_model
from seqmesh.planner.inputs.tables import unknown
from seqmesh.planner.inputs.units import (
    format_bytes,
    format_rate,
    format_seconds,
    format_tokens,
    parse_bytes,
    parse_tokens,
)

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
QWEN = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}

GPU = """
[gpu.Ours]
tflops = 100
memory_gb = 48
memory_tb_per_s = 1
pcie_gb_per_s = 32
network_gb_per_s = 12.5
"""


def refused(what: str, call: Any, *arguments: Any) -> None:
    """The call ends in one line that holds `what`."""
    with pytest.raises(ValueError, match=re.escape(what)) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), f"no remedy in: {caught.value}"


def bare(shape: ModelShape) -> ModelShape:
    """Without what says where it came from."""
    return replace(shape, name="", source="")


def config(folder: Path, **changes: Any) -> str:
    """A folder with LLaMA3-8B's config.json, changed; ... removes a key."""
    values = {key: value for key, value in (LLAMA | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def toml(folder: Path, text: str, name: str = "lab.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_tokens_are_read() -> None:
    given: list[str | int] = ["208K", "1.5M", "30000", 8192, "64k", " 1 M ", "0.5K"]
    assert [*map(parse_tokens, given)] == [212992, 1572864, 30000, 8192, 65536, 1048576, 512]


NO_TOKENS = [
    "",
    "K",
    "0",
    "-1",
    "-8K",
    0,
    -3,
    "1.5",
    "0.3K",
    "8G",
    "8KK",
    "1e5",
    "inf",
    "٣",
    "1_000",
    True,
    2.5,
    None,
]


@pytest.mark.parametrize("given", NO_TOKENS)
def test_what_is_no_number_of_tokens_is_refused_with_the_forms(given: Any) -> None:
    refused('"208K"', parse_tokens, given)
    refused(repr(given), parse_tokens, given)


def test_bytes_are_read() -> None:
    given: list[str | int] = ["80GiB", "64GB", "1.5GB", 7, "7", "512 B", "2tib", "1.1KiB"]
    assert [*map(parse_bytes, given)] == [85899345920, 64 * 10**9, 1500000000, 7, 7, 512, 2**41, 1126]


@pytest.mark.parametrize("given", ["80G", "GB", "0GB", "-1GB", 0, False, "80 giga", "nan", 1.5, "0.1B"])
def test_what_is_no_number_of_bytes_is_refused_with_the_forms(given: Any) -> None:
    refused('"80GiB"', parse_bytes, given)


def test_tokens_are_written_short_and_as_they_are_read() -> None:
    tokens = (212992, 1048576, 1572864, 30000, 1, 1024, 10**12 + 1)
    assert [*map(format_tokens, tokens)] == ["208K", "1M", "1536K", "30000", "1", "1K", "1000000000001"]
    assert tuple(map(parse_tokens, map(format_tokens, tokens))) == tokens


def test_bytes_and_rates_are_written_with_three_digits() -> None:
    amounts = (0, 999, 999.7, 81_604_378_624, 999_600_000, 99_960_000, -1.5e9, 5e18, float("inf"))
    assert [*map(format_bytes, amounts)] == [
        "0 B",
        "999 B",
        "1.00 KB",
        "81.6 GB",
        "1.00 GB",
        "100 MB",
        "-1.50 GB",
        "5000 PB",
        "inf B",
    ]
    assert (format_rate(2e11), format_rate(1.4726e14, "FLOP")) == ("200 GB/s", "147 TFLOP/s")


def test_seconds_are_written_in_the_unit_that_fits() -> None:
    short = (0, 5.6e-5, 0.0009996, 0.34, 12.34, -2.0, float("inf"))
    assert [*map(format_seconds, short)] == [
        "0 s",
        "56.0 µs",
        "1.00 ms",
        "340 ms",
        "12.3 s",
        "-2.00 s",
        "inf s",
    ]
    long = (59.96, 125, 3599.7, 12000, 86399, 3 * 86400 + 4 * 3600)
    assert [*map(format_seconds, long)] == [
        "1 min 0 s",
        "2 min 5 s",
        "1 h 0 min",
        "3 h 20 min",
        "1 d 0 h",
        "3 d 4 h",
    ]


def test_an_unknown_name_comes_with_the_nearest_and_all_known_ones() -> None:
    assert (
        str(unknown("model", "Lama", ["LLaMA", "x"]))
        == "unknown model 'Lama'; did you mean 'LLaMA'? known: LLaMA, x"
    )
    assert str(unknown("model", "zz\n", ["abc"])) == "unknown model 'zz\\n'; known: abc"
    assert str(unknown("key", "a", [], "'f' [gpu.b]")) == "'f' [gpu.b]: unknown key 'a'; known: none"


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
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, Any], rule: str) -> None:
    refused(rule, lambda: replace(load_model("llama3-8b"), **changes))


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
            {"model_type": "mixtral", "num_local_experts": 8},
            "is a mixture of experts (num_local_experts = 8)",
        ),
        ({"n_routed_experts": 256, "kv_lora_rank": 512}, "is a mixture of experts (n_routed_experts = 256)"),
        ({"kv_lora_rank": 512}, "has multi-head latent attention (kv_lora_rank)"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder (is_encoder_decoder = true)"),
        ({"model_type": "mamba"}, "has layers without attention (model_type mamba)"),
        ({"mamba_n_heads": 128}, "has layers without attention (mamba_n_heads)"),
        ({"model_type": "gemma2"}, "mixes kinds of layers (model_type gemma2)"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "mixes kinds of layers (layer_types full_attention, sliding_attention)",
        ),
        (
            {"layer_types": ["linear_attention"]},
            "has layers of an unknown kind (layer_types linear_attention)",
        ),
        ({"layer_types": "full"}, "has layers of an unknown kind (layer_types 'full')"),
        (QWEN | {"max_window_layers": 28}, "mixes kinds of layers (max_window_layers = 28 of 32)"),
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
    shape = "layers = 2\nhidden = 64\nheads = 4\nkv_heads = 2\nhead_dim = 16\nintermediate = 128\nvocabulary = 100\nsliding_window = 8\n"
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


def test_the_paper_s_node_is_known() -> None:
    gpu = load_gpu("A800-SXM")
    assert (gpu.flops_per_s, gpu.memory_bytes, gpu.memory_bytes_per_s) == (312e12, 85899345920, 2.04e12)
    assert (gpu.scale_up_bytes_per_s, gpu.pcie_bytes_per_s, gpu.network_bytes_per_s) == (200e9, 32e9, 25e9)
    assert gpu.network_bytes_per_s * 8 * 8 == 1.6e12  # 8 GPUs, 8 bits
    assert gpu.node_bytes_per_s == 200e9


def test_every_preset_says_its_source_and_is_unmeasured() -> None:
    assert known_gpus() == ["a100-sxm", "a100-pcie", "a800-sxm", "h100-sxm", "h200-sxm", "b200", "l20", "h20"]
    gpus = [load_gpu(name) for name in known_gpus()]
    assert all(gpu.source and not gpu.measured and (not gpu.overrides or gpu.name == "l20") for gpu in gpus)
    assert [gpu.name for gpu in gpus if gpu.scale_up_bytes_per_s is None] == ["a100-pcie", "l20"]
    assert load_gpu("l20").node_bytes_per_s == 32e9
    assert load_gpu("h200-sxm").memory_bytes == 141 * 10**9


def test_a_users_gpu_is_read(tmp_path: Path) -> None:
    gpu = load_gpu(
        "ours",
        [toml(tmp_path, GPU + 'source = "us"\nmeasured = true\n[gpu.Ours.assumptions]\nlatency_s = 1e-5\n')],
    )
    assert (gpu.name, gpu.flops_per_s, gpu.memory_bytes, gpu.scale_up_bytes_per_s) == (
        "Ours",
        100e12,
        48 * 10**9,
        None,
    )
    assert (gpu.network_bytes_per_s, gpu.source, gpu.measured, dict(gpu.overrides)) == (
        12.5e9,
        "us",
        True,
        {"latency_s": 1e-5},
    )
    assert len({gpu, gpu}) == 1


def test_a_gpu_is_like_another_but_for_what_it_says(tmp_path: Path) -> None:
    of_a = '[gpu.a]\nlike = "A800-SXM"\nmemory_gb = 40\nscale_up_gb_per_s = 0\nmeasured = true\n[gpu.a.assumptions]\nx = 1\ny = 2\n'
    file = toml(tmp_path, of_a + '[gpu.b]\nlike = "a"\ntflops = 1\n[gpu.b.assumptions]\ny = 3\n')
    a, b, a800 = load_gpu("a", [file]), load_gpu("b", [file]), load_gpu("a800-sxm")
    said: dict[str, Any] = {
        "memory_bytes": 40 * 10**9,
        "scale_up_bytes_per_s": None,
        "measured": True,
        "overrides": {"x": 1, "y": 2},
    }
    assert a == replace(a800, name="a", source="like a800-sxm", **said)
    # b was not measured itself.
    assert b == replace(
        a, name="b", flops_per_s=1e12, measured=False, overrides={"x": 1, "y": 3}, source="like a"
    )


def test_a_measured_profile_goes_before_the_preset_that_it_is_like(tmp_path: Path) -> None:
    first = toml(tmp_path, '[gpu.l20]\nlike = "l20"\ntflops = 100\nmeasured = true\n')
    second = toml(tmp_path, '[gpu.l20]\nlike = "l20"\npcie_gb_per_s = 20\n', "second.toml")
    gpu = load_gpu("l20", [first, second])
    assert (gpu.flops_per_s, gpu.pcie_bytes_per_s, gpu.memory_bytes) == (100e12, 20e9, 48 * 10**9)
    assert load_gpu("l20", [second]).flops_per_s == 119.5e12
    assert known_gpus([first, second]) == known_gpus()


def test_gpus_that_are_like_each_other_are_refused(tmp_path: Path) -> None:
    file = toml(tmp_path, '[gpu.a]\nlike = "b"\n[gpu.b]\nlike = "a"\n[gpu.c]\nlike = "c"\n')
    refused("'a' like 'b' like 'a' has no end; give one of them its numbers", load_gpu, "a", [file])
    refused("[gpu.c]: unknown GPU 'c'; ", load_gpu, "c", [file])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            GPU.replace("tflops", "tflop"),
            "lab.toml' [gpu.Ours]: unknown key 'tflop'; did you mean 'tflops'? known: like, tflops, ",
        ),
        (GPU.replace("tflops = 100", ""), "lab.toml' [gpu.Ours]: tflops is missing; add it"),
        (
            GPU.replace("memory_gb = 48", ""),
            "memory_gib (2^30 bytes) and memory_gb (10^9) are both missing; add one of them",
        ),
        (GPU + "memory_gib = 48", "both memory_gib and memory_gb; give one"),
        (GPU.replace("100", '"100"'), "tflops = '100' is not a finite number"),
        (GPU.replace("100", "true"), "tflops = True is not a finite number"),
        (GPU.replace("100", "0"), "tflops = 0 is not above zero; give a positive number"),
        (GPU.replace("100", "nan"), "tflops = nan is not a finite number"),
        (
            GPU.replace("100", "1" + "0" * 400),
            "is not a finite number up to 1e+15; give one, without quotes or unit",
        ),
        (GPU.replace("48", "1e-15"), "is not from 1e-09 to 1e+12"),
        (GPU + "scale_up_gb_per_s = -2", "scale_up_gb_per_s = -2 is not above zero"),
        (GPU + "measured = 1", "measured = 1 is not true or false"),
        (GPU + "assumptions = 1", "assumptions = 1 is not a table"),
        (GPU + "[gpu.Ours.assumptions]\nx = 'a'", "[gpu.Ours] assumptions: x = 'a' is not a finite number"),
        (GPU + 'like = "a80-sxm"', "[gpu.Ours]: unknown GPU 'a80-sxm'; did you mean 'a800-sxm'?"),
        (
            GPU + GPU.replace("Ours", "OURS"),
            "[gpu.OURS] is there twice but for upper and lower case; rename one",
        ),
        (
            GPU.replace("[gpu.Ours]", "[gpu]"),
            "lab.toml' [gpu]: tflops has no table of its own; name the table, as in [gpu.NAME]",
        ),
        (
            GPU.replace("[gpu.Ours]", "[gpus.Ours]"),
            "unknown section 'gpus'; did you mean 'gpu'? known: gpu, cluster, model",
        ),
        ("[gpu", "lab.toml' is not TOML: "),
        (GPU.replace("Ours", '"a\\nb"'), "unknown GPU 'ours'; known: a100-sxm, "),
    ],
)
def test_a_mistake_in_a_users_gpu_is_one_line(tmp_path: Path, text: str, rule: str) -> None:
    refused(rule, load_gpu, "ours", [toml(tmp_path, text)])


def test_an_unknown_gpu_or_file_is_refused(tmp_path: Path) -> None:
    refused("unknown GPU 'h100'; did you mean 'h100-sxm'? known: a100-sxm, ", load_gpu, "h100")
    form = "give a TOML file with tables [gpu.NAME], [cluster.NAME], [model.NAME]"
    refused(f"none.toml' does not exist; {form}", load_gpu, "l20", [tmp_path / "none.toml"])
    refused("cannot read ", load_gpu, "l20", [tmp_path])


def test_a_users_cluster_is_read(tmp_path: Path) -> None:
    lab = '[cluster.Lab]\ngpu = "a800-sxm"\nnodes = 2\ngpus_per_node = 8\n'
    file = toml(
        tmp_path, lab + lab.replace("Lab", "slow").replace("a800-sxm", "l20") + "network_gb_per_s = 1.25"
    )
    cluster = load_cluster("lab", [file])
    assert (cluster, cluster.gpus) == (Cluster(gpu=load_gpu("a800-sxm"), nodes=2, gpus_per_node=8), 16)
    assert load_cluster("slow", [file]).gpu == replace(load_gpu("l20"), network_bytes_per_s=1.25e9)
    ours = toml(tmp_path, lab.replace("a800-sxm", "ours"), "cluster.toml")
    assert load_cluster("lab", [ours, toml(tmp_path, GPU, "gpu.toml")]).gpu.name == "Ours"
    assert (known_clusters([file]), known_clusters()) == (["Lab", "slow"], [])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "unknown cluster 'lab'; known: none; describe it as [cluster.NAME] in a TOML file"),
        ("[cluster.lav]", "unknown cluster 'lab'; did you mean 'lav'? known: lav"),
        (
            "[cluster.lab]\ngpus = 8",
            "[cluster.lab]: unknown key 'gpus'; did you mean 'gpu'? known: gpu, nodes, ",
        ),
        ("[cluster.lab]\nnodes = 8", "[cluster.lab]: gpu is missing; add it"),
        ("[cluster.lab]\ngpu = 'h21'", "[cluster.lab]: unknown GPU 'h21'; did you mean 'h20'?"),
        (
            "[cluster.lab]\ngpu = 'h20'\nnodes = 1\ngpus_per_node = 8.0",
            "gpus_per_node = 8.0 is not a whole number from 1",
        ),
        (
            "[cluster.lab]\ngpu = 'h20'\nnodes = 1\ngpus_per_node = 8\nnetwork_gb_per_s = 0",
            "network_gb_per_s = 0 is not above zero",
        ),
    ],
)
def test_a_mistake_in_a_users_cluster_is_one_line(tmp_path: Path, text: str, rule: str) -> None:
    refused(rule, load_cluster, "lab", [toml(tmp_path, text)])


def test_hardware_that_cannot_be_is_refused() -> None:
    gpu = load_gpu("h20")
    for rate in (0.0, -1.0, float("inf"), float("nan")):
        refused("_per_s=", lambda rate: replace(gpu, scale_up_bytes_per_s=rate), rate)
    for nodes in (0, -1, True, 2.0):
        refused(
            f"nodes={nodes!r} is not", lambda nodes: Cluster(gpu=gpu, nodes=nodes, gpus_per_node=8), nodes
        )


def test_the_inputs_need_no_torch() -> None:
    code = (
        "import sys, seqmesh.planner.inputs.models, seqmesh.planner.inputs.hardware;"
        " print({'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )
