"""What a step is expected to hold and to send, known before a rank starts. seqmesh/trace works it out."""

from collections.abc import Callable
from dataclasses import dataclass

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


Expect = Callable[[Config, int], Expected]
"""From a recipe and the number of its model's token ids."""
