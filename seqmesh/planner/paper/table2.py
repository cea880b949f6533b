"""The rows of the paper's Table 2 as rules: a block's collectives, what they carry, who keeps how much.

    rule                as printed                     corrected
    block               12d²                           the model's own layer over d²
    parameter column    half of what the rule of       the rule: all-reduce counts 2
                        all-reduce = 2 gives
    K/V heads           as many as query heads         1/G of them
    ring, backward      K, V once more                 K, V once more, and dK, dV in fp32, twice the size

The same functions make both tables, so the printed one is computed too (tests/test_plan_compare.py has every
printed cell).

Expert parallelism, whose row is lost: a rank holds a part of the experts and of the batch. Each token goes to
its k experts (dispatch) and comes back (combine); the backward sends gradients the other way: 4 all-to-alls
of k x bsLd/N. Attention and router (Pₐ, Gₐ) are replicated and all-reduced; experts (Pₑ, Gₑ) have one owner,
so nothing of theirs is reduced. A counts the k copies.

Source: USP, Table 2; docs/table2.md lists its flaws.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

from seqmesh.planner.paper.symbols import Call, Cost, cost, symbol

P = symbol("P")
G = symbol("G")
A = symbol("A")
HIDDEN = symbol("bsLd")
"""An activation of hidden size, of the whole batch."""
WHOLE = P + G
OPTIMIZER = symbol("P", 6)

EXPERTS = "EP (derived)"
SEQMESH_RING = "SP-Ring (seqmesh)"
SEQMESH_UNIFIED = "Unified (seqmesh)"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the two tables disagree about."""

    block: Cost
    """Parameters of a block."""
    attention_block: Cost
    """Those outside the feed-forward network: what expert parallelism replicates."""
    parameter_share: Fraction
    """Of the rule's cost in the parameter column: 1, or 1/2 as printed."""
    q: Cost
    """Q, or the attention's output, of the whole batch."""
    kv: Cost
    """K, or V, of the whole batch."""
    kv_ranks: str
    """Over how many ranks Ulysses alone splits K/V heads.

    N, or K where ranks outnumber the K/V heads and hold copies.
    """
    ring_backward: int
    """Transfers of K or V, or of as much, in a rotating ring's backward."""
    bounded: bool
    """Whether the unified rows give the bound over all meshes, as printed, or their cost on one."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row."""

    name: str
    parameter_calls: tuple[Call, ...] = ()
    parameter_cost: Cost
    activation_calls: tuple[Call, ...] = ()
    activation_cost: Cost
    split: str = ""
    """What of attention / of the rest is spread."""
    states: Cost
    """Parameters and gradients that a rank keeps."""
    optimizer: Cost
    kept: Cost
    """Activations that a rank keeps."""
    spelled: bool = False
    """Whether the table names the calls in full though there are two kinds."""
    same: bool = False
    """Whether the table says "same" of the activations' calls."""


def ulysses_calls(rules: Rules) -> tuple[Call, ...]:
    """Q, K, V out and O home, and their gradients: 8 all-to-alls, none of which copies K/V heads."""
    return Call(4, "all-to-all", rules.q / "N"), Call(4, "all-to-all", rules.kv / "N")


def pure_ulysses_calls(rules: Rules) -> tuple[Call, ...]:
    """The same over all ranks, where K/V heads may have to be copied."""
    return Call(4, "all-to-all", rules.q / "N"), Call(4, "all-to-all", rules.kv / rules.kv_ranks)


def ring_calls(rules: Rules) -> tuple[Call, ...]:
    """K and V past every rank, and what the backward moves."""
    return (Call(2 + rules.ring_backward, "P2P", rules.kv),)


def exact_ring_calls(rules: Rules) -> tuple[Call, ...]:
    """seqmesh on a causal zigzag: 3/4 of the rows of K, V, of K, V once more, and of dK, dV.

    All in the inputs' precision.
    """
    return (Call(6, "P2P", rules.kv * Fraction(3, 4)),)


def methods(rules: Rules) -> tuple[Method, ...]:
    """The rows that the paper prints, in its order."""
    return (*_sequence_and_data(rules), *_unified(rules), *_tensor())


