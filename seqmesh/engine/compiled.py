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

from seqmesh.engine.call import Options, call_for, checked_call
from seqmesh.engine.encoding import decode
from seqmesh.engine.kernels import Kernel
from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.sharding import Schedule
from seqmesh.engine.ulysses import Saved, attend, attend_backward, unit_last_stride
from seqmesh.schedule.heads import default_chunks, split_heads


class Sizes(NamedTuple):
    """Numbers of a schedule that the shapes in a graph depend on.

    The degrees are fixed in a graph, the others may vary.
    """

    ulysses: int
    ulysses_rank: int
    ring: int
    k_len: int
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
    scale: float | None,
    softcap: float | None,
    kernel: str | Kernel,
    head_chunks: int | None,
) -> Tensor:
    """`seqmesh.attention` as one node of the graph.

    The checks run with the operator, before any communication.

    Raises:
        ValueError: `kernel` is an object: an operator of the graph can only name one.
    """
    if not isinstance(kernel, str):
        raise ValueError(
            f"kernel={kernel!r} under torch.compile; pass the name of a kernel,"
            " or call attention outside the compiled region"
        )
    mesh = schedule.mesh
    # What shapes in the graph depend on; everything else is inside the encoded schedule.
    sizes = Sizes(
        ulysses=mesh.ulysses,
        ulysses_rank=mesh.ulysses_rank,
        ring=mesh.ring,
        k_len=schedule.mask.k_len,
        q_rows=schedule.ring.q_rows,
        kv_rows=schedule.ring.kv_rows,
        same_rows=int(schedule.rows == schedule.kv_rows),
    )
    names = Names(mesh.ulysses_group or "", mesh.ring_group or "", kernel)
    outputs = _forward_op(
        q, k, v, sinks, schedule._encoded, list(sizes), names.joined(), scale, softcap, head_chunks
    )
    out: Tensor = outputs[0]
    return out


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
) -> list[Tensor]:
    """[out, and what attention made for the backward: Saved.made()]"""
    del sizes  # for the fake implementation
    schedule, options = _resolve(encoded, names, scale, softcap, head_chunks)
    call = checked_call(q, k, v, sinks, schedule, options)
    out, saved = attend(unit_last_stride(q), unit_last_stride(k), unit_last_stride(v), sinks, call)
    # An operator returns tensors of the strides that its fake says: contiguous ones.
    return [out, *(x.contiguous() for x in saved.made())]


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
) -> list[Tensor]:
    """Shapes of what `_forward_op` returns."""
    del v, sinks, encoded, names, scale, softcap
    b, _, h, d = q.shape
    g = k.shape[2]
    size = Sizes(*sizes)
    ulysses, ring, me = int(size.ulysses), int(size.ring), int(size.ulysses_rank)
    if head_chunks is None:
        head_chunks = default_chunks(ulysses, ring, size.k_len, b * g * d)
    outputs = [torch.empty_like(q, memory_format=torch.contiguous_format)]
    for shares in split_heads(int(h), int(g), ulysses, int(head_chunks)):
        mine = shares[me]
        if ulysses > 1:
            if size.same_rows:
                outputs.append(q.new_empty((size.q_rows, b, mine.q + 2 * mine.kv, d)))
            else:
                outputs.append(q.new_empty((size.q_rows, b, mine.q, d)))
                outputs.append(q.new_empty((size.kv_rows, b, 2 * mine.kv, d)))
            outputs.append(q.new_empty((size.q_rows, b, mine.q, d)))
        outputs.append(q.new_empty((b, mine.q, size.q_rows), dtype=accumulator_dtype(q.dtype)))
    return outputs


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep `Saved.tensors()`: where no heads are exchanged, the call's own tensors come first."""
    q, k, v, sinks, encoded, sizes, *ctx.options = inputs
    ctx.kv_shape = list(k.shape)
    out, *made = output
    own = [q, k, v, out] if Sizes(*sizes).ulysses == 1 else []
    ctx.save_for_backward(sinks, encoded, *own, *made)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    sinks, encoded, *saved = ctx.saved_tensors
    grad_out = grads[0]
    assert grad_out is not None
    dq, dk, dv, *grad_sinks = _backward_op(grad_out, sinks, saved, encoded, ctx.kv_shape, *ctx.options)
    no_grads = (None,) * 6  # encoded, sizes, names, scale, softcap, head_chunks
    return dq, dk, dv, grad_sinks[0] if grad_sinks else None, *no_grads


@torch.library.custom_op("seqmesh::attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    sinks: Tensor | None,
    saved: list[Tensor],
    encoded: Tensor,
    kv_shape: list[int],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
) -> list[Tensor]:
    """[dq, dk, dv], and dsinks if there are sinks."""
    schedule, options = _resolve(encoded, names, scale, softcap, head_chunks)
    call = call_for(grad_out, kv_shape[2], schedule, options)
    kept = Saved.of([unit_last_stride(x) for x in saved], call)
    dq, dk, dv, grad_sinks = attend_backward(grad_out, sinks, kept, call)
    grads = [dq.contiguous(), dk.contiguous(), dv.contiguous()]
    return grads if grad_sinks is None else [*grads, grad_sinks]


@_backward_op.register_fake
def _backward_fake(
    grad_out: Tensor,
    sinks: Tensor | None,
    saved: list[Tensor],
    encoded: Tensor,
    kv_shape: list[int],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
) -> list[Tensor]:
    """Shapes of what `_backward_op` returns."""
    del saved, encoded, names, scale, softcap, head_chunks
    dq = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    grads = [dq, grad_out.new_empty(kv_shape), grad_out.new_empty(kv_shape)]
    return grads if sinks is None else [*grads, torch.empty_like(sinks)]


_forward_op.register_autograd(_backward, setup_context=_save)
