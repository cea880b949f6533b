"""LoRA adapters of peft with every parallelism: training equals that of peft and transformers on one rank."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meshes import mesh_of
from parallel_runs import (
    LORA,
    Outcome,
    Run,
    assert_close,
    build,
    built,
    check,
    gradients_of,
    on_mesh,
    on_meta,
    train,
    whole,
)
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from ranks import Ranks
from torch import Tensor

from seqmesh import Schedule, SequenceMesh, masks
from seqmesh.integrations.transformers import plug_in
from seqmesh.parallel import ParallelDims, ParallelPlan, load_folder, parallelize
from seqmesh.parallel.gather import whole_weights

MIXES: dict[str, Run] = {
    "ring, zero 3": Run(dims=ParallelDims(ring=4), micro_batches=2),
    "ulysses, zero 2": Run(dims=ParallelDims(ulysses=2, dp_shard=2), plan=ParallelPlan(zero=2)),
    "zero 1": Run(dims=ParallelDims(ring=2, ulysses=2), plan=ParallelPlan(zero=1), tied=True),
    "zero 0": Run(dims=ParallelDims(dp_shard=2, ring=2), plan=ParallelPlan(zero=0), micro_batches=2),
    "replicas of shards": Run(dims=ParallelDims(dp_replicate=2, ring=2)),
    "tp": Run(dims=ParallelDims(tp=4), kv_heads=4),
    "tp, biases, one K/V head": Run(dims=ParallelDims(ring=2, tp=2), kind="qwen2", kv_heads=1),
    "tp, norms of heads, zero 1": Run(
        dims=ParallelDims(ulysses=2, tp=2), kind="qwen3", plan=ParallelPlan(zero=1), micro_batches=2
    ),
    "tp, shared rows": Run(
        dims=ParallelDims(ring=2, tp=2), plan=ParallelPlan(shard_norms=True), micro_batches=2
    ),
    "tp, shared rows, few K/V heads": Run(
        dims=ParallelDims(tp=4), kind="qwen2", plan=ParallelPlan(shard_norms=True, zero=1)
    ),
    "recomputed, tiles": Run(
        dims=ParallelDims(ring=2, tp=2), plan=ParallelPlan(recompute="full", mlp_rows=5), micro_batches=2
    ),
    "selective": Run(dims=ParallelDims(ulysses=4), plan=ParallelPlan(recompute="selective")),
    "spread experts": Run(
        dims=ParallelDims(dp_shard=2, ring=2),
        kind="mixtral",
        plan=ParallelPlan(experts=2),
        adapted=r".*self_attn\.._proj",
    ),
    "adapted experts": Run(dims=ParallelDims(dp_shard=2, ring=2), kind="mixtral"),
    "1f1b": Run(dims=ParallelDims(pp=2, ring=2), plan=ParallelPlan(zero=2), micro_batches=2),
    "interleaved": Run(
        dims=ParallelDims(pp=2, tp=2),
        plan=ParallelPlan(pipeline="interleaved", shard_norms=True, zero=0),
        layers=4,
        micro_batches=4,
    ),
    "zero-bubble": Run(
        dims=ParallelDims(pp=2, dp_shard=2),
        plan=ParallelPlan(pipeline="zero_bubble", zero=1),
        layers=4,
        micro_batches=4,
    ),
}


TOLERANCE = 3e-5
"""One rank's own A of a v_proj in fp32 has a gradient 8e-6 from that in fp64: it comes through B, o_proj and
the head."""


@pytest.mark.parametrize("name", MIXES)
def test_training_adapters_equals_that_of_one_rank(ranks: Ranks, name: str) -> None:
    run = replace(MIXES[name], adapted=MIXES[name].adapted or "all-linear")
    check(ranks.run(4, on_mesh, run), run, tolerance=TOLERANCE)


def trained_in_peft(run: Run) -> Outcome:
    """The same, given peft's own model."""
    plain = build(run.kind, run.tied, run.layers, run.kv_heads)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers, in peft
        model = get_peft_model(plain, LoraConfig(**LORA))
    model.get_base_model().load_state_dict(built(run).state_dict())
    return train(parallelize(model, mesh_of(run.dims), run.plan), run)


def test_a_model_of_peft_is_taken_as_it_is(ranks: Ranks) -> None:
    run = Run(dims=ParallelDims(ring=2, tp=2), adapted="all-linear")
    check(ranks.run(4, trained_in_peft, run), run, tolerance=TOLERANCE)


def loaded(run: Run, folder: Path) -> dict[str, Tensor]:
    model = parallelize(on_meta(run), mesh_of(run.dims), run.plan)
    load_folder(model, folder, seed=5)
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dims", [ParallelDims(ring=2, tp=2), ParallelDims(pp=2, dp_shard=2)])
def test_the_folder_of_the_plain_model_is_loaded_and_adapters_begin_as_on_one_rank(
    ranks: Ranks, tmp_path: Path, dims: ParallelDims
) -> None:
    run = Run(dims=dims, adapted="all-linear")
    build("llama", False, 2, 2).save_pretrained(tmp_path)
    plain = dict(build("llama", False, 2, 2).named_parameters())
    found: dict[str, Tensor] = {}
    for mine in ranks.run(4, loaded, run, tmp_path):
        for name, weight in mine.items():
            assert torch.equal(found.setdefault(name, weight), weight), name
    for name, weight in found.items():
        if "lora_B" in name:
            assert not weight.any()
        elif "lora_A" in name:
            bound = weight.shape[1] ** -0.5
            assert weight.abs().max() <= bound
            assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.25)
        else:
            assert torch.equal(weight, plain[name.replace(".base_layer", "")]), name
    of_a = [weight for name, weight in found.items() if "lora_A" in name]
    assert len(of_a) == 2 * 7
    assert not torch.equal(of_a[0], of_a[1])


