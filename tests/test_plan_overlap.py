"""What the engine hides and merges is priced so: heads chunk by chunk, and small exchanges of the ring."""

from dataclasses import replace

import pytest
import torch

from seqmesh import Schedule, SequenceMesh, layouts, masks
from seqmesh.engine.call import Facts, Options, call_for
from seqmesh.planner.cost.attention import AttentionCost, AttentionShape, attention_cost, hides_heads
from seqmesh.planner.cost.network import Group, place
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.cost.step_loads import Loads
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import FusedStack, PaperStack, Stack, TrainerStack
from seqmesh.planner.one_attention import attention_model, splits
from seqmesh.schedule import ring_schedule
from seqmesh.schedule.heads import OVERLAPPED_CHUNKS

pytestmark = pytest.mark.fast

CLUSTER = Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=8)


def attention_job(heads: int, kv_heads: int, seq_len: int, stack: Stack, **assumed: float) -> Job:
    """One attention on 8 GPUs."""
    return Job(
        model=attention_model(heads, kv_heads, 128),
        cluster=CLUSTER,
        seq_len=seq_len,
        assumptions=replace(Assumptions(), **assumed),
        stack=stack,
    )


def cost_of(job: Job, ulysses: int, ring: int) -> AttentionCost:
    def group(axis: str) -> Group:
        return place(("ulysses", "ring"), (ulysses, ring), frozenset((axis,)), 8)

    shape = AttentionShape.of(job, batch=1, ulysses=ulysses)
    return attention_cost(job, Loads(job)(ring), shape, group("ulysses"), group("ring"))


def walked(there: float, home: float, compute: float, chunks: int) -> float:
    """Seconds that a call waits for heads, by walking over its chunks as engine/ulysses.py does.

    One link carries the exchanges in the order in which they are issued; `there`, `home` and `compute` are
    seconds of a chunk.
    """
    now = link_free = 0.0

    def issued(seconds: float) -> float:
        nonlocal link_free
        link_free = max(link_free, now) + seconds
        return link_free

    coming = issued(there)
    under_way = 0.0
    for chunk in range(chunks):
        now = max(now, coming)
        if chunk + 1 < chunks:
            coming = issued(there)
        now = max(now + compute, under_way)
        under_way = issued(home)
    return max(now, under_way) - chunks * compute


@pytest.mark.parametrize("scale_up", [0.8, 0.02, 0.005, 0.0005], ids=lambda rate: f"link {rate}")
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (64, 16)])
def test_what_is_exposed_of_the_heads_is_what_a_walk_over_their_chunks_waits_for(
    heads: int, kv_heads: int, scale_up: float
) -> None:
    """From a link so fast that only the ends are exposed to one that is always busy."""
    assumed = {"scale_up": scale_up, "scale_up_latency": 0.0, "overlap_tax": 0.0}
    job = attention_job(heads, kv_heads, 131072, FusedStack(), **assumed)
    cost = cost_of(job, ulysses=2, ring=1)
    chunks = 8
    qkv_share = (heads + 2 * kv_heads) / (2 * heads + 2 * kv_heads)
    for one, there_share in ((cost.forward, qkv_share), (cost.backward, 1 - qkv_share)):
        chunk = one.heads_s / chunks
        compute = (one.kernel_s + one.merge_s) / chunks
        waited = walked(chunk * there_share, chunk * (1 - there_share), compute, chunks)
        assert one.heads_exposed_s == pytest.approx(waited)
        assert chunk <= one.heads_exposed_s * (1 + 1e-9)
        assert one.heads_exposed_s <= one.heads_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("kv_heads", "hides"), [(2 * OVERLAPPED_CHUNKS, True), (2 * OVERLAPPED_CHUNKS - 2, False)]
)
def test_heads_are_hidden_from_the_chunks_on_that_the_engine_overlaps(kv_heads: int, hides: bool) -> None:
    cost = cost_of(attention_job(4 * kv_heads, kv_heads, 131072, FusedStack()), ulysses=2, ring=1)
    for one in (cost.forward, cost.backward):
        assert (one.heads_exposed_s < one.heads_s) == hides
        assert one.seconds == one.kernel_s + one.merge_s + one.heads_exposed_s + one.rows_exposed_s


