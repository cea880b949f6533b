"""What a step is expected to hold, to send and to take. train/ shows it; who works it out is handed in.

Foresight.expect     before a rank starts     memory and bytes, traced            seqmesh/trace
Foresight.predict    at the end               seconds and memory, priced          seqmesh/planner
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from seqmesh.train.config import Config


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Of the rank that needs most memory, or why nothing is known."""

    rank: int = 0
    peak_bytes: int = 0
    """Of tensors; libraries, and what an allocator rounds up or keeps, come on top."""
    peak_phase: str = ""
    """forward, backward or update."""
    memory: dict[str, int]
    """Bytes at the peak by category: parameters, gradients, optimizer, activations, temporaries."""
    sent: dict[str, int]
    """Bytes that this rank sends in a step, by axis of the mesh."""
    unknown: str = ""
    """Why it could not be worked out; empty if it was."""


class Predicted(NamedTuple):
    """What the planner says of a run."""

    seconds: float
    """Of a step."""
    mfu_mask: float
    memory_bytes: int
    machine: str
    """What it was priced for."""
    priced_otherwise: tuple[str, ...]
    """Keys whose values it does not price, and what it takes in their place."""


class Foresight(NamedTuple):
    """Both, for who starts a run."""

    expect: Callable[[Config, int], Expected]
    """From a recipe and the number of its model's token ids."""
    predict: Callable[[Config, int, str], Predicted | None]
    """From these and PyTorch's name of the device; None for a machine that it does not know."""
