"""Layers that carry a state: what is counted is what transformers builds and computes, and seqmesh sends."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_models import FAMILIES
from plan_command import Run
from test_plan_families import hollow, job
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from transformers.models.bamba.modeling_bamba import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
from wrong_input import refused

from seqmesh import layouts, masks
from seqmesh.planner.cost.floor import FloorModel
from seqmesh.planner.cost.fused_memory import FusedMemory
from seqmesh.planner.cost.recurrent import passed_states
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.cost.step_loads import StepLoads
from seqmesh.planner.inputs.mixers import DeltaMixer, ScanMixer
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.schedule.chains import chains_of

READ = [name for name in FAMILIES if name not in ("bailing_hybrid", "zamba2")]
SPARSE: dict[str, Any] = {"first_k_dense_replace": 1, "num_experts": 4, "num_experts_per_token": 2}


def built(name: str, **changes: Any) -> Any:
    """The configuration of a tiny model of a family."""
    with torch.device("meta"):
        config = FAMILIES[name]().config
    left_out = {"model_type", "mlp_layer_types" if changes else ""}
    given = {key: value for key, value in config.to_dict().items() if key not in left_out}
    return AutoConfig.for_model(config.model_type, **given | changes)


def counted(config: Any) -> int:
    """Of the model that transformers builds, but for vectors of mixers and of heads."""
    total = 0
    for name, parameter in hollow(config).named_parameters():
        own = any(part in name for part in (".mixer.", ".mamba.", ".linear_attn.", ".self_attn.", ".conv."))
        if not name.endswith(("A_log", "bias")) and not (own and parameter.ndim == 1):
            total += parameter.numel()
    return total


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in READ}
CONFIGS["qwen3_next"] = ("qwen3_next", {"decoder_sparse_step": 1})
CONFIGS["kimi_linear with experts"] = ("kimi_linear", SPARSE)
CONFIGS["granite without experts"] = ("granite_hybrid", {"num_local_experts": 0})
CONFIGS["nemotron_h without experts"] = (
    "nemotron_h",
    {"layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba"]},
)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hybrid_is_counted_as_the_model_that_transformers_builds(tmp_path: Path, name: str) -> None:
    family, changes = CONFIGS[name]
    config = built(family, **changes)
    config.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).parameters == counted(config)


PRESETS: dict[str, tuple[str, dict[str, Any], float]] = {
    "qwen3-next-80b-a3b": ("qwen3_next", {}, 79.7),
    "kimi-linear-48b-a3b": ("kimi_linear", {}, 49.1),
    "nemotron-h-8b": (
        "nemotron_h",
        {"hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"},
        8.1,
    ),
}
"""model_type, what is said besides transformers' defaults, and parameters in 10^9."""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_config_of_its_family_and_the_model_that_transformers_builds(
    tmp_path: Path, name: str
) -> None:
    kind, given, total = PRESETS[name]
    config = AutoConfig.for_model(kind, **given)
    config.save_pretrained(tmp_path)
    preset = load_model(name)
    assert replace(load_model(str(tmp_path)), name="", source="") == replace(preset, name="", source="")
    assert preset.parameters == counted(config)
    assert round(preset.parameters / 1e9, 1) == total


