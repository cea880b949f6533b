"""Table 2's corrected rules for a model, and their values in elements.

Source: PAPER.md, Table 2; memory.py for the activations.
"""

from dataclasses import dataclass
from fractions import Fraction

from seqmesh.planner.inputs.models import ModelShape
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
    """The rules for a model's own layer: its parameters, its K/V heads, a width of attention that need not be
    d.
    """
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


class Evaluation:
    """The corrected rows of one model, evaluated."""

    def __init__(
        self, model: ModelShape, rules: Rules, ranks: int, batch: int, seq_len: int, top_k: int
    ) -> None:
        self.model, self.rules, self.ranks, self.batch, self.seq_len, self.top_k = (
            model,
            rules,
            ranks,
            batch,
            seq_len,
            top_k,
        )
        self.ulysses = max(u for u in range(1, ranks + 1) if ranks % u == 0 and u <= model.kv_heads)

    def impossible(self, name: str) -> str:
        """Why this model and batch cannot be spread so; empty if they can."""
        m, n = self.model, self.ranks
        if name == "SP-Ulysses" and n > m.heads:
            return f"{m.heads} query heads leave {n - m.heads} ranks without one"
        if name in ("TP", "TP-sp"):
            if n > m.kv_heads:
                return f"{m.kv_heads} K/V heads leave {n - m.kv_heads} ranks without one"
            sizes = {
                "query heads": m.heads,
                "K/V heads": m.kv_heads,
                "intermediate": m.intermediate,
                "hidden": m.hidden,
            }
            return next(
                (f"{n} ranks do not divide {what} {size}" for what, size in sizes.items() if size % n), ""
            )
        if name in ("DP", "ZeRO-1", EXPERTS) and self.batch % n:
            return f"a batch of {self.batch} does not split over {n} ranks"
        if name not in ("DP", "ZeRO-1", EXPERTS, "TP", "TP-sp") and self.seq_len < n:
            return f"{self.seq_len} tokens leave {n - self.seq_len} ranks without one"
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
        costs = (method.parameter_cost, moved, method.states, method.optimizer, method.kept)
        parameters, activations, states, optimizer, kept = (
            self._elements(one, method.name == EXPERTS) for one in costs
        )
        return Numbers(
            parameter_elements=parameters,
            activation_elements=activations,
            states_elements=states,
            optimizer_elements=optimizer,
            kept_elements=kept,
        )

    def _elements(self, cost: Cost, experts: bool) -> int:
        m, n = self.model, self.ranks
        whole, expert = m.layer_parameters, feed_forward(m)
        units = {
            "d²": m.hidden**2,
            "bsLd": self.batch * self.seq_len * m.hidden,
            **dict.fromkeys(("P", "G"), whole),
            **dict.fromkeys(("Pₐ", "Gₐ"), whole - expert),
            **dict.fromkeys(("Pₑ", "Gₑ"), n * expert),
        }
        tokens, copies = self.batch * self.seq_len, self.top_k if experts else 1
        outside, inside = activations_per_token(m)
        exact = {name: Fraction(size) for name, size in units.items()}
        exact["A"] = Fraction(tokens * (outside[0] + outside[1] + copies * inside))
        exact["αA"] = Fraction(tokens) * (outside[0] + Fraction(outside[1] + inside, n))
        symbols = {"N": n, "K": m.kv_heads, "u": self.ulysses, "k": self.top_k, "G": m.heads // m.kv_heads}
        return round(cost.value(exact, symbols))


def activations_per_token(model: ModelShape) -> tuple[tuple[int, int], int]:
    """Elements that autograd keeps of a token and layer, as memory.py counts them: ((norms, attention),
    feed-forward network).
    """
    attention = (
        2 * (model.heads + model.kv_heads) * model.head_dim + 2 * model.heads
    )  # q, k, v, out; lse in fp32
    return (4 * model.hidden, attention), (3 if model.gated else 2) * model.intermediate
