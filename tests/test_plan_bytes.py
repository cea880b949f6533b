"""What the planner says is sent is what is sent: predicted bytes against bytes counted at the collectives of real ranks."""

import pytest
import torch
from ranks import Ranks

import seqmesh
from seqmesh.exchange import CountBytes
from seqmesh.masks import Mask
from seqmesh.planner.attention import AttentionCost, Shape, price_attention, ring_load
from seqmesh.planner.cost import Pricer
from seqmesh.planner.hardware import Cluster, load_gpu
from seqmesh.planner.job import Job, Numerics, Point
from seqmesh.planner.kernel import attention_model
from seqmesh.planner.models import ModelShape
from seqmesh.planner.network import place
from seqmesh.train.recipe import load

MESHES = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4), (8, 1), (1, 8)]
DOCUMENTS: tuple[tuple[int, ...], ...] = ((), (300, 17, 511, 4, 171))
S = 1003


def counted(ulysses: int, ring: int, mask: Mask, layout: str, heads: int, kv_heads: int, dim: int, batch: int) -> tuple[int, int]:
    """Bytes that this rank sends in one forward and in one backward."""
    mesh = seqmesh.SequenceMesh.build(ulysses=ulysses, ring=ring)
    schedule = seqmesh.Schedule.build(mask, mesh, layout=layout)
    n = schedule.positions().numel()
    q, k, v = (torch.randn(batch, n, count, dim, requires_grad=True) for count in (heads, kv_heads, kv_heads))
    with CountBytes() as forward:
        out = seqmesh.attention(q, k, v, schedule)
    with CountBytes() as backward:
        out.backward(torch.randn_like(out))
    return forward.bytes_sent, backward.bytes_sent


def predicted(
    ulysses: int, ring: int, documents: tuple[int, ...], layout: str, heads: int, kv_heads: int, dim: int, batch: int
) -> AttentionCost:
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=8)
    job = Job(model=attention_model(heads, kv_heads, dim), cluster=cluster, seq_len=S, documents=documents, layout=layout)
    shape = Shape(heads=heads, kv_heads=kv_heads, head_dim=dim, batch=batch, ulysses=ulysses, element=4)
    groups = [place(("ulysses", "ring"), (ulysses, ring), frozenset((axis,)), 8) for axis in ("ulysses", "ring")]
    return price_attention(job, ring_load(job.mask, layout, ring, 256.0)[0], shape, *groups)


@pytest.mark.parametrize("documents", DOCUMENTS, ids=["causal", "documents"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"u{mesh[0]}r{mesh[1]}")
def test_predicted_attention_bytes_equal_the_counted_ones(ranks: Ranks, mesh: tuple[int, int], documents: tuple[int, ...]) -> None:
    job_mask = seqmesh.masks.documents(documents) if documents else seqmesh.masks.causal(S)
    for layout, heads, kv_heads, dim, batch in (("auto", 8, 8, 16, 1), ("zigzag", 10, 2, 8, 2)):
        sent = ranks.run(mesh[0] * mesh[1], counted, *mesh, job_mask, layout, heads, kv_heads, dim, batch)
        cost = predicted(*mesh, documents, layout, heads, kv_heads, dim, batch)
        assert cost.forward.heads_bytes + cost.forward.rows_bytes == sum(forward for forward, _ in sent)
        assert cost.backward.heads_bytes + cost.backward.rows_bytes == sum(backward for _, backward in sent)


def test_bytes_of_a_step_are_those_of_its_layers_and_passes() -> None:
    """The default recipe of `seqmesh train`: its run counts 94.4 MB of attention a step, all ranks (README)."""
    recipe = load(None)
    m = recipe.model
    shape = ModelShape(
        name="recipe", layers=m.layers, hidden=m.hidden, heads=m.heads, kv_heads=m.kv_heads, head_dim=m.head_dim,
        intermediate=m.intermediate, vocabulary=384,
    )  # fmt: skip
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=4)
    documents = (2000, 3000, 3192)
    job = Job(model=shape, cluster=cluster, seq_len=8192, documents=documents, numerics=Numerics(element=4, gradient=4, optimizer=8))
    point = Point(ulysses=2, ring=2, zero=0)
    pricer = Pricer(job)
    cost = pricer.attention(point)
    attention = m.layers * sum(one.heads_bytes + one.rows_bytes for one in (cost.forward, cost.backward))
    gradients = 2 * 4 * shape.parameters * 3 // 4 * 4  # an all-reduce over 4 ranks sends 2 (4 - 1) / 4 of them from every rank
    assert sum(pricer.price(point).bytes_per_step.values()) == pytest.approx((attention + gradients) / 4, abs=4)


def test_checkpointing_sends_the_forward_twice() -> None:
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=2, gpus_per_node=8)
    model = ModelShape(name="m", layers=4, hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=1024, vocabulary=1000)
    pricer = Pricer(Job(model=model, cluster=cluster, seq_len=65536))
    point = Point(ulysses=4, ring=4)
    cost = pricer.attention(point).forward
    once, twice = (sum(pricer.price(point.but(checkpointing=c)).bytes_per_step.values()) for c in ("none", "full"))
    assert twice - once == pytest.approx(4 * (cost.heads_bytes + cost.rows_bytes) / 16, abs=4)