def test_kimi_is_read_as_it_was_published_too(tmp_path: Path) -> None:
    own = {"num_heads": 32, "head_dim": 128, "short_conv_kernel_size": 4}
    own |= {"full_attn_layers": [5, 9, 13, 17, 21, 25]}
    config = AutoConfig.for_model("kimi_linear").to_dict()
    removed = ("layer_types", "mlp_layer_types", "linear_num_heads")
    values = {key: value for key, value in config.items() if key not in removed}
    values |= {"linear_attn_config": own, "first_k_dense_replace": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape = load_model(str(tmp_path))
    assert replace(shape, name="", source="") == replace(
        load_model("kimi-linear-48b-a3b"), name="", source=""
    )


def test_a_delta_rule_takes_the_products_of_the_kernel() -> None:
    mixer = DeltaMixer(layers=1, heads=6, key_heads=3, key_dim=16, value_dim=24, width=3)
    n = 2 * mixer.chunk
    q, k = (torch.empty(1, n, 3, 16, device="meta") for _ in range(2))
    v, g = torch.empty(1, n, 6, 24, device="meta"), torch.empty(1, n, 6, device="meta")
    with FlopCounterMode(display=False) as flops:
        torch_chunk_gated_delta_rule(q, k, v, g=g, beta=g)
    # Two triangular solves are not counted here, where kernels multiply by an inverse.
    solves = 2 * mixer.chunk * mixer.heads * (16 + 24)
    assert flops.get_total_flops() == n * (mixer.kernel_flops() - solves)


def test_a_scan_takes_the_products_of_the_kernel_and_those_of_its_chunks() -> None:
    """The states of chunks are passed on by products of their own, as many as chunks: those are left out."""
    mixer = ScanMixer(layers=1, heads=4, head_dim=8, groups=2, state_dim=16, width=3, chunk=32)
    n = mixer.chunk
    x, dt = torch.empty(1, n, 4, 8, device="meta"), torch.empty(1, n, 4, device="meta")
    b, a = torch.empty(1, n, 2, 16, device="meta"), torch.empty(4, device="meta")
    with FlopCounterMode(display=False) as flops:
        mamba2_chunk_scan(x, dt, a, b, b, chunk_size=mixer.chunk)
    of_chunks = flops.get_total_flops() - n * mixer.kernel_flops()
    assert 0 <= of_chunks <= 8 * mixer.state.heads * mixer.state.numbers


def tiny(tmp_path: Path, name: str = "qwen3_5", **changes: Any) -> ModelShape:
    built(name, **changes).save_pretrained(tmp_path)
    return load_model(str(tmp_path))


def test_flops_are_of_weights_attention_and_states(tmp_path: Path) -> None:
    shape, s = tiny(tmp_path), 512
    flops = CostModel(job(shape, seq_len=s)).estimate(Point(zero=0)).flops
    pairs = s * (s + 1) // 2
    expected = 6 * shape.matmul_parameters * s + 6 * 4 * 16 * pairs + 3 * 2 * 6 * 4 * 8 * 8 * s
    # Pairs are the mean over three layers, in whole ones.
    assert flops == pytest.approx(expected, abs=6 * 3 * 4 * 16)


@pytest.mark.parametrize("documents", [(), (100, 400, 12)])
@pytest.mark.parametrize(("ulysses", "ring"), [(1, 4), (2, 2), (4, 1)])
def test_bytes_of_states_and_halos_are_those_of_the_chains(
    tmp_path: Path, documents: tuple[int, ...], ulysses: int, ring: int
) -> None:
    shape = tiny(tmp_path)
    asked = job(shape, seq_len=512, gpus=4, documents=documents)
    costs, point = CostModel(asked), Point(ulysses=ulysses, ring=ring)
    chains = chains_of(
        masks.documents(documents) if documents else masks.causal(512), costs.load(point).layout, ulysses
    )
    sent = [0, 0]
    for rank in range(4):
        states = chains.state_traffic(rank, 4, 64, 64)
        halos = chains.halo_traffic(rank, 3)
        for way in range(2):
            sent[way] += 4 * states[way] + 2 * 64 * halos[way]
    (by_link,) = costs.recurrent.sent(point, 1, costs.group(point, "ulysses", "ring"))
    assert sum(by_link.values()) == pytest.approx(sum(sent) / 4 * 2 / 3)
    names = [term.name for term in costs.estimate(point).terms]
    assert {"recurrence kernel", "states and halos exchange"} <= {*names}


def test_documents_that_lie_whole_on_their_ranks_send_nothing_and_are_scouted_nowhere() -> None:
    mixer = DeltaMixer(layers=1, heads=4, key_heads=4, key_dim=8, value_dim=8, width=3)
    whole = chains_of(masks.documents([16] * 4), layouts.contiguous(64, 4), 1)
    assert passed_states(mixer, whole, 1, 2) == (0, (0, 0), (0, 0))
    cut = passed_states(mixer, chains_of(masks.causal(64), layouts.contiguous(64, 4), 1), 2, 2)
    assert cut.entered == 2 * 16
    assert cut.forward.most > cut.forward.mean > 0


def test_a_layer_without_attention_keeps_no_heads_and_its_states_are_kept(tmp_path: Path) -> None:
    shape = tiny(tmp_path)
    asked = job(shape, seq_len=512, gpus=4)
    memory = FusedMemory(asked, StepLoads(asked))
    layer = memory.layer_activations(Point(ring=4))
    n, kept = 128, 2 * 64 + 3 * 32 + 2 * 4 + 4 * 8
    assert layer["activations_mixers"] == 2 * kept * n * 2 // 3
    alone = 2 * 16 * n * (4 + 2) + 4 * 4 * n + 2 * 2 * 8 * n * 4  # q, k, v, out; lse; gate and product
    assert layer["activations_attention"] == alone // 3
    states = memory.of(Point(ring=4)).categories["activations_states"]
    # Two pieces that a state enters, with 4 heads of 8 x 8; of five passed through one transition.
    assert states == 4 * 2 * (2 * 4 * 64 + 5 * 64)


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h", "falcon_h1", "lfm2"])
def test_the_floor_of_a_mesh_is_below_all_its_points(tmp_path: Path, name: str) -> None:
    changes = {"decoder_sparse_step": 1} if name == "qwen3_next" else {}
    costs = CostModel(job(tiny(tmp_path, name, **changes), seq_len=4096, gpus=8, global_batch=4))
    for mesh in (Point(ring=8), Point(ulysses=2, ring=2, dp=2), Point(ulysses=4, dp=2)):
        least = FloorModel(costs).floor(mesh, (1, 3), (1, 2))
        for zero, checkpointing in ((1, "none"), (3, "full")):
            point = mesh.but(zero=zero, checkpointing=checkpointing)
            assert least <= costs.seconds(point)


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear", "nemotron_h", "lfm2"])
def test_a_hybrid_is_planned(plan: Run, tmp_path: Path, name: str) -> None:
    changes = {"qwen3_next": {"decoder_sparse_step": 1}, "kimi_linear": SPARSE}.get(name, {})
    built(name, **changes).save_pretrained(tmp_path)
    machine = ("--gpu", "h100-sxm", "--nodes", "1", "--gpus-per-node", "4", "--seq-len", "1K")
    code, out, error = plan("--model", str(tmp_path), *machine, "--global-batch", "2", "--explain")
    assert (code, error) == (0, "")
    assert "tensor parallelism is not priced with" in " ".join(out.split())


def test_a_preset_is_a_recipe_whose_folder_is_named_and_no_trace(plan: Run, tmp_path: Path) -> None:
    recipe, asked = (
        tmp_path / "plan.toml",
        ("--model", "nemotron-h-8b", "--gpu", "h100-sxm", "--seq-len", "64K"),
    )
    pins = ("--pin", "ring=8,zero=3,checkpointing=full", "--global-batch", "1")
    assert plan(*asked, *pins, "--emit", str(recipe))[0] == 0
    assert 'folder = "nemotron-h-8b"' in recipe.read_text()
    assert "no keys of the trainer say layers that carry a state" in recipe.read_text()
    code, _, error = plan(*asked, *pins, "--trace", str(tmp_path / "step.json"))
    assert (code, "which a trace does not draw yet" in error) == (2, True)
    assert "experts, latent attention or several kinds of layers" in plan(*asked, "--stack", "trainer")[2]


@pytest.mark.parametrize("layout", ["auto", "balanced"])
def test_packed_documents_of_a_hybrid_are_planned(plan: Run, layout: str) -> None:
    asked = ("--model", "qwen3-next-80b-a3b", "--gpu", "h100-sxm", "--nodes", "2", "--seq-len", "32K")
    pins = ("--pin", "ring=8,dp=2,zero=3,experts=8", "--global-batch", "4", "--layout", layout)
    found = plan.json(*asked, *pins, "--documents", "lognormal:7,1.3")["candidates"]
    assert found


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model_type": "zamba2"}, "shares one block of attention between layers (model_type zamba2)"),
        ({"model_type": "bailing_hybrid"}, "gates its latent attention head by head (model_type bailing"),
        ({"model_type": "minimax"}, "has layers without attention (model_type minimax)"),
        ({"model_type": "qwen3_next", "layer_types": ["sliding_attention"]}, "is not a list of full_atten"),
        ({"model_type": "olmo_hybrid", "layer_types": ["full_attention"]}, "has 1 of 2 layers; name all"),
        ({"model_type": "bamba"}, "attn_layer_indices [] names no layer with attention"),
        ({"model_type": "nemotron_h"}, "layers_block_type None is not a list of"),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "M*", "moe_latent_size": 4},
            "moe_latent_si",
        ),
    ],
)
def test_a_hybrid_that_the_plan_cannot_price_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    values = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4} | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    refused(rule, load_model, str(path))