def test_heads_find_only_the_compute_that_rows_of_the_ring_left_them() -> None:
    """All that is hidden of both, together, is at most the compute; with a slow network it is all of it."""
    job = attention_job(32, 32, 32768, FusedStack(), scale_up=0.01, scale_up_latency=0.0, overlap_tax=0.0)
    for ulysses, ring in ((2, 4), (4, 2)):
        for one in (cost_of(job, ulysses, ring).forward, cost_of(job, ulysses, ring).backward):
            hidden = one.heads_s - one.heads_exposed_s + one.rows_s - one.rows_exposed_s
            assert 0 < hidden <= (one.kernel_s + one.merge_s) * (1 + 1e-9)


def test_the_papers_system_waits_for_all_heads_and_merges_no_exchange() -> None:
    ours = attention_job(32, 32, 131072, FusedStack())
    theirs = replace(ours, stack=PaperStack())
    hidden = cost_of(ours, ulysses=4, ring=2).forward
    whole = cost_of(theirs, ulysses=4, ring=2).forward
    assert whole.heads_exposed_s == whole.heads_s == pytest.approx(hidden.heads_s)
    assert hidden.heads_exposed_s < hidden.heads_s / 2
    fastest = {
        stack: splits(replace(ours, stack=stack), {"ulysses": 4})[0] for stack in (ours.stack, theirs.stack)
    }
    assert fastest[ours.stack].seconds < fastest[theirs.stack].seconds


def test_exchanges_that_the_engine_would_merge_are_priced_merged() -> None:
    """128 rows a rank: an exchange costs little but its latency, and the engine's "auto" merges several."""
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=8, gpus_per_node=8)
    job = replace(attention_job(8, 8, 8192, FusedStack()), cluster=cluster)
    load = Loads(job)(64)
    assert load.asked == "auto"
    mask, layout = masks.causal(8192), layouts.zigzag(8192, 64)
    engine = ring_schedule(mask, layout, layout, 5, "auto")
    assert load.hops == tuple(stage.hops for stage in engine.stages)
    assert load.exchanges == len(engine.stages) - 1 < 63
    (merged, single) = (CostModel(replace(job, stack=stack)) for stack in (FusedStack(), PaperStack()))
    point = Point(ring=64, zero=0)
    assert single.loads(64).exchanges == 63
    assert merged.seconds(point) < single.seconds(point)
    assert (merged.estimate(point).stages, single.estimate(point).stages) == ("auto", None)


@pytest.mark.parametrize("stack", [FusedStack(), TrainerStack()], ids=lambda stack: type(stack).__name__)
def test_hops_that_no_rank_uses_are_not_priced(stack: Stack) -> None:
    """A window of a quarter of a shard: of 7 hops one is used."""
    window = replace(attention_model(8, 8, 128), sliding_window=2048)
    job = replace(attention_job(8, 8, 65536, stack), model=window, layout="contiguous")
    load = Loads(job)(8)
    assert load.hops == ((), (1,))
    assert load.asked is None


def test_large_exchanges_and_those_of_the_trainer_stay_one_a_hop() -> None:
    """`seqmesh train` builds its schedules with the default of `Schedule.build`."""
    assert Loads(attention_job(8, 8, 65536, FusedStack()))(8).asked is None
    few_rows = replace(
        attention_job(8, 8, 2048, FusedStack()), documents=(300,) * 6 + (248,), layout="zigzag"
    )
    assert Loads(few_rows)(8).asked is not None
    assert Loads(replace(few_rows, stack=TrainerStack()))(8).asked is None


@pytest.mark.parametrize(("tokens", "batch"), [(4096, 1), (1024, 4), (12288, 1), (65536, 2)])
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (4, 2), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_engine_cuts_its_heads_in_the_chunks_that_are_priced(
    ulysses: int, ring: int, tokens: int, batch: int, dtype: torch.dtype
) -> None:
    """A call of one rank, which sends nothing."""
    mesh = SequenceMesh(
        ulysses=ulysses,
        ring=ring,
        ulysses_rank=0,
        ring_rank=0,
        ulysses_group="heads" if ulysses > 1 else None,
        ring_group="rows" if ring > 1 else None,
        device_mesh=None,
    )
    schedule = Schedule.build(masks.causal(tokens), mesh)
    heads, kv_heads, head_dim = 32, 16, 64
    n = schedule.rows[0]
    shapes = [(batch, n, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    call = call_for(Facts(*shapes, dtype, torch.device("cpu")), schedule, Options(None, None, "cpu", None))
    shape = AttentionShape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=head_dim,
        batch=batch,
        ulysses=ulysses,
        element=dtype.itemsize,
    )
    assert shape.head_chunks(tokens, ring) == call.chunks
    job = attention_job(heads, kv_heads, tokens, FusedStack())
    assert hides_heads(job, ulysses, len(call.chunks)) == call.overlaps
