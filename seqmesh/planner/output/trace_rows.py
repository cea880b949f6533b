"""Rows of a Chrome trace, and the clock of the critical path: what timeline.py draws with.

    compute            |kernel|merge|wait..|kernel|          work advances the clock
    node network       |  ring exchange    |                 an exchange advances it by what nothing hides

Every link class is a process with a row for each of its exchanges, since two of them may be in flight at
once. Durations are whole (`Piece.seconds`); `exposed_seconds` in an event's args is its part of the critical
path.

Source: Google's "Trace Event Format".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Trace:
    """Events of one step. `clock` is where the critical path stands, in seconds."""

    causes: Mapping[str, str]
    """Cause of each piece of the price: the row that it is drawn on."""
    clock: float = 0.0
    drawn: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(seconds, exposed) drawn of each piece."""
    count: int = 0
    _rows: dict[tuple[str, str], list[Event]] = field(default_factory=dict)

    def work(self, name: str, seconds: float, **args: Any) -> None:
        """Something that nothing hides, on the compute row."""
        if seconds:
            self._add(name, ("compute", "compute"), self.clock, seconds, seconds, args)
            self.clock += seconds

    def exchange(
        self, name: str, seconds: float, exposed: float, start: float | None = None, **args: Any
    ) -> None:
        """An exchange, of which the clock waits for `exposed`.

        Args:
            name: of the piece.
            seconds: it takes in all.
            exposed: the part that nothing hides.
            start: when it may begin; default: so that its hidden part runs beside what has just been drawn.
        """
        if not seconds:
            return
        row = PROCESSES[self.causes[name]], name
        before = self._rows.get(row)
        free = before[-1].start + before[-1].seconds if before else 0.0
        wanted = self.clock - (seconds - exposed) if start is None else start
        self._add(name, row, max(wanted, free), seconds, exposed, args)
        self.clock += exposed

    def fold(self, title: str, times: int, one: Mapping[str, tuple[float, float]], seconds: float) -> None:
        """One event for so many repetitions of something that drew `one` and took `seconds`; its args have
        both sums by piece.
        """
        whole = {name: times * each for name, (each, _) in one.items()}
        exposed = {name: times * each for name, (_, each) in one.items()}
        self._put(
            Event(
                title, COMPUTE, self.clock, times * seconds, {"seconds": whole, "exposed_seconds": exposed}
            ),
            ("compute", "compute"),
        )
        for name in one:
            self._count(name, whole[name], exposed[name])
        self.clock += times * seconds

    def since(self, before: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """What was drawn after `drawn` stood at `before`."""
        gone = {name: before.get(name, (0.0, 0.0)) for name in self.drawn}
        return {
            name: (whole - gone[name][0], part - gone[name][1])
            for name, (whole, part) in self.drawn.items()
            if whole > gone[name][0]
        }

    def _add(
        self,
        name: str,
        row: tuple[str, str],
        start: float,
        seconds: float,
        exposed: float,
        args: dict[str, Any],
    ) -> None:
        self._put(
            Event(
                name,
                self.causes[name],
                start,
                seconds,
                {**args, "seconds": seconds, "exposed_seconds": exposed},
            ),
            row,
        )
        self._count(name, seconds, exposed)

    def _put(self, event: Event, row: tuple[str, str]) -> None:
        self._rows.setdefault(row, []).append(event)
        self.count += 1

    def _count(self, name: str, seconds: float, exposed: float) -> None:
        whole, waited = self.drawn.get(name, (0.0, 0.0))
        self.drawn[name] = (whole + seconds, waited + exposed)

    def as_json(self) -> dict[str, Any]:
        """The trace.

        A row that ends after the step, since more is hidden than there is to hide behind, is drawn compressed
        into it.
        """
        events: list[dict[str, Any]] = []
        rows = sorted(self._rows, key=lambda row: (ORDER.index(row[0]), row[1]))
        for thread, (process, name) in enumerate(rows):
            ids = {"pid": ORDER.index(process), "tid": thread}
            for kind, text in (("process_name", process), ("thread_name", name)):
                events.append({"name": kind, "ph": "M", "ts": 0, **ids, "args": {"name": text}})
            events.append(
                {"name": "process_sort_index", "ph": "M", "ts": 0, **ids, "args": {"sort_index": ids["pid"]}}
            )
            last = self._rows[process, name][-1]
            scale = MICROSECONDS * min(1.0, self.clock / (last.start + last.seconds))
            for event in self._rows[process, name]:
                times = {"ts": event.start * scale, "dur": event.seconds * scale}
                events.append(
                    {"name": event.name, "cat": event.cause, "ph": "X", **times, **ids, "args": event.args}
                )
        return {"traceEvents": events, "displayTimeUnit": "ms"}
