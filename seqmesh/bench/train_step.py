"""What a training step through seqmesh costs: time against a plain loop, memory against one rank.

    seqmesh bench train-step [--quick] [--json FILE]

    plain      transformers' model and PyTorch: forward, cross entropy, backward, clip, AdamW      1.00
    one rank   the same model, text and optimiser through Trainer.step, as many threads            <= 1.02
    two ranks  a thread each, against the plain loop with two                                      <= 1.08

Sides take turns within one run, as in speed.py. A step of ours also reads text, makes schedules, counts bytes
and compares checksums. Each sequence is one document, so that a plain causal mask is right.

Memory is a ZeRO-3 step in bf16, counted at PyTorch's allocator: what a rank holds and what it allocates on
top. Times the number of ranks it would be one rank's, if nothing were whole on every rank: a layer's gathered
weights are, and a tile of logits.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves

from seqmesh.bench.figures import Figure, Spread
from seqmesh.bench.memory import held_figure, peak_bytes
from seqmesh.bench.report import run_figures
from seqmesh.bench.speed import Timing, clocked, in_turns, wall_seconds
from seqmesh.parallel.shards import local_part
from seqmesh.processes import REQUEST_SECONDS, Workers, connect_alone
from seqmesh.train import model as models
from seqmesh.train import setup
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from seqmesh.train.data import Corpus, Piece, assemble
from seqmesh.train.trainer import Trainer, learning_rate

ONE_RANK_TARGET = 1.02
TWO_RANKS_TARGET = 1.08
TIMED = Config(
    mesh=MeshConfig(ulysses=1, ring=1),
    model=ModelConfig(hidden=512, layers=4, heads=8, kv_heads=4, intermediate=1408),
    data=DataConfig(seq_len=4096),
    train=TrainConfig(lr=1e-5, steps=1_000_000),
)
MESHES = ((1, 1), (2, 1), (1, 2))
"""(ulysses, ring): one rank, then two."""
THREADS = 2
"""Of the plain loop, and of all ranks together."""
HELD = replace(
    TIMED,
    model=ModelConfig(hidden=256, layers=8, heads=8, kv_heads=8, intermediate=704),
    data=DataConfig(seq_len=8192),
    train=replace(TIMED.train, zero=3, precision="bf16"),
)
HELD_MESHES = ((1, 1), (2, 1), (2, 2), (4, 2))


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What is timed and counted."""

    timed: Config = TIMED
    held: Config = HELD
    repeats: int = 9
    """Pairs that count."""
    is_judged: bool = True
    """Whether times are long enough to mean something."""


QUICK = StepSizes(
    timed=replace(TIMED, data=DataConfig(seq_len=256)),
    held=replace(HELD, data=DataConfig(seq_len=2048)),
    repeats=1,
    is_judged=False,
)


def run_train_step(quick: bool, json_path: Path | None) -> int:
    """Measure and print everything: the exit code. Forks workers: call it before any tensor work.

    Raises:
        ValueError: json_path cannot be written; before anything is measured.
    """
    sizes = QUICK if quick else StepSizes()
    return run_figures(chain(measure_time(sizes), measure_memory(sizes.held)), quick, json_path)


def measure_time(sizes: StepSizes) -> Iterator[Figure]:
    """One rank, then two, each against the plain loop."""
    config = sizes.timed
    with ExitStack() as stack:
        plain = stack.enter_context(Workers(partial(_plain_loop, config), threads=THREADS))
        for ulysses, ring in MESHES:
            world = ulysses * ring
            target = ONE_RANK_TARGET if world == 1 else TWO_RANKS_TARGET
            prepare = partial(_trainer_step, replace(config, mesh=MeshConfig(ulysses=ulysses, ring=ring)))
            with Workers(prepare, world=world, threads=THREADS // world) as ours:
                pairs = in_turns(plain, ours, None, sizes.repeats)
            ratios = Spread.of([wall_seconds(mine) / wall_seconds(theirs) for theirs, mine in pairs])
            yield Figure(
                section=f"training step, {config.data.tokens:,} tokens",
                what=f"U={ulysses}, R={ring}, {THREADS // world} thread(s) a rank: time / plain loop's",
                measured=ratios.text(3),
                target=f"<= {target}",
                ok=ratios.median <= target if sizes.is_judged else None,
                exact=False,
                values=ratios.values("wall_ratio"),
            )


def _text(config: Config) -> Corpus:
    """One document of random bytes that fills a sequence."""
    return Corpus(source="random", documents=(Random(0).randbytes(config.data.seq_len - 1),))


def _trainer_step(config: Config) -> Callable[[None], Timing]:
    """Our side."""
    mesh = setup.dims_of(config.mesh).build()
    trainer = Trainer(config, _text(config), mesh, peak_flops_per_s=1.0)

    def handle(_: None) -> Timing:
        if dist.is_initialized():
            dist.barrier()  # requests reach the ranks one after the other
        return clocked(trainer.step)

    return handle


def _plain_loop(config: Config) -> Callable[[None], Timing]:
    """The side to compare with: nothing of seqmesh but the text."""
    corpus, train = _text(config), config.train
    model = models.build(config).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.95))
    packed = assemble(corpus, [Piece(0, 0, config.data.seq_len)])
    steps = iter(range(train.steps))

    def step() -> float:
        lr = learning_rate(next(steps), train)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), packed.shift_labels.flatten(), ignore_index=-100)
        loss.backward()
        clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        return loss.item()

    return lambda _: clocked(step)


def measure_memory(config: Config) -> Iterator[Figure]:
    """A rank's peak on 1, 2, 4 and 8 ranks."""
    alone = 0
    for ulysses, ring in HELD_MESHES:
        on_mesh = replace(config, mesh=MeshConfig(ulysses=ulysses, ring=ring))
        with Workers(partial(_allocated, on_mesh), world=ulysses * ring) as ranks:
            peak = max(ranks.ask(None))
        alone = alone or peak
        yield held_figure(
            section=f"ZeRO-3 step in bf16, {config.data.tokens:,} tokens",
            what=f"memory of a rank, U={ulysses}, R={ring}; times ranks / one rank's",
            peak=peak,
            ranks=ulysses * ring,
            alone=alone,
        )


def _allocated(config: Config) -> Callable[[None], int]:
    """Bytes of this rank at the peak of its second step: AdamW makes its states in the first."""
    if not dist.is_initialized():  # FSDP wants a group, also of one rank
        connect_alone(REQUEST_SECONDS)
    trainer = Trainer(config, _text(config), setup.dims_of(config.mesh).build(), peak_flops_per_s=1.0)
    trainer.step()
    optimizer = trainer.optimizer

    def handle(_: None) -> int:
        optimizer.zero_grad(set_to_none=True)
        states = tree_leaves(list(optimizer.state.values()))
        held = [local_part(x) for x in (*trainer.model.parameters(), *states)]
        return sum(x.nbytes for x in held) + peak_bytes(trainer.step)

    return handle
