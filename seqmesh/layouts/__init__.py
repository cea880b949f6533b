"""Layouts: which tokens each ring rank holds, and in which order (docs/layouts.md).

16 tokens, ring 2    contiguous  0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1      the owner of each token
                     zigzag      0 0 0 0 1 1 1 1 1 1 1 1 0 0 0 0      chunk r and chunk 2R-1-r
                     striped     0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1
                     balanced    looks at the mask: equal tokens and near-equal work for any of them
                     joint       text and image tokens of a diffusion transformer, some of both on every rank
                     auto        the simplest of contiguous, zigzag and balanced that is as good as the best
"""

from seqmesh.layouts.balance import DEFAULT_PAIRS_PER_ROW, balanced
from seqmesh.layouts.choice import NAMES, auto, named
from seqmesh.layouts.fixed import contiguous, striped, zigzag
from seqmesh.layouts.joint import JointLayout, JointPiece, text_and_image
from seqmesh.layouts.layout import Layout, Span, split_evenly

__all__ = [
    "DEFAULT_PAIRS_PER_ROW",
    "NAMES",
    "JointLayout",
    "JointPiece",
    "Layout",
    "Span",
    "auto",
    "balanced",
    "contiguous",
    "named",
    "split_evenly",
    "striped",
    "text_and_image",
    "zigzag",
]
