"""Experts without data: routers are taken to send as many tokens to every expert.

    rows that a rank sends to the ranks of its experts      as many to each: n k / e
    rows that come                                          as many as go
    rows of one expert                                      no matter: an operator multiplies those of all

Real routers are not even: a rank whose experts are in demand gets more rows, and holds more. Only where
experts are spread over ranks do numbers decide how large a tensor is.

Legend: n local tokens, k experts of a token, e ranks that share a layer's experts.
Source: transformers.distributed.expert_parallel.AllToAllEP; transformers.integrations.moe.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.distributed.expert_parallel import AllToAllEP
from transformers.integrations import moe

from seqmesh.trace.fake_ranks import replaced

Dispatch = Callable[[AllToAllEP, Tensor, Tensor, Tensor], Any]


@contextmanager
def even_routing() -> Iterator[None]:
    """Where tensors are fake: tokens go to experts in equal parts, and products of experts have a shape."""
    evenly = _dispatching_evenly(AllToAllEP._dispatch_tokens)
    with ExitStack() as undone:
        undone.enter_context(replaced(AllToAllEP, "_dispatch_tokens", evenly))
        # PyTorch's product has a shape in bf16 alone; transformers' own, as large, in any dtype.
        undone.enter_context(replaced(moe, "_can_use_grouped_mm", lambda *_: False))
        yield


def _dispatching_evenly(dispatch: Dispatch) -> Dispatch:
    """Tell a dispatch the sizes that it reads: of rows to send to each rank, and of rows to get from each."""

    def evenly(experts: AllToAllEP, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Any:
        # Ranks of tp share the rows that they all have; the first has a part that is rounded up.
        rows = -(-hidden.shape[0] // experts.tp_mesh.size())
        sends = _in_parts(rows * chosen.shape[-1], experts.ep_mesh.size())
        gets = [sends[experts.ep_mesh.get_local_rank()]] * len(sends)
        with replaced(FakeTensor, "tolist", lambda _: [sends, gets]):
            return dispatch(experts, hidden, chosen, weights)

    return evenly


def _in_parts(rows: int, parts: int) -> list[int]:
    """As equal as whole rows can be."""
    return [(rows + parts - 1 - part) // parts for part in range(parts)]
