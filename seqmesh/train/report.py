"""What a run shows and leaves behind in its folder: progress, metrics, the loss curve and the report.

    events (events.py)  ->  Reporter  ->  a bar or plain lines on the screen, a line per step in metrics.jsonl
                                      ->  at the end report.json, report.txt and loss.png

The report says loss, speed, the check against one rank, bytes and memory.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seqmesh.provenance import commit, machine
from seqmesh.train.config import Config, MeshConfig
from seqmesh.train.data import Corpus
from seqmesh.train.events import Compared, Event, Started, StepMetrics, Stopped, Trained

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1}
"""Largest |Δloss| and |Δ gradient norm| against one rank in fp32, by the precision of the run.

In fp32 rounding in another order gives 1e-7 to 4e-5. A run in bf16 rounds every activation to 8 bits: this
finds what is broken, not what is off by a little.
"""
PLAIN_LINES = 20
"""Progress lines of a run whose output is not a terminal."""


METRICS = "metrics.jsonl"


def read_metrics(run: Path, steps: int) -> list[StepMetrics]:
    """The first steps of a run; nothing if they are not all there."""
    try:
        lines = (run / METRICS).read_text(encoding="utf-8").splitlines()[:steps]
        found = [StepMetrics(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        return []
    return found if [one.step for one in found] == list(range(1, steps + 1)) else []


def _line(step: StepMetrics) -> str:
    return json.dumps(asdict(step)) + "\n"


def _begin_metrics(path: Path, earlier: Sequence[StepMetrics]) -> TextIO:
    """The file with the earlier steps alone: what came after the checkpoint is done again."""
    # Replaced whole: a kill leaves the old file or the new one.
    begun = path.with_suffix(".tmp")
    begun.write_text("".join(map(_line, earlier)), encoding="utf-8")
    begun.replace(path)
    return path.open("a", encoding="utf-8")


def _progress_bar() -> Progress | None:
    """None where a bar cannot be drawn again and again: in a file or a pipe, lines are printed instead."""
    console = Console()
    if not console.is_terminal:
        return None
    columns = (BarColumn(10), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=console)


class Reporter:
    """Handles the events of one run. A context manager, so that the terminal is restored whatever happens."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        folder: Path,
        command: str,
        earlier: Sequence[StepMetrics] = (),
    ) -> None:
        """Begin the run's files.

        Args:
            config: the run.
            corpus: its text.
            folder: where the files go.
            command: what was typed.
            earlier: the steps of the run that is resumed.
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
        self._progress = _progress_bar()
        self._metrics = _begin_metrics(folder / METRICS, earlier)
        self._begin = time.monotonic()
        self.train_seconds = 0.0

    def __enter__(self) -> "Reporter":
        if self._progress is not None:
            self._progress.start()
            self._progress.add_task("starting", total=self.config.train.steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._metrics.close()

    def handle(self, event: Event) -> None:
        """Take note of an event, and show it."""
        match event:
            case Started():
                self.started = event
                self._begin = time.monotonic()
            case StepMetrics():
                self.steps.append(event)
                self._metrics.write(_line(event))
                self._metrics.flush()  # a run that is stopped leaves every step that it took
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
            f" MFU {step.mfu_mask:.1%} {_bytes(step.bytes_sent)}/step"
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

    def finish(self) -> "Report":
        """Write the picture and the report of a run that went to its end."""
        assert self.started is not None
        assert self.trained is not None
        report = summarize(
            self.corpus, self.started, self.steps, self.trained, self.compared, self.config.train.precision
        )
        run = {"train_seconds": self.train_seconds, "command": self.command, "commit": commit()}
        document = asdict(report) | run | machine()
        (self.folder / "report.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        text = describe(self.config, report, self.train_seconds, self.folder)
        origin = f"command    {self.command}\ncommit     {commit()}"
        (self.folder / "report.txt").write_text(f"{text}\n{origin}\n", encoding="utf-8")
        draw_loss(self.steps, report, self.folder / "loss.png", self.corpus.vocabulary.unit)
        print("\n" + text, flush=True)
        return report


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of a finished run."""

    text: str
    documents: int
    corpus_tokens: int
    parameters: int
    steps: int
    first_loss: float
    last_loss: float
    """Mean of the last tenth of the steps: a step is a few documents, so single ones are noisy."""
    tokens_per_s: float
    """Median over steps, as for the next three."""
    step_seconds: float
    mfu_mask: float
    mfu_noncausal: float
    peak_flops_per_s: float
    bytes_per_step: float
    """Mean, all ranks: documents differ from step to step."""
    bytes_sent: int
    bytes_scheduled: int
    bytes_agree: bool
    """Counted = scheduled on every rank at every step."""
    compared_steps: int
    largest_loss_difference: float | None
    largest_grad_norm_difference: float | None
    matches_one_rank: bool | None
    """Both differences within the tolerance.

    None if not compared, like the differences.
    """
    peak_memory_bytes: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return self.bytes_agree and self.matches_one_rank is not False


