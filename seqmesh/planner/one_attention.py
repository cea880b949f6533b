"""`seqmesh plan --kernel`: which ulysses x ring split is fastest for ONE attention forward.

This is the setting of the paper's Table 3.

    seconds = kernel + merges and launches + what no compute hides of the exchanges of heads and of rows
"""

from dataclasses import dataclass
from typing import Any

from seqmesh.planner.candidates import Pins, divisors
from seqmesh.planner.cost.attention import AttentionShape, Pass, attention_cost
from seqmesh.planner.cost.estimate import COMPUTE
from seqmesh.planner.cost.network import Group, Network, add_bytes, place
from seqmesh.planner.cost.step_loads import Loads
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import as_pin
from seqmesh.planner.inputs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split, priced."""

    ulysses: int
    ring: int
    layout: str
    parts: Pass
    links: dict[str, float]
    """Exposed seconds by cause."""
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

    @property
    def bound_by(self) -> str:
        """The cause with the largest share."""
        return max(self.links, key=lambda cause: self.links[cause])


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
    loads = Loads(job)
    found = []
    for ulysses in divisors(gpus):
        ring = gpus // ulysses
        legal = ulysses <= heads and ring <= job.seq_len
        pinned = pins.get("ulysses", ulysses) == ulysses and pins.get("ring", ring) == ring
        if legal and pinned:
            found.append(_split(job, loads, ulysses, ring))
    if not found:
        asked = ", ".join(f"{key}={value}" for key, value in pins.items()) or f"{gpus} GPUs"
        raise ValueError(
            f"no split with {asked}: ulysses x ring must be {gpus}, ulysses at most {heads} query heads,"
            f" ring at most {job.seq_len} tokens; change one of them"
        )
    return sorted(found, key=lambda split: split.seconds)


def _split(job: Job, loads: Loads, ulysses: int, ring: int) -> Split:
    m = job.model
    network = Network(job.cluster, job.assumptions)
    load = loads(ring)
    ulysses_group = _group(job, "ulysses", ulysses, ring)
    ring_group = _group(job, "ring", ulysses, ring)
    shape = AttentionShape.of(job, batch=job.global_batch, ulysses=ulysses)
    parts = attention_cost(job, load, shape, ulysses_group, ring_group).forward
    links = {COMPUTE: parts.kernel_s + parts.merge_s}
    for group, seconds in ((ulysses_group, parts.heads_exposed_s), (ring_group, parts.rows_exposed_s)):
        link = network.slowest_link(group)
        links[link] = links.get(link, 0.0) + seconds
    ranks = ulysses * ring
    sent = (
        network.spread_bytes(ulysses_group.off_node, parts.heads_bytes / ranks),
        network.spread_bytes(load.off_node(ring_group.per_node), parts.rows_bytes / ranks),
    )
    return Split(
        ulysses=ulysses,
        ring=ring,
        layout=load.layout.name,
        parts=parts,
        links=links,
        bytes_sent=add_bytes(sent),
        imbalance=load.imbalance,
        flops=4.0 * m.heads * m.head_dim * job.area,
    )


def _group(job: Job, axis: str, ulysses: int, ring: int) -> Group:
    """The process group over one of the two axes, in the job's order of axes."""
    degree = {"ulysses": ulysses, "ring": ring}
    axes = tuple(name for name in job.axes if name in degree)
    degrees = tuple(degree[name] for name in axes)
    return place(axes, degrees, frozenset((axis,)), job.cluster.gpus_per_node)


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
