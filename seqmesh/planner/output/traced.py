"""What `seqmesh plan --trace-memory` prints: traced memory beside predicted."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.units import format_bytes, format_tokens
from seqmesh.planner.output.console import named_bytes


def show_traced(out: Console, job: Job, result: Mapping[str, Any]) -> None:
    """The two, each with its parts.

    Args:
        out: where to print.
        job: that was traced.
        result: the keys of the JSON of this mode.
    """
    traced = result["traced_bytes"]
    kinds = {name: size for name, size in traced.items() if "peak" not in name}
    phases = {
        name.removesuffix("_peak_bytes"): size
        for name, size in traced.items()
        if name.endswith("_peak_bytes")
    }
    predicted = {name: size for name, size in result["predicted_bytes"].items() if name != "total"}
    out.print(
        f"one rank's peak in a step of seqmesh train ({result['precision']}, {result['point']}):"
        f" {escape(job.model.name)}, {format_tokens(job.seq_len)} tokens\n"
    )
    peak = format_bytes(traced["peak_bytes"])
    out.print(f"traced     {peak} in the {traced['peak_phase']}: {named_bytes(kinds)}")
    out.print(f"           peaks of the phases: {named_bytes(phases)}")
    total = format_bytes(result["predicted_bytes"]["total"])
    out.print(f"predicted  {total}: {named_bytes(predicted)}")
    out.print(f"predicted / traced  {result['predicted_over_traced']:.3f}")
