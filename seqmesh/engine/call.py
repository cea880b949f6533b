"""One call of attention: what it is made of besides tensors, and whether it may run.

Everything is refused here, or nowhere.

All checks look at this rank's inputs and schedule only and come before any communication, so a wrong call on
one rank is an error there and not a hang elsewhere.

Legend: b batch, n local rows, h query heads, g K/V heads, d head dim.
"""

from dataclasses import dataclass
from math import inf

from torch import Tensor

from seqmesh.engine.kernels import Kernel, Problem, select
from seqmesh.engine.sharding import Schedule
from seqmesh.schedule.heads import HeadShare, default_chunks, split_heads


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything about one call of attention that is not a tensor."""

    schedule: Schedule
    chunks: tuple[tuple[HeadShare, ...], ...]
    """Heads of every ulysses rank, per chunk."""
    kernel: Kernel
    scale: float
    softcap: float | None


def make_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    schedule: Schedule,
    *,
    scale: float | None,
    softcap: float | None,
    kernel: str | Kernel,
    head_chunks: int | None,
) -> Plan:
    """Check a call and choose its kernel and head chunks; the arguments are those of `seqmesh.attention`.

    Raises:
        ValueError: the inputs do not fit the schedule or each other, or no kernel supports them.
    """
    _check_inputs(q, k, v, sinks, schedule)
    _check_logits(scale, softcap)
    return plan_for(
        q, k.shape[2], schedule, scale=scale, softcap=softcap, kernel=kernel, head_chunks=head_chunks
    )


def plan_for(
    q: Tensor,
    kv_heads: int,
    schedule: Schedule,
    *,
    scale: float | None,
    softcap: float | None,
    kernel: str | Kernel,
    head_chunks: int | None,
) -> Plan:
    """The plan of a call that was checked: q (b, n, h, d), or its gradient, gives the sizes, device and
    dtype.
    """
    (b, _, h, d), mesh = q.shape, schedule.mesh
    if head_chunks is not None and (not isinstance(head_chunks, int) or head_chunks < 1):
        raise ValueError(f"head_chunks={head_chunks!r}: use a whole number, at least 1, or None")
    if head_chunks is None:
        head_chunks = default_chunks(mesh.ulysses, mesh.ring, schedule.mask.k_len, b * kv_heads * d)
    return Plan(
        schedule=schedule,
        chunks=split_heads(h, kv_heads, mesh.ulysses, head_chunks),
        kernel=select(kernel, Problem(device_type=q.device.type, dtype=q.dtype, head_dim=d, softcap=softcap)),
        scale=d**-0.5 if scale is None else scale,
        softcap=softcap,
    )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, schedule: Schedule) -> None:
    """Refuse what does not fit, on this rank, before anything is sent."""
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule is a {type(schedule).__name__}; pass Schedule.build(mask, mesh)")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
    ):
        raise ValueError(
            f"{shapes}: need q (b, n, h, d) and k, v (b, n, g, d) with one b and one d; transpose or slice the inputs"
        )
    if q.shape[0] < 1 or q.shape[3] < 1:
        raise ValueError(f"{shapes}: batch and head dim must be at least 1; skip the call for an empty batch")
    for name, x, rows in (("q", q, schedule.rows), ("k and v", k, schedule.kv_rows)):
        if x.shape[1] != rows[schedule.mesh.ulysses_rank]:
            raise ValueError(
                f"{name} has {x.shape[1]} tokens but rank {schedule.mesh.rank} of the mesh holds {rows[schedule.mesh.ulysses_rank]};"
                " pass what schedule.shard returned for this schedule"
            )
    mesh_device = (
        schedule.mesh.device_mesh.device_type if schedule.mesh.device_mesh is not None else q.device.type
    )
    if q.device.type not in (mesh_device, "meta"):
        raise ValueError(
            f"q is on {q.device} but the mesh exchanges {mesh_device} tensors; move the inputs, or build the mesh for their device"
        )
    extra = () if sinks is None else (("sinks", sinks),)
    for name, x in (("k", k), ("v", v), *extra):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move all inputs to one device")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: one dtype is needed; cast them alike")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q is {q.dtype}: attention needs a floating dtype; cast the inputs")
    if sinks is not None and (sinks.shape != (q.shape[2],) or not sinks.dtype.is_floating_point):
        raise ValueError(
            f"sinks is {sinks.dtype} {tuple(sinks.shape)}; need one floating logit per query head, ({q.shape[2]},)"
        )


def _check_logits(scale: float | None, softcap: float | None) -> None:
    """Flash kernels scale after masking: a scale of 0 or less would turn their -inf into NaN or +inf."""
    for name, number, instead in (
        ("scale", scale, "negate q to flip the sign"),
        ("softcap", softcap, "use None for no softcap"),
    ):
        if isinstance(number, Tensor):
            raise ValueError(
                f"{name} is a tensor, whose gradient would be lost; pass a float, and multiply q by a learned factor"
            )
        if number is not None and not 0 < number < inf:
            raise ValueError(f"{name}={number}: it must be positive and finite; {instead}")
