"""A long prompt against a long cache: move the keys to the queries, or the queries to the keys? By bytes.

    move keys       each rank's queries stay; the K/V rows that they see come      g (d + e) numbers a row
    move queries    all queries go everywhere; partial results come back           h d, then h (e + lse)

Many new tokens against a short cache move keys, few against a long one move queries. The rule counts what
all ranks send, and says the same on every rank.

Legend: h query heads, g K/V heads, d head dim of keys, e of values.
Source: pass-KV and pass-Q of Yang et al. 2024, "Context parallelism for scalable million-token inference".
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from seqmesh.layouts import Layout
from seqmesh.layouts.load import rows_received
from seqmesh.masks import Mask


@dataclass(frozen=True, kw_only=True)
class RowSizes:
    """Heads and dims of a layer, and bytes of its numbers."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    """Bytes of a number of q, k, v and of a partial output."""
    lse_itemsize: int

    @property
    def key(self) -> int:
        """Bytes of a row of K and V."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.itemsize

    @property
    def query(self) -> int:
        """Bytes of a row of Q."""
        return self.heads * self.key_dim * self.itemsize

    @property
    def part(self) -> int:
        """Bytes of a row of a partial output with its log-sum-exp."""
        return self.heads * (self.value_dim * self.itemsize + self.lse_itemsize)


def bytes_of_keys(masks: Sequence[Mask], queries: Layout, keys: Layout, sizes: RowSizes) -> int:
    """Sent by all ranks if keys move, for one sequence with each mask."""
    moved = (count * sum(rows_received(mask, queries, keys)) for mask, count in Counter(masks).items())
    return sizes.key * sum(moved)


def bytes_of_queries(sequences: int, queries: Layout, sizes: RowSizes) -> int:
    """Sent by all ranks if queries move: each to every other rank, and a part back from each."""
    return sequences * (queries.ring - 1) * queries.s * (sizes.query + sizes.part)


def moves_queries(masks: Sequence[Mask], queries: Layout, keys: Layout, sizes: RowSizes) -> bool:
    """Whether fewer bytes travel if queries move than if keys do. Equal: keys, which need no merging."""
    return bytes_of_queries(len(masks), queries, sizes) < bytes_of_keys(masks, queries, keys, sizes)
