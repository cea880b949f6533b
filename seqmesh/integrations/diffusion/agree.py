"""Whether all ranks of a mesh got the same call, and one seed for all of them.

Ranks that draw their own noise would each denoise a piece of another image, and nothing would fail. So every
forward compares a sum over the bits of its tensors, their shapes and the plain values beside them, before
anything else is exchanged: two numbers for each argument, to every rank of the ulysses group and then to
every rank of the ring group.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from seqmesh.engine.exchange import all_gather
from seqmesh.engine.mesh import SequenceMesh

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of so many bytes."""
_FACTOR = 1_000_003


def same_seed(mesh: SequenceMesh, seed: int | None = None) -> int:
    """Seed PyTorch's generators alike on all ranks of a mesh: with `seed`, or with rank 0's present one.

    A collective: every rank calls it. Returns the seed.
    """
    own = torch.initial_seed() if seed is None else seed
    # Two halves, as a seed has 64 bits and an int64 has one of them for the sign.
    halves = torch.tensor([own >> 32, own & 0xFFFFFFFF], dtype=torch.int64, device=_device(mesh))
    for group, size in _groups(mesh):
        halves = _from_every_rank(halves, group, size)[0]
    high, low = halves.tolist()
    chosen = int(high << 32 | low)
    torch.manual_seed(chosen)
    return chosen


def check_alike(mesh: SequenceMesh, call: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of which ranks got different ones, on every rank alike. A collective.

    Raises:
        ValueError: the arguments that differ.
    """
    if mesh.size == 1:
        return
    sums = torch.stack([_summary(given, _device(mesh)) for given in arguments.values()])
    differs = torch.zeros_like(sums)
    # What the ulysses group finds travels along the ring too, so all ranks find the same.
    for group, size in _groups(mesh):
        others = _from_every_rank(torch.cat([sums, differs]), group, size)
        their_sums, their_finds = others.split(len(arguments), 1)
        differs = ((their_sums != sums) | (their_finds != 0)).any(0).to(torch.int64)
    wrong = [name for name, found in zip(arguments, differs.tolist(), strict=True) if found]
    if wrong:
        raise ValueError(
            f"{call}: ranks of one mesh got different {', '.join(wrong)}, so they would compute pieces of"
            " different images; pass the same on every rank: generator=torch.Generator().manual_seed(0), or"
            " call seqmesh.integrations.diffusers.same_seed(mesh) first (or, if only encoders round"
            " differently, plug_in(..., compare_inputs=False))"
        )


def _summary(given: Any, device: torch.device) -> Tensor:
    """One number, int64, for an argument: bits and shapes of its tensors, and its plain values."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for leaf in _leaves(given):
        if isinstance(leaf, Tensor):
            bits = _bits(leaf.detach()).flatten().to(torch.int64)
            # times its place, or samples that are swapped would look the same
            number = (bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum().to(device)
            described = str(tuple(leaf.shape))
        else:
            number = total.new_zeros(())
            described = str(leaf)
        # wraps around, alike everywhere
        total = total * _FACTOR + number * _FACTOR + crc32(described.encode())
    return total


def _bits(x: Tensor) -> Tensor:
    """A tensor's numbers as whole ones."""
    plain = torch.view_as_real(x) if x.is_complex() else x
    return plain.contiguous().view(_BITS[plain.element_size()])


def _leaves(given: Any) -> Iterator[Tensor | bool | float | str | None]:
    """Tensors and plain values in an argument, in order; what else there is has no say."""
    if isinstance(given, Tensor | bool | int | float | str) or given is None:
        yield given
    elif isinstance(given, dict):
        for key in sorted(given):
            yield key
            yield from _leaves(given[key])
    elif isinstance(given, tuple | list):
        yield len(given)
        for one in given:
            yield from _leaves(one)


def _groups(mesh: SequenceMesh) -> Iterator[tuple[str, int]]:
    """Names and sizes of the groups that there are, from the inner to the outer."""
    for group, size in ((mesh.ulysses_group, mesh.ulysses), (mesh.ring_group, mesh.ring)):
        if group is not None:
            yield group, size


def _from_every_rank(values: Tensor, group: str, size: int) -> Tensor:
    """(k,) of this rank -> (size, k) of all ranks of a group, in their order."""
    return all_gather(values, [len(values)] * size, group).view(size, -1)


def _device(mesh: SequenceMesh) -> torch.device:
    """A device whose tensors the ranks can exchange; the CPU if they can."""
    types = mesh.device_types
    return torch.device("cpu" if "cpu" in types or not types else min(types))
