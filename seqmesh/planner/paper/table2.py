"""The paper's Table 2 as it is printed, and as it should be for a model: its cells, and what they amount to.

    a cell of CORRECTED    as shown (`texts`)    elements per GPU (`elements`)
    6P/N                   6P/N                  6 x parameters / ranks
    {ring}                 8·bsLd/G              8 x those of K: what depends on the model has a name

Symbols: d² of weights; bsLd, an activation of b sequences of L tokens and width d; P, G, OS of a block and A,
its activations; of experts Pₑ, Gₑ, of the rest Pₐ, Gₐ, and k experts a token. Divisors: N ranks, u ulysses
ranks, K K/V heads, G query heads to one of them.

Source: USP (Fang & Zhao 2024, arXiv 2405.07719), Table 2; docs/table2.md derives every correction, and the
row of expert parallelism.
"""

from dataclasses import dataclass
from fractions import Fraction

from seqmesh.planner.inputs.shape import ModelShape


@dataclass(frozen=True)
class Cells:
    """A row of the table as text."""

    parameter_op: str
    parameter_cost: str
    activation_op: str
    activation_cost: str
    split: str
    """What of attention / of the rest is spread."""
    states: str
    """P/G: parameters and gradients on a rank."""
    optimizer: str
    activations: str


def _read(table: str) -> dict[str, Cells]:
    """Rows by their names, of lines whose columns are the name and those of `Cells`."""
    rows = {}
    for line in table.strip().splitlines():
        name, *cells = (cell.strip() for cell in line.split("|"))
        rows[name] = Cells(*cells)
    return rows


PRINTED = _read("""
SP-Ulysses       | all-reduce | 12d² | 8 all-to-all | (8/N)·bsLd | heads / L | P+G     | 6P   | A/N
SP-Ring          | all-reduce | 12d² | P2P          | 4·bsLd     | L / L     | P+G     | 6P   | A/N
DP               | all-reduce | 12d² | none         | 0          | bs / bs   | P+G     | 6P   | A/N
ZeRO-1 | all-gather + reduce-scatter | 12d² | none  | 0          |           | P+G     | 6P/N | A/N
Unified + ZeRO-1 | AG + RS    | 12d² | P2P + 8 a2a  | <= 4·bsLd  | heads / L | P+G     | 6P/N | A/N
Unified + ZeRO-2 | AG + RS    | 12d² | same         | <= 4·bsLd  | heads / L | P+G/N   | 6P/N | A/N
Unified + ZeRO-3 | 2 AG + RS  | 18d² | same         | <= 4·bsLd  | heads / L | (P+G)/N | 6P/N | A/N
TP               | 0          | 0    | 4 all-reduce | 8·bsLd     | heads / d | (P+G)/N | 6P/N | αA
TP-sp            | 0          | 0    | 6 AG + 4 RS  | 10·bsLd    | heads / d | (P+G)/N | 6P/N | A/N
""")
"""The paper's table: cells by row."""

GROUPED = {
    "(8/N)·bsLd": "(4/N)·bsLd + (4/N)·bsLd/G",
    "4·bsLd": "4·bsLd/G",
    "<= 4·bsLd": "<= 4·bsLd/G",
}
"""Printed activation costs that grouped K/V heads change, and what the paper's text makes of them."""

CORRECTED = _read("""
SP-Ulysses        | all-reduce | {2P} | 8 all-to-all | {ulysses} | heads / L | P+G     | 6P   | A/N
SP-Ring           | all-reduce | {2P} | P2P          | {ring}    | L / L     | P+G     | 6P   | A/N
DP                | all-reduce | {2P} | none         | 0         | bs / bs   | P+G     | 6P   | A/N
ZeRO-1            | AG + RS    | {2P} | none         | 0         |           | P+G     | 6P/N | A/N
Unified + ZeRO-1  | AG + RS    | {2P} | P2P + 8 a2a  | {unified} | heads / L | P+G     | 6P/N | A/N
Unified + ZeRO-2  | AG + RS    | {2P} | same         | {unified} | heads / L | P+G/N   | 6P/N | A/N
Unified + ZeRO-3  | 2 AG + RS  | {3P} | same         | {unified} | heads / L | (P+G)/N | 6P/N | A/N
TP                | 0          | 0    | 4 all-reduce | 8·bsLd    | heads / d | (P+G)/N | 6P/N | αA
TP-sp             | 0          | 0    | 6 AG + 4 RS  | 10·bsLd   | heads / d | (P+G)/N | 6P/N | A/N
SP-Ring (seqmesh) | all-reduce | {2P} | P2P          | {exact ring}    | L / L     | P+G | 6P   | A/N
Unified (seqmesh) | AG + RS    | {2P} | P2P + 8 a2a  | {exact unified} | heads / L | P+G | 6P/N | A/N
EP (derived)| all-reduce| {2Pₐ}| 4 all-to-all| (4k/N)·bsLd| bs / experts| Pₐ+Gₐ+(Pₑ+Gₑ)/N| 6Pₐ+6Pₑ/N| {A/N}
""")
"""The corrected one, with a name in braces where a cell depends on the model.

The last three rows are not the paper's: the ring as seqmesh runs it, and expert parallelism.
"""

