"""ZeRO-1, -2 and -3, HSDP and accumulation: losses, gradients, norms and parameters are those of one rank."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from parallel_runs import (
    ADAMW,
    Run,
    assert_close,
    build,
    check,
    mesh_of,
    micro_batch,
    on_mesh,
    on_one_rank,
    whole,
)
from parallel_runs import train as train_model
from ranks import Ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqmesh.parallel import (
    IGNORED_LABEL,
    ParallelDims,
    ParallelPlan,
    clip_gradients,
    loss,
    parallelize,
    shard_batch,
    shard_micro_batches,
)

SEQUENCE = ParallelDims(ring=2, ulysses=2)
BOTH = ParallelDims(dp_shard=2, ring=2)
REPLICATED = ParallelDims(dp_replicate=2, ulysses=2)


@pytest.mark.parametrize(
    ("dims", "zero"),
    [(SEQUENCE, 3), (BOTH, 1), (BOTH, 2), (BOTH, 3), (REPLICATED, 1), (REPLICATED, 2)],
    ids=lambda x: (
        str(x) if isinstance(x, int) else "x".join(f"{k}{v}" for k, v in x.degrees.items() if v > 1)
    ),
)
def test_training_equals_that_of_one_rank(ranks: Ranks, dims: ParallelDims, zero: int) -> None:
    run = Run(dims=dims, plan=ParallelPlan(zero=zero), micro_batches=2)
    check(ranks.run(4, on_mesh, run), run)


@pytest.mark.parametrize("zero", [1, 3])
def test_tied_embeddings(ranks: Ranks, zero: int) -> None:
    run = Run(dims=BOTH, plan=ParallelPlan(zero=zero), tied=True)
    check(ranks.run(4, on_mesh, run), run)


def test_a_model_with_norms_of_its_heads_and_gradients_reduced_each_time(ranks: Ranks) -> None:
    run = Run(dims=BOTH, plan=ParallelPlan(reduce_each=True), kind="qwen3", micro_batches=2)
    check(ranks.run(4, on_mesh, run), run)


def labels_here(run: Run) -> int:
    """Labels on this rank of what it trains on first."""
    local = shard_batch(micro_batch(0, 0), mesh_of(run.dims), layout=run.layout)
    return int((local.shift_labels != IGNORED_LABEL).sum())


def test_ranks_without_a_label(ranks: Ranks) -> None:
    run = Run(dims=SEQUENCE, layout="contiguous")
    assert [count > 0 for count in ranks.run(4, labels_here, run)] == [False, False, True, True]
    check(ranks.run(4, on_mesh, run), run)


def test_layers_with_windows_and_a_head_that_caps_its_logits(ranks: Ranks) -> None:
    run = Run(dims=BOTH, kind="gemma2", tied=True, micro_batches=2)
    check(ranks.run(4, on_mesh, run), run)


def with_frozen_weights(zero: int) -> tuple[bool, dict[str, torch.Tensor]]:
    """On one rank: whether they stayed, and the gradients of the others."""
    hf = build("llama", False, 2, 2)
    hf.model.layers[0].requires_grad_(False)
    hf.lm_head.requires_grad_(False)
    model = parallelize(hf, mesh_of(BOTH), ParallelPlan(zero=zero))
    before = {name: whole(p.detach()) for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = model.optimizer(partial(ADAMW, weight_decay=0.5))
    numbers = [mesh_of(BOTH).rank("dp_shard")]
    model.gradients(shard_micro_batches([micro_batch(0, number) for number in numbers], model.mesh))
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    after = dict(model.named_parameters())
    return all(torch.equal(whole(after[name].detach()), was) for name, was in before.items()), grads


@pytest.mark.parametrize("zero", [1, 3])
def test_frozen_weights_stay_and_the_others_train(ranks: Ranks, zero: int) -> None:
    want = on_one_rank("llama", False, 2, 2, 2).gradients
    for stayed, grads in ranks.run(4, with_frozen_weights, zero):
        assert stayed
        assert grads
        for name, grad in grads.items():
            assert_close(name, grad, want[name], 1e-5)


def test_one_process_without_a_group() -> None:
    run = Run(dims=ParallelDims(), micro_batches=3)
    check([on_mesh(run)], run)


class CountCollectives(TorchDispatchMode):
    """Collectives by name, but the all-to-alls of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def collectives(plan: ParallelPlan) -> dict[str, int]:
    """On one rank: what a step of 3 micro-batches communicates for parameters and gradients."""
    mesh = mesh_of(SEQUENCE)
    model = parallelize(build("llama", False, 2, 2), mesh, plan)
    batches = shard_micro_batches([micro_batch(0, number) for number in range(3)], mesh)
    with CountCollectives() as seen:
        model.gradients(batches)
    return dict(seen.counts)


def test_accumulation_communicates_no_more_than_it_must(ranks: Ranks) -> None:
    """Four groups of parameters: two layers, the embedding, the rest."""
    for found in ranks.run(4, collectives, ParallelPlan(zero=1)):
        assert found == {"allreduce_": len(build("llama", False, 2, 2).state_dict())}
    once = {"_allgather_base_": 4, "_reduce_scatter_base_": 4}
    for found in ranks.run(4, collectives, ParallelPlan(zero=2)):
        assert found == once
    # Layers and embedding are gathered for every forward and backward, gradients are sent once all the same.
    for found in ranks.run(4, collectives, ParallelPlan(zero=3)):
        assert found["_reduce_scatter_base_"] == 4
    for found in ranks.run(4, collectives, ParallelPlan(zero=3, reduce_each=True)):
        assert found["_reduce_scatter_base_"] == 12


