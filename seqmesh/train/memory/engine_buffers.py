"""What our engine saves of one attention and holds in its backward, on rank 0, in bytes.

Read off engine/ulysses.py and engine/ring.py; one causal sequence, zigzag over the ring. Rank 0 has the first
rows and the last, which need every other rank's keys.

Rows of several parts are summed in fp32, and rounded in the end; in fp32 the sums are the result.

Legend: n tokens of a rank, N rows of its ring rank, U ulysses degree, R ring degree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from seqmesh.layouts import split_evenly, zigzag
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.schedule.heads import default_chunks, overlaps_exchange, split_heads

SUM_BYTES = 4
"""Bytes of a number that is a sum of several parts, or a log-sum-exp: fp32."""


@dataclass(frozen=True)
class _Chunk:
    """One chunk of this rank's heads: elements of a row."""

    q: int
    """Of the queries."""
    kv: int
    """Of keys and values together."""

    @property
    def width(self) -> int:
        """Of queries, keys and values."""
        return self.q + self.kv


@dataclass(frozen=True)
class EngineBuffers:
    """Rank 0's sizes."""

    shape: ModelShape
    seq_len: int
    ulysses: int
    ring: int
    tp: int = 1
    """Ranks that share the heads."""
    element: int = 4
    """Bytes of queries, keys and values."""

    @cached_property
    def rows(self) -> int:
        """N."""
        return zigzag(self.seq_len, self.ring).counts[0]

    @cached_property
    def tokens(self) -> int:
        """n."""
        return split_evenly(self.rows, self.ulysses)[1]

    @property
    def _heads(self) -> int:
        """Query heads of this rank of tp."""
        return self.shape.heads // self.tp

    @property
    def _kv_heads(self) -> int:
        """K/V heads of this rank of tp."""
        return self.shape.kv_heads // self.tp

    @cached_property
    def chunks(self) -> list[_Chunk]:
        """The head chunks that the engine takes one after the other."""
        d = self.shape.head_dim
        elements = self.seq_len * (self._heads + self._kv_heads) * 2 * d
        wanted = default_chunks(self.ulysses, self.ring, elements, self.element)
        shares = [chunk[0] for chunk in split_heads(self._heads, self._kv_heads, self.ulysses, wanted)]
        return [_Chunk(q=share.q * d, kv=2 * share.kv * d) for share in shares]

    @property
    def local_width(self) -> int:
        """Elements of a token's queries, keys and values on this rank, before heads are exchanged."""
        return (self._heads + 2 * self._kv_heads) * self.shape.head_dim

    @cached_property
    def inputs(self) -> int:
        """Rotated q and k, and v, where no heads are exchanged: of this rank's n tokens, all heads."""
        return self.tokens * self.local_width * self.element if self.ulysses == 1 else 0

    @cached_property
    def results(self) -> int:
        """What attention makes and the engine saves: out and lse.

        U > 1: of all N rows, the rank's own heads, with q, k and v as received.
        """
        if self.ulysses == 1:
            return self.tokens * self._heads * (self.shape.head_dim * self.element + SUM_BYTES)
        d = self.shape.head_dim
        received = sum(chunk.width + chunk.q for chunk in self.chunks) * self.element
        lse = sum(chunk.q // d for chunk in self.chunks) * SUM_BYTES
        return self.rows * (received + lse)

    @property
    def saved(self) -> int:
        """All that the engine saves."""
        return self.inputs + self.results

    def in_backward(self) -> int:
        """Gradients of all heads, and the fullest moment of a chunk.

        Gradients of this rank's tokens are made when the first chunk's are there to be put in place; a single
        chunk's are taken as they are at U = 1.
        """
        gradients = self.tokens * self.local_width * self.element
        if self.ulysses == 1 and len(self.chunks) == 1:
            gradients = 0
        fullest = 0
        for number, chunk in enumerate(self.chunks):
            held = gradients if number else 0
            fullest = max(fullest, held + self._exchanged(chunk) + max(self._stages(chunk)))
            fullest = max(fullest, gradients + self._home(chunk))
        return fullest

    def _exchanged(self, chunk: _Chunk) -> int:
        """The gradient of out, of this rank's heads; where chunks overlap, also the next chunk's on its way.

        The heads of the last chunk are on their way home then, too.
        """
        if self.ulysses == 1:
            return 0
        received = self.rows * chunk.q * self.element
        if not overlaps_exchange(self.ulysses, len(self.chunks)):
            return received
        return 3 * received + 2 * self.rows * chunk.width * self.element

    def _home(self, chunk: _Chunk) -> int:
        """A chunk's dq and dkv, when all stages are done; at U > 1, also the buffer that takes them home."""
        return (2 if self.ulysses > 1 else 1) * self.rows * chunk.width * self.element

    def _stages(self, chunk: _Chunk) -> Iterator[int]:
        """What the ring holds at the fullest moments of each stage.

        Rank 0 receives N rows a stage, for the later half of its queries, and sends its earlier half.
        """
        early = (self.rows + 1) // 2
        late = self.rows - early
        q, kv = self.rows * chunk.q * self.element, self.rows * chunk.kv * self.element
        sent = early * chunk.kv * self.element
        late_q = late * chunk.q * self.element
        packed = 0
        message = sent
        if (self.ring - 1) * early > self.rows:  # packed once, in place of every message
            packed, message = kv, 0
        coming = packed + message + kv if self.ring > 1 else 0
        # Of dq for the later half, of dk and dv for the earlier one, which peers use too.
        sums = (late * chunk.q + early * chunk.kv) * SUM_BYTES if self.element < SUM_BYTES else 0
        # What the kernel made, and where it goes; without other stages it is taken as it is.
        yield coming + (2 * (q + kv) + sums if self.ring > 1 else q + kv)
        for stage in range(1, self.ring):
            held = q + kv + sums + packed  # sums of dq and of own dk, dv
            fetch = message + kv if stage < self.ring - 1 else 0
            going = kv + sent if stage > 1 else 0  # of the stage before: its dk, dv, and ours that come back
            yield held + kv + fetch + going + late_q + kv
            # dk and dv, packed to go; and ours that come back.
            yield held + kv + fetch + kv + max(kv, sent)
