"""One call of attention: what it is made of besides tensors, and whether it may run.

What `attention` cannot do is refused while the call is made, never later. All checks look at this rank's
inputs and schedule only and come before any communication, so a wrong call on one rank is an error there and
not a hang elsewhere. A schedule keeps the calls that were checked: the layers of a model make the same one.

Legend: b batch, n local rows, h query heads, g K/V heads, d head dim of queries and keys, e of values.
"""

import warnings
from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.kernels import Kernel, LogitRule, Problem, select
from seqmesh.engine.program import Program, program_of
from seqmesh.engine.sharding import Schedule
from seqmesh.schedule.heads import HeadShare, default_chunks, overlaps_exchange, split_heads

HOPELESS_SCORES = 1 << 34
"""Logits, from which on dense attention on a GPU is worth a warning: seconds a call."""


class Options(NamedTuple):
    """What the caller of `seqmesh.attention` may choose."""

    scale: float | None
    softcap: float | None
    kernel: str | Kernel
    head_chunks: int | None


class Needs(NamedTuple):
    """Which gradients are wanted: what nobody needs is neither summed nor sent. The same on every rank."""

    q: bool
    kv: bool
    sinks: bool


class Facts(NamedTuple):
    """What a call depends on of its tensors."""

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class AttentionCall(NamedTuple):
    """Everything about one checked call of attention that is not a tensor."""

    schedule: Schedule
    kv_heads: int
    """K/V heads g of the call, over all ulysses ranks."""
    head_dim: int
    value_head_dim: int
    chunks: tuple[tuple[HeadShare, ...], ...]
    """Heads of every ulysses rank, per chunk of heads."""
    overlaps: bool
    """Whether the heads of a chunk travel while another chunk is computed."""
    kernel: Kernel
    rule: LogitRule
    program: Program

    @property
    def exchanges_heads(self) -> bool:
        """Whether there is more than one ulysses rank."""
        return self.schedule.mesh.ulysses_group is not None

    @property
    def same_rows(self) -> bool:
        """Whether keys lie on the same rows as queries, so that q, k and v can travel in one buffer."""
        return self.schedule.same_rows

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
    _check_plain(q, k, v, sinks)
    _check_devices(q, k, v, sinks, schedule)
    _check_dtypes(q, k, v)
    _check_sinks(q, sinks)
    facts = Facts(q.shape, k.shape, v.shape, q.dtype, q.device)
    return call_for(facts, schedule, options)


def call_for(facts: Facts, schedule: Schedule, options: Options) -> AttentionCall:
    """The call of such inputs, checked where the schedule has not seen it before.

    Raises:
        ValueError: the inputs do not fit the schedule or each other, or no kernel supports them.
    """
    # Without the schedule: one that kept itself would not be freed when its step is over.
    rest = schedule.kept((facts, options), lambda: _new_call(facts, schedule, options)[1:])
    return AttentionCall(schedule, *rest)


def _new_call(facts: Facts, schedule: Schedule, options: Options) -> AttentionCall:
    """The call, checked."""
    _check_shapes(facts)
    _check_rows(facts, schedule)
    _check_logits(options)
    b, _, h, d = facts.q_shape
    g, e = facts.v_shape[2:]
    mesh = schedule.mesh
    head_chunks = options.head_chunks
    if head_chunks is None:
        tokens = max(schedule.mask.q_len, schedule.mask.k_len)
        head_chunks = default_chunks(
            mesh.ulysses, mesh.ring, tokens * b * (h + g) * (d + e), facts.dtype.itemsize
        )
    elif not isinstance(head_chunks, int) or head_chunks < 1:
        raise ValueError(f"head_chunks={head_chunks!r}: use a whole number, at least 1, or None")
    kernel = select(options.kernel, _problem(facts, options))
    slow = hopeless(kernel.name, facts.device.type, schedule.ring.area * b * h)
    if slow is not None:
        warnings.warn(slow, stacklevel=2)
    chunks = split_heads(h, g, mesh.ulysses, head_chunks)
    in_pieces = facts.dtype.itemsize < 4 and mesh.size > 1
    ring = schedule.ring
    return AttentionCall(
        schedule=schedule,
        kv_heads=g,
        head_dim=d,
        value_head_dim=e,
        chunks=chunks,
        overlaps=overlaps_exchange(mesh.ulysses, len(chunks)),
        kernel=kernel,
        rule=LogitRule(scale=d**-0.5 if options.scale is None else options.scale, softcap=options.softcap),
        program=schedule.kept((kernel, in_pieces), lambda: program_of(ring, kernel, in_pieces=in_pieces)),
    )


