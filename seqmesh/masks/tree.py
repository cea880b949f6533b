"""Trees: one prompt and many completions, branches of branches; every token sees its ancestors and itself.

A tree is given by segments, parents before children, and laid out as one sequence in that order:

    lengths (2, 1, 2, 1), parents (None, 0, 0, 1)        key j ->   p p a b b c
                                                     query i   p    X . . . . .
        p p --- a --- c         path 0: p p a c         |      p    X X . . . .
            \\                                           v      a    X X X . . .
             b b                path 1: p p b b                b    X X . X . .
                                                               b    X X . X X .
    6 tokens instead of 8                                      c    X X X . . X

Attention over the tree is exactly attention over each path by itself, but what paths share is computed once.
What training needs beside the mask follows from the tree too: positions along the path, and which token
predicts which, with how many paths go that way.

In depth-first order (a parent, its first child with everything below, the next child, ...) a segment is one
band: everything below it lies in consecutive rows. Any other order in which parents come first is exact too,
with more bands.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from math import isfinite
from typing import NamedTuple

from seqmesh.masks.band import Band
from seqmesh.masks.mask import Mask, whole

Run = tuple[int, int]
"""The tokens start <= i < stop."""


class Predictions(NamedTuple):
    """Every step from a token to the next along some path, once: three lists of one length."""

    sources: list[int]
    """The token whose output predicts."""
    targets: list[int]
    """The token that is predicted."""
    weights: list[float]
    """Of the step in the loss: the weights of the paths that take it, added up."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Segments of tokens, each the continuation of its parent; several roots are several trees, side by side.

    Raises:
        ValueError: not as many parents as lengths, a negative length, or a parent that does not come before
            its child.
    """

    lengths: tuple[int, ...]
    """Tokens of each segment, in the order in which they are laid out; zero is allowed."""
    parents: tuple[int | None, ...]
    """The segment that each continues, None for a root."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(map(whole, self.lengths)))
        parents = tuple(None if parent is None else whole(parent) for parent in self.parents)
        object.__setattr__(self, "parents", parents)
        if len(self.lengths) != len(parents):
            raise ValueError(
                f"a tree of {len(self.lengths)} lengths and {len(parents)} parents;"
                " pass a length and a parent for each segment"
            )
        for segment, (length, parent) in enumerate(zip(self.lengths, parents, strict=True)):
            if length < 0:
                raise ValueError(f"segment {segment} has {length} tokens; pass lengths >= 0")
            if parent is not None and not 0 <= parent < segment:
                raise ValueError(
                    f"segment {segment} continues segment {parent}, which does not come before it;"
                    " list parents before their children, and None for a root"
                )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first token of each segment, and the number of all tokens."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The segments that continue each segment."""
        found: list[list[int]] = [[] for _ in self.lengths]
        for segment, parent in enumerate(self.parents):
            if parent is not None:
                found[parent].append(segment)
        return tuple(map(tuple, found))

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Segments from a root to each leaf, leaves in order: the sequences that the tree stands for."""
        ways: list[tuple[int, ...]] = []
        for segment, parent in enumerate(self.parents):
            ways.append((segment,) if parent is None else (*ways[parent], segment))
        return tuple(way for way, below in zip(ways, self.children, strict=True) if not below)

    @cached_property
    def mask(self) -> Mask:
        """Every token sees its ancestors and itself."""
        return Mask(self.starts[-1], self.starts[-1], tuple(_bands(self)))

    def window(self, window: int) -> Mask:
        """Every token sees the last `window` tokens of its path, itself included: for sliding-window layers.

        A window over the rows as they lie, `mask & sliding_window(...)`, would count the tokens of other
        branches in between.

        Raises:
            ValueError: window < 1.
        """
        if whole(window) < 1:
            raise ValueError(f"window={window}: a token sees at least itself; use window >= 1")
        return Mask(self.starts[-1], self.starts[-1], tuple(_windows(self, whole(window))))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How many tokens precede each segment on its path."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent is None else found[parent] + self.lengths[parent])
        return tuple(found)

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """How many tokens precede each token on its path: its position id."""
        runs = (range(depth, depth + length) for depth, length in zip(self.depths, self.lengths, strict=True))
        return tuple(chain.from_iterable(runs))

    def predictions(self, weights: Sequence[float] | None = None) -> Predictions:
        """Which token predicts which, and with what weight; the last of a segment predicts all its children.

        The weighted sum of the losses of these steps is the weighted sum of the losses of the paths, each run
        by itself.

        Args:
            weights: of each of `paths`, in that order; default 1 each. Advantages, for example: any sign.

        Raises:
            ValueError: not one finite weight for each path.
        """
        through = self._weights_through(weights)
        last: list[int | None] = []  # token before whatever continues each segment
        found = Predictions([], [], [])
        for segment, (start, length) in enumerate(zip(self.starts, self.lengths, strict=False)):
            parent = self.parents[segment]
            before = None if parent is None else last[parent]
            last.append(start + length - 1 if length else before)
            if length and before is not None:
                found.sources.append(before)
                found.targets.append(start)
            found.sources.extend(range(start, start + length - 1))
            found.targets.extend(range(start + 1, start + length))
            found.weights.extend([through[segment]] * (len(found.targets) - len(found.weights)))
        return found

    def _weights_through(self, weights: Sequence[float] | None) -> list[float]:
        """The weights of the paths through each segment, added up."""
        count = len(self.paths)
        given = [1.0] * count if weights is None else [float(weight) for weight in weights]
        if len(given) != count or not all(map(isfinite, given)):
            raise ValueError(
                f"weights={weights} of a tree of {count} paths; pass one finite number for each of tree.paths"
            )
        through = [0.0] * len(self.lengths)
        for path, weight in zip(self.paths, given, strict=True):
            through[path[-1]] = weight
        for segment in reversed(range(len(self.lengths))):
            parent = self.parents[segment]
            if parent is not None:
                through[parent] += through[segment]
        return through


def tree(lengths: Iterable[int], parents: Iterable[int | None]) -> Mask:
    """Every token of a tree of segments sees its ancestors and itself: the mask of `Tree`.

    Args:
        lengths: tokens of each segment, in the order in which they are laid out.
        parents: the segment that each continues, None for a root; parents come before their children.

    Raises:
        ValueError: as of `Tree`.
    """
    return Tree(lengths=tuple(lengths), parents=tuple(parents)).mask


def _bands(tree: Tree) -> list[Band]:
    """For each segment as keys: its own rows, causally, and those of everything below it, fully."""
    below: list[list[Run]] = [[] for _ in tree.lengths]  # rows below each segment, apart from its own
    bands: list[Band] = []
    k_stop: dict[int, int] = {}  # of segments that have taken in their only child
    for segment in reversed(range(len(tree.lengths))):
        start = tree.starts[segment]
        stop = tree.starts[segment + 1]
        keys_stop = k_stop.get(segment, stop)
        rows = _join([(start, stop), *below[segment]])
        parent = tree.parents[segment]
        if parent is not None:
            below[parent] += rows
            if len(tree.children[parent]) == 1 and start == tree.starts[parent + 1]:
                # The parent is seen by the same rows, and by its own: one causal band for both.
                k_stop[parent] = keys_stop
                continue
        bands += (Band(first, last, start, keys_stop, lo=0) for first, last in rows)
    return bands


def _windows(tree: Tree, window: int) -> Iterator[Band]:
    """For each segment and each of its ancestors, the pairs that are less than `window` apart on the path."""
    for segment, (start, length) in enumerate(zip(tree.starts, tree.lengths, strict=False)):
        above: int | None = segment
        while above is not None:
            # Rows lie further apart than the path says by what lies between the two segments.
            between = (start - tree.depths[segment]) - (tree.starts[above] - tree.depths[above])
            keys = (tree.starts[above], tree.starts[above + 1])
            yield Band(start, start + length, *keys, lo=between, hi=between + window - 1)
            near = tree.depths[segment] - tree.depths[above] < window - 1
            above = tree.parents[above] if near else None


def _join(runs: Iterable[Run]) -> list[Run]:
    """Runs in order, those that touch as one, empty ones left out."""
    joined: list[Run] = []
    for start, stop in sorted(runs):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return joined
