"""The one primitive by which everything moves: an all-to-all with a size of its own for every pair of ranks.

Ulysses sends heads and receives rows; a ring stage sends rows and receives rows; each backward is the
transpose. No send/recv pair can deadlock, nothing waits for a handshake, and the functional form is what
torch.compile understands.

    scatter_heads   (n, b, h, d) of every rank  ->  (n_0 + n_1 + ..., b, h_mine, d)    to a peer: its heads
    gather_heads    (N, b, h_mine, d)           ->  one (n, b, h_u, d) per peer        to a peer: its rows
    fetch_rows      K, V rows of the stage      ->  (received rows, b, 2 g, d)         K heads, then V heads
    return_rows     gradients of those rows     ->  to the ranks that own them
                                                    add_returned_rows_: added there, in fp32

Tensors are rows-first: a rank's rows are then one slice of memory, so rows need no packing on the receiving
side.

Legend: n local rows, N rows of the ulysses group, b batch, h query heads, g K/V heads, d head dim.
Source: the paper's SP-Ulysses and SP-Ring communication.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from seqmesh.schedule.ring import Transfer


class Pending(NamedTuple):
    """A message under way.

    Keep it until `wait`: it holds the sent buffer, which must not change or be freed before.
    """

    received: Tensor
    sent: Tensor

    def wait(self, *, keep_sent: bool = False) -> Tensor:
        """The received elements, flat, in the order of the peers.

        Frees the sent buffer, unless it is to be kept.

        The backend's thread may hold the message for a while after it has left: freed by hand, memory does
        not depend on that.
        """
        received: Tensor = torch.ops._c10d_functional.wait_tensor(self.received)
        if not keep_sent:
            self.sent.untyped_storage().resize_(0)
        return received


def start_exchange(
    send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: str
) -> Pending:
    """Start an all-to-all of a flat buffer.

    `send_sizes[p]` elements go to peer p, `receive_sizes[p]` come from it. Every rank of the group must call
    it, in the same order, also when it has nothing to send.
    """
    received = torch.ops._c10d_functional.all_to_all_single(
        send, list(receive_sizes), list(send_sizes), group
    )
    return Pending(received, send)


class HeadSlices(NamedTuple):
    """A tensor (n, b, heads, d) and the half-open range of its heads that each ulysses rank needs."""

    tensor: Tensor
    ranges: tuple[tuple[int, int], ...]

    def width(self, ulysses_rank: int) -> int:
        """Number of heads that a rank needs."""
        start, stop = self.ranges[ulysses_rank]
        return stop - start


def scatter_heads(parts: Sequence[HeadSlices], rows: Sequence[int], ulysses_rank: int, group: str) -> Tensor:
    """Swap sequence shards for head shards: Q, K and V in one collective.

    Args:
        parts: the tensors, all of this rank's rows; each peer gets its heads of the first, then of the
            second, ...
        rows: rows of every ulysses rank.
        ulysses_rank: this rank.
        group: the ulysses group.

    Returns:
        (sum of rows, b, heads of this rank over all parts, d): the ring rank's rows in storage order.
    """
    n, b, _, d = parts[0].tensor.shape
    widths = [sum(part.width(u) for part in parts) for u in range(len(rows))]
    send_sizes = [n * b * d * width for width in widths]
    # One buffer with a message for each peer, one after the other, as the collective wants it.
    send = parts[0].tensor.new_empty(sum(send_sizes))
    for u, message in enumerate(send.split(send_sizes)):
        _pack_heads_(message.view(n, b, widths[u], d), parts, u)
    mine = widths[ulysses_rank]
    receive_sizes = [count * b * d * mine for count in rows]
    return start_exchange(send, send_sizes, receive_sizes, group).wait().view(sum(rows), b, mine, d)


def _pack_heads_(message: Tensor, parts: Sequence[HeadSlices], ulysses_rank: int) -> None:
    """Write the heads that a rank needs, part after part, into its message (n, b, heads, d)."""
    first = 0
    for part in parts:
        start, stop = part.ranges[ulysses_rank]
        width = stop - start
        message[:, :, first : first + width].copy_(part.tensor[:, :, start:stop])
        first += width


def gather_heads(
    x: Tensor, rows: Sequence[int], widths: Sequence[int], ulysses_rank: int, group: str
) -> list[Tensor]:
    """Swap head shards back for sequence shards.

    Args:
        x: (sum of rows, b, widths[ulysses_rank], d).
        rows: rows of every ulysses rank.
        widths: heads held by every ulysses rank.
        ulysses_rank: this rank.
        group: the ulysses group.

    Returns:
        For every ulysses rank u, its heads of this rank's rows: (n, b, widths[u], d).
    """
    _, b, mine, d = x.shape
    n = rows[ulysses_rank]
    send_sizes = [count * b * d * mine for count in rows]
    receive_sizes = [n * b * d * width for width in widths]
    pending = start_exchange(x.contiguous().view(-1), send_sizes, receive_sizes, group)
    # What was sent may be the caller's own storage, such as a chunk's output that is saved for the backward.
    messages = pending.wait(keep_sent=True).split(receive_sizes)
    return [message.view(n, b, width, d) for message, width in zip(messages, widths, strict=True)]


def _sizes(transfers: Sequence[Transfer], ring: int, row: int) -> list[int]:
    """Elements for, or from, every ring rank, of rows of `row` elements."""
    sizes = [0] * ring
    for transfer in transfers:
        sizes[transfer.peer] = transfer.rows * row
    return sizes


def _runs(transfers: Sequence[Transfer]) -> Iterator[tuple[slice, slice]]:
    """(rows of this rank's storage, their place in a buffer that holds all transfers) of every run."""
    row = 0
    for transfer in transfers:
        for start, stop in transfer.runs:
            length = stop - start
            yield slice(start, stop), slice(row, row + length)
            row += length


def fetch_rows(
    k: Tensor, v: Tensor, sends: Sequence[Transfer], receives: Sequence[Transfer], ring: int, group: str
) -> Pending:
    """Start one ring stage: send the rows that peers need, receive the rows that this rank needs.

    Args:
        k: (N, b, g, d) this ring rank's keys.
        v: its values, of the same shape.
        sends: local rows for each peer.
        receives: rows that come from each peer.
        ring: ring degree.
        group: the ring group.
    """
    _, b, g, d = k.shape
    send = k.new_empty((sum(transfer.rows for transfer in sends), b, 2 * g, d))
    # Keys beside values in one row, so that a stage is one collective.
    for stored, packed in _runs(sends):
        send[packed, :, :g].copy_(k[stored])
        send[packed, :, g:].copy_(v[stored])
    row = b * 2 * g * d
    return start_exchange(send.view(-1), _sizes(sends, ring, row), _sizes(receives, ring, row), group)


def return_rows(
    grads: Tensor, sends: Sequence[Transfer], receives: Sequence[Transfer], ring: int, group: str
) -> Pending:
    """Start the transpose of `fetch_rows`: gradients of a stage's rows travel to their owners.

    `grads` is (received rows, b, 2 g, d).
    """
    row = grads.shape[1:].numel()
    return start_exchange(grads.reshape(-1), _sizes(receives, ring, row), _sizes(sends, ring, row), group)


def add_returned_rows_(grads: Tensor, returned: Tensor, sends: Sequence[Transfer]) -> None:
    """Add the gradients that came home to (N, b, 2 g, d) fp32 accumulators, run by run."""
    came = returned.view(sum(transfer.rows for transfer in sends), *grads.shape[1:])
    for stored, packed in _runs(sends):
        grads[stored] += came[packed]


class CountBytes(TorchDispatchMode):
    """Counts the bytes that this rank hands to all-to-all collectives for others, while it is active.

    `bytes_sent` counts at the collective itself, in the forward and in the backward; what stays on the rank
    is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes_sent = 0

    def __enter__(self) -> "CountBytes":
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            send, _, send_sizes, group = args
            # A message to oneself is a copy: it crosses no link.
            stays = send_sizes[_resolve_process_group(group).rank()]
            self.bytes_sent += (
                (sum(send_sizes) - stays) * send.element_size() * (send.numel() // max(1, send.shape[0]))
            )
        return func(*args, **(kwargs or {}))
