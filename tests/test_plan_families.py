"""Mixtures, latent attention, windows in some layers: what the planner counts is what transformers builds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from seqmesh.planner.cost.compute import Compute
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.train.sizes import ModelSizes

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "intermediate_size": 48,
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 3}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1, 4],
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {"num_key_value_heads": 2, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 8,
            "q_lora_rank": 20,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 14,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            "first_k_dense_replace": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gemma2": ("gemma2", {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 100}),
    "gemma3_text": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 100}),
    "qwen2": (
        "qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 100,
            "max_window_layers": 3,
            "tie_word_embeddings": False,
        },
    ),
}
"""model_type, and what its configuration has besides SMALL."""
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-8x7b": ("mixtral", {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "qwen3-235b-a22b": (
        "qwen3_moe",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 12288,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536,
        },
    ),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": ("gpt_oss", {}),
    "deepseek-v3": ("deepseek_v3", {}),
    "gemma3-27b": (
        "gemma3_text",
        {
            "hidden_size": 5376,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "intermediate_size": 21504,
            "sliding_window": 1024,
        },
    ),
}
"""model_type, and what its published config.json has besides that type's defaults."""
UNCOUNTED = ("bias", "sinks", "q_norm", "k_norm", "feedforward_layernorm", "q_a_layernorm", "kv_a_layernorm")
"""Parts of the names of parameters that `ModelShape` leaves out."""


def hollow(config: Any) -> PreTrainedModel:
    """The model without memory."""
    logging.set_verbosity_error()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def read(kind: str, given: dict[str, Any], folder: Path) -> tuple[ModelShape, PreTrainedModel]:
    """The shape that the planner reads, and the model that transformers builds of one config.json."""
    config = AutoConfig.for_model(kind, **given)
    config.save_pretrained(folder)
    return load_model(str(folder)), hollow(config)


def check_counts(shape: ModelShape, model: PreTrainedModel) -> None:
    """Parameters, those that a token is multiplied with, and calls of attention are the model's own."""
    counted = [
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not any(part in name for part in UNCOUNTED)
    ]
    assert shape.parameters == sum(counted)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters > 0.999 * whole or shape.hidden == SMALL["hidden_size"]
    sizes = ModelSizes.of(model)
    assert shape.matmul_parameters == sizes.matmul_parameters
    values = shape.both_dims - shape.head_dim
    for call in sizes.calls:
        assert (call.heads, call.kv_heads) == (shape.heads, shape.kv_heads)
        assert (call.key_dim, call.value_dim) == (shape.head_dim, values)
    windows = [call.window for call in sizes.calls if call.window is not None]
    assert len(windows) == (shape.layers - shape.full_layers if shape.sliding_window else 0)
    assert set(windows) <= {shape.sliding_window}
    lengths = [700]
    asked = job(shape, seq_len=700)
    flops = sizes.step_flops(700, sizes.attention_work(lengths))
    # Pairs are the mean over layers, in whole ones.
    rounding = 6 * shape.layers * shape.heads * shape.both_dims
    assert CostModel(asked).estimate(Point(zero=0)).flops == pytest.approx(flops, abs=rounding, rel=1e-12)


def job(shape: ModelShape, *, seq_len: int = 4096, gpus: int = 1, **more: Any) -> Job:
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=1, gpus_per_node=gpus)
    return Job(model=shape, cluster=cluster, seq_len=seq_len, **more)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_config_is_counted_as_the_model_that_transformers_builds(tmp_path: Path, name: str) -> None:
    kind, more = TINY[name]
    check_counts(*read(kind, SMALL | more, tmp_path))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_config_and_the_model_that_transformers_builds(
    tmp_path: Path, name: str
) -> None:
    shape, model = read(*PUBLISHED[name], tmp_path)
    preset = load_model(name)
    assert replace(shape, name="", source="") == replace(preset, name="", source="")
    check_counts(preset, model)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", "46.7", "12.9"),
        ("qwen3-235b-a22b", "235.1", "22.2"),  # published as 235B and 22B
        ("deepseek-v3", "671.0", "37.6"),  # 671B and 37B
        ("gemma3-27b", "27.0", "27.0"),
        ("qwen3-30b-a3b", "30.5", "3.4"),  # 3.353B, published as 3.3B
    ],
)
def test_totals_and_active_parameters_are_the_published_ones(name: str, total: str, active: str) -> None:
    shape = load_model(name)
    assert (f"{shape.parameters / 1e9:.1f}", f"{shape.active_parameters / 1e9:.1f}") == (total, active)