EXPERTS = "EP (derived)"
ROTATING = 8
"""Times that a rotating ring moves as much as K: K, V; K, V once more; dK, dV in fp32, twice the size."""
EXACT = Fraction(9, 2)
"""The same of seqmesh on a causal zigzag: 3/4 of the rows, and dK, dV in bf16: 3/4 of 6."""


@dataclass(frozen=True, kw_only=True)
class SpreadLayer:
    """A layer of a model on some ranks.

    Raises:
        ValueError: another block than the table's, fewer than two ranks, an empty batch or sequence, or more
            experts for a token than there are ranks.
    """

    model: ModelShape
    ranks: int
    """N."""
    batch: int
    """Sequences of a step, b."""
    seq_len: int
    """Tokens of a sequence, L."""
    top_k: int = 2
    """Experts of a token, for expert parallelism: one expert of the model's own width on every rank."""

    def __post_init__(self) -> None:
        if not self.model.is_plain:
            raise ValueError(
                f"{self.model.name} has experts, latent attention or several kinds of layers, and Table 2 is"
                " of one plain block; compare a dense model"
            )
        if self.ranks < 2:
            raise ValueError(
                f"ranks={self.ranks}: one rank sends nothing, so there is nothing to compare; use at least 2"
            )
        if self.batch < 1 or self.seq_len < 1:
            raise ValueError(
                f"batch={self.batch}, seq_len={self.seq_len}: both must be at least 1; use a positive batch"
                " and length"
            )
        if not 1 <= self.top_k <= self.ranks:
            raise ValueError(
                f"top_k={self.top_k} with one expert on each of {self.ranks} ranks;"
                f" use a top_k from 1 to {self.ranks}"
            )

    @property
    def groups(self) -> int:
        """G: query heads to a K/V head."""
        return self.model.heads // self.model.kv_heads

    @property
    def block(self) -> Fraction:
        """Parameters over d²."""
        return Fraction(self.model.layer_parameters, self.model.hidden**2)

    @property
    def expert(self) -> int:
        """Parameters of the feed-forward network, or of one expert."""
        return (3 if self.model.gated else 2) * self.model.hidden * self.model.intermediate

    @property
    def ulysses(self) -> int:
        """Ulysses ranks of the unified rows: as many as there are K/V heads for; more would hold copies."""
        most = min(self.ranks, self.model.kv_heads)
        return max(u for u in range(1, most + 1) if self.ranks % u == 0)


def texts(layer: SpreadLayer) -> dict[str, str]:
    """What the corrected table shows for the names in braces."""
    m = layer.model
    attention = layer.block - Fraction(layer.expert, m.hidden**2)
    width = Fraction(m.heads * m.head_dim, m.hidden)  # of attention, which need not be d wide
    four, eight = shown(4 * width), shown(8 * width)
    ring, exact = shown(ROTATING * width), shown(EXACT * width)
    kv = "bsLd/G" if layer.groups > 1 else "bsLd"
    heads = f"({four}/N)·bsLd + ({four}/N)·bsLd/G" if layer.groups > 1 else f"({eight}/N)·bsLd"
    copies = f"({four}/N)·bsLd + ({four}/K)·{kv}"
    return {
        "{2P}": f"{shown(2 * layer.block)}d²",
        "{3P}": f"{shown(3 * layer.block)}d²",
        "{2Pₐ}": f"{shown(2 * attention)}d²",
        "{ulysses}": heads if layer.ranks <= m.kv_heads else copies,
        "{ring}": f"{ring}·{kv}",
        "{unified}": f"{heads} + ({ring}/u)·{kv}",
        "{exact ring}": f"{exact}·{kv}",
        "{exact unified}": f"{heads} + ({exact}/u)·{kv}",
        "{A/N}": "A/N",
    }


