"""Rows of a Chrome trace, and the clock of the critical path: what timeline.py draws with.

    compute            |kernel|merge|wait..|kernel|          work advances the clock
    node network       |  ring exchange    |                 an exchange advances it by what nothing hides

Every link class is a process with a row for each of its exchanges, since two of them may be in flight at
once. Durations are whole (`CostTerm.seconds`); `exposed_seconds` in an event's args is its part of the
critical path.

Source: Google's "Trace Event Format".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from seqmesh.planner.cost.estimate import COMPUTE, PIPELINE
from seqmesh.planner.cost.network import NETWORK, PCIE, SCALE_UP

PROCESSES = {
    COMPUTE: "compute",
    PIPELINE: "compute",
    SCALE_UP: "scale-up",
    PCIE: "PCIe",
    NETWORK: "node network",
}
"""Names of the processes, by cause."""
ORDER = ("compute", "scale-up", "PCIe", "node network")
MICROSECONDS = 1e6


@dataclass
class Event:
    """One event, in seconds."""

    name: str
    cause: str
    start: float
    seconds: float
    args: dict[str, Any]


class TraceRow(NamedTuple):
    """A line of the picture."""

    process: str
    name: str


COMPUTE_ROW = TraceRow("compute", "compute")


@dataclass(frozen=True)
class Drawn:
    """Seconds that were drawn of a term."""

    seconds: float = 0.0
    exposed: float = 0.0
    """The part on the critical path."""


@dataclass
class Trace:
    """Events of one step. `clock` is where the critical path stands, in seconds."""

    causes: Mapping[str, str]
    """Cause of each term of the estimate: it says the row that the term is drawn on."""
    clock: float = 0.0
    drawn: dict[str, Drawn] = field(default_factory=dict)
    """What was drawn of each term."""
    count: int = 0
    """Events so far."""
    _rows: dict[TraceRow, list[Event]] = field(default_factory=dict)

    def work(self, name: str, seconds: float, **args: Any) -> None:
        """Something that nothing hides, on the compute row."""
        if seconds:
            self._add(name, COMPUTE_ROW, self.clock, Drawn(seconds, seconds), args)
            self.clock += seconds

    def exchange(
        self, name: str, seconds: float, exposed: float, start: float | None = None, **args: Any
    ) -> None:
        """An exchange, of which the clock waits for `exposed`.

        Args:
            name: of the term.
            seconds: it takes in all.
            exposed: the part that nothing hides.
            start: when it may begin; default: so that its hidden part runs beside what has just been drawn.
            args: shown with the event.
        """
        if not seconds:
            return
        row = TraceRow(PROCESSES[self.causes[name]], name)
        before = self._rows.get(row)
        free = before[-1].start + before[-1].seconds if before else 0.0  # one event at a time on a row
        wanted = self.clock - (seconds - exposed) if start is None else start
        self._add(name, row, max(wanted, free), Drawn(seconds, exposed), args)
        self.clock += exposed

    def fold(self, title: str, times: int, one: Mapping[str, Drawn], seconds: float) -> None:
        """One event for so many repetitions of something that drew `one` and took `seconds`.

        Its args have both sums by term.
        """
        whole = {name: times * drawn.seconds for name, drawn in one.items()}
        exposed = {name: times * drawn.exposed for name, drawn in one.items()}
        args = {"seconds": whole, "exposed_seconds": exposed}
        self._put(Event(title, COMPUTE, self.clock, times * seconds, args), COMPUTE_ROW)
        for name in one:
            self._count(name, Drawn(whole[name], exposed[name]))
        self.clock += times * seconds

    def since(self, before: Mapping[str, Drawn]) -> dict[str, Drawn]:
        """What was drawn after `drawn` stood at `before`."""
        found = {}
        for name, now in self.drawn.items():
            then = before.get(name, Drawn())
            if now.seconds > then.seconds:
                found[name] = Drawn(now.seconds - then.seconds, now.exposed - then.exposed)
        return found

    def _add(self, name: str, row: TraceRow, start: float, drawn: Drawn, args: dict[str, Any]) -> None:
        shown = {**args, "seconds": drawn.seconds, "exposed_seconds": drawn.exposed}
        self._put(Event(name, self.causes[name], start, drawn.seconds, shown), row)
        self._count(name, drawn)

    def _put(self, event: Event, row: TraceRow) -> None:
        self._rows.setdefault(row, []).append(event)
        self.count += 1

    def _count(self, name: str, more: Drawn) -> None:
        so_far = self.drawn.get(name, Drawn())
        self.drawn[name] = Drawn(so_far.seconds + more.seconds, so_far.exposed + more.exposed)

    def as_json(self) -> dict[str, Any]:
        """The trace.

        A row that ends after the step, since more is hidden than there is to hide behind, is drawn compressed
        into it.
        """
        events: list[dict[str, Any]] = []
        rows = sorted(self._rows, key=lambda row: (ORDER.index(row.process), row.name))
        for thread, row in enumerate(rows):
            ids = {"pid": ORDER.index(row.process), "tid": thread}
            events += _names(row, ids)
            last = self._rows[row][-1]
            scale = MICROSECONDS * min(1.0, self.clock / (last.start + last.seconds))
            events += (_complete(event, ids, scale) for event in self._rows[row])
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def _names(row: TraceRow, ids: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """The metadata events that name a row and put its process in its place."""
    for kind, args in (
        ("process_name", {"name": row.process}),
        ("thread_name", {"name": row.name}),
        ("process_sort_index", {"sort_index": ids["pid"]}),
    ):
        yield {"name": kind, "ph": "M", "ts": 0, **ids, "args": args}


def _complete(event: Event, ids: Mapping[str, int], scale: float) -> dict[str, Any]:
    """A "complete" event; `scale`: units of the trace in a second."""
    times = {"ts": event.start * scale, "dur": event.seconds * scale}
    return {"name": event.name, "cat": event.cause, "ph": "X", **times, **ids, "args": event.args}
