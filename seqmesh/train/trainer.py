"""The training loop of one rank. Start reading here.

    global batch (1, s), the same on every rank      data.py; labels are shifted before anything is sharded
      -> schedule of its documents                   Schedule.build(batch.mask, mesh)
      -> this rank's tokens (1, n)                   schedule.shard
      -> logits (1, n, vocabulary)                   a plain transformers model, attention over all ranks
      -> sum of losses / labels of all ranks         loss.py
      -> gradients, summed over ranks                one all-reduce
      -> clip, AdamW                                 the same on every rank: weights stay equal, unsent
      -> facts of every rank, compared               facts.py

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
from seqmesh.train.facts import RankFacts, check_agreement, gather, gather_facts, weight_checksum
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
        """Build them; nothing is computed yet.

        Args:
            config: the run.
            corpus: its text.
            mesh: the ranks that share every sequence.
            peak_flops_per_s: of all ranks together, which MFU is a share of.
            vocabulary: token ids of the model.
        """
        self.config = config
        self.mesh = mesh
        self.peak_flops_per_s = peak_flops_per_s
        self.model = models.build(config, vocabulary).train()
        self.matmul_parameters = models.count_matmul_parameters(self.model)
        self.batches = batches(
            corpus, seq_len=config.data.seq_len, sequences=config.data.sequences, seed=config.train.seed
        )
        self.optimizer = _adamw(self.model, config.train)
        self.steps_done = 0

    def step(self) -> StepMetrics:
        """One optimiser step. A collective over the mesh."""
        start = time.perf_counter()
        batch = next(self.batches)
        schedule = Schedule.build(batch.mask, self.mesh, layout=self.config.mesh.layout)
        lr = learning_rate(self.steps_done, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        # Only what attention sends is counted: the schedule knows nothing of the all-reduce that follows.
        with CountBytes() as counted:
            loss = self._share_of_loss(batch, schedule)
            loss.backward()
        sum_gradients(self.model, self.mesh.size)
        grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip))
        self.optimizer.step()
        mine = RankFacts(
            loss_share=loss.item(),
            grad_norm=grad_norm,
            bytes_sent=counted.bytes_sent,
            bytes_scheduled=self._scheduled_bytes(schedule),
            weight_checksum=weight_checksum(self.model),
        )
        facts = gather_facts(mine, self.mesh.size)
        check_agreement(facts, self.steps_done + 1)
        self.steps_done += 1
        return self._metrics(batch, schedule, facts, lr, time.perf_counter() - start)

    def _share_of_loss(self, batch: Batch, schedule: Schedule) -> Tensor:
        input_ids = schedule.shard(batch.input_ids, 1)  # (1, s) -> (1, n), as the next two
        labels = schedule.shard(batch.shift_labels, 1)
        positions = schedule.shard(batch.position_ids, 1)
        # (1, n) -> (1, n, vocabulary)
        logits = self.model(input_ids, position_ids=positions, schedule=schedule).logits
        return next_token_loss(logits, labels, batch.label_count)

    def _scheduled_bytes(self, schedule: Schedule) -> int:
        """Bytes that this rank sends in a step, all layers, forward and backward, as the schedule says."""
        model = self.config.model
        of_a_layer = schedule.traffic(
            batch=1, heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, dtype=torch.float32
        )
        return model.layers * (of_a_layer.forward_bytes + of_a_layer.backward_bytes)

    def _metrics(
        self, batch: Batch, schedule: Schedule, facts: Sequence[RankFacts], lr: float, seconds: float
    ) -> StepMetrics:
        data = self.config.data
        flops = self._flops(batch.mask.area)
        flops_noncausal = self._flops(data.sequences * data.seq_len**2)
        return StepMetrics(
            step=self.steps_done,
            loss=sum(rank.loss_share for rank in facts),
            grad_norm=facts[0].grad_norm,
            lr=lr,
            seconds=seconds,
            tokens=data.tokens,
            labels=batch.label_count,
            documents=len(batch.mask.bands),
            area=batch.mask.area,
            layout=schedule.layout.name,
            flops=flops,
            tokens_per_s=data.tokens / seconds,
            mfu_mask=flops / (seconds * self.peak_flops_per_s),
            mfu_noncausal=flops_noncausal / (seconds * self.peak_flops_per_s),
            bytes_sent=int(sum(rank.bytes_sent for rank in facts)),
            bytes_scheduled=int(sum(rank.bytes_scheduled for rank in facts)),
            bytes_agree=all(rank.bytes_sent == rank.bytes_scheduled for rank in facts),
        )

    def _flops(self, area: int) -> float:
        """FLOPs of a step whose mask allows `area` pairs."""
        return models.step_flops(
            matmul_parameters=self.matmul_parameters,
            tokens=self.config.data.tokens,
            model=self.config.model,
            area=area,
        )


def _adamw(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    # Norms and biases have a scale of their own, which decay would pull to 0.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.95))


def sum_gradients(model: nn.Module, ranks: int) -> None:
    """Sum every gradient over the ranks of the default group, in one all-reduce.

    Each rank holds the gradient of its share of the mean loss, so the sum is the gradient of the loss.
    """
    if ranks == 1:
        return
    # A parameter that this rank's tokens did not use has no gradient here, but may have one elsewhere.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    sums = flat.split([grad.numel() for grad in grads])
    for parameter, grad in zip(model.parameters(), sums, strict=True):
        parameter.grad = grad.view_as(parameter)


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
    trainer = Trainer(config, corpus, mesh, _measure_peak(mesh.size))
    beginning = _take_steps(trainer, emit)
    memory = gather(peak_memory_bytes(), mesh.size)
    if mesh.size > 1:
        # the other ranks are done: nobody waits, with whatever timeout, for rank 0's comparison
        dist.destroy_process_group()
    if mesh.rank == 0:
        save(trainer.model, folder / "checkpoint")
        emit(Trained(peak_memory_bytes=tuple(int(peak) for peak in memory)))
        if beginning:
            emit(compare_on_one_rank(config, corpus, beginning))


def _take_steps(trainer: Trainer, emit: Emit) -> list[StepMetrics]:
    """All steps of a run; returns the first ones, which are repeated on one rank afterwards."""
    config = trainer.config.train
    first_rank = trainer.mesh.rank == 0
    if first_rank:
        emit(
            Started(
                parameters=sum(p.numel() for p in trainer.model.parameters()),
                matmul_parameters=trainer.matmul_parameters,
                peak_flops_per_s=trainer.peak_flops_per_s,
            )
        )
    beginning: list[StepMetrics] = []
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else math.inf
    while trainer.steps_done < config.steps and _time_is_left(deadline, trainer.mesh.size):
        metrics = trainer.step()
        if first_rank:
            emit(metrics)
        if len(beginning) < config.compare_steps:
            beginning.append(metrics)
    return beginning


def _time_is_left(deadline: float, ranks: int) -> bool:
    """Rank 0's clock decides for all: a rank that stopped by its own would leave the others waiting."""
    return bool(gather(time.monotonic() < deadline, ranks)[0])


