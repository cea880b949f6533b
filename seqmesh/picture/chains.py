"""The picture of chains: where documents are cut, and what layers with a state send for that.

    a row per rank, a column per token    a piece is a box, in the colour of its rank
    pale                                  of every other document
    arrows                                a state leaves a piece and enters the next of its chain
    hatched                               the halo of a piece, in the colour of the rank that sends it

Read off `Chains`, as the engine reads them.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

from seqmesh.layouts import Layout
from seqmesh.masks import Mask
from seqmesh.picture.canvas import (
    COLORS,
    EMPTY,
    FAINT,
    INK,
    box,
    check_degrees,
    figure,
    inches,
    save,
    shade,
)
from seqmesh.schedule.chains import Chains, DocumentPiece, chains_of

INCHES_OF_SEQUENCE = 7.2
INCHES_OF_LABEL = 0.9
INCHES_PER_RANK = 0.62
INCHES_OF_PIECE = 0.3


def draw_chains(mask: Mask, layout: Layout, path: Path, *, ulysses: int = 1, width: int = 3) -> None:
    """Draw the pieces of all ranks to a file, with their states and halos.

    Args:
        mask: of whole causal documents.
        layout: of spans without strides, over at most 8 ring ranks.
        path: file to write; its ending says the format.
        ulysses: ulysses degree; at most 8 ranks in all.
        width: tokens before its own that a short convolution sees.

    Raises:
        ValueError: more than 8 ranks, a mask that is not of documents, or a layout with strides.
        ImportError: matplotlib is not installed.
    """
    check_degrees(ranks=layout.ring * ulysses)
    chains = chains_of(mask, layout, ulysses)
    scale = INCHES_OF_SEQUENCE / layout.s
    page = figure(INCHES_OF_LABEL + INCHES_OF_SEQUENCE + 0.2, 0.95 + INCHES_PER_RANK * chains.size)
    axes = inches(page, 0, 0, *page.get_size_inches())
    title = (
        f"{layout.name} layout on {chains.size} ranks: pieces of documents, states, halos of {width} tokens"
    )
    axes.text(0.1, 0.2, title, fontsize=10.5, fontweight="bold", color=INK, va="center")
    for rank, pieces in enumerate(chains.pieces):
        middle = _top(rank) + INCHES_OF_PIECE / 2
        axes.text(
            0.1, middle, f"rank {rank}", fontsize=8.5, color=COLORS[rank], fontweight="bold", va="center"
        )
        box(axes, (INCHES_OF_LABEL, _top(rank), INCHES_OF_SEQUENCE, INCHES_OF_PIECE), EMPTY)
        for piece in pieces:
            _draw_piece(axes, piece, scale)
    _draw_halos(axes, chains, width, scale)
    _draw_states(axes, chains, scale)
    _draw_documents(axes, chains, scale)
    bottom = 0.62 + INCHES_PER_RANK * chains.size
    axes.text(0.1, bottom, _caption(chains), fontsize=8.5, color=INK, va="center", linespacing=1.4)
    save(page, path)


def _top(rank: int) -> float:
    return 0.5 + INCHES_PER_RANK * rank


def _left(position: int, scale: float) -> float:
    return INCHES_OF_LABEL + scale * position


def _draw_piece(axes: Any, piece: DocumentPiece, scale: float) -> None:
    place = (_left(piece.position, scale), _top(piece.rank), scale * piece.tokens, INCHES_OF_PIECE)
    box(axes, place, shade(COLORS[piece.rank], piece.document % 2, 2), "white")
    first, last = piece.position, piece.position + piece.tokens - 1
    text = f"{first}-{last}" if last > first else f"{first}"
    if scale * piece.tokens > 0.065 * len(text):  # of a character at 7.5 pt
        middle = place[0] + place[2] / 2
        look = {
            "fontsize": 7.5,
            "color": INK if piece.document % 2 else "white",
            "va": "center",
            "ha": "center",
        }
        axes.text(middle, place[1] + INCHES_OF_PIECE / 2, text, **look)


def _draw_halos(axes: Any, chains: Chains, width: int, scale: float) -> None:
    """Right before a piece what it needs of others, in the colour of the rank that holds it."""
    from matplotlib.patches import Rectangle

    for run in chains.halo(width):
        if run.owner == run.piece.rank:
            continue
        piece = chains.at(run.piece)
        x = _left(piece.position - run.back - run.rows, scale)
        y = _top(piece.rank) + 0.04
        height = INCHES_OF_PIECE - 0.08
        axes.add_patch(
            Rectangle(
                (x, y),
                scale * run.rows,
                height,
                facecolor="white",
                edgecolor=COLORS[run.owner],
                linewidth=0.8,
                hatch="//////",
            )
        )


def _draw_states(axes: Any, chains: Chains, scale: float) -> None:
    """From the end of each piece of a chain to the beginning of the next."""
    for chain in chains.chains:
        for before, after in pairwise(chain):
            tail, head = chains.at(before), chains.at(after)
            x = _left(head.position, scale)
            down = head.rank > tail.rank
            start = _top(tail.rank) + (INCHES_OF_PIECE if down else 0)
            end = _top(head.rank) + (0 if down else INCHES_OF_PIECE)
            look = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=(x + 0.03, end), xytext=(x - 0.03, start), arrowprops=look)


def _draw_documents(axes: Any, chains: Chains, scale: float) -> None:
    """A line where each but the first begins."""
    below = _top(chains.size - 1) + INCHES_OF_PIECE + 0.08
    for own in chains.pieces:
        for piece in own:
            if piece.is_first and piece.position:
                x = _left(piece.position, scale)
                axes.plot([x, x], [_top(0) - 0.08, below], color=FAINT, linewidth=0.8, linestyle=":")


def _caption(chains: Chains) -> str:
    whole = sum(piece.is_first and piece.is_last for own in chains.pieces for piece in own)
    documents = 1 + max(piece.document for own in chains.pieces for piece in own)
    states = sum(map(len, chains.leaving))
    return (
        f"{documents} document{'s' if documents > 1 else ''}, {whole} of them whole on one rank;"
        f" {states} states leave a piece for the next.\nHatched: the halo of a piece, in the color of the"
        " rank that sends it. Every other document is pale."
    )
