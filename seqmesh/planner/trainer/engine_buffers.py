"""What our engine saves of one attention and holds in its backward, on rank 0, in elements.

Read off engine/ulysses.py and engine/ring.py; one causal sequence, zigzag over the ring. Rank 0 has the first
rows and the last, which need every other rank's keys.

Legend: n tokens of a rank, N rows of its ring rank, U ulysses degree, R ring degree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from seqmesh.layouts import split_evenly, zigzag
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.schedule.heads import default_chunks, overlaps_exchange, split_heads

FP32_BYTES = 4
"""The trainer trains in fp32."""


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
    """Rank 0's sizes, in elements."""

    shape: ModelShape
    seq_len: int
    ulysses: int
    ring: int

    @cached_property
    def rows(self) -> int:
        """N."""
        return zigzag(self.seq_len, self.ring).counts[0]

    @cached_property
    def tokens(self) -> int:
        """n."""
        return split_evenly(self.rows, self.ulysses)[1]

    @cached_property
    def chunks(self) -> list[_Chunk]:
        """The head chunks that the engine takes one after the other."""
        m = self.shape
        elements = self.seq_len * (m.heads + m.kv_heads) * 2 * m.head_dim
        wanted = default_chunks(self.ulysses, self.ring, elements, FP32_BYTES)
        shares = [chunk[0] for chunk in split_heads(m.heads, m.kv_heads, self.ulysses, wanted)]
        return [_Chunk(q=share.q * m.head_dim, kv=2 * share.kv * m.head_dim) for share in shares]

    @cached_property
    def saved(self) -> int:
        """What the engine saves: rotated q and k, v, out and lse.

        U = 1: of this rank's n tokens, all heads. U > 1: of all N rows, the rank's own heads, as received.
        """
        m = self.shape
        if self.ulysses == 1:
            return self.tokens * (2 * m.hidden + 2 * m.kv_heads * m.head_dim + m.heads)
        lse_widths = (chunk.q // m.head_dim for chunk in self.chunks)
        return self.rows * (sum(2 * chunk.q + chunk.kv for chunk in self.chunks) + sum(lse_widths))

    def in_backward(self) -> int:
        """Gradients of all heads, and the fullest moment of a chunk.

        Gradients of this rank's tokens are made when the first chunk's are there to be put in place; a single
        chunk's are taken as they are at U = 1.
        """
        m = self.shape
        gradients = self.tokens * (m.hidden + 2 * m.kv_heads * m.head_dim)
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
        received = self.rows * chunk.q
        if not overlaps_exchange(self.ulysses, len(self.chunks)):
            return received
        return 3 * received + 2 * self.rows * chunk.width

    def _home(self, chunk: _Chunk) -> int:
        """A chunk's dq and dkv, when all stages are done; at U > 1, also the buffer that takes them home."""
        return (2 if self.ulysses > 1 else 1) * self.rows * chunk.width

    def _stages(self, chunk: _Chunk) -> Iterator[int]:
        """What the ring holds at the fullest moments of each stage.

        Rank 0 receives N rows a stage, for the later half of its queries, and sends its earlier half.
        """
        early = (self.rows + 1) // 2
        q, kv = self.rows * chunk.q, self.rows * chunk.kv
        sent = early * chunk.kv
        late_q = (self.rows - early) * chunk.q
        packed = 0
        message = sent
        if (self.ring - 1) * early > self.rows:  # packed once, in place of every message
            packed, message = kv, 0
        coming = packed + message + kv if self.ring > 1 else 0
        # What the kernel made, and where it goes; without other stages it is taken as it is.
        yield coming + (2 if self.ring > 1 else 1) * (q + kv)
        for stage in range(1, self.ring):
            held = q + kv + packed  # sums of dq and of own dk, dv
            fetch = message + kv if stage < self.ring - 1 else 0
            going = kv + sent if stage > 1 else 0  # of the stage before: its dk, dv, and ours that come back
            yield held + kv + fetch + going + late_q + kv
            # dk and dv, packed to go; and ours that come back.
            yield held + kv + fetch + kv + max(kv, sent)
