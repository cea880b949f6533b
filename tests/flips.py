"""Steps in which one bit flips: somewhere, at some time, on some rank. For the tests of the check of bits."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqmesh.parallel import LocalBatch
from seqmesh.parallel.shards import local_part
from seqmesh.train.check import FlippedBitError
from seqmesh.train.exchanges import _collective_of, _wait
from seqmesh.train.trainer import Trainer

PLACES = ("weight before", "weight between", "gradient", "handed over", "on the way", "received")
COPIES = {"all_to_all_single", "_allgather_base_", "all_gather_into_tensor", "send", "broadcast_"}
"""Collectives that move what they are given. Others add, and may round a bit away that flips on the way."""
NOT_RECEIVED = {"send", "_reduce_scatter_base_"}
"""Messages are not here yet when the call returns. gloo copies what was scattered whenever somebody waits for
it: a bit that flips between two waits flips back."""


@dataclass(kw_only=True)
class Flip:
    """A bit that flips once: at the chance-th of the opportunities that its place has in a step."""

    place: str
    rank: int
    pass_number: int
    """0 or 1: the first or the second time that the step is computed."""
    chance: random.Random
    opportunities: list[int]
    """Of the places of exchanges, on this rank, as an earlier step had them."""
    done: str = ""
    """What flipped."""

    def flip(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
        """Flip a bit of a tensor, whatever it is and whoever remembers its version; returned to be undone."""
        x = local_part(x).data
        place = tuple(self.chance.randrange(size) for size in x.shape)
        bit = self.chance.randrange(8 * x.element_size())
        flip_bit(x, place, bit)
        self.done = f"bit {bit} of {place} in {tuple(x.shape)}"
        return x, place, bit


def flip_bit(x: Tensor, place: tuple[int, ...], bit: int) -> None:
    content = x[place].clone().view(1).view(torch.uint8)
    content[bit // 8] ^= 1 << bit % 8
    x[place] = content.view(x.dtype)[0]


class Injector(TorchDispatchMode):
    """Flips a bit of one exchange, and counts the tensors of the others."""

    def __init__(self, place: str, flip: Flip | None) -> None:
        super().__init__()
        self.place = place
        self.seen = 0
        self.flip = flip if flip is not None and flip.place == place else None
        self.target = -1
        if self.flip is not None:
            self.target = self.flip.chance.randrange(self.flip.opportunities[PLACES.index(place)])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        call = _collective_of(func, args, given)
        if call is None:
            return func(*args, **given)
        if self.place == "handed over" or (self.place == "on the way" and call.what.split()[0] in COPIES):
            self._maybe(call.sent)
        result = func(*args, **given)
        if self.place == "received" and call.what.split()[0] not in NOT_RECEIVED:
            if func.namespace == "c10d":
                _wait(result)
                self._maybe(call.received)
            else:
                self._maybe([torch.ops._c10d_functional.wait_tensor(result)])
        return result

    def _maybe(self, tensors: Sequence[Tensor]) -> None:
        for x in tensors:
            # Before a pipeline begins, stages send each other pickles of what they expect: one that is
            # damaged ends the step, or lets the peer wait until its time is over.
            if x.numel() and x.is_floating_point():
                if self.flip is not None and self.seen == self.target:
                    self.flip.flip(x)
                self.seen += 1


Undo = tuple[Tensor, tuple[int, ...], int]
"""What flipped, to flip back."""


class Flipping:
    """Computes a trainer's gradients, and lets the bit flip in them or around them."""

    def __init__(self, trainer: Trainer, flip: Flip | None) -> None:
        self.compute = trainer.model.gradients
        self.trainer = trainer
        self.flip = flip
        self.passes = 0
        self.opportunities = [0] * len(PLACES)
        self.outer: list[Injector] = []
        self.flipped: list[Undo] = []

    def gradients(self, batches: Sequence[LocalBatch]) -> Tensor:
        mine = self.flip if self.flip is not None and self.flip.pass_number == self.passes else None
        self.passes += 1
        injectors = [
            Injector(place, mine)
            for place in PLACES[3:]
            if self.flip is None or (mine and mine.place == place)
        ]
        self.outer[:] = [one for one in injectors if one.place != "handed over"]
        with ExitStack() as inner:
            for one in injectors:
                if one.place == "handed over":
                    inner.enter_context(one)
            share = self.compute(batches)
        self.outer.clear()
        for one in injectors:
            self.opportunities[PLACES.index(one.place)] = one.seen
        if mine is not None and mine.place == "gradient":
            mine.flip(some([p.grad for p in self.trainer.model.parameters()], mine.chance))
        if mine is not None and mine.place == "weight between":
            self.flip_weight(mine)
        return share

    def flip_weight(self, flip: Flip) -> None:
        self.flipped.append(flip.flip(some(list(self.trainer.model.parameters()), flip.chance)))


@contextmanager
def flipping(trainer: Trainer, flip: Flip | None) -> Iterator[list[int]]:
    """Let the bit flip in the step that is taken here; gives the opportunities of every place."""
    around = Flipping(trainer, flip)
    if flip is not None and flip.place == "weight before":
        around.flip_weight(flip)
    trainer.model.gradients = around.gradients  # type: ignore[method-assign]
    try:
        with ExitStack() as outside:
            if flip is None or flip.place in ("on the way", "received"):
                outside.enter_context(Outside(around.outer))
            yield around.opportunities
    finally:
        trainer.model.gradients = around.compute  # type: ignore[method-assign]
        for x, place, bit in around.flipped:
            flip_bit(x, place, bit)


class Outside(TorchDispatchMode):
    """Lets injectors act on what the check has recorded already: it calls them from outside of it."""

    def __init__(self, injectors: list[Injector]) -> None:
        super().__init__()
        self.injectors = injectors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("c10d", "_c10d_functional") or not self.injectors:
            return func(*args, **(kwargs or {}))
        with ExitStack() as stack:
            for injector in self.injectors:
                stack.enter_context(injector)
            return func(*args, **(kwargs or {}))


def some(tensors: Sequence[Tensor | None], chance: random.Random) -> Tensor:
    """One that has elements on this rank."""
    found = [x for x in tensors if x is not None and local_part(x).numel()]
    return chance.choice(found)


def flip_bits(trainer: Trainer, seed: int, count: int) -> list[tuple[str, int, str]]:
    """On one rank: steps with a flip each, between two steps without one; place, rank and what was said."""
    with flipping(trainer, None) as opportunities:
        trainer.step()
    said = []
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        place = chance.choice(PLACES)
        victim = chance.randrange(dist.get_world_size())
        pass_number = chance.randrange(2)
        flip = Flip(
            place=place, rank=victim, pass_number=pass_number, chance=chance, opportunities=opportunities
        )
        error = ""
        with flipping(trainer, flip if dist.get_rank() == victim else None):
            try:
                trainer.step()
            except FlippedBitError as found:
                error = str(found)
        assert dist.get_rank() != victim or flip.done
        said.append((place, victim, error))
    trainer.step()
    return said
