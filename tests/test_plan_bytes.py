"""What the planner says is sent is what is sent, counted at the collectives of real ranks."""

import pytest
import torch
from meshes import mesh_of
from ranks import Ranks

import seqmesh
from seqmesh import masks
from seqmesh.engine.exchange import CountBytes
from seqmesh.masks import Mask
from seqmesh.planner.cost.attention import AttentionShape, attention_cost
from seqmesh.planner.cost.network import place
from seqmesh.planner.cost.ring_load import ring_load
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.numerics import Numerics
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.one_attention import attention_model
from seqmesh.train.config import Config, DataConfig, MeshConfig
from seqmesh.train.data import Corpus, sequences
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

MESHES = [(u, r) for u in range(1, 9) for r in range(1, 9) if 2 <= u * r <= 8]
S = 1003
MASKS = {
    "causal": masks.causal(S),
    "documents": masks.documents((300, 17, 511, 4, 171)),
    "window": masks.sliding_window(S, 200),
}
CALLS = [
    ("auto", 8, 8, 16, 16, 1),
    ("zigzag", 10, 2, 8, 8, 2),
    ("contiguous", 9, 3, 12, 8, 1),  # values narrower than keys, as of latent attention
    ("striped", 8, 2, 8, 8, 1),
]
"""(layout, query heads, K/V heads, head dim, head dim of values, batch)"""


def counted(ulysses: int, ring: int, mask: Mask) -> list[tuple[int, int]]:
    """Bytes that this rank sends in the forward and in the backward of each of the calls."""
    mesh, sent = seqmesh.SequenceMesh.build(ulysses=ulysses, ring=ring), []
    for layout, heads, kv_heads, dim, value_dim, batch in CALLS:
        schedule = seqmesh.Schedule.build(mask, mesh, layout=layout)
        n = schedule.positions().numel()
        shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
        q, k, v = (torch.randn(batch, n, *shape, requires_grad=True) for shape in shapes)
        with CountBytes() as forward:
            out = seqmesh.attention(q, k, v, schedule)
        with CountBytes() as backward:
            out.backward(torch.randn_like(out))
        sent.append((forward.bytes_sent, backward.bytes_sent))
    return sent


def predicted(
    ulysses: int, ring: int, mask: Mask, call: tuple[str, int, int, int, int, int]
) -> tuple[float, float]:
    layout, heads, kv_heads, dim, value_dim, batch = call
    job = Job(
        model=attention_model(heads, kv_heads, dim),
        cluster=Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=8),
        seq_len=S,
    )
    shape = AttentionShape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        value_head_dim=value_dim,
        batch=batch,
        ulysses=ulysses,
        element=4,
    )
    groups = [
        place(("ulysses", "ring"), (ulysses, ring), frozenset((axis,)), 8) for axis in ("ulysses", "ring")
    ]
    cost = attention_cost(job, ring_load(mask, layout, ring, 256.0)[0], shape, *groups)
    return (
        cost.forward.heads_bytes + cost.forward.rows_bytes,
        cost.backward.heads_bytes + cost.backward.rows_bytes,
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"u{mesh[0]}r{mesh[1]}")
def test_predicted_attention_bytes_equal_the_counted_ones(
    ranks: Ranks, mesh: tuple[int, int], mask: str
) -> None:
    every = ranks.run(mesh[0] * mesh[1], counted, *mesh, MASKS[mask])
    for number, call in enumerate(CALLS):
        total = tuple(sum(rank[number][way] for rank in every) for way in (0, 1))
        assert predicted(*mesh, MASKS[mask], call) == total, call


CONFIG = Config(data=DataConfig(seq_len=1024))
CORPUS = Corpus(source="test", documents=tuple(bytes(range(1, 250)) * times for times in (1, 3, 2, 1, 4, 2)))


def trained(ulysses: int, ring: int) -> int:
    """Attention bytes of one step of `seqmesh train`, all ranks, as its ranks counted them."""
    config = Config(mesh=MeshConfig(ulysses=ulysses, ring=ring), data=CONFIG.data)
    return Trainer(config, CORPUS, mesh_of(dims_of(config.mesh)), peak_flops_per_s=1.0).step().bytes_sent


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1), (1, 4), (1, 3)], ids=lambda mesh: f"u{mesh[0]}r{mesh[1]}")
def test_predicted_bytes_of_a_step_equal_those_of_a_real_training_step(
    ranks: Ranks, mesh: tuple[int, int]
) -> None:
    m = CONFIG.model
    shape = ModelShape(
        name="recipe",
        layers=m.layers,
        hidden=m.hidden,
        heads=m.heads,
        kv_heads=m.kv_heads,
        head_dim=m.elements_of_head,
        intermediate=m.intermediate,
        vocabulary=384,
    )
    pieces = next(sequences(CORPUS, seq_len=1024, seed=CONFIG.train.seed))
    documents = tuple(piece.stop - piece.start for piece in pieces)
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=mesh[0] * mesh[1])
    job = Job(
        model=shape,
        cluster=cluster,
        seq_len=1024,
        documents=documents,
        numerics=Numerics(element=4, gradient=4, optimizer=8),
    )
    costs, point = CostModel(job), Point(ulysses=mesh[0], ring=mesh[1], zero=0)
    cost = costs.attention(point)
    attention = m.layers * sum(one.heads_bytes + one.rows_bytes for one in (cost.forward, cost.backward))
    assert attention == ranks.run(point.sp, trained, *mesh)[0]
    # What an all-reduce sends from each rank, in reduce-scatter + all-gather.
    gradients = 2 * 4 * shape.parameters * (point.sp - 1) // point.sp
    sent = sum(costs.estimate(point).bytes_per_step.values())
    assert sent == pytest.approx(attention / point.sp + gradients, abs=4)


def test_checkpointing_sends_the_forward_twice() -> None:
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=2, gpus_per_node=8)
    model = ModelShape(
        name="m", layers=4, hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=1024, vocabulary=1000
    )
    costs = CostModel(Job(model=model, cluster=cluster, seq_len=65536))
    point = Point(ulysses=4, ring=4)
    cost = costs.attention(point).forward
    once, twice = (
        sum(costs.estimate(point.but(checkpointing=c)).bytes_per_step.values()) for c in ("none", "full")
    )
    assert twice - once == pytest.approx(4 * (cost.heads_bytes + cost.rows_bytes) / 16, abs=4)


@pytest.mark.parametrize(("ring", "per_node"), [(8, 4), (8, 2), (6, 3), (4, 1), (8, 8)])
def test_the_share_of_rows_that_leaves_the_node_is_that_of_a_full_mask_counted_pair_by_pair(
    ring: int, per_node: int
) -> None:
    load = ring_load(masks.full(64 * ring), "contiguous", ring, 256.0)[0]
    pairs = [(a, b) for a in range(ring) for b in range(ring) if a != b]
    assert load.off_node(per_node) == pytest.approx(
        sum(a // per_node != b // per_node for a, b in pairs) / len(pairs)
    )


def test_the_share_of_a_window_that_leaves_the_node_is_that_of_the_hops_it_uses() -> None:
    """Each exchange is weighed by its own hops: those that no rank uses have been dropped."""
    load = ring_load(masks.sliding_window(512, 30), "contiguous", 8, 256.0)[0]
    assert load.hops == ((), (1,))
    assert load.exchanges == 1
    assert load.off_node(4) == pytest.approx(
        1 / 4
    )  # the last of a node's four ranks has its neighbour elsewhere
