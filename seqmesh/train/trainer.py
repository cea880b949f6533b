"""A training step of one rank. Start reading here; loop.py takes the steps.

    sequences of a step, as pieces of documents         data/packing.py: the same on every rank
      -> those of this data-parallel rank               evening.py: work that is even over ranks
      -> its micro-batches, read and packed             (1, s); labels are shifted before anything is sharded
      -> this rank's tokens (1, n) and schedules        shard_micro_batches: one count of labels for all ranks
      -> sum of losses / labels of all ranks            ParallelModel.gradients: the model's own code, made
      -> gradients, summed over ranks                   parallel from outside, whatever the mesh
      -> clip, AdamW                                    one norm for all ranks
      -> facts of every rank, compared                  facts.py

The same class with one rank on every axis: that is how a run checks its own first steps.
"""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from seqmesh.parallel import LocalBatch, ParallelDims, ParallelMesh, shard_micro_batches
from seqmesh.train import device as devices
from seqmesh.train import model as models
from seqmesh.train import setup, step_folders
from seqmesh.train.bits import joined, weight_bits
from seqmesh.train.check import BitCheck, Computed
from seqmesh.train.checkpoint import Checkpoint, Progress, load_checkpoint
from seqmesh.train.config import Config, TrainConfig
from seqmesh.train.costs import RankCosts, WatchCosts, all_sent, mean_seconds
from seqmesh.train.data import Corpus, Piece, assemble, lengths_of, sequences
from seqmesh.train.evening import deal
from seqmesh.train.events import StepMetrics
from seqmesh.train.facts import RankFacts, check_agreement, gather_facts, weight_sum
from seqmesh.train.recipe import dump
from seqmesh.train.saving import Saver
from seqmesh.train.scheduled import scheduled_bytes
from seqmesh.train.sizes import ModelSizes
from seqmesh.train.whereabouts import Note, nowhere


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warm-up to `lr`, then a cosine to `lr * min_lr_ratio` at the last step. `step` counts from 0."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    progress = (step - train.warmup) / max(1, train.steps - 1 - train.warmup)
    low = train.lr * train.min_lr_ratio
    return low + (train.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class _StepText(NamedTuple):
    """What a step computes on, over all ranks."""

    documents: int
    labels: int
    """Tokens that predict something: the loss's denominator."""
    area: int
    """Allowed (query, key) pairs of a layer."""
    attention_work: int
    """Of all layers, see sizes.py."""

    @staticmethod
    def of(pieces: Sequence[Piece], sizes: ModelSizes) -> "_StepText":
        """Each piece is a document of its own, whose last token predicts nothing."""
        lengths = lengths_of(pieces)
        labels = sum(lengths) - len(lengths)
        return _StepText(len(lengths), labels, sizes.area(lengths), sizes.attention_work(lengths))


class Trainer:
    """Model, optimiser and batches of one rank of a mesh."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        mesh: ParallelMesh,
        peak_flops_per_s: float,
        *,
        note: Note = nowhere,
    ) -> None:
        """Build them; nothing is computed yet. A collective over all ranks.

        Args:
            config: the run.
            corpus: its text.
            mesh: of all parallelisms; its degrees are the recipe's.
            peak_flops_per_s: of all ranks together, which MFU is a share of.
            note: is told of every stage that this rank comes to.
        """
        self._note = note
        self.memory_before = devices.memory_bytes(config.run.device)
        """What this process had before it made its model, in bytes."""
        self.config = config
        self.corpus = corpus
        self.mesh = mesh
        self.peak_flops_per_s = peak_flops_per_s
        hollow = models.build_hollow(config, corpus.vocabulary)
        self.sizes = models.sizes_of(config, hollow)
        self.model = setup.build(config, mesh, hollow, corpus.vocabulary)
        self.optimizer = self.model.optimizer(
            partial(torch.optim.AdamW, lr=config.train.lr, betas=(0.9, 0.95)), self._parameter_groups()
        )
        self._holders = holders(mesh.dims, config.train.zero)
        self._check = BitCheck(self.model, mesh) if config.run.check_every else None
        self.saver = Saver(self.model, self.optimizer)
        self._begin_after(0)
        self.saved: Path | None = None
        """The checkpoint that holds, or will hold, what this is now; None before one is saved or loaded."""

    def _begin_after(self, steps: int) -> None:
        """Let the next step be the one after `steps`, with its text."""
        data = self.config.data
        self.steps_done = steps
        self.stream = sequences(
            self.corpus,
            seq_len=data.seq_len,
            seed=self.config.train.seed,
            skip=steps * data.sequences,
        )

    def save(self, run: Path) -> None:
        """Begin a checkpoint in a run's folder, unless it is there. A collective over all ranks.

        It is complete when `saver` has finished.

        Raises:
            ValueError: on all ranks alike, it cannot be written, or the one before could not be.
        """
        folder = step_folders.folder_of(run, self.steps_done).resolve()
        if self.saved == folder:
            return
        self._note(self.steps_done, "checkpoint")
        progress = Progress(
            step=self.steps_done,
            sequences=self.steps_done * self.config.data.sequences,
            recipe=dump(self.config),
            text=self.corpus.fingerprint,
            world=self.mesh.dims.world,
        )
        self.saver.begin(run, progress, self.config.run.keep)
        self.saved = folder

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was saved. A collective over all ranks.

        Raises:
            ValueError: on all ranks alike, a file of it that is damaged.
        """
        load_checkpoint(checkpoint, self.model, self.optimizer)
        if self._check is not None:
            self._check.updated(weight_bits(self.model.parameters()))
        self._begin_after(checkpoint.progress.step)
        self.saved = checkpoint.folder.resolve()

    def _parameter_groups(self) -> list[dict[str, object]]:
        # Norms and biases, those of experts too, have a scale of their own, which decay would pull to 0.
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        is_matrix = [p.ndim >= 2 and not name.endswith("bias") for name, p in named]
        matrices = [p for (_, p), decays in zip(named, is_matrix, strict=True) if decays]
        vectors = [p for (_, p), decays in zip(named, is_matrix, strict=True) if not decays]
        return [
            {"params": matrices, "weight_decay": self.config.train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def next_batches(self) -> tuple[LocalBatch, ...]:
        """This rank's tokens of the step after the last, which that step is then without."""
        return self._local_batches(list(islice(self.stream, self.config.data.sequences)))

    def step(self) -> StepMetrics:
        """One optimiser step. A collective over all ranks."""
        start = time.perf_counter()
        self._at("data")
        packed = list(islice(self.stream, self.config.data.sequences))
        batches = self._local_batches(packed)
        data_seconds = time.perf_counter() - start
        lr = learning_rate(self.steps_done, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._at("forward and backward")
        share, watch = self._gradients(batches)
        with self._watched_by(watch):
            self._at("clip")
            grad_norm = self.model.clip(self.config.train.clip)
            self._at("update")
            self.optimizer.step()
        self._at("facts")
        bits = weight_bits(self.model.parameters())
        if self._check is not None:
            self._check.updated(bits)
        mine = RankFacts(
            loss_share=share.item(),
            grad_norm=grad_norm,
            bytes_scheduled=sum(self.scheduled_traffic(batches).values()),
            weight_sum=weight_sum(self.model.parameters()),
            weight_bits=joined(bits),
            costs=RankCosts(data_seconds, watch.waiting_seconds, watch.by_known_axis(self.mesh)),
        )
        facts = gather_facts(mine, self.mesh.dims.world)
        check_agreement(facts, self.steps_done + 1, self._holders)
        self.steps_done += 1
        text = _StepText.of([piece for sequence in packed for piece in sequence], self.sizes)
        layout = batches[0].schedule.layout.name
        return self._metrics(text, layout, facts, lr, time.perf_counter() - start)

    def _watched_by(self, watch: WatchCosts) -> AbstractContextManager[object]:
        """Of one rank nothing is sent, and watching every operator costs some per cent."""
        return watch if self.mesh.dims.world > 1 else nullcontext()

    def _at(self, stage: str) -> None:
        self._note(self.steps_done + 1, stage)

    def _gradients(self, batches: Sequence[LocalBatch]) -> Computed:
        """Gradients of a step, checked if it is its turn, and this rank's share of the loss."""

        def compute() -> Computed:
            self.optimizer.zero_grad(set_to_none=True)
            watch = WatchCosts()
            with self._watched_by(watch):
                share = self.model.gradients(batches)
            return share, watch

        if self._check is None:
            return compute()
        step = self.steps_done + 1
        if self._is_checked():
            return self._check.gradients(step, compute)
        self._check.weights(step)
        return compute()

    def _is_checked(self) -> bool:
        """Whether the coming step is computed twice."""
        return (self.steps_done + 1) % self.config.run.check_every == 0

    def _local_batches(self, step: Sequence[tuple[Piece, ...]]) -> tuple[LocalBatch, ...]:
        """This rank's tokens of its micro-batches. What other data-parallel ranks compute is not read."""
        ranks = self.config.mesh.data_parallel
        work = [self.sizes.attention_work(lengths_of(sequence)) for sequence in step]
        dealt = deal(work, ranks, self.config.micro_batches)
        mine = dealt[self.mesh.rank("data")]
        packed = [assemble(self.corpus, [piece for one in batch for piece in step[one]]) for batch in mine]
        return shard_micro_batches(
            packed, self.mesh, layout=self.config.mesh.placement, layers=self.sizes.kinds
        )

    def scheduled_traffic(self, batches: Sequence[LocalBatch]) -> dict[str, int]:
        """Bytes that layers send from this rank in a step to mix tokens, forward and backward, by axis."""
        own = {number for part in self.model.parts for number in part.anatomy.own_numbers}
        dtype = self.model.plan.param_dtype or torch.float32
        return scheduled_bytes(self.sizes, own, batches, tp=self.mesh.dims.tp, dtype=dtype)

    def _metrics(
        self,
        text: _StepText,
        layout: str,
        facts: Sequence[RankFacts],
        lr: float,
        seconds: float,
    ) -> StepMetrics:
        data = self.config.data
        flops = self.sizes.step_flops(data.tokens, text.attention_work)
        all_pairs = self.sizes.noncausal_work(data.sequences, data.seq_len)
        flops_noncausal = self.sizes.step_flops(data.tokens, all_pairs)
        costs = [rank.costs for rank in facts]
        data_seconds, waiting_seconds = mean_seconds(costs)
        return StepMetrics(
            step=self.steps_done,
            # ranks of tp have the same share
            loss=sum(rank.loss_share for rank in facts[:: self.mesh.dims.tp]),
            grad_norm=facts[0].grad_norm,
            lr=lr,
            seconds=seconds,
            tokens=data.tokens,
            labels=text.labels,
            documents=text.documents,
            area=text.area,
            layout=layout,
            flops=flops,
            tokens_per_s=data.tokens / seconds,
            mfu_mask=flops / (seconds * self.peak_flops_per_s),
            mfu_noncausal=flops_noncausal / (seconds * self.peak_flops_per_s),
            bytes_sent=sum(rank.bytes_sent for rank in facts),
            bytes_scheduled=int(sum(rank.bytes_scheduled for rank in facts)),
            bytes_agree=all(rank.bytes_sent == rank.bytes_scheduled for rank in facts),
            sent=all_sent(costs),
            data_seconds=data_seconds,
            waiting_seconds=waiting_seconds,
        )


def holders(dims: ParallelDims, zero: int) -> list[tuple[int, ...]]:
    """What each rank holds of the weights: ranks with equal entries hold the same, and must agree."""
    found = []
    for rank in range(dims.world):
        place: dict[str, int] = {}
        for axis, degree in reversed(dims.degrees.items()):
            rank, place[axis] = divmod(rank, degree)
        shard = (place["dp_shard"], place["ring"], place["ulysses"]) if zero >= 2 else ()
        found.append((place["pp"], place["tp"], *shard))
    return found
