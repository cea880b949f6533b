"""What the mixers of hybrid models compute: sizes of convolutions and recurrences, known without weights.

As calls.py for attention, in the same forward on the meta device: each mixer calls its own functions, and
what it calls them with is noted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from seqmesh.engine.recurrent.kernels import Tensors
from seqmesh.engine.recurrent.rules import DeltaRule, Mamba2, Rule
from seqmesh.integrations.mixers import MixerFunction, bound_to, by_name, mixers_of


@dataclass(frozen=True, kw_only=True)
class RecurrentCall:
    """What a layer's mixer computes along the sequence, once in every forward: of either kind, 0 for none."""

    layer: int
    channels: int = 0
    """Of a short convolution."""
    width: int = 0
    """Tokens that it reaches back."""
    heads: int = 0
    """Of a recurrence."""
    groups: int = 0
    """Of heads that share queries and keys, or B and C."""
    state: int = 0
    """Numbers of a head's state."""
    transition: int = 0
    """Numbers of a head's transition."""
    products: int = 0
    """Multiplications by, or into, a state for each token and head: a delta rule reads it twice."""

    def heads_of(self, tp: int) -> int:
        """Those that a rank of tp computes."""
        return self.heads // tp if self.heads and divides_heads(tp, self.heads, self.groups) else self.heads

    @property
    def work(self) -> int:
        """Multiplications of a token in a forward."""
        return self.channels * (self.width + 1) + self.heads * self.products


def divides_heads(ranks: int, heads: int, groups: int) -> bool:
    """Whether ranks can share the heads of a recurrence: each some groups, or some heads of one."""
    return heads % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0)


@contextmanager
def recorded(found: list[RecurrentCall], layers: Sequence[nn.Module]) -> Iterator[None]:
    """Note what the mixers of layers compute, while they compute it."""
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            notes = by_name(
                convolution=_noting(found, number, _convolution),
                delta_rule=_noting(found, number, _delta_rule),
                scan=_noting(found, number, _scan),
            )
            for mixer in mixers_of(layer):
                stack.enter_context(bound_to(mixer, notes))
        yield


def _noting(found: list[RecurrentCall], layer: int, look: Callable[..., RecurrentCall]) -> Callable[..., Any]:
    """A function that notes a call and then makes it."""

    def noting(kernel: MixerFunction, *args: Tensor, **kwargs: Any) -> Any:
        found.append(look(layer, *args, **kwargs))
        return kernel.function(*args, **kwargs)

    return noting


def _convolution(layer: int, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> RecurrentCall:
    del x
    return RecurrentCall(layer=layer, channels=weight.shape[0], width=weight.shape[-1] - 1)


def _delta_rule(layer: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> RecurrentCall:
    rows = {"query": query, "key": key, "value": value}
    return _recurrence(layer, DeltaRule(_not_called), rows, query.shape[2], 3)


def _scan(layer: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **_: Any) -> RecurrentCall:
    del dt, A
    return _recurrence(layer, Mamba2(_not_called, 1), {"hidden_states": x, "B": B, "C": C}, B.shape[2], 2)


def _not_called(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """The kernel of a rule that is asked for shapes alone."""
    raise AssertionError


def _recurrence(layer: int, rule: Rule, tensors: Tensors, groups: int, products: int) -> RecurrentCall:
    shapes = rule.shapes(tensors)
    state = prod(shapes.state)
    return RecurrentCall(
        layer=layer,
        heads=shapes.heads,
        groups=groups,
        state=state,
        transition=prod(shapes.transition),
        products=products * state,
    )
