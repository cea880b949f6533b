"""`seqmesh plan --kernel`: which ulysses x ring split is fastest for ONE attention forward.

This is the setting of the paper's Table 3.

    seconds = kernel + merges and launches + what no compute hides of the exchanges of heads and of rows
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from seqmesh.planner.candidates import Pins, divisors
from seqmesh.planner.cost.attention import AttentionShape, Pass, attention_cost
from seqmesh.planner.cost.estimate import COMPUTE
from seqmesh.planner.cost.network import add_bytes
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point, as_pin
from seqmesh.planner.inputs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split, priced."""

    ulysses: int
    ring: int
    layout: str
    parts: Pass
    bound_by: str
    """The cause with the largest share."""
    bytes_sent: dict[str, int]
    """Bytes that one GPU sends, on average, by link class."""
    imbalance: float
    """Pairs of the busiest ring rank over the mean."""
    flops: float
    """Of the mask's pairs, over all GPUs."""

    @property
    def seconds(self) -> float:
        """Of one forward."""
        return self.parts.seconds


def attention_model(heads: int, kv_heads: int, head_dim: int) -> ModelShape:
    """A model that is nothing but one attention.

    Raises:
        ValueError: heads or dims that no attention has.
    """
    return ModelShape(
        name="attention",
        layers=1,
        hidden=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=1,
        vocabulary=1,
        source="--heads, --kv-heads, --head-dim",
    )


def splits(job: Job, pins: Pins) -> list[Split]:
    """Every legal split of one attention over all GPUs of the job, the fastest first.

    Raises:
        ValueError: a pin that is not of this mode, or that no split has.
    """
    gpus = job.cluster.gpus
    heads = job.model.heads
    for key, value in pins.items():
        if key not in ("ulysses", "ring") and (key == "pool" or value not in (1, "none")):
            pin = as_pin(key, value)
            raise ValueError(f"--pin {pin} has no meaning with --kernel; pin ulysses or ring")
    costs = CostModel(job)
    found = []
    for ulysses in divisors(gpus):
        ring = gpus // ulysses
        legal = ulysses <= heads and ring <= job.seq_len
        pinned = pins.get("ulysses", ulysses) == ulysses and pins.get("ring", ring) == ring
        if legal and pinned:
            found.append(_split(costs, Point(ulysses=ulysses, ring=ring)))
    if not found:
        asked = ", ".join(f"{key}={value}" for key, value in pins.items()) or f"{gpus} GPUs"
        raise ValueError(
            f"no split with {asked}: ulysses x ring must be {gpus}, ulysses at most {heads} query heads,"
            f" ring at most {job.seq_len} tokens; change one of them"
        )
    return sorted(found, key=lambda split: split.seconds)


def _split(costs: CostModel, point: Point) -> Split:
    job, network = costs.job, costs.network
    m = job.model
    load = costs.loads(point.ring)
    heads, rows = costs.group(point, "ulysses"), costs.group(point, "ring")
    shape = AttentionShape.of(job, batch=job.global_batch, ulysses=point.ulysses)
    parts = attention_cost(job, load, shape, heads, rows).forward
    links = defaultdict(float, {COMPUTE: parts.kernel_s + parts.merge_s})
    links[network.slowest_link(heads)] += parts.heads_exposed_s
    links[network.slowest_link(rows)] += parts.rows_exposed_s
    sent = (
        network.spread_bytes(heads.off_node, parts.heads_bytes / point.gpus),
        network.spread_bytes(load.off_node(rows.per_node), parts.rows_bytes / point.gpus),
    )
    return Split(
        ulysses=point.ulysses,
        ring=point.ring,
        layout=load.layout.name,
        parts=parts,
        bound_by=max(links, key=links.__getitem__),
        bytes_sent=add_bytes(sent),
        imbalance=load.imbalance,
        flops=4.0 * m.heads * m.head_dim * job.area,
    )


def split_record(split: Split) -> dict[str, Any]:
    """One split as data."""
    gpus = split.ulysses * split.ring
    return {
        "ulysses": split.ulysses,
        "ring": split.ring,
        "layout": split.layout,
        "iterations_per_second": 1 / split.seconds,
        "step_seconds": split.seconds,
        "tflops_per_gpu": split.flops / split.seconds / gpus / 1e12,
        "kernel_seconds": split.parts.kernel_s,
        "merge_seconds": split.parts.merge_s,
        "ulysses_seconds": split.parts.heads_s,
        "ulysses_exposed_seconds": split.parts.heads_exposed_s,
        "ring_seconds": split.parts.rows_s,
        "ring_exposed_seconds": split.parts.rows_exposed_s,
        "imbalance": split.imbalance,
        "bytes_per_step": split.bytes_sent,
        "bound_by": split.bound_by,
    }
