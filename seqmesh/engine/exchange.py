"""The one primitive by which everything moves: an all-to-all with a size of its own for every pair of ranks.

Ulysses sends heads and receives rows; a ring stage sends rows and receives rows; each backward is the
transpose. No send/recv pair can deadlock, nothing waits for a handshake, and the functional form is what
torch.compile understands.

    scatter_heads   (n, b, heads, dim) of every rank  ->  (n_0 + n_1 + ..., b, width)    to a peer: its heads
    gather_heads    (N, b, width)                     ->  one (n, b, width_u) per peer   to a peer: its rows
    fetch_rows      K, V rows of the stage            ->  (received rows, b, g d + g e)  K heads, then V heads
    return_rows     gradients of those rows           ->  to the ranks that own them     added there, in fp32

A row holds heads of several tensors side by side, flat: q, k and v, or k and v. `columns` gives them back.
Tensors are rows-first: a rank's rows are then one slice of memory, so rows need no packing on the receiving
side.

Legend: n local rows, N rows of the ulysses group, b batch, g K/V heads, d head dim of keys, e of values.
Source: the paper's SP-Ulysses and SP-Ring communication.
"""

from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode


class Pending(NamedTuple):
    """A message under way.

    Keep it until `wait`: it holds the sent buffer, which must not change or be freed before.
    """

    received: Tensor
    sent: Tensor
    is_ours: bool
    """Whether the sent buffer was made for this message alone."""

    def wait(self) -> Tensor:
        """The received elements, flat, in the order of the peers.

        Frees the sent buffer if it was made for this message. The backend's thread may hold the message for a
        while after it has left: freed by hand, memory does not depend on that.
        """
        received: Tensor = torch.ops._c10d_functional.wait_tensor(self.received)
        if self.is_ours:
            self.sent.untyped_storage().resize_(0)
        return received


def start_exchange(
    send: Tensor, send_sizes: list[int], receive_sizes: list[int], group: str, *, is_ours: bool
) -> Pending:
    """Start an all-to-all of a flat buffer, which is freed afterwards if it `is_ours`.

    `send_sizes[p]` elements go to peer p, `receive_sizes[p]` come from it. Every rank of the group must call
    it, in the same order, also when it has nothing to send.
    """
    assert send.is_contiguous(), "gloo on CPU takes any tensor, CUDA none that is not contiguous"
    if not send.numel() and any(receive_sizes) and _is_dry_run(group):
        return Pending(send.new_zeros(sum(receive_sizes)), send, False)
    received = torch.ops._c10d_functional.all_to_all_single(send, receive_sizes, send_sizes, group)
    return Pending(received, send, is_ours)