def test_the_bytes_of_the_page_are_what_the_code_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))
    from write_hybrid_bytes import PAGE, rows, table

    assert table() in PAGE.read_text(), "run python tools/write_hybrid_bytes.py"
    for said, sent in rows():
        assert sent.passed < min(sent.all_gather, sent.all_to_all) / 4, said


def test_strided_layouts_and_tensor_parallelism_are_refused(tmp_path: Path) -> None:
    shape = tiny(tmp_path)
    with pytest.raises(ValueError, match=r"layout=striped with .* whose layers carry a state"):
        job(shape, layout="striped")
    assert shape.not_shared_by_tp == "layers that carry a state"


@pytest.mark.parametrize(
    ("mixer", "rule"),
    [
        ('kind = "rwkv"', "unknown kind of mixer 'rwkv'; known: delta, scan, convolution"),
        ('kind = "convolution", layers = 1, channels = 64', "width is missing; add it"),
        ('kind = "convolution", layers = 3, channels = 64, width = 2', "mixer.layers=3 of layers=2"),
        ('kind = "convolution", layers = 1, channels = 64, width = 2, heads = 1', "unknown key 'heads'"),
    ],
)
def test_a_users_mixer_with_a_mistake_is_refused(tmp_path: Path, mixer: str, rule: str) -> None:
    shape = "layers = 2\nhidden = 64\nheads = 4\nkv_heads = 2\nhead_dim = 16\nintermediate = 128\n"
    file = tmp_path / "lab.toml"
    file.write_text(f"[model.t]\n{shape}vocabulary = 100\nattention_layers = 1\nmixer = {{ {mixer} }}\n")
    refused(rule, load_model, "t", [file])
