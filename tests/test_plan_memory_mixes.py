"""The formula of the trainer's memory against the trace of its real step, for mixes of all that it runs.

A trace is what the allocator has to 0.1% (test_plan_tracing_mixes.py). It runs on CPU, where the memory of
the host is the device's: what is offloaded counts in it. Tolerances: 2% is asked of the peak; the formula
leaves out scalars, and that the input of an MLP that is one tile may live a little shorter. States are exact
but for rows that shards are padded with.
"""

from typing import Any

import pytest

from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.trace.of_rank import trace_rank
from seqmesh.train.memory.moment import Moment
from seqmesh.train.memory.peak import trainer_moments
from seqmesh.train.memory.rank import TrainedRank

REL = 2e-2


def rank(vocabulary: int = 2000, layers: int = 3, *, tied: bool = False, **changes: Any) -> TrainedRank:
    """Of a small Llama whose layers, not whose loss, make the peak; `changes` are its or of its point."""
    of_rank = {"micro_batches", "is_half", "shard_norms", "copies", "stage", "seq_len"}
    shape = ModelShape(
        name="tested",
        layers=layers,
        hidden=512,
        heads=8,
        kv_heads=4,
        head_dim=64,
        intermediate=1792,
        vocabulary=vocabulary,
        tied_embeddings=tied,
    )
    given = {"seq_len": 16_384, **{name: value for name, value in changes.items() if name in of_rank}}
    knobs = {"zero": 0, **{name: value for name, value in changes.items() if name not in of_rank}}
    return TrainedRank(shape=shape, point=Point(**knobs), **given)


SELECTIVE = {"checkpointing": "selective"}
FULL = {"checkpointing": "full"}
TILES = {"tiling": "mlp"}
BF16_3 = {"zero": 3, "is_half": True}

MIXES = {
    "zero 1, full": rank(ulysses=2, ring=2, zero=1, **FULL),
    "zero 0, selective": rank(ulysses=2, ring=2, **SELECTIVE),
    "zero 1, selective, tiles": rank(ulysses=2, zero=1, **SELECTIVE, **TILES),
    "zero 2, bf16": rank(ulysses=2, ring=2, zero=2, is_half=True),
    "zero 3, bf16, selective": rank(ring=4, **BF16_3, **SELECTIVE),
    "zero 3, bf16, full": rank(ulysses=2, ring=2, **BF16_3, **FULL),
    "zero 3, bf16, tiles": rank(ulysses=2, **BF16_3, **TILES),
    "zero 3, bf16, a large vocabulary": rank(vocabulary=64_000, ulysses=2, ring=2, **BF16_3, **FULL),
    "tied, zero 3, bf16, full": rank(tied=True, ulysses=2, **BF16_3, **FULL),
    "offload of both": rank(ulysses=4, seq_len=32_768, offload="both", **BF16_3, **FULL, **TILES),
    "tp, bf16, selective": rank(tp=4, ulysses=2, **BF16_3, **SELECTIVE),
    "tp, shared norms, zero 2, bf16": rank(tp=2, ring=2, zero=2, is_half=True, shard_norms=True),
    "tp, shared norms, full": rank(tp=4, ring=2, shard_norms=True, **FULL),
    "tp, shared norms, tiles": rank(tp=4, ring=2, zero=2, shard_norms=True, **TILES),
    "accumulated, copies, zero 3": rank(dp=4, copies=2, zero=3, micro_batches=2, seq_len=4096, **SELECTIVE),
    "accumulated, zero 0": rank(dp=2, micro_batches=3, seq_len=4096),
    "accumulated, zero 3, bf16, full": rank(dp=2, micro_batches=3, seq_len=4096, **BF16_3, **FULL),
    "two sequences at once": rank(dp=2, ulysses=2, zero=2, micro_batch=2, micro_batches=2, seq_len=4096),
}

PIPELINES = {
    "zero 0": rank(pp=2, micro_batches=4, seq_len=4096),
    "zero 2, bf16, selective": rank(
        pp=2, ulysses=2, zero=2, is_half=True, micro_batches=3, seq_len=8192, **SELECTIVE
    ),
    "zero 3, bf16, full": rank(pp=2, dp=2, micro_batches=2, seq_len=8192, **BF16_3, **FULL),
}


def peak_of(one: TrainedRank) -> Moment:
    """As a trace sees it."""
    return max(trainer_moments(one), key=lambda moment: moment.everywhere)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_the_formula_predicts_the_traced_peak_of_a_mix(mix: TrainedRank) -> None:
    traced, peak = trace_rank(mix), peak_of(mix)
    assert peak.everywhere == pytest.approx(traced.peak_bytes, rel=REL)
    if not mix.point.offloads_optimizer:
        slack = traced.peak_bytes // 100
        assert peak.parameters == pytest.approx(traced.parameters, rel=1e-2, abs=slack)
        assert peak.optimizer == pytest.approx(traced.optimizer, rel=1e-2, abs=slack)
        assert peak.gradients == pytest.approx(traced.gradients, rel=1e-2, abs=slack)


@pytest.mark.parametrize("stage", ["first", "last"])
@pytest.mark.parametrize("mix", PIPELINES.values(), ids=PIPELINES)
def test_the_formula_predicts_the_traced_peak_of_both_end_stages(mix: TrainedRank, stage: str) -> None:
    one = mix.at_stage(0 if stage == "first" else mix.point.pp - 1)
    assert peak_of(one).everywhere == pytest.approx(trace_rank(one).peak_bytes, rel=REL)


def test_what_is_offloaded_is_on_the_host_and_not_on_the_gpu() -> None:
    kept = rank(ulysses=4, **BF16_3, **FULL)
    plain = {moment.name: moment for moment in trainer_moments(kept)}
    for offload in ("activations", "optimizer", "both"):
        moved = rank(ulysses=4, offload=offload, **BF16_3, **FULL)
        for moment in trainer_moments(moved):
            assert moment.everywhere == plain[moment.name].everywhere
            assert moment.host > 0 or offload == "activations"
        assert peak_of(moved).total < peak_of(kept).total
    inputs = kept.layers * kept.stream
    loss = next(
        moment for moment in trainer_moments(rank(ulysses=4, offload="activations", **BF16_3, **FULL))
    )
    assert loss.host == inputs
