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
from seqmesh.schedule.heads import default_chunks, split_heads


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
        wanted = default_chunks(self.ulysses, self.ring, self.seq_len, m.kv_heads * m.head_dim)
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
        """Gradients of all heads, and the fullest chunk.

        The chunk before it has left its dq and dkv in variables until the loop overwrites them.
        """
        m = self.shape
        exchanged = self.ulysses > 1
        fullest = before = 0
        for chunk in self.chunks:
            # The gradient of out, of this rank's heads.
            received = self.rows * chunk.q if exchanged else 0
            # dq and dkv: as they are, in one buffer, and what arrives.
            home = 3 * self.rows * chunk.width if exchanged else 0
            in_stages = before + max(self._stages(chunk))
            fullest = max(fullest, received + max(in_stages, home))
            before = self.rows * chunk.width
        return self.tokens * (m.hidden + 2 * m.kv_heads * m.head_dim) + fullest

    def _stages(self, chunk: _Chunk) -> Iterator[int]:
        """What the ring holds at the end of each stage's kernel.

        Rank 0 receives N rows a stage, for half its queries, and sends N/2.
        """
        q, kv = self.rows * chunk.q, self.rows * chunk.kv
        # The kernel copies q, dout and out to compact ones; one head received alone is compact already.
        copied = self.ulysses == 1 or self.shape.head_dim < chunk.q
        inputs = 3 if copied else 1
        fetch = 3 * kv // 2  # rows sent and rows received, for the next stage
        # Own rows: compact inputs and dq, compact k and v, dk and dv.
        yield (inputs + 1) * q + 2 * kv + (fetch if self.ring > 1 else 0)
        for stage in range(1, self.ring):
            # Sums of dq and of own dk, dv; this stage's rows; dk and dv of the stage before, in variables.
            held = q + 3 * kv
            kernel = (inputs + 1) * q // 2 + 2 * kv
            coming = fetch if stage < self.ring - 1 else 0
            # dq of the stage before; its dk and dv, under way, and ours that come back.
            going = q // 2 + fetch if stage > 1 else 0
            yield held + kernel + coming + going