REFUSED: list[tuple[dict[str, Any], ParallelDims, dict[str, Any], str]] = [
    ({"target_modules": ["lm_head"]}, ParallelDims(ring=4), {}, "lm_head is adapted, and lies outside"),
    ({"target_modules": ["embed_tokens"]}, ParallelDims(ring=4), {}, "embed_tokens is adapted, and lies"),
    ({"target_modules": ["q_proj"], "use_dora": True}, ParallelDims(tp=4), {}, "use plain LoRA, or tp=1"),
    ({"target_modules": ["q_proj"], "lora_bias": True}, ParallelDims(tp=4), {}, "use plain LoRA, or tp=1"),
    (
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        ParallelDims(ring=4),
        {"experts": 2},
        "whose adapters belong to all experts",
    ),
]


def refusal(settings: dict[str, Any], dims: ParallelDims, plan: dict[str, Any]) -> str:
    model = build("mixtral" if plan else "qwen2", False, 2, 4)
    inject_adapter_in_model(LoraConfig(**settings), model)
    try:
        parallelize(model, mesh_of(dims), ParallelPlan(**plan))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("settings", "dims", "plan", "message"), REFUSED)
def test_adapters_that_would_be_left_out_or_shared_wrongly_are_refused(
    ranks: Ranks, settings: dict[str, Any], dims: ParallelDims, plan: dict[str, Any], message: str
) -> None:
    for found in ranks.run(4, refusal, settings, dims, plan):
        assert message in found
        assert "\n" not in found


def test_modules_that_are_trained_whole_beside_adapters_are_refused_outside_the_layers(ranks: Ranks) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    for found in ranks.run(4, wrapped_refusal, settings):
        assert "lm_head is adapted, and lies outside the layers" in found


def wrapped_refusal(settings: dict[str, Any]) -> str:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model = get_peft_model(build("llama", False, 2, 2), LoraConfig(**settings))
    try:
        parallelize(model, mesh_of(ParallelDims(ring=4)))
    except ValueError as error:
        return str(error)
    return ""


def dora(run: Run) -> Outcome:
    """Without tp, whatever peft does to a layer is trained."""
    return train(parallelize(weight_decomposed(), mesh_of(run.dims), run.plan), run)


def weight_decomposed() -> Any:
    model = build("llama", False, 2, 2)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True), model)
    return model


def test_all_that_peft_trains_is_gathered(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks.run(4, gathered_dora)):
        kinds = {name.partition("lora_")[2].partition(".")[0] for name in found}
        assert kinds == ({"A", "B", "magnitude_vector"} if rank == 0 else set())


def gathered_dora() -> set[str]:
    """Names of what a rank gathers of a model whose adapters have magnitudes."""
    return set(whole_weights(parallelize(weight_decomposed(), mesh_of(ParallelDims(ring=2, ulysses=2)))))


def test_other_adapters_of_layers_train_without_tp(ranks: Ranks) -> None:
    alone = Run(dims=ParallelDims(), plan=ParallelPlan(zero=0))
    (want,) = ranks.run(1, dora, alone)
    assert any("magnitude" in name for name in want.gradients)
    for got in ranks.run(4, dora, Run(dims=ParallelDims(ring=2, ulysses=2))):
        for name, gradient in want.gradients.items():
            assert_close(name, got.gradients[name], gradient, TOLERANCE)


def plugged(ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A rank's logits of a PeftModel that is plugged in, and its part of the adapters' gradients."""
    model = plug_in(wrapped())
    sequence = SequenceMesh.build(ulysses=2, ring=2)
    schedule = Schedule.build(masks.documents([23, 14]), sequence)
    positions = torch.cat([torch.arange(23), torch.arange(14)])[None]
    mine, places = schedule.shard(ids, 1), schedule.shard(positions, 1)
    logits = model(input_ids=mine, position_ids=places, schedule=schedule, use_cache=False).logits
    logits.pow(2).sum().backward()
    whole_logits = schedule.unshard(logits.detach(), 1)
    return whole_logits, gradients_of(model.get_base_model().named_parameters())


def wrapped() -> Any:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model = get_peft_model(build("llama", False, 2, 2), LoraConfig(**LORA))
    model.get_base_model().load_state_dict(build("llama", False, 2, 2, "all-linear").state_dict())
    return model


def test_a_model_of_peft_is_plugged_in_as_it_is(ranks: Ranks) -> None:
    ids = torch.randint(0, 96, (1, 37), generator=torch.Generator().manual_seed(1))
    plain = wrapped()
    logits = torch.cat([plain(input_ids=part, use_cache=False).logits for part in ids.split([23, 14], 1)], 1)
    logits.pow(2).sum().backward()
    found = ranks.run(4, plugged, ids)
    for got, _ in found:
        assert_close("logits", got, logits.detach(), 1e-5)
    for name, gradient in gradients_of(plain.get_base_model().named_parameters()).items():
        assert_close(name, torch.stack([part[name] for _, part in found]).sum(0), gradient, TOLERANCE)