@pytest.mark.parametrize(("name", "total", "active"), [("20b", 20.91, 3.61), ("120b", 116.83, 5.13)])
def test_gpt_oss_has_the_parameters_of_its_model_card(name: str, total: float, active: float) -> None:
    """The card counts the output head as active, not the embedding. Biases are 0.04% of the total."""
    shape = load_model(f"gpt-oss-{name}")
    assert shape.parameters / 1e9 == pytest.approx(total, rel=5e-4)
    assert round(shape.matmul_parameters / 1e9, 2) == active


def test_latent_attention_has_five_matrices() -> None:
    shape = load_model("deepseek-v3")
    q = 7168 * 1536 + 1536 * 128 * 192
    kv = 7168 * (512 + 64) + 512 * 128 * (128 + 128)
    assert sum(m.rows * m.columns for m in shape.attention_matrices) == q + kv + 128 * 128 * 7168


@pytest.mark.parametrize(
    ("name", "experts"),
    [(name, 1) for name in (*PUBLISHED, "llama3-8b", "gpt2-xl")] + [("deepseek-v3", 8), ("gpt-oss-20b", 4)],
)
def test_products_take_the_flops_of_the_weights_that_a_token_passes(name: str, experts: int) -> None:
    """With memory that takes no time: forward 2 FLOPs a weight and token, backward twice that."""
    shape = load_model(name)
    gpu = replace(load_gpu("h100-sxm"), memory_bytes_per_s=1e30)
    cluster = Cluster(gpu=gpu, nodes=1, gpus_per_node=experts)
    assumed = Assumptions(matmul_half_outputs=0.0)
    asked = Job(model=shape, cluster=cluster, seq_len=1024, global_batch=8, assumptions=assumed)
    layer = Compute(asked).layer(Point(dp=experts, experts=experts, zero=3))
    weights = shape.matmul_parameters - shape.embedding_parameters
    expected = 2 * 1024 * weights / asked.product_rate
    assert shape.layers * layer.matmul_forward == pytest.approx(expected, rel=1e-12)
    assert shape.layers * layer.matmul_backward == pytest.approx(2 * expected, rel=1e-12)


def test_what_passes_through_memory_is_counted_product_by_product() -> None:
    """By hand, with FLOPs that take no time: every product's operands and outputs once, in bf16."""
    n, h, rows, width, here = 1024, 2048, 8 * 1024, 768, 16
    shape = load_model("qwen3-30b-a3b")
    gpu = replace(load_gpu("h100-sxm"), flops_per_s=1e40)
    asked = Job(
        model=shape,
        cluster=Cluster(gpu=gpu, nodes=1, gpus_per_node=8),
        seq_len=n,
        global_batch=8,
        assumptions=Assumptions(matmul_half_outputs=0.0),
    )
    layer = Compute(asked).layer(Point(dp=8, experts=8, zero=3))

    def moved(m: int, k: int, columns: int, matrices: int = 1) -> int:
        return 2 * (m * k + matrices * k * columns + m * columns)

    experts = moved(rows, h, 2 * width, here) + moved(rows, width, h, here)
    forward = moved(n, h, 40 * 128) + moved(n, 32 * 128, h) + moved(n, h, 128) + experts
    rate = asked.memory_rate
    assert layer.matmul_forward * rate == pytest.approx(forward, rel=1e-9)
    assert layer.mlp_forward * rate == pytest.approx(moved(n, h, 128) + experts, rel=1e-9)
    assert layer.matmul_backward * rate == pytest.approx(2 * forward, rel=1e-9)
    second = moved(n, h, 4 * 128) + moved(n, 32 * 128, h) + moved(n, h, 64) + moved(rows, h, width, here)
    assert layer.half_forward * rate == pytest.approx(second, rel=1e-9)
    # 14 hidden numbers a token, 3 of each expert's width, 7 hidden ones for each row.
    assert layer.elementwise * rate == pytest.approx(2 * n * (14 * h + 8 * 3 * width + 8 * 7 * h), rel=1e-9)
