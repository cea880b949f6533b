"""Rows of a Chrome trace, and the clock of the critical path: what timeline.py draws with.

    compute            |kernel|merge|wait..|kernel|          work advances the clock
    node network       |  ring exchange    |                 an exchange advances it by what nothing hides

Every link class is a process with a row for each of its exchanges, since two of them may be in flight at
once. Durations are whole (`CostTerm.seconds`); `exposed_seconds` in an event's args is its part of the
critical path.

Source: Google's "Trace Event Format".
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from seqmesh.planner.cost.estimate import COMPUTE, PIPELINE
from seqmesh.planner.cost.network import NETWORK, PCIE, SCALE_UP

PROCESSES = ("compute", "scale-up", "PCIe", "node network")
PROCESS_OF = {COMPUTE: 0, PIPELINE: 0, SCALE_UP: 1, PCIE: 2, NETWORK: 3}
"""Index of the process that shows what has this cause."""
MICROSECONDS = 1e6


class TraceRow(NamedTuple):
    """A line of the picture; they sort from top to bottom."""

    process: int
    name: str


COMPUTE_ROW = TraceRow(0, "compute")


@dataclass(frozen=True)
class Event:
    """One event, in seconds."""

    name: str
    """Of the term; of an event that stands for many, what they are."""
    cause: str
    row: TraceRow
    start: float
    seconds: float
    args: dict[str, Any]
    """What a reader sees of it: `seconds` and `exposed_seconds` at least, or both as sums by term."""


def seconds_by_term(events: Sequence[Event], of: str) -> dict[str, float]:
    """Sums of an argument of events: "seconds" or "exposed_seconds"."""
    sums: dict[str, float] = {}
    for event in events:
        given = event.args[of]
        by_term = given if isinstance(given, dict) else {event.name: given}
        for name, seconds in by_term.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return sums


@dataclass
class Trace:
    """Events of one step. `clock` is where the critical path stands, in seconds."""

    causes: Mapping[str, str]
    """Cause of each term of the estimate: it says the row that the term is drawn on."""
    clock: float = 0.0
    events: list[Event] = field(default_factory=list)
    _ends: dict[TraceRow, float] = field(default_factory=dict)
    """Since when each row is free."""

    def draw(
        self,
        name: str,
        seconds: float,
        args: Mapping[str, Any],
        *,
        exposed: float | None = None,
        start: float | None = None,
    ) -> None:
        """An event of which the clock waits for the exposed part.

        Args:
            name: of the term.
            seconds: it takes in all; of 0 s nothing is drawn.
            args: shown with the event.
            exposed: the part that nothing hides; default: all of it, as of work.
            start: when it may begin; default: so that its hidden part runs beside what has just been drawn.
        """
        if not seconds:
            return
        waited = seconds if exposed is None else exposed
        wanted = self.clock - (seconds - waited) if start is None else start
        cause = self.causes[name]
        process = PROCESS_OF[cause]
        row = TraceRow(process, name) if process else COMPUTE_ROW
        free = self._ends.get(row, 0.0)  # one event at a time on a row
        shown = {**args, "seconds": seconds, "exposed_seconds": waited}
        self._add(Event(name, cause, row, max(wanted, free), seconds, shown))
        self.clock += waited

    def fold(self, title: str, times: int, one: Sequence[Event], seconds: float) -> None:
        """One event for so many repetitions of `one`, which took `seconds`; its args are sums by term."""
        args = {
            of: {name: times * spent for name, spent in seconds_by_term(one, of).items()}
            for of in ("seconds", "exposed_seconds")
        }
        self._add(Event(title, COMPUTE, COMPUTE_ROW, self.clock, times * seconds, args))
        self.clock += times * seconds

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self._ends[event.row] = event.start + event.seconds

    def as_json(self) -> dict[str, Any]:
        """The trace.

        A row that ends after the step, since more is hidden than there is to hide behind, is drawn compressed
        into it.
        """
        found: list[dict[str, Any]] = []
        for thread, row in enumerate(sorted(self._ends)):
            ids = {"pid": row.process, "tid": thread}
            found += _names(row, ids)
            scale = MICROSECONDS * min(1.0, self.clock / self._ends[row])
            found += (_complete(event, ids, scale) for event in self.events if event.row == row)
        return {"traceEvents": found, "displayTimeUnit": "ms"}


def _names(row: TraceRow, ids: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """The metadata events that name a row and put its process in its place."""
    for kind, args in (
        ("process_name", {"name": PROCESSES[row.process]}),
        ("thread_name", {"name": row.name}),
        ("process_sort_index", {"sort_index": row.process}),
    ):
        yield {"name": kind, "ph": "M", "ts": 0, **ids, "args": args}


def _complete(event: Event, ids: Mapping[str, int], scale: float) -> dict[str, Any]:
    """A "complete" event; `scale`: units of the trace in a second."""
    times = {"ts": event.start * scale, "dur": event.seconds * scale}
    return {"name": event.name, "cat": event.cause, "ph": "X", **times, **ids, "args": event.args}
