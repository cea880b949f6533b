"""Costs as the paper's Table 2 writes them: exact multiples of a few symbols, added, and printed as there.

    Call(8, "all-to-all", BSLD / "N")      collectives of a block and what one of them carries
    cost([...])                            (8/N)·bsLd: count x factor of nccl-tests x what is carried

Symbols: d² of weights; bsLd, an activation of b sequences of L tokens and width d; P, G, OS of a block and A,
its activations. Divisors: N ranks, u ulysses ranks, G query heads to a K/V head (as a unit, G means
gradients: the table uses it for both).

Source: USP (Fang & Zhao 2024, arXiv 2405.07719), Table 2.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

FACTOR = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "P2P": 1}
"""What a call moves over what it carries: nccl-tests, with (N - 1)/N counted as 1."""
SHORT = {"all-reduce": "AR", "all-gather": "AG", "reduce-scatter": "RS", "all-to-all": "a2a", "P2P": "P2P"}


@dataclass(frozen=True)
class Term:
    """`coefficient` x `factor` x `unit` / `over`."""

    coefficient: Fraction
    unit: str
    over: tuple[str, ...] = ()
    factor: str = ""
    """A symbol that multiplies: k of top-k."""

    @property
    def shared(self) -> tuple[str, ...]:
        """Divisors over which ranks share it: all but the heads' group."""
        return tuple(symbol for symbol in self.over if symbol != "G")

    def __str__(self) -> str:
        """As the table prints it: 12d², (8/N)·bsLd, 4·bsLd/G, 6P."""
        number = shown(self.coefficient) + self.factor
        if self.unit != "bsLd":
            return ("" if number == "1" else number) + self.unit
        lead = f"({number}/{''.join(self.shared)})" if self.shared else number
        return f"{lead}·bsLd{'/G' if 'G' in self.over else ''}"


@dataclass(frozen=True)
class Cost:
    """A sum of terms, like terms added up; or a bound."""

    terms: tuple[Term, ...] = ()
    at_most: bool = False
    """Whether this is an upper bound."""

    def __add__(self, other: "Cost") -> "Cost":
        sums: dict[tuple[str, tuple[str, ...], str], Fraction] = {}
        for term in (*self.terms, *other.terms):
            key = (term.unit, term.over, term.factor)
            sums[key] = sums.get(key, Fraction(0)) + term.coefficient
        return Cost(tuple(Term(coefficient, *key) for key, coefficient in sums.items() if coefficient))

    def __mul__(self, times: int | Fraction | str) -> "Cost":
        if isinstance(times, str):
            return Cost(tuple(Term(t.coefficient, t.unit, t.over, t.factor + times) for t in self.terms))
        return Cost(tuple(Term(t.coefficient * times, t.unit, t.over, t.factor) for t in self.terms))

    def __truediv__(self, symbol: str) -> "Cost":
        return Cost(tuple(Term(t.coefficient, t.unit, (*t.over, symbol), t.factor) for t in self.terms))

    def bound(self) -> "Cost":
        """The same as an upper bound."""
        return Cost(self.terms, at_most=True)

    def value(self, units: Mapping[str, Fraction], symbols: Mapping[str, int]) -> Fraction:
        """The number, given the units and what multiplies and divides them."""
        total = Fraction(0)
        for term in self.terms:
            one = term.coefficient * units[term.unit] * (symbols[term.factor] if term.factor else 1)
            for symbol in term.over:
                one /= symbols[symbol]
            total += one
        return total

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        if self.terms[0].unit in ("bsLd", "d²"):
            return ("<= " if self.at_most else "") + " + ".join(map(str, self.terms))
        by_divisor = groupby(self.terms, key=lambda term: term.over)
        return "+".join(_shared(over, [str(term) for term in members]) for over, members in by_divisor)


def _shared(over: tuple[str, ...], texts: list[str]) -> str:
    """Terms with the same divisors: (P+G)/N."""
    joined = "+".join(texts)
    if over and len(texts) > 1:
        joined = f"({joined})"
    return joined + "".join(f"/{symbol}" for symbol in over)


def symbol(unit: str, coefficient: int | Fraction = 1) -> Cost:
    """So much of one unit."""
    return Cost((Term(Fraction(coefficient), unit),))


def shown(number: Fraction) -> str:
    """12, 4.5; two digits and no fewer where they are rounded: 13.00 of 13.0005."""
    exact = f"{float(number):.2f}"
    return exact.rstrip("0").rstrip(".") if Fraction(exact) == number else exact


@dataclass(frozen=True)
class Call:
    """Calls of one collective in a block, forward and backward."""

    count: int
    op: str
    carries: Cost
    """Of one call, in the size that nccl-tests counts."""


def cost(calls: Iterable[Call]) -> Cost:
    """What the calls move."""
    total = Cost()
    for call in calls:
        total += call.carries * (call.count * FACTOR[call.op])
    return total


def words(calls: Iterable[Call], *, none: str, spelled: bool = False) -> str:
    """The calls as the table names them: in full where there is one kind, else in short ("2 AG + RS").

    Args:
        calls: of a block.
        none: what stands for no calls.
        spelled: whether several kinds are named in full too.
    """
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.op] = counts.get(call.op, 0) + call.count
    short = len(counts) > 1 and not spelled
    named = []
    for op, count in counts.items():
        name = SHORT[op] if short else op
        counted = count > 1 and op != "P2P"  # the table counts no messages of a ring
        named.append(f"{count} {name}" if counted else name)
    return " + ".join(named) or none
