"""The answer of `seqmesh plan` in five lines.

Run       the point that we would run first: among ties, room to spare, few savers, headroom (search.py)
It takes  a step and memory, each with its error
Ties      the other meshes that the model cannot tell from it; or by how much it is ahead
Rests on  where rates come from, and the assumption that moves the step most
Try       on a real machine, before anything is believed
"""

from dataclasses import asdict

from seqmesh.planner.candidates import mesh_of
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.errors import HEADROOM, MEMORY_ERROR, TIE, is_roomy, step_error
from seqmesh.planner.inputs.units import format_bytes, format_seconds
from seqmesh.planner.search import Found
from seqmesh.planner.sensitivity import sensitivities
from seqmesh.planner.words import knob_words, mesh_words, point_words

MOST_TIES = 3
"""Ties that are named; of the others, how many there are."""


def answer(costs: CostModel, found: Found, written: str | None = None) -> list[str]:
    """The lines.

    Args:
        costs: of the job.
        found: by its search: something that fits.
        written: where the plan is written for that program, if it is.
    """
    best = found.tied[0]
    return [
        _run(costs, best, written),
        _takes(costs, best),
        _ties(costs, found),
        _rests_on(costs, best),
        _try(costs, best, found, written),
    ]


def _run(costs: CostModel, best: StepEstimate, written: str | None) -> str:
    ranks, program = costs.job.cluster.gpus, costs.job.stack.program
    point = f"Run {mesh_words(best.point)}, {knob_words(best.point)}"
    if program == "seqmesh" and (refused := costs.job.model.untrainable):
        return f"{point}; not by seqmesh train: {refused}."
    emit = "--emit plan.toml" if program == "seqmesh" else f"--emit plan.sh --emit-for {program}"
    add = "" if written else f"add {emit}, then "
    return f"{point}: {add}{_started(costs, written)} on {ranks} GPU{'s' if ranks > 1 else ''}."


def _started(costs: CostModel, written: str | None) -> str:
    """What starts the plan, by the program that it was priced for."""
    by_seqmesh = costs.job.stack.program == "seqmesh"
    return f"seqmesh train {written or 'plan.toml'}" if by_seqmesh else f"sh {written or 'plan.sh'}"


def _takes(costs: CostModel, best: StepEstimate) -> str:
    memory, capacity = best.memory.total, costs.job.capacity
    room = "" if is_roomy(costs.job, best.memory) else f", less than {HEADROOM:.0%} of it free"
    error = step_error(costs.job)
    return (
        f"It takes {format_seconds(best.seconds)} a step (± {error:.0%}), {best.mfu_causal:.1%} MFU, and"
        f" {format_bytes(memory)} (± {MEMORY_ERROR:.0%}) of a GPU's {format_bytes(capacity)}{room}."
    )


def _ties(costs: CostModel, found: Found) -> str:
    best, *ties = found.tied
    if ties:
        named = ", ".join(
            f"{mesh_words(one.point)} ({one.seconds / best.seconds - 1:+.1%})" for one in ties[:MOST_TIES]
        )
        more = f" and {len(ties) - MOST_TIES} more" if len(ties) > MOST_TIES else ""
        return f"Ties, within {TIE:.0%}, too close to tell: {named}{more}."
    others = [one for one in found.best if mesh_of(one.point) != mesh_of(best.point)]
    if not others:
        return "Ties: none; no other mesh fits."
    gap = others[0].seconds / best.seconds - 1
    if gap > step_error(costs.job):
        return f"Ties: none. It wins: the next, {mesh_words(others[0].point)}, takes {gap:.0%} longer."
    return (
        f"Ties: none, but the next, {mesh_words(others[0].point)}, takes only {gap:.1%} longer, which is"
        f" within the model's error."
    )


def _rests_on(costs: CostModel, best: StepEstimate) -> str:
    gpu = costs.job.cluster.gpu
    rates = "a measured profile" if gpu.measured else "data-sheet rates that nobody measured here"
    strongest = next(iter(sensitivities(costs, [best], asdict(best.point))), None)
    if strongest is None:
        return f"It rests on {rates}."
    trial = max(strongest.trials, key=lambda one: one.change)
    assumed = next(one for one in costs.job.assumptions.explain() if one.name == strongest.name)
    name = strongest.name.replace("_", " ")
    balance = f"{costs.job.assumptions.expert_balance:.3g}x the mean tokens"
    experts = (
        f" Of the ranks that share experts the busiest gets {balance}." if best.point.experts > 1 else ""
    )
    return (
        f"It rests on {rates}, and most on {name}: with {trial.value:.3g} in place of {assumed.value:.3g}"
        f" a step takes {trial.change:.0%} longer.{experts}"
    )


def _try(costs: CostModel, best: StepEstimate, found: Found, written: str | None) -> str:
    low, high = ((1 + sign * step_error(costs.job)) * best.seconds for sign in (-1, 1))
    tie = f"; then {point_words(found.tied[1].point)}" if len(found.tied) > 1 else ""
    by_seqmesh = costs.job.stack.program == "seqmesh" and not costs.job.model.untrainable
    run = f"{_started(costs, written)} --steps 5" if by_seqmesh else "5 steps"
    return (
        f"Try first: {run}{tie}. Outside {format_seconds(low)} to"
        f" {format_seconds(high)}, the rates are not yours."
    )
