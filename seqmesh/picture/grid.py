"""The mask of a schedule as a grid: colour = ring rank that computes the pair, shade = stage.

It is read off the blocks of every rank's `ring_schedule`, never off the mask, so a wrong schedule makes a
wrong picture. Blocks count in local rows, so the grid has to undo the layout: it finds for every query its
place in its rank's storage, and for every key its place in what that rank computes on at that stage.

Long sequences are sampled: some hundred queries and keys, evenly spaced, are looked up, and no mask of all
pairs is ever made.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from seqmesh.layouts import Layout
from seqmesh.masks import Band
from seqmesh.picture.canvas import COLORS, EMPTY, FAINT, rgb, shade
from seqmesh.schedule.ring import RingSchedule, Stage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SAMPLES = 768
"""The grid shows at most this many queries and keys: as many as it has pixels, about."""


class SampledTokens(NamedTuple):
    """Evenly spaced tokens, all of them if they are few."""

    rank: "npt.NDArray[np.int64]"
    """(samples,): the ring rank that holds each."""
    place: "npt.NDArray[np.int64]"
    """(samples,): its place in that rank's storage."""


def draw_grid(axes: Any, layout: Layout, schedules: Sequence[RingSchedule]) -> None:
    """The mask, query down and key across, with the owner of the tokens along both edges."""
    s = layout.s
    if not s:
        return
    import numpy as np

    tokens = sample_tokens(layout)
    owners = np.array([rgb(color) for color in COLORS])[tokens.rank]
    edge = 0.028 * s  # width of the strips of owners, in tokens
    # Nearest: a pixel between two tokens must not mix the colours of two ranks.
    look = {"interpolation": "nearest", "aspect": "equal"}
    axes.imshow(owners_image(tokens, schedules), extent=(0, s, s, 0), **look)
    axes.imshow(owners[:, None], extent=(-1.6 * edge, -0.6 * edge, s, 0), **look)
    axes.imshow(owners[None, :], extent=(0, s, -0.6 * edge, -1.6 * edge), **look)
    axes.set_xlim(-1.6 * edge, s)
    axes.set_ylim(s, -1.6 * edge)
    keys = f"key 0 ... {s - 1:,}"
    axes.text(s / 2, s * 1.015, keys, ha="center", va="top", fontsize=8, color=FAINT)
    queries = f"query 0 ... {s - 1:,}"
    axes.text(-2 * edge, s / 2, queries, ha="right", va="center", rotation=90, fontsize=8, color=FAINT)
    legend = (
        "strips: the ring rank that holds a token\n"
        "square: the ring rank that computes a pair; lighter = at a later stage"
    )
    axes.text(-1.6 * edge, s * 1.09, legend, va="top", fontsize=7.5, color=FAINT, linespacing=1.4)


def sample_tokens(layout: Layout) -> SampledTokens:
    """Evenly spaced tokens of a layout, from the first to the last."""
    import numpy as np

    rank_of = np.empty(layout.s, np.int64)
    place_of = np.empty(layout.s, np.int64)
    for rank in range(layout.ring):
        held = np.fromiter(layout.positions(rank), np.int64)
        rank_of[held] = rank
        place_of[held] = np.arange(len(held))
    sampled = np.linspace(0, max(0, layout.s - 1), min(layout.s, SAMPLES)).astype(np.int64)
    return SampledTokens(rank=rank_of[sampled], place=place_of[sampled])


def owners_image(tokens: SampledTokens, schedules: Sequence[RingSchedule]) -> "npt.NDArray[np.float64]":
    """The colour of the rank and stage that compute each pair: (samples, samples, 3), queries first."""
    import numpy as np

    samples = len(tokens.rank)
    image = np.ones((samples, samples, 3)) * rgb(EMPTY)
    for schedule in schedules:
        queries = np.flatnonzero(tokens.rank == schedule.ring_rank)
        for number, stage in enumerate(schedule.stages):
            key_places = _places_in_buffer(stage, number, schedule.ring_rank, tokens)
            color = shade(COLORS[schedule.ring_rank], number, len(schedule.stages))
            for block in stage.blocks:
                rows, columns = _pairs_of_block(block, tokens.place[queries], key_places)
                image[queries[rows], columns] = color
    return image


def _pairs_of_block(
    block: Band, query_places: "npt.NDArray[np.int64]", key_places: "npt.NDArray[np.int64]"
) -> "tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]":
    """Indices of the queries and of the keys of the sampled pairs that a block allows."""
    import numpy as np

    q_start, q_stop, k_start, k_stop, lo, hi = block
    rows = np.flatnonzero((query_places >= q_start) & (query_places < q_stop))
    columns = np.flatnonzero((key_places >= k_start) & (key_places < k_stop))
    difference = query_places[rows][:, None] - key_places[columns]
    inside = np.ones_like(difference, dtype=bool)
    if lo is not None:
        inside &= difference >= lo
    if hi is not None:
        inside &= difference <= hi
    down, across = np.nonzero(inside)
    return rows[down], columns[across]


def _places_in_buffer(
    stage: Stage, number: int, ring_rank: int, tokens: SampledTokens
) -> "npt.NDArray[np.int64]":
    """Where each sampled key lies in what a stage computes on, -1 where it does not: (samples,).

    Stage 0 computes on the rank's own storage, later ones on the receive buffer, in which the received runs
    lie one after the other.
    """
    import numpy as np

    if number == 0:
        return np.where(tokens.rank == ring_rank, tokens.place, -1)
    places = np.full(len(tokens.place), -1, np.int64)
    base = 0  # where the run begins in the buffer
    for transfer in stage.receives:
        for start, stop in transfer.runs:
            here = (tokens.rank == transfer.peer) & (tokens.place >= start) & (tokens.place < stop)
            places[here] = base + tokens.place[here] - start
            base += stop - start
    return places
