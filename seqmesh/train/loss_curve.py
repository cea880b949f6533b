"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

from seqmesh.train.events import StepMetrics


def draw_loss(steps: Sequence[StepMetrics], title: str, path: Path, unit: str = "byte") -> None:
    """Each step's loss and its running mean, in nats per `unit`."""
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
        title=title,
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
