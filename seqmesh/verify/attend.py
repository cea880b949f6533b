"""One rank's part of a case: its tokens' output and gradients, and the whole put together from all ranks'.

    global q, k, v  -- shard -->  attention on the mesh  -->  parts of every rank  -->  global results

Parts carry the positions of their tokens, and every token must come from exactly one rank: what is put
together does not rely on `unshard`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqmesh.engine.attention import attention
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.sharding import Schedule
from seqmesh.verify.cases import AttentionCase
from seqmesh.verify.oracle import Global, Results, autocast_of, input_dtype


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank computed, on the CPU; or why it did not."""

    queries: Tensor
    """(n,) positions of its queries"""
    keys: Tensor
    """(m,) positions of its keys"""
    local: Results
    """out and dq of its queries, dk and dv of its keys, dsinks of what it computed"""
    failure: str | None = None


def attend(case: AttentionCase, given: Global, mesh: SequenceMesh, device: torch.device) -> Part:
    """Run the case on this rank. A collective."""
    schedule = Schedule.build(case.made_mask(), mesh, case.layout)
    leaves = _local_leaves(case, given, schedule, device)
    weights = schedule.shard(given.weights, 1).to(device)
    local = _run(case, schedule, leaves, weights, _called(case))
    failure = None
    if case.mode == "checkpoint":
        plain = _run(case, schedule, _local_leaves(case, given, schedule, device), weights, _plainly)
        failure = (
            _differs(local, plain) if device.type == "cpu" else None
        )  # CUDA's backward adds in any order
    return Part(
        queries=schedule.positions(),
        keys=schedule.positions(keys=True),
        local={name: x.cpu() for name, x in local.items()},
        failure=failure,
    )


def _local_leaves(
    case: AttentionCase, given: Global, schedule: Schedule, device: torch.device
) -> list[Tensor]:
    """This rank's q, k, v, and sinks if there are any."""
    local = [schedule.shard(given.q, 1), schedule.shard(given.k, 1, keys=True)]
    local.append(schedule.shard(given.v, 1, keys=True))
    if given.sinks is not None:
        local.append(given.sinks)
    return [x.detach().to(device, input_dtype(case), copy=True).requires_grad_() for x in local]


Attend = Callable[..., Tensor]


def _run(
    case: AttentionCase, schedule: Schedule, leaves: list[Tensor], weights: Tensor, attend_as: Attend
) -> Results:
    """Output and gradients of this rank."""
    q, k, v, *sinks = leaves
    call = partial(
        attention,
        schedule=schedule,
        softcap=case.softcap,
        sinks=sinks[0] if sinks else None,
        kernel=case.kernel,
    )
    with autocast_of(case, q.device):
        out = attend_as(call, q, k, v)
    (out * weights.to(out.dtype)).sum().backward()
    found = {"out": out.detach()}
    for name, leaf in zip(("dq", "dk", "dv", "dsinks"), leaves, strict=False):
        found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def _called(case: AttentionCase) -> Attend:
    """How the case calls attention."""
    if case.mode == "compile":
        return _in_a_graph
    return _recomputed if case.mode == "checkpoint" else _plainly


def _plainly(call: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return call(q, k, v)


def _recomputed(call: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Times one: the layer around attention is recomputed too, as a model's is.
    out: Tensor = checkpoint(lambda *given: call(*(x * 1 for x in given)), q, k, v, use_reentrant=False)
    return out


def _in_a_graph(call: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # aot_eager traces, makes functional and differentiates as inductor does, and needs no C++ compiler.
    compiled = torch.compile(
        lambda *given: call(*(x * 1 for x in given)), fullgraph=True, backend="aot_eager"
    )
    out: Tensor = compiled(q, k, v)
    return out


def _differs(recomputed: Results, plain: Results) -> str | None:
    """Recomputation repeats the same operations: equal to the last bit."""
    for name, x in recomputed.items():
        if not torch.equal(x, plain[name]):
            most = float((x - plain[name]).abs().max())
            return f"activation checkpointing changed {name} by {most:.1e}"
    return None


def assemble(case: AttentionCase, parts: Sequence[Part]) -> Results:
    """The global results.

    Raises:
        ValueError: a token that no rank, or that more than one rank, holds.
    """
    mask = case.made_mask()
    for side, length in (("queries", mask.q_len), ("keys", mask.k_len)):
        held = torch.cat([getattr(part, side) for part in parts]).sort().values
        if not torch.equal(held, torch.arange(length)):
            raise ValueError(f"the ranks' {side} are not the {length} tokens, each once")
    whole = {
        name: _gathered(name, "queries" if name in ("out", "dq") else "keys", parts)
        for name in ("out", "dq", "dk", "dv")
    }
    if case.sinks:
        whole["dsinks"] = torch.stack([part.local["dsinks"] for part in parts]).sum(0)
    return whole


def _gathered(name: str, side: str, parts: Sequence[Part]) -> Tensor:
    """(b, tokens, heads, d) in global order."""
    held = torch.cat([getattr(part, side) for part in parts])
    return torch.cat([part.local[name] for part in parts], 1)[:, held.argsort()]
