"""What layers that carry a state cost over ranks: a group of Qwen3-Next's, forward + backward, fp32.

    seqmesh bench hybrid [--quick] [--json FILE]

    one process    transformers' layers, three delta rules and one attention, two threads       1.00
    two ranks      a thread each, on those two cores                                            <= 1.3
                   bytes that the ranks send: as the schedule says
    a rank         buffers of 1, 2, 4 ranks, times ranks                                        1

Sides take turns within one run, as in speed.py. One document, so that plain causal layers are right. On CPU
transformers' own kernel computes, whose backward takes a time that grows with the square of a call's tokens:
a rank's calls are shorter, which flatters us.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from seqmesh import masks
from seqmesh.bench.figures import Figure, Spread
from seqmesh.bench.memory import held_figure, peak_bytes
from seqmesh.bench.report import run_figures
from seqmesh.bench.speed import Degrees, Timing, clocked, in_turns, wall_seconds
from seqmesh.engine.exchange import CountBytes
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.sharding import Schedule
from seqmesh.integrations.transformers import plug_in
from seqmesh.processes import Workers
from seqmesh.train.scheduled import attention_bytes, recurrence_bytes
from seqmesh.train.sizes import ModelSizes

TARGET = 1.3
THREADS = 2
"""Of the one process, and of both ranks together."""
TIMED_MESH = Degrees(1, 2)
HELD_MESHES = (Degrees(1, 1), Degrees(1, 2), Degrees(2, 2))


@dataclass(frozen=True, kw_only=True)
class HybridSizes:
    """What is timed and counted."""

    tokens: int = 8192
    held_tokens: int = 4096
    hidden: int = 256
    head_dim: int = 128
    """Of keys and values of the delta rules."""
    repeats: int = 3
    """Pairs that count."""
    is_judged: bool = True
    """Whether times are long enough to mean something."""


QUICK = HybridSizes(tokens=512, held_tokens=512, hidden=64, head_dim=16, repeats=1, is_judged=False)


class HybridRun(NamedTuple):
    """One worker's forward and backward."""

    timing: Timing
    bytes_sent: int
    scheduled_bytes: int


def run_hybrid(quick: bool, json_path: Path | None) -> int:
    """Measure and print everything: the exit code. Forks workers: call it before any tensor work.

    Raises:
        ValueError: json_path cannot be written; before anything is measured.
    """
    return run_figures(measure_hybrid(QUICK if quick else HybridSizes()), quick, json_path)


def measure_hybrid(sizes: HybridSizes) -> Iterator[Figure]:
    """The figures, in the order of the table above."""
    yield from _times(sizes)
    yield from _buffers(sizes)


def _times(sizes: HybridSizes) -> Iterator[Figure]:
    with ExitStack() as stack:
        alone = stack.enter_context(Workers(partial(_alone, sizes), threads=THREADS))
        ranks = stack.enter_context(Workers(partial(_on_ranks, sizes), world=TIMED_MESH.world))
        pairs = in_turns(alone, ranks, None, sizes.repeats)
    ratio = Spread.of(
        [wall_seconds(run.timing for run in ours) / wall_seconds(plain) for plain, ours in pairs]
    )
    ours: list[HybridRun] = pairs[-1][1]
    section = f"3 delta rules and 1 attention, {sizes.tokens:,} tokens"
    yield Figure(
        section=section,
        what=f"{TIMED_MESH}: time / one process, {THREADS} threads",
        measured=ratio.text(3),
        target=f"<= {TARGET}",
        ok=ratio.median <= TARGET if sizes.is_judged else None,
        exact=False,
        values=ratio.values("wall_ratio"),
    )
    sent, scheduled = sum(run.bytes_sent for run in ours), sum(run.scheduled_bytes for run in ours)
    yield Figure(
        section=section,
        what="bytes that all ranks send",
        measured=f"{sent:,}",
        target=f"{scheduled:,}, as scheduled",
        ok=[run.bytes_sent for run in ours] == [run.scheduled_bytes for run in ours],
        exact=True,
        values={"bytes_sent": sent, "scheduled_bytes": scheduled},
    )


def _buffers(sizes: HybridSizes) -> Iterator[Figure]:
    alone = 0
    for mesh in HELD_MESHES:
        with Workers(partial(_held, sizes, mesh), world=mesh.world) as ranks:
            most = max(ranks.ask(None))
        alone = alone or most
        yield held_figure(
            section=f"the same, {sizes.held_tokens:,} tokens",
            what=f"buffers of the fullest of {mesh}, without weights; times ranks / one's",
            peak=most,
            ranks=mesh.world,
            alone=alone,
        )


def _config(sizes: HybridSizes) -> Qwen3NextConfig:
    """One group of layers, with dense MLPs."""
    return Qwen3NextConfig(
        vocab_size=64,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        mlp_only_layers=[0, 1, 2, 3],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=sizes.hidden // 4,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=sizes.head_dim,
        linear_value_head_dim=sizes.head_dim,
        max_position_embeddings=sizes.tokens,
    )


def _model(sizes: HybridSizes) -> Qwen3NextForCausalLM:
    torch.manual_seed(0)
    return Qwen3NextForCausalLM(_config(sizes)).train()


def _step(model: Any, ids: Tensor, positions: Tensor, **schedule: Schedule) -> None:
    """Forward and backward of the layers; gradients add up."""
    out = model.model(input_ids=ids, position_ids=positions, use_cache=False, **schedule).last_hidden_state
    out.square().sum().backward()


def _batch(tokens: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randint(64, (1, tokens), generator=made), torch.arange(tokens)[None]


def _alone(sizes: HybridSizes) -> Callable[[None], Timing]:
    """The side to compare with."""
    step = partial(_step, _model(sizes), *_batch(sizes.tokens))
    return lambda _: clocked(step)


def _schedule(tokens: int, degrees: Degrees) -> Schedule:
    mesh = SequenceMesh.build(ulysses=degrees.ulysses, ring=degrees.ring)
    return Schedule.build(masks.causal(tokens), mesh)


def _sharded_step(sizes: HybridSizes, schedule: Schedule) -> Callable[[], None]:
    """This rank's part of a step."""
    ids, positions = (schedule.shard(x, 1) for x in _batch(schedule.mask.q_len))
    return partial(_step, plug_in(_model(sizes)), ids, positions, schedule=schedule)


def _on_ranks(sizes: HybridSizes) -> Callable[[None], HybridRun]:
    """Our side."""
    schedule = _schedule(sizes.tokens, TIMED_MESH)
    step = _sharded_step(sizes, schedule)
    with torch.device("meta"):
        scheduled = _scheduled(ModelSizes.of(Qwen3NextForCausalLM(_config(sizes))), schedule)

    def handle(_: None) -> HybridRun:
        dist.barrier()  # requests reach the ranks one after the other
        with CountBytes() as sent:
            timing = clocked(step)
        return HybridRun(timing, sent.bytes_sent, scheduled)

    return handle


def _held(sizes: HybridSizes, degrees: Degrees) -> Callable[[None], int]:
    """Bytes of this rank's buffers."""
    step = _sharded_step(sizes, _schedule(sizes.held_tokens, degrees))

    def handle(_: None) -> int:
        step()  # makes the gradients of weights
        return peak_bytes(step)

    return handle


def _scheduled(sizes: ModelSizes, schedule: Schedule) -> int:
    """Bytes that this rank sends, forward and backward."""
    attention = [sum(attention_bytes(call, schedule, 1, torch.float32).values()) for call in sizes.calls]
    return sum(attention) + sum(
        recurrence_bytes(call, schedule, 1, torch.float32) for call in sizes.recurrent
    )
