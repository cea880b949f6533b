"""What exchanges hide behind: the compute of a step, each second of which hides one."""

from collections.abc import Iterable
from dataclasses import replace

from seqmesh.planner.cost.estimate import CostTerm


class OverlapBudget:
    """Compute that exchanges can hide behind: no more, over all terms and links, than there is.

    So no link is busy longer than the step. Links of two classes could hide at once; counting them one after
    the other is a little pessimistic, and keeps a faster GPU from ever being slower.
    """

    def __init__(self, busy: float) -> None:
        self.left = busy
        """Seconds that hide nothing yet."""

    def hide(self, terms: Iterable[CostTerm]) -> list[CostTerm]:
        """The terms, each hidden only as far as there is compute left."""
        return [self._hide(term) for term in terms]

    def _hide(self, term: CostTerm) -> CostTerm:
        if term.exposed >= term.seconds:
            return term
        hidden = min(term.seconds - term.exposed, self.left)
        self.left -= hidden
        return replace(term, exposed=term.seconds - hidden) if self.left == 0 else term
