"""Metrics as they come: a line of JSON a step, and TensorBoard's events if asked."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from seqmesh.train.events import StepMetrics

METRICS = "metrics.jsonl"
_CURVES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "speed/tokens a second",
    "mfu_mask": "speed/MFU, the mask's pairs",
    "mfu_noncausal": "speed/MFU, seq_len^2 pairs",
    "seconds": "seconds/step",
    "data_seconds": "seconds/data",
    "waiting_seconds": "seconds/waiting",
    "documents": "text/documents",
}
"""Fields of a step that TensorBoard gets, by the name there."""


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


class MetricsLog:
    """The files of one run's metrics. A context manager."""

    def __init__(self, folder: Path, earlier: Sequence[StepMetrics], *, tensorboard: bool) -> None:
        """Begin them.

        Args:
            folder: of the run.
            earlier: the steps of the run that is resumed.
            tensorboard: whether to write its events too, in `folder`/tensorboard.

        Raises:
            ValueError: TensorBoard is not installed.
        """
        # What came after the checkpoint is hidden there.
        self._events = _tensorboard(folder / "tensorboard", len(earlier) + 1) if tensorboard else None
        self._lines = _begin_metrics(folder / METRICS, earlier)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        if self._events is not None:
            self._events.close()

    def add(self, step: StepMetrics) -> None:
        """One more step: on disk at once, so that a run that is stopped leaves every step that it took."""
        self._lines.write(_line(step))
        self._lines.flush()
        if self._events is None:
            return
        for field, name in _CURVES.items():
            self._events.add_scalar(name, getattr(step, field), step.step)
        for axis, sent in step.sent.items():
            self._events.add_scalar(f"bytes sent/{axis}", sent, step.step)
        self._events.flush()


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ValueError(
            "run.tensorboard needs the package tensorboard, which is not installed; pip install"
            " tensorboard, or leave it out"
        ) from None
    return SummaryWriter(str(folder), purge_step=first_step)
