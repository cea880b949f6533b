"""What a run shows, and leaves behind in its folder at the end.

events (events.py)  ->  Reporter  ->  how it starts (start.py), then a bar or plain lines on the screen
                                  ->  a line per step in metrics.jsonl, TensorBoard (metrics_log.py)
                                  ->  at the end report.json, report.txt (report.py), loss.png
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seqmesh.provenance import commit, machine
from seqmesh.train.config import Config
from seqmesh.train.data import Corpus
from seqmesh.train.events import Compared, Event, Started, StepMetrics, Stopped, Trained
from seqmesh.train.expected import Expected, Foresight
from seqmesh.train.loss_curve import draw_loss
from seqmesh.train.metrics_log import MetricsLog
from seqmesh.train.report import Report, describe, summarize
from seqmesh.train.start import describe_available, describe_start
from seqmesh.train.units import in_bytes

PLAIN_LINES = 20
"""Progress lines of a run whose output is not a terminal."""


def _progress_bar() -> Progress | None:
    """None where a bar cannot be drawn again and again: in a file or a pipe, lines are printed instead."""
    console = Console()
    if not console.is_terminal:
        return None
    columns = (BarColumn(10), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=console)


def token_ids(config: Config, corpus: Corpus) -> int:
    """Of the model."""
    return config.model.vocabulary or corpus.vocabulary.size


class Reporter:
    """Handles the events of one run. A context manager, so that the terminal is restored whatever happens."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        folder: Path,
        command: str,
        earlier: Sequence[StepMetrics] = (),
        expected: Expected | None = None,
        foresight: Foresight | None = None,
    ) -> None:
        """Begin the run's files.

        Args:
            config: the run.
            corpus: its text.
            folder: where the files go.
            command: what was typed.
            earlier: the steps of the run that is resumed.
            expected: of a step, if it was asked for.
            foresight: says what the planner makes of the run; default: nobody does.

        Raises:
            ValueError: metrics for TensorBoard, which is not installed.
        """
        self.config = config
        self.corpus = corpus
        self.folder = folder
        self.command = command
        self.started: Started | None = None
        self.trained: Trained | None = None
        self.compared: Compared | None = None
        self.stopped: Stopped | None = None
        self.steps = list(earlier)
        self.expected = expected
        self._foresight = foresight
        self._progress = _progress_bar()
        self._metrics = MetricsLog(folder, earlier, tensorboard=config.run.tensorboard)
        self._undone = ExitStack()
        self._begin = time.monotonic()
        self.train_seconds = 0.0

    def __enter__(self) -> "Reporter":
        self._undone.enter_context(self._metrics)
        if self._progress is not None:
            self._undone.enter_context(self._progress)
            self._progress.add_task("starting", total=self.config.train.steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undone.close()

    def handle(self, event: Event) -> None:
        """Take note of an event, and show it."""
        match event:
            case Started():
                self.started = event
                self._begin = time.monotonic()
                lines = describe_start(self.config, event.parameters, self.expected, trained=event.trained)
                lines.append(describe_available(event.available_bytes, self.expected))
                self._print("\n".join(lines) + "\n")
            case StepMetrics():
                self.steps.append(event)
                self._metrics.add(event)
                self._show(event)
            case Trained():
                self.trained = event
                self.train_seconds = time.monotonic() - self._begin
                if self.config.train.compare_steps and not self.config.run.resume:
                    repeated = min(len(self.steps), self.config.train.compare_steps)
                    self._say(f"repeating the first {repeated} steps on one rank")
            case Compared():
                self.compared = event
            case Stopped():
                self.stopped = event

    def _show(self, step: StepMetrics) -> None:
        line = (
            f"loss {step.loss:.3f} {step.tokens_per_s:,.0f} tokens/s"
            f" MFU {step.mfu_mask:.1%} {in_bytes(sum(step.sent.values()))}/step"
        )
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step.step, description=line)
            return
        steps = self.config.train.steps
        every = math.ceil(steps / PLAIN_LINES)
        if step.step in (1, steps) or step.step % every == 0:
            print(f"step {step.step}/{steps}  {line}  {step.seconds:.2f} s", flush=True)

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=line)
        else:
            print(line, flush=True)

    def _print(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def finish(self) -> "Report":
        """Write the picture and the report of a run that went to its end."""
        assert self.started is not None
        assert self.trained is not None
        predicted = None
        if self._foresight is not None:
            ids = token_ids(self.config, self.corpus)
            predicted = self._foresight.predict(self.config, ids, self.started.device_name)
        report = summarize(
            self.corpus,
            self.started,
            self.steps,
            self.trained,
            self.compared,
            self.config.train.precision,
            self.expected,
            predicted,
        )
        run = {"train_seconds": self.train_seconds, "command": self.command, "commit": commit()}
        document = asdict(report) | run | machine()
        (self.folder / "report.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        text = describe(self.config, report, self.train_seconds, self.folder)
        origin = f"command    {self.command}\ncommit     {commit()}"
        (self.folder / "report.txt").write_text(f"{text}\n{origin}\n", encoding="utf-8")
        title = f"{report.text}: {report.first_loss:.2f} → {report.last_loss:.2f}"
        draw_loss(self.steps, title, self.folder / "loss.png", self.corpus.vocabulary.unit)
        print("\n" + text, flush=True)
        return report
