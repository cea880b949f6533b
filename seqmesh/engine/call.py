"""One call of attention: what it is made of besides tensors, and whether it may run.

What `attention` cannot do is refused while the call is made, never later. All checks look at this rank's
inputs and schedule only and come before any communication, so a wrong call on one rank is an error there and
not a hang elsewhere.

Legend: b batch, n local rows, h query heads, g K/V heads, d head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from torch import Tensor

from seqmesh.engine.kernels import Kernel, LogitRule, Problem, select
from seqmesh.engine.sharding import Schedule
from seqmesh.schedule.heads import HeadShare, default_chunks, split_heads


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller of `seqmesh.attention` may choose."""

    scale: float | None
    softcap: float | None
    kernel: str | Kernel
    head_chunks: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """Everything about one checked call of attention that is not a tensor."""

    schedule: Schedule
    kv_heads: int
    """K/V heads g of the call, over all ulysses ranks."""
    chunks: tuple[tuple[HeadShare, ...], ...]
    """Heads of every ulysses rank, per chunk of heads."""
    kernel: Kernel
    rule: LogitRule

    @property
    def exchanges_heads(self) -> bool:
        """Whether there is more than one ulysses rank."""
        return self.schedule.mesh.ulysses_group is not None

    @property
    def same_rows(self) -> bool:
        """Whether keys lie on the same rows as queries, so that q, k and v can travel in one buffer."""
        return self.schedule.kv_rows == self.schedule.rows

    def mine(self, shares: tuple[HeadShare, ...]) -> HeadShare:
        """This ulysses rank's heads of a chunk."""
        return shares[self.schedule.mesh.ulysses_rank]


def checked_call(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, schedule: Schedule, options: Options
) -> AttentionCall:
    """Check a call and choose its kernel and head chunks; the arguments are those of `seqmesh.attention`.

    Raises:
        ValueError: the inputs do not fit the schedule or each other, or no kernel supports them.
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule is a {type(schedule).__name__}; pass Schedule.build(mask, mesh)")
    _check_shapes(q, k, v)
    _check_rows(q, k, schedule)
    _check_devices(q, k, v, sinks, schedule)
    _check_dtypes(q, k, v)
    _check_sinks(q, sinks)
    _check_logits(options)
    return call_for(q, k.shape[2], schedule, options)


def call_for(q: Tensor, kv_heads: int, schedule: Schedule, options: Options) -> AttentionCall:
    """The call of inputs that were checked: q (b, n, h, d), or its gradient, gives sizes, device and dtype.

    Raises:
        ValueError: head chunks that are no number, heads that cannot be split, or no kernel supports the
            inputs.
    """
    b, _, h, d = q.shape
    mesh = schedule.mesh
    head_chunks = options.head_chunks
    if head_chunks is None:
        head_chunks = default_chunks(mesh.ulysses, mesh.ring, schedule.mask.k_len, b * kv_heads * d)
    elif not isinstance(head_chunks, int) or head_chunks < 1:
        raise ValueError(f"head_chunks={head_chunks!r}: use a whole number, at least 1, or None")
    problem = Problem(device_type=q.device.type, dtype=q.dtype, head_dim=d, softcap=options.softcap)
    scale = d**-0.5 if options.scale is None else options.scale
    return AttentionCall(
        schedule=schedule,
        kv_heads=kv_heads,
        chunks=split_heads(h, kv_heads, mesh.ulysses, head_chunks),
        kernel=select(options.kernel, problem),
        rule=LogitRule(scale=scale, softcap=options.softcap),
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    four_dims = q.ndim == 4 and k.ndim == 4 and k.shape == v.shape
    if not four_dims or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{shapes}: need q (b, n, h, d) and k, v (b, n, g, d) with one b and one d;"
            " transpose or slice the inputs"
        )
    if q.shape[0] < 1 or q.shape[3] < 1:
        raise ValueError(f"{shapes}: batch and head dim must be at least 1; skip the call for an empty batch")


def _check_rows(q: Tensor, k: Tensor, schedule: Schedule) -> None:
    mesh = schedule.mesh
    for name, x, rows in (("q", q, schedule.rows), ("k and v", k, schedule.kv_rows)):
        held = rows[mesh.ulysses_rank]
        if x.shape[1] != held:
            raise ValueError(
                f"{name} has {x.shape[1]} tokens but rank {mesh.rank} of the mesh holds {held};"
                " pass what schedule.shard returned for this schedule"
            )


def _check_devices(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, schedule: Schedule) -> None:
    device_mesh = schedule.mesh.device_mesh
    exchanged = q.device.type if device_mesh is None else device_mesh.device_type
    if q.device.type not in (exchanged, "meta"):
        raise ValueError(
            f"q is on {q.device} but the mesh exchanges {exchanged} tensors;"
            " move the inputs, or build the mesh for their device"
        )
    for name, x in _beside_q(k, v, sinks):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move all inputs to one device")


def _beside_q(k: Tensor, v: Tensor, sinks: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    yield "k", k
    yield "v", v
    if sinks is not None:
        yield "sinks", sinks


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: one dtype is needed; cast them alike")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q is {q.dtype}: attention needs a floating dtype; cast the inputs")


def _check_sinks(q: Tensor, sinks: Tensor | None) -> None:
    heads = q.shape[2]
    if sinks is not None and (sinks.shape != (heads,) or not sinks.dtype.is_floating_point):
        raise ValueError(
            f"sinks is {sinks.dtype} {tuple(sinks.shape)}; need one floating logit per query head, ({heads},)"
        )


def _check_logits(options: Options) -> None:
    """Flash kernels scale after masking: a scale of 0 or less would turn their -inf into NaN or +inf."""
    remedies = {"scale": "negate q to flip the sign", "softcap": "use None for no softcap"}
    for name, remedy in remedies.items():
        number = getattr(options, name)
        if isinstance(number, Tensor):
            raise ValueError(
                f"{name} is a tensor, whose gradient would be lost;"
                " pass a float, and multiply q by a learned factor"
            )
        if number is not None and not 0 < number < inf:
            raise ValueError(f"{name}={number}: it must be positive and finite; {remedy}")
