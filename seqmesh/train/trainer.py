"""The training loop of one rank. Start reading here.

    global batch (1, s), the same on every rank      data.py; labels are shifted before anything is sharded
      -> schedule of its documents                   Schedule.build(batch.mask, mesh)
      -> this rank's tokens (1, n)                   schedule.shard
      -> logits (1, n, vocabulary)                   a plain transformers model, attention over all ranks
      -> sum of losses / labels of all ranks         loss.py
      -> gradients, summed over ranks                one all-reduce
      -> clip, AdamW                                 the same on every rank, so weights stay equal without being sent

The same class with the 1 x 1 mesh trains on one rank: that is how a run checks its own first steps.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import ByT5Tokenizer, PreTrainedModel

from seqmesh.engine.exchange import CountBytes
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.sharding import Schedule
from seqmesh.train import model as models
from seqmesh.train.config import Config, TrainConfig
from seqmesh.train.data import VOCAB_SIZE, Batch, Corpus, batches
from seqmesh.train.events import Compared, Event, Started, StepMetrics, Trained
from seqmesh.train.loss import next_token_loss

Emit = Callable[[Event], None]


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warm-up to `lr`, then a cosine to `lr * min_lr_ratio` at the last step. `step` counts from 0."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    progress = (step - train.warmup) / max(1, train.steps - 1 - train.warmup)
    low = train.lr * train.min_lr_ratio
    return low + (train.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Trainer:
    """Model, optimiser and batches of one rank of a mesh."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        mesh: SequenceMesh,
        peak_flops_per_s: float,
        *,
        vocabulary: int = VOCAB_SIZE,
    ) -> None:
        self.config, self.mesh, self.peak = config, mesh, peak_flops_per_s
        self.model = models.build(config, vocabulary).train()
        self.weights = models.matmul_parameters(self.model)
        self.batches = batches(
            corpus, seq_len=config.data.seq_len, sequences=config.data.sequences, seed=config.train.seed
        )
        self.optimizer = _adamw(self.model, config.train)
        self.taken = 0

    def step(self) -> StepMetrics:
        """One optimiser step. A collective over the mesh."""
        start = time.perf_counter()
        batch = next(self.batches)
        schedule = Schedule.build(batch.mask, self.mesh, layout=self.config.mesh.layout)
        lr = learning_rate(self.taken, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with CountBytes() as counted:
            loss = self._share_of_loss(batch, schedule)
            loss.backward()
        sum_gradients(self.model, self.mesh.size)
        grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip))
        self.optimizer.step()
        mine = (
            loss.item(),
            grad_norm,
            counted.bytes_sent,
            self._scheduled_bytes(schedule),
            weight_checksum(self.model),
        )
        facts = _gather(mine, self.mesh.size)
        _check_agreement(facts, self.taken + 1)
        self.taken += 1
        return self._metrics(batch, schedule, facts, lr, time.perf_counter() - start)

    def _share_of_loss(self, batch: Batch, schedule: Schedule) -> Tensor:
        input_ids, labels, positions = (
            schedule.shard(x, 1) for x in (batch.input_ids, batch.shift_labels, batch.position_ids)
        )
        logits = self.model(
            input_ids, position_ids=positions, schedule=schedule
        ).logits  # (1, n) -> (1, n, vocabulary)
        return next_token_loss(logits, labels, batch.label_count)

    def _scheduled_bytes(self, schedule: Schedule) -> int:
        """Bytes that this rank sends in a step, all layers, forward and backward, as the schedule says."""
        model = self.config.model
        one = schedule.traffic(
            batch=1, heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, dtype=torch.float32
        )
        return model.layers * (one.forward_bytes + one.backward_bytes)

    def _metrics(
        self, batch: Batch, schedule: Schedule, facts: Sequence[Sequence[float]], lr: float, seconds: float
    ) -> StepMetrics:
        data, model = self.config.data, self.config.model
        losses, norms, sent, scheduled, _ = zip(*facts, strict=True)
        flops, flops_noncausal = (
            models.step_flops(weights=self.weights, tokens=data.tokens, model=model, area=area)
            for area in (batch.mask.area, data.sequences * data.seq_len**2)
        )
        return StepMetrics(
            step=self.taken,
            loss=sum(losses),
            grad_norm=norms[0],
            lr=lr,
            seconds=seconds,
            tokens=data.tokens,
            labels=batch.label_count,
            documents=len(batch.mask.bands),
            area=batch.mask.area,
            layout=schedule.layout.name,
            flops=flops,
            tokens_per_s=data.tokens / seconds,
            mfu_mask=flops / (seconds * self.peak),
            mfu_noncausal=flops_noncausal / (seconds * self.peak),
            bytes_sent=int(sum(sent)),
            bytes_scheduled=int(sum(scheduled)),
            bytes_agree=sent == scheduled,
        )


def _adamw(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.95))


def sum_gradients(model: nn.Module, ranks: int) -> None:
    """Sum every gradient over the ranks of the default group, in one all-reduce: each rank holds its share of
    the mean loss.
    """
    if ranks == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for parameter, grad in zip(model.parameters(), flat.split([grad.numel() for grad in grads]), strict=True):
        parameter.grad = grad.view_as(parameter)


