"""Attention under torch.compile: one opaque operator.

So `fullgraph=True` works, and new documents do not recompile.

Dynamo must not look into a schedule: it would unroll every stage and compile again for every batch. The
operator takes the schedule as a tensor instead (encoding.py), decodes it when it runs, and caches what it
decoded by its contents. The numbers are the eager ones, since the same two functions run inside.

Legend: b batch, n local rows, N rows of the ring rank, h query heads, g K/V heads, d head dim.
Source: torch.library.custom_op: opaque to the compiler, differentiable through register_autograd. An operator
takes tensors, numbers, text and flat lists of them: that is why `Sizes` and `Names` are flattened and put
together again. No state but the cache.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.call import AttentionCall, Facts, Needs, Options, call_for, checked_call
from seqmesh.engine.encoding import decode
from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.sharding import Schedule
from seqmesh.engine.ulysses import Attended, Saved, attend, attend_backward, unit_last_stride
from seqmesh.engine.watching import seen_inside, watched
from seqmesh.schedule.heads import default_chunks, split_heads


class Sizes(NamedTuple):
    """Numbers of a schedule that the shapes in a graph depend on.

    The degrees are fixed in a graph, the others may vary.
    """

    ulysses: int
    ulysses_rank: int
    ring: int
    tokens: int
    """The longer of queries and keys, of the whole sequence."""
    q_rows: int
    """N of the queries."""
    kv_rows: int
    """N of the keys."""
    same_rows: int
    """1 if queries and keys lie on the same rows, else 0."""


class Names(NamedTuple):
    """Names that an operator resolves when it runs."""

    ulysses_group: str
    """"" for a ulysses degree of 1."""
    ring_group: str
    """"" for a ring degree of 1."""
    kernel: str

    def joined(self) -> str:
        """As one text; no name holds a bar."""
        return "|".join(self)

    @staticmethod
    def of(joined: str) -> "Names":
        """The names of a `joined` text."""
        return Names(*joined.split("|"))


def compiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    schedule: Schedule,
    options: Options,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`seqmesh.attention` as one node of the graph, or for meta tensors: the output, and lse if asked for.

    The checks run with the operator, before any communication.

    Raises:
        ValueError: the kernel is an object: an operator of the graph can only name one.
    """
    if not isinstance(options.kernel, str):
        raise ValueError(
            f"kernel={options.kernel!r} under torch.compile; pass the name of a kernel,"
            " or call attention outside the compiled region"
        )
    if q.is_meta and not torch.compiler.is_compiling():  # no operator runs that would check
        checked_call(q, k, v, sinks, schedule, options)
    keep = needs_backward(q, k, v, sinks)
    out, *rest = _forward_op(
        q, k, v, sinks, schedule._encoded, *_arguments(schedule, options), keep, with_lse
    )
    return out, rest[0].detach() if with_lse else None


def _arguments(
    schedule: Schedule, options: Options
) -> tuple[list[int], str, float | None, float | None, int | None]:
    """What the operator gets beside tensors; everything else is inside the encoded schedule."""
    assert isinstance(options.kernel, str)
    mesh = schedule.mesh
    sizes = Sizes(
        ulysses=mesh.ulysses,
        ulysses_rank=mesh.ulysses_rank,
        ring=mesh.ring,
        tokens=max(schedule.mask.q_len, schedule.mask.k_len),
        q_rows=schedule.ring.q_rows,
        kv_rows=schedule.ring.kv_rows,
        same_rows=int(schedule.same_rows),
    )
    names = Names(mesh.ulysses_group or "", mesh.ring_group or "", options.kernel).joined()
    return list(sizes), names, options.scale, options.softcap, options.head_chunks


