"""How many layers of a model see whole documents, a window of them, or a chunk; and how many pairs each sees.

    document of n = 7        whole    n (n + 1) / 2                         28 pairs
    window of 3              a row sees itself and 2 before it              18
    chunks of 3              0 1 2 | 3 4 5 | 6: each a document by itself   13

All kinds share one layout, which is chosen for all of them, each with the weight of its layers.

Chunks count from the first token of a document: what a document gives does not depend on what it is packed
with.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from seqmesh import masks
from seqmesh.integrations.calls import LayerCall
from seqmesh.masks import Mask
from seqmesh.parallel.packing import PackedTokens


@dataclass(frozen=True, kw_only=True)
class LayerKinds:
    """Layers of each kind. At least one kind has some."""

    full: int = 0
    """Layers that see whole documents."""
    sliding: int = 0
    chunked: int = 0
    window: int | None = None
    """Tokens that a sliding layer reaches back, the token itself among them."""
    chunk: int | None = None
    """Tokens of a chunk."""

    def __post_init__(self) -> None:
        """Refuse layers without a limit, limits without a layer, and no layer at all."""
        for name, layers, limit in (
            ("window", self.sliding, self.window),
            ("chunk", self.chunked, self.chunk),
        ):
            if layers < 0 or (layers > 0) != (limit is not None) or (limit is not None and limit < 1):
                raise ValueError(
                    f"{layers} layers with a {name} of {limit} tokens: give a number of at least 1, for"
                    " layers that have it"
                )
        if self.full < 0 or self.full + self.sliding + self.chunked < 1:
            raise ValueError(f"{self.full} full layers and no other; a model has at least one layer")

    @staticmethod
    def of(calls: Iterable[LayerCall]) -> "LayerKinds":
        """Those of a model, whose calls `calls_of` finds.

        Raises:
            ValueError: windows, or chunks, of several sizes: there is one schedule for each kind.
        """
        kinds = Counter((call.window, call.chunk) for call in calls)
        windows = sorted({window for window, chunk in kinds if window is not None and chunk is None})
        chunks = sorted({chunk for _, chunk in kinds if chunk is not None})
        for name, sizes in (("windows", windows), ("chunks", chunks)):
            if len(sizes) > 1:
                raise ValueError(
                    f"layers have {name} of {' and '.join(map(str, sizes))} tokens, and there is one schedule"
                    f" for all {name}; use a model with {name} of one size"
                )
        return LayerKinds(
            full=kinds[None, None],
            sliding=sum(count for (window, chunk), count in kinds.items() if chunk is None and window),
            chunked=sum(count for (_, chunk), count in kinds.items() if chunk is not None),
            window=windows[0] if windows else None,
            chunk=chunks[0] if chunks else None,
        )

    def masks_of(self, packed: PackedTokens) -> "KindMasks":
        """What each kind sees of packed documents."""
        whole = packed.mask
        sliding = chunked = None
        if self.window is not None:
            sliding = whole & masks.sliding_window(whole.q_len, self.window)
        if self.chunk is not None:
            starts = (packed.position_ids[0] % self.chunk == 0).nonzero().flatten().tolist()
            lengths = [stop - start for start, stop in pairwise([*starts, whole.q_len])]
            chunked = whole & masks.documents(lengths)
        return KindMasks(full=whole if self.full else None, sliding=sliding, chunked=chunked)

    def counts(self) -> tuple[int, ...]:
        """Layers of the kinds that there are, in the order full, sliding, chunked."""
        return tuple(count for count in (self.full, self.sliding, self.chunked) if count)


@dataclass(frozen=True, kw_only=True)
class KindMasks:
    """The mask of each kind of layers; None for a kind that no layer is of."""

    full: Mask | None
    sliding: Mask | None
    chunked: Mask | None

    def present(self) -> tuple[Mask, ...]:
        """Those that there are, in the order full, sliding, chunked."""
        return tuple(mask for mask in (self.full, self.sliding, self.chunked) if mask is not None)


def allowed_pairs(length: int, window: int | None = None, chunk: int | None = None) -> int:
    """(query, key) pairs of a causal document of `length` tokens in a layer of some kind, exactly."""
    if chunk is not None:
        whole, rest = divmod(length, chunk)
        return whole * _triangle(chunk) + _triangle(rest)
    if window is None:
        return _triangle(length)
    return _triangle(length) - _triangle(max(0, length - window))


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