def summarize(
    corpus: Corpus,
    started: Started,
    steps: Sequence[StepMetrics],
    trained: Trained,
    compared: Compared | None,
    precision: str = "fp32",
) -> Report:
    """The report of a run's events."""
    last_tenth = steps[-max(1, len(steps) // 10) :]
    matches = loss_difference = norm_difference = None
    if compared is not None:
        loss_difference = compared.largest_loss_difference
        norm_difference = compared.largest_grad_norm_difference
        matches = max(loss_difference, norm_difference) <= TOLERANCE[precision]
    return Report(
        text=corpus.source,
        documents=len(corpus.documents),
        corpus_tokens=corpus.tokens,
        parameters=started.parameters,
        steps=len(steps),
        first_loss=steps[0].loss,
        last_loss=sum(step.loss for step in last_tenth) / len(last_tenth),
        tokens_per_s=median(step.tokens_per_s for step in steps),
        step_seconds=median(step.seconds for step in steps),
        mfu_mask=median(step.mfu_mask for step in steps),
        mfu_noncausal=median(step.mfu_noncausal for step in steps),
        peak_flops_per_s=started.peak_flops_per_s,
        bytes_per_step=sum(step.bytes_sent for step in steps) / len(steps),
        bytes_sent=sum(step.bytes_sent for step in steps),
        bytes_scheduled=sum(step.bytes_scheduled for step in steps),
        bytes_agree=all(step.bytes_agree for step in steps),
        compared_steps=len(compared.losses) if compared is not None else 0,
        largest_loss_difference=loss_difference,
        largest_grad_norm_difference=norm_difference,
        matches_one_rank=matches,
        peak_memory_bytes=trained.peak_memory_bytes,
    )


def describe(config: Config, report: Report, seconds: float, folder: Path) -> str:
    """The report as text: one line per finding."""
    model, mesh, data = config.model, config.mesh, config.data
    hardware = machine()
    peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in report.peak_memory_bytes)
    lines = {
        "model": f"{model.name}, {report.parameters / 1e6:.2f} M parameters, {config.train.precision}",
        "ranks": f"{mesh.world}: {_degrees(mesh)}, {config.run.threads} thread(s) each",
        "memory of": f"zero {config.train.zero}, checkpointing {config.train.checkpointing},"
        f" offload {config.train.offload}, {config.micro_batches} micro-batch(es) a step",
        "text": f"{report.text}: {report.documents:,} documents, {report.corpus_tokens / 1e6:.1f} M tokens",
        "loss": f"{report.first_loss:.3f} -> {report.last_loss:.3f}"
        f" in {report.steps} steps of {data.tokens:,} tokens, {seconds:.0f} s",
        "speed": f"{report.tokens_per_s:,.0f} tokens/s, {report.step_seconds:.2f} s a step (medians)",
        "MFU": f"{report.mfu_mask:.1%} counting the mask's exact area,"
        f" {report.mfu_noncausal:.1%} counting seq_len^2 pairs;"
        f" of {report.peak_flops_per_s / 1e9:.0f} GFLOP/s,"
        " fp32 matmul measured on all ranks at once before the start",
        "one rank": _one_rank_verdict(report, config),
        "exchanged": f"{_bytes(report.bytes_per_step)} a step by attention, all ranks;"
        f" {_bytes_verdict(report)}",
        "memory": f"peak {peaks} MiB on ranks 0, 1, ..., libraries included",
        "machine": f"{hardware['cores']} cores, {hardware['cpu']};"
        f" torch {hardware['torch']}, transformers {hardware['transformers']}",
        "results": f"{folder}: metrics.jsonl, loss.png, config.toml, report.json, checkpoint/, checkpoints/",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def _degrees(mesh: MeshConfig) -> str:
    """Those that are not 1, as the ranks run them; ulysses and ring in any case."""
    shown = {axis: n for axis, n in mesh.degrees.items() if n > 1 or axis in ("ring", "ulysses")}
    text = " x ".join(f"{axis} {n}" for axis, n in reversed(shown.items()))
    return f"{text}, one pool" if mesh.pool else text


def _one_rank_verdict(report: Report, config: Config) -> str:
    if report.matches_one_rank is None:
        why = f"resumed from {config.run.resume}" if config.run.resume else "train.compare_steps = 0"
        return f"not compared ({why})"
    tolerance = TOLERANCE[config.train.precision]
    verdict = "ok" if report.matches_one_rank else "NOT EQUAL: report this as a bug"
    return (
        f"first {report.compared_steps} steps: |Δloss| <= {report.largest_loss_difference:.1e},"
        f" |Δ gradient norm| <= {report.largest_grad_norm_difference:.1e}"
        f" (limit {tolerance:.0e}): {verdict}"
    )


def _bytes_verdict(report: Report) -> str:
    if report.bytes_agree:
        return "measured = scheduled on every rank at every step"
    return (
        f"NOT EQUAL: measured {report.bytes_sent}, scheduled {report.bytes_scheduled} bytes;"
        " report this as a bug"
    )


def _bytes(count: float) -> str:
    """Decimal units, as networks are rated."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def draw_loss(steps: Sequence[StepMetrics], report: Report, path: Path, unit: str = "byte") -> None:
    """The loss curve as a picture, in nats per `unit`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tokens = [step.step * step.tokens / 1e6 for step in steps]
    losses = [step.loss for step in steps]
    axes.plot(tokens, losses, color="tab:blue", linewidth=0.8, alpha=0.4, label="each step")
    axes.plot(tokens, _smooth(losses), color="tab:blue", linewidth=2, label="running mean")
    axes.set(
        xlabel="tokens seen (millions)",
        ylabel=f"loss (nats per {unit})",
        title=f"{report.text}: {report.first_loss:.2f} → {report.last_loss:.2f}",
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential running mean, with the start weighted so that it does not lag."""
    smoothed: list[float] = []
    mean = 0.0
    weight = 0.0  # what the values seen so far weigh: it tends to 1, and the mean from 0 is too small by it
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