@torch.no_grad()
def weight_checksum(model: nn.Module) -> float:
    """Sum over all weights w of w + w^2, in fp64: a change in the last bit of an fp32 weight shows."""
    return float(
        sum(w.sum() + w.square().sum() for w in (parameter.double() for parameter in model.parameters()))
    )


def _gather(facts: Sequence[float], ranks: int) -> list[list[float]]:
    """The facts of every rank, by rank. fp64 holds byte counts exactly up to 2^53."""
    mine = torch.tensor(facts, dtype=torch.float64)
    if ranks == 1:
        return [mine.tolist()]
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(everyone, mine)
    return [one.tolist() for one in everyone]


def _check_agreement(facts: Sequence[Sequence[float]], step: int) -> None:
    """Nobody sends weights, so a rank with others than rank 0 must not go on.

    Only the weights can tell: gradients, and their norm, are summed to the same bits everywhere, whatever
    weights made them.
    """
    loss, norm, weights = sum(rank[0] for rank in facts), facts[0][1], [rank[4] for rank in facts]
    if not all(map(math.isfinite, (loss, norm, *weights))):
        raise FloatingPointError(
            f"step {step} has loss {loss}, gradient norm {norm} and weight checksum {weights[0]}; lower train.lr or lengthen train.warmup"
        )
    if strays := [rank for rank, checksum in enumerate(weights) if checksum != weights[0]]:
        raise RuntimeError(
            f"rank {strays[0]} diverged at step {step}: its weights have checksum {weights[strays[0]]!r}, rank 0's have {weights[0]!r};"
            " run all ranks on equal machines and libraries, or report this as a bug"
        )


def train(config: Config, corpus: Corpus, folder: Path, emit: Emit) -> None:
    """A whole run of one rank.

    The default process group is set up when the mesh has more than one rank, and is ended here.

    Args:
        config: the run.
        corpus: its text.
        folder: rank 0 writes folder/checkpoint.
        emit: called on rank 0 with every event.
    """
    torch.set_num_threads(config.run.threads)
    mesh = SequenceMesh.build(
        ulysses=config.mesh.ulysses, ring=config.mesh.ring, timeout=timedelta(seconds=config.run.timeout_s)
    )
    first = mesh.rank == 0
    trainer = Trainer(config, corpus, mesh, _measure_peak(mesh.size))
    if first:
        parameters = sum(p.numel() for p in trainer.model.parameters())
        emit(Started(parameters=parameters, matmul_parameters=trainer.weights, peak_flops_per_s=trainer.peak))
    beginning: list[StepMetrics] = []
    deadline = time.monotonic() + 60 * config.train.minutes if config.train.minutes else math.inf
    while trainer.taken < config.train.steps and _gather((time.monotonic() < deadline,), mesh.size)[0][0]:
        metrics = trainer.step()
        if first:
            emit(metrics)
        if len(beginning) < config.train.compare_steps:
            beginning.append(metrics)
    memory = tuple(int(peak) for (peak,) in _gather((peak_memory_bytes(),), mesh.size))
    if mesh.size > 1:
        # the other ranks are done: nobody waits, with whatever timeout, for rank 0's comparison
        dist.destroy_process_group()
    if first:
        save(trainer.model, folder / "checkpoint")
        emit(Trained(peak_memory_bytes=memory))
        if beginning:
            emit(compare_on_one_rank(config, corpus, beginning))


def _measure_peak(ranks: int, rounds: int = 6) -> float:
    """fp32 matmul FLOP/s of all ranks at once, the best of a few rounds: on shared cores that is what they
    can have together.
    """
    best = 0.0
    for _ in range(rounds):
        _gather((0.0,), ranks)  # start together
        best = max(best, sum(rate for (rate,) in _gather((models.measure_matmul_flops_per_s(),), ranks)))
    return best


def peak_memory_bytes() -> int:
    """Resident set high-water mark of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save(model: PreTrainedModel, folder: Path) -> None:
    """A checkpoint that plain transformers loads.

    How attention is computed is not part of it, so nothing has to be undone.
    """
    model.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)


def compare_on_one_rank(config: Config, corpus: Corpus, beginning: Sequence[StepMetrics]) -> Compared:
    """Repeat the first steps from the same seed with the 1 x 1 mesh, which exchanges nothing, and compare."""
    torch.set_num_threads(
        max(config.run.threads, min(config.mesh.world * config.run.threads, os.cpu_count() or 1))
    )
    alone = Trainer(config, corpus, SequenceMesh.build(), peak_flops_per_s=1.0)
    repeated = [alone.step() for _ in beginning]
    return Compared(
        losses=tuple(step.loss for step in repeated),
        grad_norms=tuple(step.grad_norm for step in repeated),
        largest_loss_difference=max(abs(a.loss - b.loss) for a, b in zip(beginning, repeated, strict=True)),
        largest_grad_norm_difference=max(
            abs(a.grad_norm - b.grad_norm) for a, b in zip(beginning, repeated, strict=True)
        ),
    )
