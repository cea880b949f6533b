"""Which schedule is a layer's: models mix layers that see all of a document, a window of it, or a chunk.

One layout serves all of them, so tokens never move between layers; each kind of layer has a schedule with its
own mask. What a layer may see, as its configuration says, must be in its schedule's mask.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from seqmesh.engine.sharding import Schedule
from seqmesh.masks import Mask

FULL = "full_attention"
SLIDING = "sliding_attention"
CHUNKED = "chunked_attention"
"""Types of layers, as transformers' configurations call them."""


@dataclass(frozen=True)
class LayerSchedules:
    """The schedules of a forward.

    Raises:
        ValueError: layouts that differ.
    """

    full: Schedule
    sliding: Schedule | None = None
    chunked: Schedule | None = None

    def __post_init__(self) -> None:
        for name, other in (("sliding_schedule", self.sliding), ("chunked_schedule", self.chunked)):
            if other is not None and other.layout != self.full.layout:
                raise ValueError(
                    f"{name} has another layout than schedule; build it with layout=schedule.layout"
                )

    def of_layer(self, layer: str, window: int | None, chunk: int | None) -> Schedule:
        """The schedule of a layer with a sliding window, or a chunk, of so many tokens, or neither.

        Raises:
            ValueError: its mask lets tokens meet that the layer must keep apart.
        """
        if chunk is not None:
            chosen = self.chunked or self.full
            _check_reach(
                f"{layer} attends within chunks of {chunk} tokens",
                chosen.mask,
                chunk,
                f"build the schedule from mask & masks.chunked(s, {chunk}) and pass it as chunked_schedule=",
            )
            return chosen
        if window is None:
            return self.full
        chosen = self.sliding or self.full
        _check_reach(
            f"{layer} has a sliding window of {window} tokens",
            chosen.mask,
            window,
            f"build the schedule from mask & masks.sliding_window(s, {window}) and pass it as"
            " sliding_schedule= (or schedule=, if every layer slides)",
        )
        return chosen


def _check_reach(layer: str, mask: Mask, limit: int, remedy: str) -> None:
    reach = furthest(mask)
    if reach >= limit:
        raise ValueError(f"{layer} but its schedule's mask lets tokens {reach} apart meet; {remedy}")


def chunk_of(module: nn.Module) -> int | None:
    """Tokens of the chunks within which a layer attends; None if it does not attend in chunks."""
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if not types or index is None or types[index] != CHUNKED:
        return None
    return int(config.attention_chunk_size)


def furthest(mask: Mask) -> int:
    """Largest distance |i - j| of an allowed pair, 0 for an empty mask."""
    reach = 0
    for band in mask.bands:
        # Without a bound on i - j, the corner of the band's rectangle is the furthest pair.
        back = band.q_stop - 1 - band.k_start if band.hi is None else band.hi
        ahead = band.k_stop - 1 - band.q_start if band.lo is None else -band.lo
        reach = max(reach, back, ahead)
    return reach