def all_gather(mine: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """This rank's flat buffer to all ranks of a group: the buffers of all, flat, in the order of the ranks.

    `sizes` are their elements. Every rank of the group must call it.
    """
    copies = mine.repeat(len(sizes))
    return start_exchange(copies, [mine.numel()] * len(sizes), list(sizes), group, is_ours=True).wait()


def _is_dry_run(group: str) -> bool:
    """Whether a group is PyTorch's "fake" one: it moves nothing, and gives nothing for an empty send."""
    try:
        backend = dist.get_backend(_resolve_process_group(group))  # type: ignore[arg-type]
    except ValueError:  # a group of another making
        return False
    return bool(backend == "fake")


def columns(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(rows, b, width) as a (rows, b, heads, dim) view for each (heads, dim) that lie side by side in it."""
    rows, b, _ = flat.shape
    parts = torch.split_with_sizes(flat, [heads * dim for heads, dim in shapes], -1)
    return [part.view(rows, b, *shape) for part, shape in zip(parts, shapes, strict=True)]


class HeadSlices(NamedTuple):
    """A tensor (n, b, heads, dim) and the half-open range of its heads that each ulysses rank needs."""

    tensor: Tensor
    ranges: tuple[tuple[int, int], ...]

    def shape(self, ulysses_rank: int) -> tuple[int, int]:
        """Heads that a rank needs, and their dim."""
        start, stop = self.ranges[ulysses_rank]
        return stop - start, self.tensor.shape[3]


def scatter_heads(parts: Sequence[HeadSlices], rows: Sequence[int], ulysses_rank: int, group: str) -> Pending:
    """Start to swap sequence shards for head shards: several tensors in one collective.

    Args:
        parts: the tensors, all of this rank's rows; each peer gets its heads of the first, then of the
            second, ...
        rows: rows of every ulysses rank.
        ulysses_rank: this rank.
        group: the ulysses group.

    Returns:
        What will be (sum of rows, b, elements of this rank's heads over all parts): the ring rank's rows in
        storage order.
    """
    n, b, _, _ = parts[0].tensor.shape
    shapes = [[part.shape(u) for part in parts] for u in range(len(rows))]
    widths = [sum(heads * dim for heads, dim in peer) for peer in shapes]
    send_sizes = [n * b * width for width in widths]
    # One buffer with a message for each peer, one after the other, as the collective wants it.
    send = parts[0].tensor.new_empty(sum(send_sizes))
    for u, message in enumerate(send.split(send_sizes)):
        for part, into in zip(parts, columns(message.view(n, b, widths[u]), shapes[u]), strict=True):
            start, stop = part.ranges[u]
            into.copy_(part.tensor[:, :, start:stop])
    receive_sizes = [count * b * widths[ulysses_rank] for count in rows]
    return start_exchange(send, send_sizes, receive_sizes, group, is_ours=True)


def gather_heads(
    x: Tensor, rows: Sequence[int], widths: Sequence[int], ulysses_rank: int, group: str, *, is_ours: bool
) -> Pending:
    """Start to swap head shards back for sequence shards.

    Args:
        x: (sum of rows, b, widths[ulysses_rank]), contiguous.
        rows: rows of every ulysses rank.
        widths: elements per row of the heads of every ulysses rank.
        ulysses_rank: this rank.
        group: the ulysses group.
        is_ours: x is of no other use.

    Returns:
        What `gathered` reads.
    """
    b, mine = x.shape[1:]
    n = rows[ulysses_rank]
    send_sizes = [count * b * mine for count in rows]
    receive_sizes = [n * b * width for width in widths]
    return start_exchange(x.view(-1), send_sizes, receive_sizes, group, is_ours=is_ours)


def gathered(received: Tensor, n: int, b: int, widths: Sequence[int]) -> list[Tensor]:
    """For every ulysses rank u, its heads of this rank's n rows: (n, b, widths[u])."""
    messages = received.split([n * b * width for width in widths])
    return [message.view(n, b, width) for message, width in zip(messages, widths, strict=True)]


def pack_rows(k: Tensor, v: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Runs of K (N, b, g, d) beside V (N, b, g, e), one after the other: flat rows (rows, b, g d + g e)."""
    shapes = [(x.shape[2], x.shape[3]) for x in (k, v)]
    rows = sum(stop - start for start, stop in runs)
    packed = k.new_empty((rows, k.shape[1], sum(heads * dim for heads, dim in shapes)))
    keys, values = columns(packed, shapes)
    row = 0
    for start, stop in runs:
        place = slice(row, row + stop - start)
        keys[place].copy_(k[start:stop])
        values[place].copy_(v[start:stop])
        row = place.stop
    return packed


def fetch_rows(
    k: Tensor,
    v: Tensor,
    packed: Tensor | None,
    runs: Sequence[tuple[int, int]],
    sent_to: Sequence[int],
    received_from: Sequence[int],
    group: str,
) -> Pending:
    """Start one ring stage: send the rows that peers need, receive the rows that this rank needs.

    Args:
        k: (N, b, g, d) this ring rank's keys.
        v: (N, b, g, e) its values.
        packed: all of them as of `pack_rows`, if they were packed.
        runs: rows that are sent, peer after peer.
        sent_to: rows for every ring rank.
        received_from: rows from every ring rank.
        group: the ring group.
    """
    is_ours = packed is None or len(runs) != 1
    if packed is None:
        send = pack_rows(k, v, runs)
    elif len(runs) == 1:
        send = packed[slice(*runs[0])]
    else:
        send = torch.cat([packed[start:stop] for start, stop in runs]) if runs else packed[:0].clone()
    row = k.shape[1] * (k.shape[2] * k.shape[3] + v.shape[2] * v.shape[3])
    send_sizes = [rows * row for rows in sent_to]
    receive_sizes = [rows * row for rows in received_from]
    return start_exchange(send.view(-1), send_sizes, receive_sizes, group, is_ours=is_ours)


def return_rows(grads: Tensor, sent_to: Sequence[int], received_from: Sequence[int], group: str) -> Pending:
    """Start the transpose of `fetch_rows`: gradients of a stage's rows travel to their owners.

    `grads` is (received rows, b, g d + g e), contiguous and of no other use; the rest is as for `fetch_rows`.
    """
    row = grads.shape[1] * grads.shape[2]
    send_sizes = [rows * row for rows in received_from]
    receive_sizes = [rows * row for rows in sent_to]
    return start_exchange(grads.view(-1), send_sizes, receive_sizes, group, is_ours=True)


class Watch(TorchDispatchMode):
    """A dispatch mode that looks on: `with Watch() as watch`. PyTorch's own has no types."""

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)


class CountBytes(Watch):
    """Counts the bytes that this rank hands to all-to-all collectives for others, while it is active.

    `bytes_sent` counts at the collective itself, in the forward and in the backward; what stays on the rank
    is not counted.
    """

    def __init__(self, groups: Collection[str] | None = None) -> None:
        """Count those of process groups of these names; default: of all."""
        super().__init__()
        self._groups = groups
        self.bytes_sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            send, _, send_sizes, name = args
            group = _resolve_process_group(name)
            if self._groups is None or group.group_name in self._groups:
                # A message to oneself is a copy: it crosses no link.
                rows = sum(send_sizes) - send_sizes[group.rank()]
                self.bytes_sent += rows * send.element_size() * (send.numel() // max(1, send.shape[0]))
        return func(*args, **(kwargs or {}))
