"""The memory trace against memory that was allocated, and the formula against the trace.

Tolerances: a trace cannot see one operator's own buffers. Those of the flash kernel's backward are 1 MiB of
logits a thread and a copy of a tile's queries; others are a few KB. The formula leaves out a few KB of
scalars, and what unequal heads save in copies.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from meshes import mesh_of
from ranks import Ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from seqmesh.bench.memory import peak_bytes
from seqmesh.parallel import HeadRule, ParallelDims, ParallelMesh
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.trace.allocations import KINDS, TracedMemory
from seqmesh.trace.of_rank import trace_rank
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from seqmesh.train.data import BYTES, Corpus
from seqmesh.train.memory import backward as formula
from seqmesh.train.memory.moment import Moment
from seqmesh.train.memory.peak import trainer_memory, trainer_moments
from seqmesh.train.memory.rank import TrainedRank
from seqmesh.train.setup import plan_of
from seqmesh.train.trainer import Trainer


def shape(
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    *,
    layers: int = 2,
    tied: bool = False,
    gated: bool = True,
) -> ModelShape:
    return ModelShape(
        name="tested",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate=intermediate,
        vocabulary=vocabulary,
        tied_embeddings=tied,
        gated=gated,
    )


def rank_of(model: ModelShape, seq_len: int, ulysses: int, ring: int) -> TrainedRank:
    """In fp32, with whole weights."""
    return TrainedRank(shape=model, point=Point(ulysses=ulysses, ring=ring, zero=0), seq_len=seq_len)


def traced_step(
    model: ModelShape, seq_len: int, ulysses: int, ring: int, documents: list[int] | None = None
) -> TracedMemory:
    return trace_rank(rank_of(model, seq_len, ulysses, ring), documents)


LLAMA3_8B = shape(4096, 32, 8, 14336, 128256, layers=32)
GROUPED = shape(512, 8, 2, 1792, 16000)
SMALL_VOCABULARY = shape(512, 8, 8, 1376, 259)
ATTENTION_HEAVY = shape(512, 8, 8, 256, 50)
KERNEL_BYTES = 3 * 2**19
"""More than the flash kernel holds in its backward, on one thread, for the small shapes here."""


def trainer(model: ModelShape, seq_len: int, mesh: ParallelMesh) -> Trainer:
    """Made here as train() makes it, not as the tracer does."""
    sizes = ModelConfig(
        hidden=model.hidden,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        intermediate=model.intermediate,
    )
    config = Config(
        mesh=MeshConfig(ulysses=mesh.dims.ulysses, ring=mesh.dims.ring),
        model=sizes,
        data=DataConfig(seq_len=seq_len),
    )
    text = replace(BYTES, size=model.vocabulary)
    corpus = Corpus(source="zeros", documents=(bytes(seq_len - 1),), vocabulary=text)
    return Trainer(config, corpus, mesh, peak_flops_per_s=1.0)


A_FEW_NUMBERS = 64
"""Bytes of scalars that a real step frees a little earlier."""


def allocated(model: ModelShape, seq_len: int, ulysses: int, ring: int) -> int:
    """Peak bytes of the second step at PyTorch's allocator, on this rank. A collective."""
    trained = trainer(model, seq_len, mesh_of(ParallelDims(ulysses=ulysses, ring=ring)))
    trained.step()
    # As the step begins; before it, for the profiler does not see old blocks go.
    trained.optimizer.zero_grad(set_to_none=True)
    states = (state for states in trained.optimizer.state.values() for state in states.values())
    held = sum(x.nbytes for x in (*trained.model.parameters(), *trained.model.parts[0].buffers(), *states))
    return held + peak_bytes(trained.step)


@pytest.mark.parametrize(
    ("model", "seq_len", "phase"),
    [
        (shape(128, 4, 2, 352, 259), 2048, "backward"),
        (shape(64, 2, 2, 64, 3000), 9000, "forward"),
        (shape(256, 4, 2, 1024, 8000), 128, "update"),
    ],
    ids=["layers", "logits", "weights"],
)
def test_the_traced_peak_is_what_one_rank_allocates(model: ModelShape, seq_len: int, phase: str) -> None:
    traced = traced_step(model, seq_len, 1, 1)
    assert traced.peak_phase == phase
    assert traced.peak_bytes == pytest.approx(allocated(model, seq_len, 1, 1), rel=1e-3)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (1, 4), (4, 1)])
def test_the_traced_peak_is_what_rank_0_of_four_allocates(ranks: Ranks, ulysses: int, ring: int) -> None:
    """The peak is among the engine's buffers, or next to it.

    The least of a few steps: gloo's thread may hold a message for a while.
    """
    model, seq_len = shape(256, 8, 8, 64, 50, layers=1), 4096
    traced = traced_step(model, seq_len, ulysses, ring)
    found = min(ranks.run(4, allocated, model, seq_len, ulysses, ring)[0] for _ in range(3))
    assert -A_FEW_NUMBERS <= found - traced.peak_bytes <= KERNEL_BYTES
    assert traced.peak_bytes > 14 * KERNEL_BYTES


def test_the_trace_agrees_with_pytorchs_memory_tracker() -> None:
    model, seq_len = shape(128, 4, 2, 352, 259), 2048
    traced = traced_step(model, seq_len, 1, 1)
    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch.context() as patch:
        for read, answer in (("__bool__", True), ("__int__", 1), ("__float__", 1.0), ("item", 1.0)):
            patch.setattr(torch.Tensor, read, lambda _, answer=answer: answer)
        trained = trainer(model, seq_len, ParallelDims().build())
        trained.step()
        trained.optimizer.zero_grad()
        tracker.track_external(trained.model.parts[0], trained.optimizer)
        with tracker:
            trained.step()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    assert snapshot["Total"] == pytest.approx(traced.peak_bytes, rel=1e-6)


