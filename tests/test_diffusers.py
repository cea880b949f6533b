"""Transformers of diffusers on 4 ranks give the outputs and all gradients of one rank, in fp64."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusion_models import NAMES, example, run, worst
from oracle import mesh_of
from ranks import Ranks
from torch import Tensor

from seqmesh.integrations.diffusers import plug_in

MESHES = [(1, 4), (2, 2), (4, 1)]
"""ulysses x ring."""
TOLERANCE = 1e-10


def heads_for(ulysses: int) -> int:
    """Every ulysses rank needs a head; neither number divides by 2 or 4."""
    return 3 if ulysses < 4 else 5


@cache
def on_one_rank(name: str, heads: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    return run(example(name, heads))


def on_mesh(name: str, ulysses: int, ring: int) -> list[Any]:
    """On one rank: the whole output, and gradients summed over ranks."""
    case = example(name, heads_for(ulysses))
    plug_in(case.model, mesh_of(ulysses, ring))
    out, grads, input_grads = run(case)
    for grad in [*grads.values(), *input_grads.values()]:
        dist.all_reduce(grad)
    return [out, grads if dist.get_rank() == 0 else None, input_grads]


def compare(results: list[Any], name: str, ulysses: int) -> None:
    want, want_grads, want_input_grads = on_one_rank(name, heads_for(ulysses))
    outputs = [out for out, _, _ in results]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert (outputs[0] - want).abs().max() <= TOLERANCE * want.abs().max()
    for got, expected in ((results[0][1], want_grads), (results[0][2], want_input_grads)):
        if expected:
            error, where = worst(got, expected)
            assert error <= TOLERANCE, f"the gradient of {where} is off by {error:.1e} of its largest entry"


@pytest.mark.parametrize(("ulysses", "ring"), MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_all_gradients_are_those_of_one_rank(
    ranks: Ranks, name: str, ulysses: int, ring: int
) -> None:
    compare(ranks.run(4, on_mesh, name, ulysses, ring), name, ulysses)


def in_half_precision(name: str) -> list[float]:
    """On one rank: the difference to one rank in bf16, and that one's difference to fp64."""
    exact = on_one_rank(name, 3)[0]
    case = example(name, dtype=torch.bfloat16)
    with torch.no_grad():
        alone = case.model(**case.arguments, return_dict=False)[0].flatten()
        plug_in(case.model, mesh_of(2, 2))
        out = case.model(**case.arguments, return_dict=False)[0].flatten()
    assert out.dtype == torch.bfloat16
    return [(x.double() - exact).abs().mean().item() for x in (out, alone)]


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
def test_half_precision_is_as_near_to_fp64_as_on_one_rank(ranks: Ranks, name: str) -> None:
    for error, of_one_rank in ranks.run(4, in_half_precision, name):
        # Roundings fall elsewhere, so neither is always the nearer one.
        assert error <= 1.5 * of_one_rank
