"""Replay one case of tests/test_attention.py on ranks of your own, and print how far off it is.

    torchrun --nproc-per-node=4 tests/replay.py "Case(mask=masks.causal(37), ulysses=2, ring=2)"

The text is what a failing test prints. As many ranks must be started as the case's mesh has.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from oracle import Case, assemble, attend, dense, errors

from seqmesh import layouts, masks
from seqmesh.layouts import Layout, Span
from seqmesh.masks import Band, Mask

NAMES = {thing.__name__: thing for thing in (Case, Mask, Band, Layout, Span)}


def parse(text: str) -> Case:
    """The case that a text of Python spells out."""
    case = eval(text, {"torch": torch, "masks": masks, "layouts": layouts, **NAMES})
    assert isinstance(case, Case), f"{text!r} is a {type(case).__name__}; pass Case(...)"
    return case


def main(text: str) -> None:
    """Run the case on every rank; rank 0 compares and prints."""
    case = parse(text)
    dist.init_process_group("gloo")
    mine = attend([case])[0]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        for name, error in errors(assemble(case, everyone), dense(case)).items():
            print(f"{name:6} {error:.2e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
