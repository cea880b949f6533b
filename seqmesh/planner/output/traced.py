"""What `seqmesh plan --trace-memory` prints: traced memory beside predicted."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.units import format_bytes, format_tokens


def show_traced(out: Console, job: Job, result: Mapping[str, Any]) -> None:
    """The two, each with its parts.

    Args:
        out: where to print.
        job: that was traced.
        result: the keys of the JSON of this mode.
    """
    traced = dict(result["traced_bytes"])
    predicted = dict(result["predicted_bytes"])
    out.print(
        f"one rank's peak in a step of seqmesh train ({result['precision']}, {result['point']}):"
        f" {escape(job.model.name)}, {format_tokens(job.seq_len)} tokens\n"
    )
    peak = traced.pop("peak_bytes")
    phase = traced.pop("peak_phase")
    phases: dict[str, int] = {}
    for name in list(traced):
        if name.endswith("_peak_bytes"):
            phases[name.removesuffix("_peak_bytes")] = traced.pop(name)
    out.print(f"traced     {format_bytes(peak)} in the {phase}: {_sizes(traced)}")
    out.print(f"           peaks of the phases: {_sizes(phases)}")
    total = predicted.pop("total")
    out.print(f"predicted  {format_bytes(total)}: {_sizes(predicted)}")
    out.print(f"predicted / traced  {result['predicted_over_traced']:.3f}")


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in sizes.items() if size)
