"""The figures of a finished run, beside what was expected of it, and the report as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from seqmesh.provenance import machine
from seqmesh.train.config import Config, MeshConfig
from seqmesh.train.data import Corpus
from seqmesh.train.events import Compared, Started, StepMetrics, Trained
from seqmesh.train.expected import Expected, Predicted
from seqmesh.train.units import in_bytes, in_memory, in_parameters

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1}
"""Largest |Δloss| and |Δ gradient norm| against one rank, by the precision of both.

The latter is relative to norms above 1. In fp32 rounding in another order gives 1e-7 to 4e-5. In bf16 every
activation is rounded to 8 bits, and the rows of an embedding's gradient are added up in them: this finds what
is broken, not what is off by a little.
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of a finished run."""

    text: str
    documents: int
    corpus_tokens: int
    parameters: int
    trained_parameters: int
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
    data_seconds: float
    """Of a step, as for the next two: medians, means over ranks."""
    waiting_seconds: float
    """In collectives, and for them."""
    compute_seconds: float
    """The rest."""
    sent: dict[str, float]
    """Bytes of a step by axis, all ranks: means over steps."""
    peak_memory_bytes: tuple[int, ...]
    grown_memory_bytes: int
    """What the rank that grew most took on top of libraries, what its allocator keeps included."""
    held_bytes: dict[str, int]
    """Parameters, gradients and optimiser states of the rank that has most."""
    expected: Expected | None
    """None if it was not asked for."""
    predicted: Predicted | None
    """The planner's; None for a machine that it does not know."""

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
    expected: Expected | None = None,
    predicted: Predicted | None = None,
) -> Report:
    """The report of a run's events."""
    last_tenth = steps[-max(1, len(steps) // 10) :]
    return Report(
        text=corpus.source,
        documents=len(corpus.documents),
        corpus_tokens=corpus.tokens,
        parameters=started.parameters,
        trained_parameters=started.trained,
        steps=len(steps),
        first_loss=steps[0].loss,
        last_loss=sum(step.loss for step in last_tenth) / len(last_tenth),
        **_medians(steps),
        peak_flops_per_s=started.peak_flops_per_s,
        bytes_per_step=sum(step.bytes_sent for step in steps) / len(steps),
        bytes_sent=sum(step.bytes_sent for step in steps),
        bytes_scheduled=sum(step.bytes_scheduled for step in steps),
        bytes_agree=all(step.bytes_agree for step in steps),
        **_comparison(compared, precision),
        sent=_mean_sent(steps),
        peak_memory_bytes=trained.peak_memory_bytes,
        grown_memory_bytes=trained.grown_memory_bytes,
        held_bytes=trained.held_bytes,
        expected=expected,
        predicted=predicted,
    )


def _comparison(compared: Compared | None, precision: str) -> dict[str, Any]:
    """Fields of a report that compare with one rank."""
    return {
        "compared_steps": len(compared.losses) if compared is not None else 0,
        "largest_loss_difference": None if compared is None else compared.largest_loss_difference,
        "largest_grad_norm_difference": None if compared is None else compared.largest_grad_norm_difference,
        "matches_one_rank": None if compared is None else compared.largest_difference <= TOLERANCE[precision],
    }


def _medians(steps: Sequence[StepMetrics]) -> dict[str, Any]:
    """Fields of a report that are medians over steps."""
    return {
        "tokens_per_s": median(step.tokens_per_s for step in steps),
        "step_seconds": median(step.seconds for step in steps),
        "mfu_mask": median(step.mfu_mask for step in steps),
        "mfu_noncausal": median(step.mfu_noncausal for step in steps),
        "data_seconds": median(step.data_seconds for step in steps),
        "waiting_seconds": median(step.waiting_seconds for step in steps),
        "compute_seconds": median(step.seconds - step.data_seconds - step.waiting_seconds for step in steps),
    }


def _mean_sent(steps: Sequence[StepMetrics]) -> dict[str, float]:
    axes = dict.fromkeys(axis for step in steps for axis in step.sent)
    return {axis: sum(step.sent.get(axis, 0) for step in steps) / len(steps) for axis in axes}


def describe(config: Config, report: Report, seconds: float, folder: Path) -> str:
    """The report as text: one line per finding."""
    model, mesh, data = config.model, config.mesh, config.data
    hardware = machine()
    peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in report.peak_memory_bytes)
    lines = {
        "model": f"{model.name}, {in_parameters(report.parameters, report.trained_parameters)},"
        f" {config.train.precision}",
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
        "time": f"{report.compute_seconds:.2f} s computing, {report.waiting_seconds:.2f} waiting for others"
        f" and for what they send, {report.data_seconds:.2f} for data (medians)",
        "plan": _prediction(report),
        "exchanged": f"{in_bytes(report.bytes_per_step)} a step along the sequence, all ranks;"
        f" {_bytes_verdict(report)}",
        "sent": ", ".join(f"{axis} {in_bytes(sent)}" for axis, sent in report.sent.items()) or "nothing",
        "memory": f"peak {peaks} MiB on ranks 0, 1, ..., libraries included",
        "": _memory_by_kind(report),
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


def _prediction(report: Report) -> str:
    predicted = report.predicted
    if predicted is None:
        return "not priced: the planner does not know this machine (run.profile takes a measured one)"
    text = (
        f"{predicted.seconds:.2f} s a step, MFU {predicted.mfu_mask:.1%}, {in_memory(predicted.memory_bytes)}"
        f" a rank on {predicted.machine}; measured {report.step_seconds:.2f} s, {report.mfu_mask:.1%}"
    )
    return text + "".join(f"; {one}" for one in predicted.priced_otherwise)


def _memory_by_kind(report: Report) -> str:
    held = ", ".join(f"{kind} {in_memory(size)}" for kind, size in report.held_bytes.items() if size)
    text = f"without them {in_memory(report.grown_memory_bytes)}: {held}, the rest in a step"
    if report.expected is None or report.expected.unknown:
        return text
    return f"{text}; expected were {in_memory(report.expected.peak_bytes)} of tensors"


def _bytes_verdict(report: Report) -> str:
    if report.bytes_agree:
        return "measured = scheduled on every rank at every step"
    return (
        f"NOT EQUAL: measured {report.bytes_sent}, scheduled {report.bytes_scheduled} bytes;"
        " report this as a bug"
    )
