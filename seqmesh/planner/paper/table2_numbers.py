"""Table 2's corrected rules for a model, and their values in elements.

Source: USP (Fang & Zhao 2024, arXiv 2405.07719), Table 2; cost/fused_memory.py for the
activations.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.paper.symbols import Cost, symbol
from seqmesh.planner.paper.table2 import EXPERTS, HIDDEN, SEQMESH_UNIFIED, Method, Rules, mixed

BYTES = 2
"""Of a bf16 element."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A corrected row in elements per GPU and layer; bytes in bf16 are twice as many."""

    parameter_elements: int
    """Moved for weights and gradients."""
    activation_elements: int
    """Moved for activations."""
    states_elements: int
    """Parameters and gradients kept."""
    optimizer_elements: int
    """Optimizer states kept, in bf16 elements."""
    kept_elements: int
    """Activations kept."""


def corrected_rules(model: ModelShape, ranks: int) -> Rules:
    """The rules for a model's own layer: its parameters and K/V heads; attention need not be d wide."""
    d2 = model.hidden**2
    attention = model.layer_parameters - feed_forward(model)
    q = HIDDEN * Fraction(model.heads * model.head_dim, model.hidden)
    return Rules(
        block=symbol("d²", Fraction(model.layer_parameters, d2)),
        attention_block=symbol("d²", Fraction(attention, d2)),
        parameter_share=Fraction(1),
        q=q,
        kv=q / "G" if model.kv_heads < model.heads else q,
        kv_ranks="N" if ranks <= model.kv_heads else "K",
        ring_backward=6,
        bounded=False,
    )


def feed_forward(model: ModelShape) -> int:
    """Parameters of the feed-forward network: of one expert."""
    return (3 if model.gated else 2) * model.hidden * model.intermediate


_BATCH_SPLIT = ("DP", "ZeRO-1", EXPERTS)
"""Rows that spread the batch."""
_HEADS_SPLIT = ("TP", "TP-sp")
"""Rows that spread heads and widths; all others spread the sequence."""


class Evaluation:
    """The corrected rows of one model, evaluated."""

    def __init__(
        self, model: ModelShape, rules: Rules, *, ranks: int, batch: int, seq_len: int, top_k: int
    ) -> None:
        self.model = model
        self.rules = rules
        self.ranks = ranks
        self.batch = batch
        self.seq_len = seq_len
        self.top_k = top_k
        # As many ulysses ranks as there are K/V heads for: more of them would hold copies.
        self.ulysses = max(u for u in range(1, ranks + 1) if ranks % u == 0 and u <= model.kv_heads)

    def impossible(self, name: str) -> str:
        """Why this model and batch cannot be spread so; empty if they can."""
        m = self.model
        n = self.ranks
        if name == "SP-Ulysses" and n > m.heads:
            return f"{m.heads} query heads leave {n - m.heads} ranks without one"
        if name in _HEADS_SPLIT:
            return self._impossible_heads()
        if name in _BATCH_SPLIT:
            return f"a batch of {self.batch} does not split over {n} ranks" if self.batch % n else ""
        if self.seq_len < n:
            return f"{self.seq_len} tokens leave {n - self.seq_len} ranks without one"
        return ""

    def _impossible_heads(self) -> str:
        m = self.model
        n = self.ranks
        if n > m.kv_heads:
            return f"{m.kv_heads} K/V heads leave {n - m.kv_heads} ranks without one"
        sizes = {
            "query heads": m.heads,
            "K/V heads": m.kv_heads,
            "intermediate": m.intermediate,
            "hidden": m.hidden,
        }
        for what, size in sizes.items():
            if size % n:
                return f"{n} ranks do not divide {what} {size}"
        return ""

    def mesh_of(self, name: str) -> str:
        """What the numbers are of, where the row's name does not say it."""
        if name.startswith("Unified"):
            return f"u{self.ulysses} r{self.ranks // self.ulysses}"
        return f"top {self.top_k}, an expert a rank" if name == EXPERTS else ""

    def of(self, method: Method) -> Numbers:
        """The row in elements."""
        moved = method.activation_cost
        if method.name.startswith("Unified"):
            exact = method.name == SEQMESH_UNIFIED
            moved = mixed(self.rules, self.ranks // self.ulysses, self.ulysses, exact=exact)
        experts = method.name == EXPERTS
        return Numbers(
            parameter_elements=self._elements(method.parameter_cost, experts),
            activation_elements=self._elements(moved, experts),
            states_elements=self._elements(method.states, experts),
            optimizer_elements=self._elements(method.optimizer, experts),
            kept_elements=self._elements(method.kept, experts),
        )

    def _elements(self, cost: Cost, experts: bool) -> int:
        """The value of a cost.

        Args:
            cost: in the table's symbols.
            experts: whether each token's activations exist once for each of its experts.
        """
        m = self.model
        n = self.ranks
        whole = m.layer_parameters
        expert = feed_forward(m)
        tokens = self.batch * self.seq_len
        copies = self.top_k if experts else 1
        kept = activations_per_token(m)
        units = {
            "d²": Fraction(m.hidden**2),
            "bsLd": Fraction(tokens * m.hidden),
            "P": Fraction(whole),
            "G": Fraction(whole),
            "Pₐ": Fraction(whole - expert),
            "Gₐ": Fraction(whole - expert),
            "Pₑ": Fraction(n * expert),
            "Gₑ": Fraction(n * expert),
            "A": Fraction(tokens * (kept.norms + kept.attention + copies * kept.feed_forward)),
            # Tensor parallelism without its sequence parallelism keeps the norms whole.
            "αA": Fraction(tokens) * (kept.norms + Fraction(kept.attention + kept.feed_forward, n)),
        }
        symbols = {"N": n, "K": m.kv_heads, "u": self.ulysses, "k": self.top_k, "G": m.heads // m.kv_heads}
        return round(cost.value(units, symbols))


class KeptPerToken(NamedTuple):
    """Elements that autograd keeps of a token and layer, by module."""

    norms: int
    attention: int
    feed_forward: int


def activations_per_token(model: ModelShape) -> KeptPerToken:
    """Elements that autograd keeps of a token and layer, as cost/fused_memory.py counts them."""
    # q, k, v and out; the lse is fp32, two elements
    attention = 2 * (model.heads + model.kv_heads) * model.head_dim + 2 * model.heads
    return KeptPerToken(
        norms=4 * model.hidden,
        attention=attention,
        feed_forward=(3 if model.gated else 2) * model.intermediate,
    )
