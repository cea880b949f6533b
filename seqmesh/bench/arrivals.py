"""What ranks that do not exist send: copies of what this rank sends, as large as what would arrive.

PyTorch's "fake" backend fills what an all-gather receives. What an all-to-all or a reduce-scatter receives it
fills in 2.13 and leaves as it was allocated in 2.11: on a GPU NaN may lie there. Here the copies are made
where the backend makes none, on the device's current stream, in the order of the compute.

Source: FakeProcessGroup.hpp of both versions.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import nan
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqmesh.trace.fake_ranks import replaced


@contextmanager
def arrivals_filled() -> Iterator[None]:
    """Within, collectives of the default process group, a "fake" one, give numbers."""
    with ExitStack() as undone:
        if not is_filled_by_backend():
            functional = torch.ops._c10d_functional
            undone.enter_context(_returning(functional, "all_to_all_single"))
            undone.enter_context(_returning(functional, "reduce_scatter_tensor"))
            for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # of 2.11, of 2.13
                if hasattr(dist, name):
                    undone.enter_context(_writing(name))
        yield


def is_filled_by_backend() -> bool:
    """Whether PyTorch's own backend makes the copies."""
    received = torch.full((dist.get_world_size(),), nan)
    dist.all_to_all_single(received, torch.ones_like(received))
    return not bool(received.isnan().any())


def fill(received: Tensor, sent: Tensor) -> None:
    """Write what is sent, again and again, until all is written; zeros if it is nothing."""
    into, source = received.view(-1), sent.reshape(-1)
    if not source.numel():
        into.zero_()
        return
    for start in range(0, into.numel(), source.numel()):
        part = into[start : start + source.numel()]
        part.copy_(source[: part.numel()])


def _returning(owner: Any, name: str) -> Any:
    """A functional collective, which returns what it received."""
    return replaced(owner, name, _Filled(getattr(owner, name)))


class _Filled:
    """In the place of PyTorch's, whose parts (`default`) PyTorch itself asks it for."""

    def __init__(self, collective: Any) -> None:
        self._collective = collective

    def __call__(self, sent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        received: Tensor = self._collective(sent, *args, **kwargs)
        fill(received, sent)
        return received

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collective, name)


def _writing(name: str) -> Any:
    """A collective that writes what it received."""
    collective = getattr(dist, name)

    def filled(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:  # PyTorch's names
        work = collective(output, input, *args, **kwargs)
        fill(output, input)
        return work

    return replaced(dist, name, filled)
