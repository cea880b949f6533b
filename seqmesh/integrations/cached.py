"""What a K/V cache that is spread over a mesh does to a model's forward: the seam between a model and it.

    before the outermost model     cache.begin(...)        its tokens, or this rank's, and no mask
    in every attention             forward.attend(...)     instead of a schedule's
    after the inner model          forward.finish(...)     the rows that logits are asked of, on every rank

The cache itself is in seqmesh.generate; this file is what integrations know of it.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn


class Softmax(NamedTuple):
    """How a layer makes weights of logits, as `seqmesh.attention` says."""

    scale: float | None
    softcap: float | None
    sinks: Tensor | None


class CachedForward(ABC):
    """One forward of a model on a cache. Travels through its layers in place of a schedule."""

    past: int
    """Tokens before this forward's, padding included: where transformers counts places from."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        chunk: int | None,
        softmax: Softmax,
    ) -> Tensor:
        """q (b, n, h, d), k and v as the cache's layer returned them, rows second -> (b, n, h, e).

        `window` and `chunk` are the layer's, in tokens; None for none.
        """

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """(b, n, H) of this rank's tokens -> (b, rows, H) of the last tokens, on every rank alike."""


class SequenceCache(ABC):
    """A K/V cache of a whole mesh."""

    @abstractmethod
    def begin(self, call: str, given: dict[str, Any]) -> dict[str, Any]:
        """A model's keyword arguments -> those with which it is to run, the forward as `schedule`.

        Raises:
            ValueError: what cannot be honoured, named after `call`; on every rank alike.
        """


def finish_cached(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a model: let the cache choose the last hidden states that go on."""
    forward = kwargs.get("schedule")
    if not isinstance(forward, CachedForward):
        return output
    if isinstance(output, tuple):  # return_dict=False
        return (forward.finish(output[0]), *output[1:])
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = forward.finish(output.last_hidden_state)
    return output
