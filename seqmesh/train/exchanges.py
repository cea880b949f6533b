"""What a rank hands to other ranks and gets from them while a step is computed, as sums of bits.

    exchange 7 along ring      sent      sum of the bits that this rank hands over
                               received  sum of the bits that it gets

Every collective counts, whoever calls it: attention, tensor parallelism, FSDP, pipelines. A mode sees them at
PyTorch's dispatcher, and waits for each at once, so that there is something to sum; in a step that is
recorded, nothing overlaps. Hidden states that stages send each other are not waited for, as two stages that
do may wait for ever: what came is summed at the end, while the buffers are still held.
"""

from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.exchange import Watch
from seqmesh.parallel.traffic import arguments_of, group_of
from seqmesh.train.bits import bit_sum, numbers_of

SENT, RECEIVED = "handed over", "received"


class Exchange(NamedTuple):
    """One collective: equal on all ranks that take part in it, and on no others."""

    group: str
    """PyTorch's name of the process group."""
    what: str
    """The collective, and for a message from one rank to another, from where to where in the group."""
    number: int
    """Of those of its kind in the group, from 1."""


class EndOfExchange(NamedTuple):
    """What a rank handed over or received in an exchange."""

    exchange: Exchange
    direction: str
    """SENT or RECEIVED."""
    is_backward: bool


class _Collective(NamedTuple):
    """A call of a collective, in terms of what moves."""

    group: Any
    what: str
    sent: list[Tensor]
    received: list[Tensor]
    """Those that are known before the call."""


class RecordExchanges(Watch):
    """Sums the bits of every exchange while it is active. `sums` has them afterwards, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[EndOfExchange] = []
        self.sums: list[int] = []
        self._sums: list[Tensor] = []
        self._late: dict[int, list[Tensor]] = {}
        """Place in `ends` -> buffers that are filled by the end."""
        self._counts: Counter[tuple[str, str]] = Counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for place, tensors in self._late.items():
            self._sums[place] = _total(tensors)
        self._late.clear()
        self.sums = numbers_of(self._sums)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        call = _collective_of(func, args, given)
        if call is None:
            return func(*args, **given)
        exchange = self._next(call)
        if call.sent:
            self._note(exchange, SENT, _total(call.sent))
        result = func(*args, **given)
        if func.namespace == "_c10d_functional":
            received = [torch.ops._c10d_functional.wait_tensor(x) for x in _tensors(result)]
        elif _is_message(func):
            if call.received:
                self._late[len(self._sums)] = call.received
                self._note(exchange, RECEIVED, torch.zeros((), dtype=torch.int64))
            return result
        else:
            _wait(result)
            received = call.received
        if received:
            self._note(exchange, RECEIVED, _total(received))
        return result

    def _next(self, call: _Collective) -> Exchange:
        name = call.group.group_name
        self._counts[name, call.what] += 1
        return Exchange(name, call.what, self._counts[name, call.what])

    def _note(self, exchange: Exchange, direction: str, total: Tensor) -> None:
        is_backward = torch._C._current_graph_task_id() != -1
        self.ends.append(EndOfExchange(exchange, direction, is_backward))
        self._sums.append(total)


def _collective_of(func: Any, args: Any, given: Any) -> _Collective | None:
    """What an operator moves, if it is a collective."""
    if func.namespace not in ("c10d", "_c10d_functional"):
        return None
    name = func._schema.name.partition("::")[2]
    arguments = arguments_of(func, args, given)
    group = group_of(arguments)
    if group is None or name in ("barrier", "monitored_barrier_"):
        return None
    if func.namespace == "_c10d_functional":
        return _Collective(group, name, list(_tensors(args[0])), [])
    into = [x for key, value in arguments.items() if key.startswith("output") for x in _tensors(value)]
    out_of = [x for key, value in arguments.items() if key.startswith("input") for x in _tensors(value)]
    in_place = list(_tensors(arguments.get("tensors")))
    if name == "send":
        return _Collective(group, f"{name} {group.rank()} to {arguments['dst']}", in_place, [])
    if name == "recv_":
        return _Collective(group, f"send {arguments['src']} to {group.rank()}", [], in_place)
    if name == "broadcast_":  # what others than the first had there before is nobody's
        return _Collective(group, name, in_place if group.rank() == arguments["root_rank"] else [], in_place)
    return _Collective(group, name, [*out_of, *in_place], [*into, *in_place])


def _is_message(func: Any) -> bool:
    return func._schema.name in ("c10d::send", "c10d::recv_")


def _wait(result: Any) -> None:
    """Until a collective of c10d has ended: it returns tensors and its work, or its work alone."""
    for one in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(one, torch.ScriptObject):
            work: Any = one  # a class of TorchScript's, which type checkers do not know
            work.wait()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in an argument: itself, or in lists of lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def _total(tensors: list[Tensor]) -> Tensor:
    """One sum of some tensors' bits, in which the place of each counts."""
    sums = [bit_sum(x) * (2 * place + 1) for place, x in enumerate(tensors)]
    return torch.stack(sums).sum()