def shown(number: Fraction) -> str:
    """12, 4.5; two digits and no fewer where they are rounded: 13.00 of 13.0005."""
    exact = f"{float(number):.2f}"
    return exact.rstrip("0").rstrip(".") if Fraction(exact) == number else exact


def elements(layer: SpreadLayer) -> dict[str, Fraction]:
    """What every cell of the corrected table amounts to, in elements per GPU."""
    m, n = layer.model, layer.ranks
    p = Fraction(m.layer_parameters)  # as many as gradients
    tokens = Fraction(layer.batch * layer.seq_len)
    hidden = tokens * m.hidden
    q, kv = tokens * m.heads * m.head_dim, tokens * m.kv_heads * m.head_dim
    # Kept of a token, as cost/fused_memory.py counts it; the lse of a head is fp32, two elements.
    norms = tokens * 4 * m.hidden
    attention = tokens * 2 * ((m.heads + m.kv_heads) * m.head_dim + m.heads)
    feed_forward = tokens * (3 if m.gated else 2) * m.intermediate
    return {
        "0": Fraction(0),
        "{2P}": 2 * p,  # an all-reduce counts 2, a gather or scatter 1
        "{3P}": 3 * p,
        "{2Pₐ}": 2 * (p - layer.expert),
        "{ulysses}": 4 * q / n + 4 * kv / min(n, m.kv_heads),
        "{ring}": ROTATING * kv,
        "{unified}": unified(q, kv, n, layer.ulysses, ROTATING),
        "{exact ring}": EXACT * kv,
        "{exact unified}": unified(q, kv, n, layer.ulysses, EXACT),
        "8·bsLd": 8 * hidden,
        "10·bsLd": 10 * hidden,
        "(4k/N)·bsLd": 4 * layer.top_k * hidden / n,
        "P+G": 2 * p,
        "P+G/N": p + p / n,
        "(P+G)/N": 2 * p / n,
        "Pₐ+Gₐ+(Pₑ+Gₑ)/N": 2 * p,  # an expert a rank: as much as the dense layer
        "6P": 6 * p,
        "6P/N": 6 * p / n,
        "6Pₐ+6Pₑ/N": 6 * p,
        "A/N": (norms + attention + feed_forward) / n,
        "{A/N}": (norms + attention + layer.top_k * feed_forward) / n,
        "αA": norms + (attention + feed_forward) / n,  # without sequence parallelism norms are kept whole
    }


def unified(q: Fraction, kv: Fraction, ranks: int, ulysses: int, transfers: int | Fraction) -> Fraction:
    """Activation elements that Ulysses x ring moves.

    Args:
        q: elements of Q, or of attention's output, of the whole batch.
        kv: of K, or of V.
        ranks: N.
        ulysses: ranks that exchange heads: Q, K, V out, O home, and their gradients. One exchanges nothing.
        transfers: times that a ring moves as much as K; one of a rank moves nothing.
    """
    heads = 4 * (q + kv) / ranks if ulysses > 1 else Fraction(0)
    rows = transfers * kv / ulysses if ulysses < ranks else Fraction(0)
    return heads + rows


def impossible(name: str, layer: SpreadLayer) -> str:
    """Why the layer cannot be spread as the row of that name is; empty if it can."""
    m, n = layer.model, layer.ranks
    if name in ("DP", "ZeRO-1", EXPERTS):
        return f"a batch of {layer.batch} does not split over {n} ranks" if layer.batch % n else ""
    if name in ("TP", "TP-sp"):
        heads = {"query heads": m.heads, "K/V heads": m.kv_heads}
        sizes = {**heads, "intermediate": m.intermediate, "hidden": m.hidden}
        undivided = [f"{n} ranks do not divide {what} {size}" for what, size in sizes.items() if size % n]
        return _too_few("K/V heads", m.kv_heads, n) or "".join(undivided[:1])
    few_heads = _too_few("query heads", m.heads, n) if name == "SP-Ulysses" else ""
    return few_heads or _too_few("tokens", layer.seq_len, n)


def _too_few(what: str, count: int, ranks: int) -> str:
    return f"{count} {what} leave {ranks - count} ranks without one" if count < ranks else ""