def needs_backward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Whether anything is to be kept for a backward."""
    if not torch.is_grad_enabled():
        return False
    return (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    )


def attend_visibly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    call: AttentionCall,
    options: Options,
    *,
    with_lse: bool,
) -> Attended:
    """`attend` as one operator, whose outputs a selective checkpoint's policy may keep.

    Then recomputation repeats neither the attention nor its exchange: the policy names
    `torch.ops.seqmesh.attention.default`. Other dispatch modes, such as one that counts collectives, see what
    happens inside.
    """
    schedule = call.schedule
    with seen_inside():
        out, *rest = _forward_op(
            q, k, v, sinks, schedule._encoded, *_arguments(schedule, options), True, with_lse
        )
    lse = rest.pop(0) if with_lse else None
    own = [] if call.exchanges_heads else [q, k, v, out]
    return Attended(out=out, lse=lse, saved=Saved.of([*own, *rest], call))


@lru_cache(maxsize=64)
def _schedule(encoded: bytes, ulysses_group: str, ring_group: str) -> Schedule:
    """The schedule of an encoded one, on a mesh of these process groups (without its device mesh)."""
    fields = decode(encoded)
    mesh = SequenceMesh(
        ulysses=fields.ulysses,
        ring=fields.layout.ring,
        ulysses_rank=fields.ulysses_rank,
        ring_rank=fields.ring_rank,
        ulysses_group=ulysses_group or None,
        ring_group=ring_group or None,
        device_mesh=None,
    )
    own_keys = fields.kv_layout is not fields.layout
    kv_layout = fields.kv_layout if own_keys else None
    return Schedule.build(fields.mask, mesh, fields.layout, kv_layout=kv_layout, stages=fields.stages)


def _resolve(
    encoded: Tensor, joined_names: str, scale: float | None, softcap: float | None, head_chunks: int | None
) -> tuple[Schedule, Options]:
    """What the operator was given, as the eager functions take it."""
    names = Names.of(joined_names)
    schedule = _schedule(encoded.numpy().tobytes(), names.ulysses_group, names.ring_group)
    return schedule, Options(scale=scale, softcap=softcap, kernel=names.kernel, head_chunks=head_chunks)


@torch.library.custom_op("seqmesh::attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    encoded: Tensor,
    sizes: list[int],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
    keep: bool,
    with_lse: bool,
) -> list[Tensor]:
    """[out, lse if it was asked for, and what attention made for the backward, if that is to be kept]"""
    del sizes  # for the fake implementation
    schedule, options = _resolve(encoded, names, scale, softcap, head_chunks)
    call = checked_call(q, k, v, sinks, schedule, options)
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    with watched():
        done = attend(q, k, v, sinks, call, keep=keep, with_lse=with_lse)
    lse = [] if done.lse is None else [done.lse]
    made = [] if done.saved is None else done.saved.made()
    # An operator returns tensors of the strides that its fake says: contiguous ones.
    return [done.out, *lse, *(x.contiguous() for x in made)]


@_forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    encoded: Tensor,
    sizes: list[int],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
    keep: bool,
    with_lse: bool,
) -> list[Tensor]:
    """Shapes of what `_forward_op` returns."""
    del k, sinks, encoded, names, scale, softcap
    b, n, h, d = q.shape
    g, e = v.shape[2:]
    size = Sizes(*sizes)
    ulysses, ring, me = int(size.ulysses), int(size.ring), int(size.ulysses_rank)
    if head_chunks is None:
        head_chunks = default_chunks(ulysses, ring, size.tokens * b * (h + g) * (d + e), q.dtype.itemsize)
    outputs = [q.new_empty((b, n, h, e))]
    if with_lse:
        outputs.append(q.new_empty((b, h, n), dtype=accumulator_dtype(q.dtype)))
    if not keep:
        return outputs
    for shares in split_heads(int(h), int(g), ulysses, int(head_chunks)):
        mine = shares[me]
        if ulysses > 1:
            q_width, kv_width = mine.q * d, mine.kv * (d + e)
            if size.same_rows:
                outputs.append(q.new_empty((size.q_rows, b, q_width + kv_width)))
            else:
                outputs.append(q.new_empty((size.q_rows, b, q_width)))
                outputs.append(q.new_empty((size.kv_rows, b, kv_width)))
            outputs.append(q.new_empty((size.q_rows, b, mine.q, e)))
        outputs.append(q.new_empty((b, mine.q, size.q_rows), dtype=accumulator_dtype(q.dtype)))
    return outputs


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep `Saved.tensors()`: where no heads are exchanged, the call's own tensors come first."""
    q, k, v, sinks, encoded, sizes, *ctx.options, _, with_lse = inputs
    ctx.q_shape, ctx.k_shape = list(q.shape), list(k.shape)
    out, *made = output
    if with_lse:
        del made[0]
    own = [q, k, v, out] if Sizes(*sizes).ulysses == 1 else []
    ctx.save_for_backward(sinks, encoded, *own, *made)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    sinks, encoded, *saved = ctx.saved_tensors
    grad_out = grads[0]
    assert grad_out is not None
    q, k, v, sinks_needed, *_ = ctx.needs_input_grad
    needs = Needs(q=q, kv=k or v, sinks=sinks is not None and sinks_needed)
    found = iter(
        _backward_op(grad_out, sinks, saved, encoded, ctx.q_shape, ctx.k_shape, list(needs), *ctx.options)
    )
    dq = next(found) if needs.q else None
    dk, dv = (next(found), next(found)) if needs.kv else (None, None)
    dsinks = next(found) if needs.sinks else None
    no_grads = (None,) * 8  # encoded, sizes, names, scale, softcap, head_chunks, keep, with_lse
    return dq, dk, dv, dsinks, *no_grads


@torch.library.custom_op("seqmesh::attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    sinks: Tensor | None,
    saved: list[Tensor],
    encoded: Tensor,
    q_shape: list[int],
    k_shape: list[int],
    needs: list[bool],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
) -> list[Tensor]:
    """Of dq, dk and dv, dsinks those that are needed, in this order."""
    schedule, options = _resolve(encoded, names, scale, softcap, head_chunks)
    v_shape = (*k_shape[:3], grad_out.shape[3])
    facts = Facts(tuple(q_shape), tuple(k_shape), v_shape, grad_out.dtype, grad_out.device)
    call = call_for(facts, schedule, options)
    kept = Saved.of([unit_last_stride(x) for x in saved], call)
    grads = attend_backward(grad_out, sinks, kept, call, Needs(*needs))
    return [x.contiguous() for x in grads if x is not None]


@_backward_op.register_fake
def _backward_fake(
    grad_out: Tensor,
    sinks: Tensor | None,
    saved: list[Tensor],
    encoded: Tensor,
    q_shape: list[int],
    k_shape: list[int],
    needs: list[bool],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
) -> list[Tensor]:
    """Shapes of what `_backward_op` returns."""
    del saved, encoded, names, scale, softcap, head_chunks
    needed = Needs(*needs)
    grads = []
    if needed.q:
        grads.append(grad_out.new_empty(q_shape))
    if needed.kv:
        grads.append(grad_out.new_empty(k_shape))
        grads.append(grad_out.new_empty((*k_shape[:3], grad_out.shape[3])))
    if needed.sinks and sinks is not None:
        grads.append(torch.empty_like(sinks))
    return grads


_forward_op.register_autograd(_backward, setup_context=_save)