def moments_of(model: ModelShape, seq_len: int, ulysses: int, ring: int) -> tuple[TracedMemory, list[Moment]]:
    traced = traced_step(model, seq_len, ulysses, ring)
    assert sum(getattr(traced, kind) for kind in KINDS) == traced.peak_bytes
    return traced, trainer_moments(rank_of(model, seq_len, ulysses, ring))


def assert_predicted(traced: TracedMemory, moments: list[Moment]) -> None:
    """The peak, by kind, and the peaks of forward, backward and update.

    The loss is the forward's peak, or one of its layers near the backward's is.
    """
    peak = max(moments, key=lambda moment: moment.total)
    after = [moment.name for moment in moments].index("embedding") + 1
    assert peak.total == pytest.approx(traced.peak_bytes, rel=1e-2)
    assert moments[0].total <= traced.forward_peak_bytes * 1.01
    assert max(moment.total for moment in moments[1:after]) == pytest.approx(
        traced.backward_peak_bytes, rel=1e-2
    )
    assert max(moment.total for moment in moments[after:]) == pytest.approx(
        traced.update_peak_bytes, rel=1e-2
    )
    transients = peak.total - peak.parameters - peak.gradients - peak.optimizer - peak.activations
    found = (peak.parameters, peak.gradients, peak.optimizer, peak.activations, transients)
    for kind, predicted in zip(KINDS, found, strict=True):
        assert predicted == pytest.approx(getattr(traced, kind), rel=1e-2, abs=traced.peak_bytes // 1000), (
            kind
        )


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 4), (8, 2), (2, 3)])
@pytest.mark.parametrize(
    "model", [GROUPED, SMALL_VOCABULARY, ATTENTION_HEAVY], ids=["grouped", "bytes", "attention"]
)
def test_the_formula_predicts_the_traced_peak(model: ModelShape, ulysses: int, ring: int) -> None:
    assert_predicted(*moments_of(model, 32_768, ulysses, ring))


@pytest.mark.parametrize(
    ("model", "seq_len", "ulysses", "ring"),
    [
        (shape(512, 8, 2, 1792, 4000, layers=6), 500, 2, 2),
        (shape(256, 8, 8, 1024, 16000, tied=True), 500, 1, 2),
        (shape(256, 8, 8, 1024, 16000, tied=True), 500, 1, 1),
        (shape(256, 8, 8, 1024, 16000, tied=True), 4000, 1, 1),
        (shape(256, 8, 8, 1024, 16000), 1500, 1, 1),
        (shape(192, 6, 2, 512, 259, layers=3), 10_001, 5, 3),
    ],
    ids=["weights", "tied", "tied, one rank", "tied, chunks", "a chunk and a half", "nothing divides"],
)
def test_the_formula_predicts_short_and_uneven_sequences(
    model: ModelShape, seq_len: int, ulysses: int, ring: int
) -> None:
    assert_predicted(*moments_of(model, seq_len, ulysses, ring))


def test_the_formula_predicts_llama3_8b_at_208k_tokens() -> None:
    traced, moments = moments_of(LLAMA3_8B, 212_992, 8, 2)
    assert_predicted(traced, moments)
    assert traced.parameters > 32e9
    assert trainer_memory(rank_of(LLAMA3_8B, 212_992, 8, 2))["total"] == max(
        moment.total for moment in moments
    )


def test_documents_change_the_engines_buffers_only() -> None:
    whole = traced_step(GROUPED, 20_000, 2, 2)
    packed = traced_step(GROUPED, 20_000, 2, 2, documents=[12_000, 5000, 2000, 1000])
    assert packed.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-2)


def test_a_trace_leaves_no_group_and_no_random_state_behind() -> None:
    before = torch.get_rng_state()
    traced_step(shape(64, 4, 4, 64, 50), 256, 2, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not dist.is_initialized()
    assert torch.ones(2).sum().item() == 2


def test_models_and_batches_that_the_trainer_cannot_have_are_refused() -> None:
    wide = ModelShape(
        name="wide", layers=1, hidden=64, heads=4, kv_heads=4, head_dim=32, intermediate=64, vocabulary=50
    )
    for refused, why in ((wide, "head_dim=16"), (shape(64, 4, 4, 64, 50, gated=False), "no gate")):
        with pytest.raises(ValueError, match=why):
            traced_step(refused, 256, 1, 1)
        with pytest.raises(ValueError, match=why):
            trainer_memory(rank_of(refused, 256, 1, 1))
    with pytest.raises(ValueError, match="fill it exactly"):
        traced_step(shape(64, 4, 4, 64, 50), 256, 1, 1, documents=[200])
    with pytest.raises(ValueError, match="without a head"):
        traced_step(shape(64, 4, 4, 64, 50), 256, 8, 1)


def test_the_formula_tiles_losses_and_mlps_as_the_code_does() -> None:
    assert formula.LOSS_ROWS == HeadRule().chunk_rows == plan_of(Config()).loss_rows
    assert plan_of(Config(train=TrainConfig(tiling="mlp"))).mlp_rows == formula.MLP_ROWS


def test_the_formula_needs_no_torch() -> None:
    program = "import sys, seqmesh.train.memory.peak; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
