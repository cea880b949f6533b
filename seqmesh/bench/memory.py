"""Peak memory of a piece of code, counted at PyTorch's CPU allocator.

It is repeatable to the byte, unlike resident-set sizes.

Source: the profiler's memory events; each allocation and each release is one, with its size.
"""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from seqmesh.bench.figures import Figure


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that were allocated at a time while `run()` ran, beyond what was allocated before.

    Its result counts: it is released after the profiler has stopped.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = run()
    results = profiler.profiler.kineto_results
    memory_events = [event for event in results.events() if event.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in memory_events)
    del kept  # kept until the profiler has stopped: a release of the result is no part of the run
    now = peak = 0
    for _, size in changes:  # negative for a release
        now += size
        peak = max(peak, now)
    return peak


def held_figure(*, section: str, what: str, peak: int, ranks: int, alone: int) -> Figure:
    """Bytes that the fullest of some ranks holds; times ranks, in parts of what one rank holds alone."""
    share = peak * ranks / alone
    return Figure(
        section=section,
        what=what,
        measured=f"{peak / 2**20:.1f} MiB, {share:.3f}",
        target="",
        ok=None,
        exact=True,
        values={"peak_bytes": peak, "share": share},
    )
