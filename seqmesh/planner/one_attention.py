"""`seqmesh plan --kernel`: which ulysses x ring split is fastest for ONE attention forward (the setting of
the paper's Table 3).

    seconds = kernel + merges and launches + exchange of heads + what no compute hides of the exchange of rows
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqmesh.planner.cost.attention import Loads, Pass, Shape, price_attention
from seqmesh.planner.cost.estimate import COMPUTE
from seqmesh.planner.cost.network import Network, add_bytes, place
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import ModelShape
from seqmesh.planner.search import divisors


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
        return self.parts.kernel + self.parts.merge + self.parts.heads + self.parts.rows_exposed

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


def splits(job: Job, pins: Mapping[str, int | str]) -> list[Split]:
    """Every legal split of one attention over all GPUs of the job, the fastest first.

    Raises:
        ValueError: a pin that is not of this mode, or that no split has.
    """
    gpus, heads = job.cluster.gpus, job.model.heads
    for key, value in pins.items():
        if key not in ("ulysses", "ring") and value not in (1, "none"):
            raise ValueError(f"--pin {key}={value} has no meaning with --kernel; pin ulysses or ring")
    loads, found = Loads(job), []
    for ulysses in divisors(gpus):
        ring = gpus // ulysses
        if (
            ulysses <= heads
            and ring <= job.seq_len
            and pins.get("ulysses", ulysses) == ulysses
            and pins.get("ring", ring) == ring
        ):
            found.append(_split(job, loads, ulysses, ring))
    if not found:
        asked = ", ".join(f"{key}={value}" for key, value in pins.items()) or f"{gpus} GPUs"
        raise ValueError(
            f"no split with {asked}: ulysses x ring must be {gpus}, ulysses at most {heads} query heads,"
            f" ring at most {job.seq_len} tokens; change one of them"
        )
    return sorted(found, key=lambda split: split.seconds)


def _split(job: Job, loads: Loads, ulysses: int, ring: int) -> Split:
    axes = tuple(axis for axis in job.axes if axis in ("ulysses", "ring"))
    degrees = tuple({"ulysses": ulysses, "ring": ring}[axis] for axis in axes)
    u_group, r_group = (
        place(axes, degrees, frozenset((axis,)), job.cluster.gpus_per_node) for axis in ("ulysses", "ring")
    )
    m, network, load = job.model, Network(job.cluster, job.assumptions), loads(ring)
    shape = Shape.of(job, batch=job.global_batch, ulysses=ulysses)
    parts = price_attention(job, load, shape, u_group, r_group).forward
    links = {COMPUTE: parts.kernel + parts.merge}
    for group, seconds in ((u_group, parts.heads), (r_group, parts.rows_exposed)):
        links[network.reach(group)] = links.get(network.reach(group), 0.0) + seconds
    sent = (
        network.spread_bytes(u_group.off_node, parts.heads_bytes / (ulysses * ring)),
        network.spread_bytes(load.off_node(r_group.per_node), parts.rows_bytes / (ulysses * ring)),
    )
    return Split(
        ulysses=ulysses,
        ring=ring,
        layout=load.layout.name,
        parts=parts,
        links=links,
        bytes_sent=add_bytes(sent),
        imbalance=load.imbalance,
        flops=4.0 * m.heads * m.head_dim * job.mask.area * job.global_batch,
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
        "kernel_seconds": split.parts.kernel,
        "merge_seconds": split.parts.merge,
        "ulysses_seconds": split.parts.heads,
        "ring_seconds": split.parts.rows,
        "ring_exposed_seconds": split.parts.rows_exposed,
        "imbalance": split.imbalance,
        "bytes_per_step": split.bytes_sent,
        "bound_by": split.bound_by,
    }