def derived(rules: Rules) -> tuple[Method, ...]:
    """Rows that it does not print: the ring as seqmesh runs it, and expert parallelism."""
    unified = _unified(rules)[0]
    exchange, ring = ulysses_calls(rules), exact_ring_calls(rules)
    return (
        _replicated(rules, SEQMESH_RING, ring, "L / L"),
        replace(
            unified,
            name=SEQMESH_UNIFIED,
            activation_calls=(*ring, *exchange),
            activation_cost=cost(exchange) + cost(ring) / "u",
        ),
        _experts(rules),
    )


def mixed(rules: Rules, ring_ranks: int, ulysses_ranks: int, *, exact: bool) -> Cost:
    """Activation cost on a concrete mesh: an axis of one rank exchanges nothing."""
    total = Cost()
    if ulysses_ranks > 1:
        total += cost(ulysses_calls(rules))
    if ring_ranks > 1:
        total += cost(exact_ring_calls(rules) if exact else ring_calls(rules)) / "u"
    return total


def _sequence_and_data(rules: Rules) -> tuple[Method, ...]:
    weights = (Call(1, "all-gather", rules.block), Call(1, "reduce-scatter", rules.block))
    return (
        _replicated(rules, "SP-Ulysses", pure_ulysses_calls(rules), "heads / L"),
        _replicated(rules, "SP-Ring", ring_calls(rules), "L / L"),
        _replicated(rules, "DP", (), "bs / bs"),
        Method(
            name="ZeRO-1",
            parameter_calls=weights,
            parameter_cost=cost(weights) * rules.parameter_share,
            activation_cost=Cost(),
            states=WHOLE,
            optimizer=OPTIMIZER / "N",
            kept=A / "N",
            spelled=True,
        ),
    )


def _replicated(rules: Rules, name: str, activations: tuple[Call, ...], split: str) -> Method:
    reduce = (Call(1, "all-reduce", rules.block),)
    return Method(
        name=name,
        parameter_calls=reduce,
        parameter_cost=cost(reduce) * rules.parameter_share,
        activation_calls=activations,
        activation_cost=cost(activations),
        split=split,
        states=WHOLE,
        optimizer=OPTIMIZER,
        kept=A / "N",
    )


def _unified(rules: Rules) -> tuple[Method, ...]:
    """Ulysses x ring.

    No mesh of two ranks or more moves more than the ring alone: 4/u + 8/N <= 4, the printed bound.
    """
    ring, exchange = ring_calls(rules), ulysses_calls(rules)
    activation = cost(ring).bound() if rules.bounded else cost(exchange) + cost(ring) / "u"
    rows = []
    for stage, gathers, states in ((1, 1, WHOLE), (2, 1, P + G / "N"), (3, 2, WHOLE / "N")):
        weights = (Call(gathers, "all-gather", rules.block), Call(1, "reduce-scatter", rules.block))
        rows.append(
            Method(
                name=f"Unified + ZeRO-{stage}",
                parameter_calls=weights,
                parameter_cost=cost(weights) * rules.parameter_share,
                activation_calls=(*ring, *exchange),
                activation_cost=activation,
                split="heads / L",
                states=states,
                optimizer=OPTIMIZER / "N",
                kept=A / "N",
                same=stage > 1,
            )
        )
    return tuple(rows)


def _tensor() -> tuple[Method, ...]:
    reduce = (Call(4, "all-reduce", HIDDEN),)
    apart = (Call(6, "all-gather", HIDDEN), Call(4, "reduce-scatter", HIDDEN))
    return tuple(
        Method(
            name=name,
            parameter_cost=Cost(),
            activation_calls=calls,
            activation_cost=cost(calls),
            split="heads / d",
            states=WHOLE / "N",
            optimizer=OPTIMIZER / "N",
            kept=kept,
        )
        for name, calls, kept in (("TP", reduce, symbol("αA")), ("TP-sp", apart, A / "N"))
    )


def _experts(rules: Rules) -> Method:
    reduce = (Call(1, "all-reduce", rules.attention_block),)
    exchange = (Call(4, "all-to-all", HIDDEN * "k" / "N"),)
    owned = symbol("Pₑ") + symbol("Gₑ")
    return Method(
        name=EXPERTS,
        parameter_calls=reduce,
        parameter_cost=cost(reduce) * rules.parameter_share,
        activation_calls=exchange,
        activation_cost=cost(exchange),
        split="bs / experts",
        states=symbol("Pₐ") + symbol("Gₐ") + owned / "N",
        optimizer=symbol("Pₐ", 6) + symbol("Pₑ", 6) / "N",
        kept=A / "N",
    )
