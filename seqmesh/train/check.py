"""The check of bits: a step that is computed twice must come out the same, and weights must be as written.

    before every step    weights     against what the last update left, parameter by parameter
    every Nth step       twice       each exchange as this rank hands it over and as it receives it, the share
                                     of the loss, the gradient of every parameter

Nothing in a step is random, and sums over ranks have one order: two runs differ where hardware does, or
memory, or the network. What differs first tells where. A rank that received other bits, which their sender
did not hand over, is where they changed; a rank that handed over other bits without having received any
computed them.

What it cannot see: a fault that comes again in just the same way, and a bit that flips inside a sum over
ranks and is rounded away, which changes nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from seqmesh.parallel import ParallelMesh, ParallelModel
from seqmesh.train.bits import bit_sums, weight_bits
from seqmesh.train.costs import WatchCosts
from seqmesh.train.exchanges import RECEIVED, EndOfExchange, Exchange, RecordExchanges
from seqmesh.train.gathering import gather, gather_objects

Computed = tuple[Tensor, WatchCosts]
"""A rank's share of the loss, and what it sent and waited for."""

_NAMES = {
    "all_to_all_single": "all-to-all",
    "alltoall_base_": "all-to-all",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast_": "broadcast",
}
"""PyTorch's operators by the names of the collectives."""


class FlippedBitError(RuntimeError):
    """A step came out otherwise the second time, or weights changed by themselves."""


class BitDifference(NamedTuple):
    """Something on a rank whose bits were others the second time."""

    what: str
    """In words."""
    exchange: Exchange | None = None
    """What it was moved by, if it was."""
    is_received: bool = False


class _Computation(NamedTuple):
    """One forward and backward of a step, as sums of bits."""

    subjects: list[EndOfExchange | str]
    sums: list[int]


def differences(first: _Computation, second: _Computation, axes: dict[str, str]) -> list[BitDifference]:
    """What two runs of a step differ in on this rank, in the order in which it came up.

    Args:
        first: the first run.
        second: the second.
        axes: names of process groups -> in words.
    """
    if first.subjects != second.subjects:
        return [BitDifference("the order of exchanges")]
    return [
        _difference(subject, axes)
        for subject, before, after in zip(first.subjects, first.sums, second.sums, strict=True)
        if before != after
    ]


def _difference(subject: EndOfExchange | str, axes: dict[str, str]) -> BitDifference:
    if isinstance(subject, str):
        return BitDifference(subject)
    exchange = subject.exchange
    name = _NAMES.get(exchange.what, exchange.what)
    direction = "backward" if subject.is_backward else "forward"
    along = axes.get(exchange.group, f"group {exchange.group}")
    return BitDifference(
        f"what was {subject.direction} in {name} {exchange.number} along {along} ({direction})",
        exchange,
        subject.direction == RECEIVED,
    )


def origin(found: Sequence[Sequence[BitDifference]]) -> tuple[int, BitDifference]:
    """Where bits changed that then spread: a rank, and what was first there.

    Args:
        found: differences of every rank; there is one at least.
    """
    handed_over = {one.exchange for rank in found for one in rank if one.exchange and not one.is_received}
    firsts = [(rank, mine[0]) for rank, mine in enumerate(found) if mine]
    for rank, first in firsts:
        if not (first.is_received and first.exchange in handed_over):
            return rank, first
    # A buffer that waits for a message counts from when it was set out, which may be before what made the
    # message another one.
    own = [(rank, one) for rank, mine in enumerate(found) for one in mine if not one.is_received]
    return own[0] if own else firsts[0]


class BitCheck:
    """Checks the steps of a rank. All ranks have one, and call it together."""

    def __init__(self, model: ParallelModel, mesh: ParallelMesh) -> None:
        self._model = model
        self._world = mesh.dims.world
        self._axes = _axes(mesh)
        self._devices = [torch.cuda.current_device()] if mesh.device_type == "cuda" else []
        self._left = weight_bits(model.parameters())

    def updated(self, bits: list[int]) -> None:
        """The weights are others from now on, and these are their sums."""
        self._left = bits

    def weights(self, step: int) -> None:
        """Compare the weights with what the last update left. A collective over all ranks.

        Raises:
            FlippedBitError: on all ranks alike, the parameter and the rank.
        """
        self._judge(step, self._changed(), [])

    def gradients(self, step: int, compute: Callable[[], Computed]) -> Computed:
        """Forward and backward of a step, twice. A collective over all ranks.

        Args:
            step: its number, from 1.
            compute: makes the gradients anew; called twice.

        Raises:
            FlippedBitError: on all ranks alike, what differs and the rank where it did first.
        """
        with torch.random.fork_rng(self._devices):
            first, _ = self._observed(compute)
        second, computed = self._observed(compute)
        self._judge(step, self._changed(), differences(first, second, self._axes))
        return computed

    def _observed(self, compute: Callable[[], Computed]) -> tuple[_Computation, Computed]:
        with RecordExchanges() as recorded:
            computed = compute()
        named = list(self._model.named_parameters())
        subjects = ["the share of the loss", *(f"the gradient of {name}" for name, _ in named)]
        sums = bit_sums([computed[0], *(parameter.grad for _, parameter in named)])
        return _Computation([*recorded.ends, *subjects], [*recorded.sums, *sums]), computed

    def _changed(self) -> list[str]:
        """Weights that nobody wrote."""
        names = [name for name, _ in self._model.named_parameters()]
        now = weight_bits(self._model.parameters())
        found = zip(names, self._left, now, strict=True)
        return [f"the weight {name}" for name, before, after in found if before != after]

    def _judge(self, step: int, changed: list[str], differing: list[BitDifference]) -> None:
        if not any(gather(bool(changed or differing), self._world)):
            return
        everyone = gather_objects((changed, differing), self._world)
        # A weight that changed explains whatever else did.
        for rank, (weights, _) in enumerate(everyone):
            if weights:
                raise FlippedBitError(_explain(step, rank, f"{weights[0]} is not what the last update left"))
        rank, first = origin([others for _, others in everyone])
        raise FlippedBitError(_explain(step, rank, f"computed twice, {first.what} differs"))


def _explain(step: int, rank: int, what: str) -> str:
    return (
        f"check of step {step}: {what} on rank {rank}; a bit flipped there: in memory, in a computation or on"
        " the way; resume from a checkpoint, without that machine if it comes again"
    )


def _axes(mesh: ParallelMesh) -> dict[str, str]:
    """What this rank's process groups are, by PyTorch's names for them."""
    if mesh.device_mesh is None:
        return {}
    named: dict[str, str] = {}
    if dist.group.WORLD is not None:
        named[dist.group.WORLD.group_name] = "all ranks"
    for axis in [*mesh.flattened, *mesh.dims.degrees]:
        group = mesh.group(axis)
        if group is not None:
            named[group.group_name] = axis
    return named
