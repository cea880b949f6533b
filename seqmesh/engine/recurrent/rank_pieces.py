"""One rank among those that share a sequence, and the pieces of documents that all of them hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from seqmesh.engine.encoding import decode
from seqmesh.engine.sharding import Schedule
from seqmesh.schedule.chains import Chains, DocumentPiece, chains_of


@dataclass(frozen=True, eq=False)
class RankPieces:
    """Where a rank stands. Made from a schedule, or from an encoded one."""

    chains: Chains
    rank: int
    group: str | None
    """Name of the group of all these ranks, in their order; None for one rank."""

    @staticmethod
    def of(schedule: Schedule) -> "RankPieces":
        """This rank of a schedule. With both degrees above 1 the first call is a collective.

        Raises:
            ValueError: a mask that is not of whole causal documents, or a strided layout.
        """
        chains = schedule.chains
        return schedule.kept(
            "rank_pieces", lambda: RankPieces(chains, schedule.mesh.rank, schedule.mesh.sequence_group)
        )

    @staticmethod
    def decoded(encoded: Tensor, group: str) -> "RankPieces":
        """The same of a schedule's encoded fields; `group` is "" for one rank."""
        return _decoded(encoded.numpy().tobytes(), group)

    @property
    def pieces(self) -> tuple[DocumentPiece, ...]:
        """Of this rank."""
        return self.chains.pieces[self.rank]

    @property
    def rows(self) -> int:
        """Tokens of this rank."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def entered(self) -> Sequence[int]:
        """Places of this rank's pieces that a state enters."""
        return self.chains.entering[self.rank]

    @property
    def leaving(self) -> Sequence[int]:
        """Places of those that a state leaves."""
        return self.chains.leaving[self.rank]

    @property
    def passed(self) -> Sequence[int]:
        """Places of those that a state enters and leaves."""
        return self.chains.passing[self.rank]

    @property
    def is_cut(self) -> bool:
        """Whether any document lies on several ranks, or in several pieces: the same on every rank."""
        return bool(self.chains.chains)


@lru_cache(maxsize=64)
def _decoded(encoded: bytes, group: str) -> RankPieces:
    fields = decode(encoded)
    chains = chains_of(fields.mask, fields.layout, fields.ulysses)
    return RankPieces(chains, fields.ring_rank * fields.ulysses + fields.ulysses_rank, group or None)


def group_name(schedule: Schedule) -> str:
    """Name of the group of all ranks of the sequence, "" for one.

    Raises:
        ValueError: a group that is yet to be made, which the compiler cannot do.
    """
    mesh = schedule.mesh
    if mesh.ring > 1 and mesh.ulysses > 1 and "as_ring" not in vars(mesh):
        raise ValueError(
            "a compiled recurrence over ulysses and ring needs the process group of all their ranks;"
            " make it before, by mesh.as_ring on every rank, or by one forward outside of the compiler"
        )
    return mesh.sequence_group or ""