def in_bf16() -> tuple[Any, set[torch.dtype], set[torch.dtype]]:
    run = Run(dims=BOTH, plan=ParallelPlan(param_dtype=torch.bfloat16), micro_batches=2)
    model = parallelize(build("llama", False, 2, 2), mesh_of(BOTH), run.plan)
    seen: set[torch.dtype] = set()
    model.parts[0].anatomy.layers[1].register_forward_hook(lambda *args: seen.add(args[2].dtype))
    outcome = train_model(model, run)
    return outcome, seen, {p.dtype for p in model.parameters()}


def test_bf16_computes_over_fp32_weights_and_gradients(ranks: Ranks) -> None:
    want = on_one_rank("llama", False, 2, 2, 4)
    for got, computed, kept in ranks.run(4, in_bf16):
        assert (computed, kept) == ({torch.bfloat16}, {torch.float32})
        assert {grad.dtype for grad in got.gradients.values()} == {torch.float32}
        for name, grad in got.gradients.items():
            # bf16 has 8 bits: 2 ** -9 a rounding, and some dozens of them on the way of a gradient
            assert_close(name, grad, want.gradients[name], 0.03)


def own_loop() -> list[float]:
    """The three calls, without `gradients`."""
    mesh = mesh_of(SEQUENCE)
    model = parallelize(build("llama", False, 2, 2), mesh)
    optimizer = model.optimizer(ADAMW)
    losses = []
    for step in range(3):
        share = loss(model, shard_batch(micro_batch(step, 0), mesh))
        share.backward()
        losses.append(model.total_loss(share))
        clip_gradients(model.parameters(), 0.05, mesh)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_loop_of_ones_own(ranks: Ranks) -> None:
    want = on_one_rank("llama", False, 2, 2, 1).losses
    for got in ranks.run(4, own_loop):
        assert got == pytest.approx(want, rel=1e-5)


def shares() -> list[tuple[str, float]]:
    model = parallelize(build("llama", False, 2, 2), mesh_of(SEQUENCE))
    held = [(name, p.to_local().numel() / p.numel()) for name, p in model.named_parameters()]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return held


def test_every_rank_holds_a_quarter_of_every_parameter(ranks: Ranks) -> None:
    for held in ranks.run(4, shares):
        assert {share for _, share in held} == {0.25}


def state_sizes() -> tuple[int, float]:
    model = parallelize(build("llama", False, 2, 2), mesh_of(SEQUENCE), ParallelPlan(zero=1))
    optimizer = model.optimizer(ADAMW)
    model.gradients([shard_batch(micro_batch(0, 0), model.mesh)])
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    (inner,) = optimizer.inner.param_groups
    return sum(state["exp_avg"].numel() for state in optimizer.inner.state.values()), inner["lr"]


def test_zero_1_spreads_states_and_follows_the_learning_rate(ranks: Ranks) -> None:
    found = ranks.run(4, state_sizes)
    total = sum(p.numel() for p in build("llama", False, 2, 2).parameters())
    assert sum(size for size, _ in found) == total
    assert max(size for size, _ in found) < 0.3 * total
    assert {rate for _, rate in found} == {0.5}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero": 4}, "zero=4: ZeRO has stages 0 to 3"),
        ({"zero": 1, "offload_optimizer": True}, "what is sharded can be kept on the host"),
        ({"zero": 1, "param_dtype": torch.bfloat16}, "use zero=2"),
        ({"recompute": "some"}, "recompute='some'; use one of"),
        ({"pipeline": "gpipe"}, "pipeline='gpipe'; use one of"),
        ({"offload": True}, 'use recompute="full" too'),
        ({"pipeline": "zero_bubble"}, "use zero=2"),
        ({"pipeline": "zero_bubble", "zero": 2, "recompute": "full"}, "makes the gradients of weights later"),
        ({"mlp_rows": 0}, "at least 1 token"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelPlan(**given)


def test_what_a_model_lacks_is_said() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    mesh = ParallelDims().build()
    sizes = {"intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 8}
    config = AutoConfig.for_model("granite", vocab_size=8, num_hidden_layers=1, logits_scaling=2.0, **sizes)
    with pytest.raises(ValueError, match="no output embedding"):
        parallelize(AutoModel.from_config(config), mesh)
    with pytest.raises(ValueError, match=r"logits_scaling=2.0 in its config"):
        parallelize(AutoModelForCausalLM.from_config(config), mesh)
    with pytest.raises(ValueError, match="without a process group"):
        parallelize(build("llama", False, 1, 2), mesh, ParallelPlan(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="shard_norms=True with tp=1"):
        parallelize(build("llama", False, 1, 2), mesh, ParallelPlan(shard_norms=True))
    with pytest.raises(ValueError, match="pipeline='interleaved' with pp=1"):
        parallelize(build("llama", False, 1, 2), mesh, ParallelPlan(pipeline="interleaved"))
    with pytest.raises(ValueError, match="max_norm=0"):
        clip_gradients([], 0, mesh)