def hopeless(kernel: str, device_type: str, scores: int) -> str | None:
    """What to say of a call that would take minutes on a GPU; Python shows a warning once.

    Args:
        kernel: name of the kernel that was chosen.
        device_type: of the tensors.
        scores: logits that this rank computes, over its batch and all heads.
    """
    if kernel != "reference" or device_type != "cuda" or scores < HOPELESS_SCORES:
        return None
    return (
        f"the reference kernel computes {scores:.1e} logits on CUDA, dense and a few rows at a time: many"
        " times slower than flash attention; cast to bf16 and leave out softcap, or ask for kernel='cuda' to"
        " see why that refuses"
    )


def _problem(facts: Facts, options: Options) -> Problem:
    """What the kernel is asked to support."""
    return Problem(
        device_type=facts.device.type,
        dtype=facts.dtype,
        head_dim=facts.q_shape[3],
        softcap=options.softcap,
        value_head_dim=facts.v_shape[3],
        gpu=_architecture(facts.device) if facts.device.type == "cuda" else "",
    )


def _architecture(device: torch.device) -> str:
    """What a "cuda" device is: "rocm", or "sm" and its compute capability."""
    if torch.version.hip is not None:
        return "rocm"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _check_plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """A DTensor knows a placement of its own, which says nothing of a schedule's layout."""
    for name, x in (("q", q), *_beside_q(k, v, sinks)):
        if hasattr(x, "placements"):
            raise ValueError(
                f"{name} is a DTensor with placements {x.placements}, but attention takes this rank's plain"
                f" tensors; pass {name}.to_local() if that is this rank's part in the order of"
                " schedule.shard (of sinks, all heads: full_tensor())"
            )


def _check_shapes(facts: Facts) -> None:
    q, k, v = tuple(facts.q_shape), tuple(facts.k_shape), tuple(facts.v_shape)
    shapes = f"q {q}, k {k}, v {v}"
    four_dims = len(q) == len(k) == len(v) == 4 and k[:3] == v[:3]
    if not four_dims or q[0] != k[0] or q[3] != k[3]:
        raise ValueError(
            f"{shapes}: need q (b, n, h, d), k (b, n, g, d) and v (b, n, g, e) with one b and one d;"
            " transpose or slice the inputs"
        )
    if q[0] < 1 or q[3] < 1 or v[3] < 1:
        raise ValueError(f"{shapes}: batch and head dim must be at least 1; skip the call for an empty batch")


def _check_rows(facts: Facts, schedule: Schedule) -> None:
    mesh = schedule.mesh
    for name, shape, rows in (
        ("q", facts.q_shape, schedule.rows),
        ("k and v", facts.k_shape, schedule.kv_rows),
    ):
        held = rows[mesh.ulysses_rank]
        if shape[1] != held:
            raise ValueError(
                f"{name} has {shape[1]} tokens but rank {mesh.rank} of the mesh holds {held};"
                " pass what schedule.shard returned for this schedule"
            )


def _check_devices(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, schedule: Schedule) -> None:
    exchanged = schedule.mesh.device_types
    if exchanged and q.device.type not in (*exchanged, "meta"):
        raise ValueError(
            f"q is on {q.device} but the mesh exchanges {' and '.join(sorted(exchanged))} tensors;"
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
    if sinks is None:
        return
    heads = q.shape[2] if q.ndim == 4 else 0
    if sinks.shape != (heads,) or not sinks.dtype.is_floating_point:
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
