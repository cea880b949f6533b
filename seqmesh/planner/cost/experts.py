"""Tokens on their way to experts that are spread over ranks, and back: one layer and micro-batch.

    n tokens of a rank x k experts    a row each, to the rank of its expert: all but 1 / R of them leave
    forward     the numbers of rows, dispatch, combine         backward     gradients of both
    again       dispatch and combine, in what is computed again for the backward

    bytes of a rank   (1 - 1/R) (2 x 2 n k h e + 8 E)      h hidden, e bytes of a number, R ranks, E experts

On average a rank receives what it sends; the busiest receives as many times more as `expert_balance` says,
and the others wait for it. Nothing hides: rows are needed at once.

A stack with DeepEP sends a token once to each other node that has one of its experts, whose ranks pass it on
by the links inside: of N nodes each is left out with C(E - E/N, k) / C(E, k), if experts are chosen evenly.

Sources: GShard (Lepikhin et al. 2020); transformers' AllToAllEP, which `seqmesh train` runs; DeepSeek-V3
(arXiv 2412.19437), section 3.2.2.
"""

from math import comb
from typing import NamedTuple

from seqmesh.planner.cost.network import Group, place
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import TILE_ROWS, Point
from seqmesh.planner.inputs.shape import FeedForward, ModelShape

INT64 = 8
"""Bytes of a number of rows."""


class SentToExperts(NamedTuple):
    """What a rank sends for one layer and micro-batch."""

    mean: float
    """Bytes, on average."""
    most: float
    """Bytes that the busiest rank sends or receives."""
    calls: float
    """All-to-alls."""
    off_node: float
    """Share of the rows that cross to another node."""


def expert_group(job: Job, point: Point, *, copies: bool = False) -> Group:
    """The ranks that share a layer's experts; or with `copies` the ranks that hold the same ones.

    Those with the same weights are cut in blocks of neighbours, each of which has all experts.
    """
    # tp is 1 where there are experts, and pp outside of the others, or inside of them: legality.py.
    inside = point.pp if point.used(job.axes)[:1] == ["pp"] else 1
    degrees = (inside, point.experts, point.replicas // point.experts)
    members = frozenset(("copies" if copies else "experts",))
    return place(("inside", "experts", "copies"), degrees, members, job.cluster.gpus_per_node)


def sparse_share(model: ModelShape) -> float:
    """The share of a model's layers that have experts."""
    return sum(of.layers for of in model.feed_forwards if of.experts) / model.layers


def _tiles(job: Job, point: Point) -> int:
    """Pieces in which a feed-forward network takes a rank's tokens."""
    return -(-job.tokens(point) // TILE_ROWS) if point.tiling == "mlp" else 1


def repeats_experts(job: Job, point: Point) -> float:
    """How often the backward of a layer sends its tokens to experts again, and back.

    What a checkpoint computes again ends where nothing more is asked for: before the last tile, whose own
    backward makes it. Tiles are taken to be equal.
    """
    selective = point.checkpointing == "selective" and job.stack.selective != "all"
    again = int(selective or point.checkpointing == "full")
    if point.tiling != "mlp":
        return again
    return 1 + again * (1 - 1 / _tiles(job, point))


def sent_to_experts(job: Job, point: Point) -> SentToExperts:
    """What a rank sends of a layer with experts."""
    of = job.model.feed_forwards[0]
    leave = 1 - 1 / point.experts
    one_way = leave * job.tokens(point) * of.active * job.model.hidden * job.numerics.element
    forwards = 1 + repeats_experts(job, point)
    tiles = _tiles(job, point)
    rows = (2 * forwards + 2) * one_way
    numbers = forwards * leave * INT64 * of.experts * tiles
    return SentToExperts(
        mean=rows + numbers,
        most=job.expert_spread(point) * rows + numbers,
        calls=(3 * forwards + 2) * tiles,
        off_node=_off_node(job, point, of),
    )


def _off_node(job: Job, point: Point, of: FeedForward) -> float:
    """Rows that cross to another node, over the rows that leave a rank."""
    group = expert_group(job, point)
    if not job.stack.rows_once_a_node or group.nodes == 1:
        return group.off_node
    there = of.experts // group.nodes
    missed = comb(of.experts - there, of.active) / comb(of.experts, of.active)
    return (group.nodes - 1) * (1 - missed) / (of.active * (1 - 1 / point.experts))