def _measure_peak(ranks: int, rounds: int = 6) -> float:
    """fp32 matmul FLOP/s of all ranks together, the best of a few rounds.

    All measure at once: on shared cores that is what they can have together.
    """
    best = 0.0
    for _ in range(rounds):
        gather(0.0, ranks)  # start together
        rates = gather(models.measure_matmul_flops_per_s(), ranks)
        best = max(best, sum(rates))
    return best


def peak_memory_bytes() -> int:
    """Resident set high-water mark of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save(model: PreTrainedModel, folder: Path) -> None:
    """A checkpoint that plain transformers loads.

    How attention is computed is not part of it, so nothing has to be undone.
    """
    model.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)


def compare_on_one_rank(config: Config, corpus: Corpus, beginning: Sequence[StepMetrics]) -> Compared:
    """Repeat the first steps from the same seed with the 1 x 1 mesh, which exchanges nothing, and compare."""
    # The other ranks have ended: their cores are free.
    threads_of_all = config.mesh.world * config.run.threads
    torch.set_num_threads(max(config.run.threads, min(threads_of_all, os.cpu_count() or 1)))
    alone = Trainer(config, corpus, SequenceMesh.build(), peak_flops_per_s=1.0)
    repeated = [alone.step() for _ in beginning]
    pairs = list(zip(beginning, repeated, strict=True))
    return Compared(
        losses=tuple(step.loss for step in repeated),
        grad_norms=tuple(step.grad_norm for step in repeated),
        largest_loss_difference=max(abs(a.loss - b.loss) for a, b in pairs),
        largest_grad_norm_difference=max(abs(a.grad_norm - b.grad_norm) for a, b in pairs),
    )
