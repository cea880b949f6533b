"""What a rank does with a schedule and a kernel, worked out once: launches, and where their results go.

    schedule (stages, blocks)  x  kernel (tiles, launches)  ->  Program

It depends on no tensor: a schedule keeps its programs, and the calls of a step's layers share them. The ring
(ring.py) then only walks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from seqmesh.engine.kernels import Kernel, Launch, launches_of
from seqmesh.engine.rows import RowPlan, row_plan
from seqmesh.layouts import split_evenly
from seqmesh.masks import Band
from seqmesh.schedule import RingSchedule, Stage
from seqmesh.schedule.pieces import Runs
from seqmesh.schedule.ring import Transfer

ROW_PIECES = 4
"""Half-precision blocks are computed in so many pieces of their rows, where memory counts.

Their accumulators are twice as wide as they are; a kernel's output beside them must be small.
"""
PIECE_ROWS = 1024
"""No smaller pieces: a kernel needs some rows to be fast."""


@dataclass(frozen=True, kw_only=True)
class RowMessage:
    """Rows of K/V that a stage moves, or of their gradients, the other way round."""

    runs: Runs
    """Rows of this rank that it sends, one run after the other."""
    sent: int
    received: int
    """Numbers of rows."""
    sent_to: tuple[int, ...]
    """Rows for every ring rank."""
    received_from: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class StagePlan:
    """How a stage is exchanged and computed."""

    launches: tuple[Launch, ...]
    first_part: int
    """Launches are the parts of the queries' results, counted through all stages."""
    received: RowPlan | None
    """Gradients of the received rows, whose parts are the stage's launches; None at stage 0."""
    message: RowMessage
    """What this rank sends and receives of the stage."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """All stages of a rank, and the plans of what they result in."""

    stages: tuple[StagePlan, ...]
    queries: RowPlan
    """Outputs and gradients of this rank's query rows; a part is a launch."""
    own_keys: RowPlan
    """Gradients of this rank's key rows: the launches of stage 0, then what each later stage sends home."""
    packs_keys: bool
    """Whether K and V are packed once, in place of every message."""

    def home_part(self, stage: int) -> int:
        """The part of `own_keys` that a stage, counted from 1, sends home."""
        return len(self.stages[0].launches) + stage - 1


def program_of(ring: RingSchedule, kernel: Kernel, *, in_pieces: bool) -> Program:
    """The program of a ring rank; `in_pieces` cuts blocks by rows, as half precision wants it."""
    works = []
    first_part = 0
    for number, stage in enumerate(ring.stages):
        blocks: Sequence[Band] = stage.blocks
        if in_pieces:
            blocks = [piece for block in blocks for piece in _row_pieces(block, ring.q_rows)]
        launches = launches_of(kernel, blocks)
        received = None
        if number > 0:
            received = row_plan(stage.rows_received, [launch.keys for launch in launches])
        works.append(
            StagePlan(
                launches=launches,
                first_part=first_part,
                received=received,
                message=_message(stage, ring.ring),
            )
        )
        first_part += len(launches)
    own = [launch.keys for launch in works[0].launches]
    home = [work.message.runs for work in works[1:]]
    return Program(
        stages=tuple(works),
        queries=row_plan(ring.q_rows, [launch.queries for work in works for launch in work.launches]),
        own_keys=row_plan(ring.kv_rows, own + home),
        # A row that travels more than once is packed once.
        packs_keys=ring.rows_sent > ring.kv_rows,
    )


def _message(stage: Stage, ring: int) -> RowMessage:
    return RowMessage(
        runs=tuple(run for transfer in stage.sends for run in transfer.runs),
        sent=stage.rows_sent,
        received=stage.rows_received,
        sent_to=_by_peer(stage.sends, ring),
        received_from=_by_peer(stage.receives, ring),
    )


def _by_peer(transfers: Sequence[Transfer], ring: int) -> tuple[int, ...]:
    rows = [0] * ring
    for transfer in transfers:
        rows[transfer.peer] = transfer.rows
    return tuple(rows)


def _row_pieces(block: Band, rows: int) -> Iterator[Band]:
    """A block cut by its rows, so that a piece has about `rows` / ROW_PIECES of them."""
    height = block.q_stop - block.q_start
    most = max(PIECE_ROWS, -(-rows // ROW_PIECES))
    for start, stop in pairwise(split_evenly(height, max(1, -(-height // most)))):
        piece = block.within(block.q_start + start, block.q_start + stop, block.k_start, block.k_stop)
        if piece is not None:
            yield piece
