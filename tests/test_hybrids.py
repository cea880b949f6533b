"""Hybrid models of transformers on shards, against each document alone on one rank.

Their kernels compute in fp32 whatever comes, so errors are held to the noise of one rank: what another chunk
size of the same kernel changes, which in real numbers is nothing.
"""

import warnings
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hybrid_models import FAMILIES, VOCABULARY, hybrid, rechunk
from oracle import mesh_of
from ranks import Ranks
from torch import Tensor
from transformers import PreTrainedModel

from seqmesh import Schedule, masks
from seqmesh.integrations.transformers import plug_in
from seqmesh.schedule.chains import Chains

ONE = (150,)
PACKED = (60, 5, 1, 84)
Lengths = tuple[int, ...]


class Found(NamedTuple):
    """What a model gives."""

    logits: Tensor
    grads: dict[str, Tensor]


def inputs(lengths: Lengths) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions that restart, and a gradient of the logits."""
    s = sum(lengths)
    made = torch.Generator().manual_seed(s)
    ids = torch.randint(3, VOCABULARY, (1, s), generator=made)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, positions, torch.randn(1, s, VOCABULARY, generator=made) / s


def alone(model: PreTrainedModel, lengths: Lengths) -> Found:
    """Every document by itself, by transformers' own attention and mixers."""
    ids, _, up = inputs(lengths)
    ends = [0, *accumulate(lengths)]
    logits = torch.cat([model(ids[:, a:b], use_cache=False).logits.float() for a, b in pairwise(ends)], 1)
    logits.backward(up)
    grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return Found(logits.detach(), grads)


def distance(found: Found, wanted: Found) -> tuple[float, float]:
    """Largest errors of the logits and of any gradient, relative to their largest numbers."""
    assert found.grads.keys() == wanted.grads.keys()
    scale = max(grad.abs().max() for grad in wanted.grads.values())
    grads = [
        (found.grads[name] - grad).abs().max() / max(grad.abs().max(), 1e-3 * scale)
        for name, grad in wanted.grads.items()
    ]
    logits = (found.logits - wanted.logits).abs().max() / wanted.logits.abs().max()
    return logits.item(), max(grads).item()


@lru_cache(maxsize=2)
def reference(family: str, lengths: Lengths) -> tuple[Found, tuple[float, float]]:
    """One rank's result, and its noise."""
    wanted = alone(hybrid(family), lengths)
    noise = [distance(alone(rechunk(hybrid(family), chunk), lengths), wanted) for chunk in (8, 24)]
    least = 3e-7  # of models without kernels that have chunks
    return wanted, (max(least, *(n[0] for n in noise)), max(4 * least, *(n[1] for n in noise)))


def sharded(
    family: str,
    lengths: Lengths,
    layout: str,
    ulysses: int,
    ring: int,
    checkpoints: bool,
    dtype: torch.dtype = torch.float32,
    passes: bool = True,
) -> Found:
    """Logits of all tokens and gradients of all ranks; or what comes if no state and no halo is passed."""
    model = plug_in(hybrid(family).to(dtype))
    if checkpoints:
        model.activation_checkpointing_enable()
    mesh = mesh_of(ulysses, ring)
    schedule = Schedule.build(masks.documents(lengths), mesh, layout=layout)
    if not passes:
        cut = [
            [piece._replace(is_first=True, is_last=True) for piece in own] for own in schedule.chains.pieces
        ]
        vars(schedule)["chains"] = Chains(tuple(map(tuple, cut)))
    ids, positions, up = (schedule.shard(x, 1) for x in inputs(lengths))
    logits = model(ids, position_ids=positions, schedule=schedule).logits.float()
    logits.backward(up)
    grads = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad.float()
        dist.all_reduce(grad)
        if grad.any():
            grads[name] = grad
    return Found(schedule.unshard(logits.detach(), 1), grads)


CASES = [
    (ONE, "zigzag", 1, 4, False),
    (PACKED, "balanced", 1, 4, False),
    (PACKED, "zigzag", 2, 2, True),
]


@pytest.mark.parametrize("case", CASES, ids=["one-document", "packed", "packed-ulysses-checkpoints"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hybrid_on_shards_equals_each_document_alone(
    ranks: Ranks, family: str, case: tuple[Lengths, str, int, int, bool]
) -> None:
    wanted, noise = reference(family, case[0])
    found = distance(ranks.run(4, sharded, family, *case)[0], wanted)
    assert found[0] <= 3 * noise[0]
    assert found[1] <= 3 * noise[1]


@pytest.mark.parametrize("family", ["qwen3_5", "kimi_linear", "bamba", "lfm2"])
def test_without_passing_everything_is_wrong(ranks: Ranks, family: str) -> None:
    """The control: what the other tests would see if states or halos stayed at home."""
    wanted, _ = reference(family, ONE)
    logits, grads = distance(ranks.run(4, sharded, family, *CASES[0], torch.float32, False)[0], wanted)
    assert min(logits, grads) > 0.05


@pytest.mark.parametrize("family", ["qwen3_5", "kimi_linear", "bamba", "lfm2"])
def test_bf16_on_shards_is_as_exact_as_bf16_on_one_rank(ranks: Ranks, family: str) -> None:
    wanted, _ = reference(family, PACKED)
    one = alone(hybrid(family).to(torch.bfloat16), PACKED)
    noise = distance(one, wanted)
    found = distance(ranks.run(4, sharded, family, *CASES[1], torch.bfloat16)[0], wanted)
    assert found[0] <= 1.5 * noise[0]
    assert found[1] <= 1.5 * noise[1]


def compiled(family: str, batches: list[Lengths], ulysses: int, ring: int) -> tuple[list[float], int]:
    """Errors of a compiled model beside the eager one, and how often it compiled."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    warnings.simplefilter("ignore")  # PyTorch's compiler warns about its own deprecations
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    models = [plug_in(hybrid(family)) for _ in range(2)]
    mesh = mesh_of(ulysses, ring)
    assert mesh.as_ring.size == ulysses * ring
    compiled_model = torch.compile(models[1], fullgraph=True, backend=counter)
    worst = []
    for lengths in batches:
        schedule = Schedule.build(masks.documents(lengths), mesh, layout="zigzag")
        ids, positions, up = (schedule.shard(x, 1) for x in inputs(lengths))
        found = []
        for model, call in ((models[0], models[0]), (models[1], compiled_model)):
            model.zero_grad()
            logits = call(ids, position_ids=positions, schedule=schedule).logits
            logits.backward(up)
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append(Found(logits.detach(), grads))
        worst += distance(found[1], found[0])
    return worst, counter.frame_count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("default")
def test_a_compiled_hybrid_gives_the_eager_numbers(ranks: Ranks, family: str) -> None:
    batches = [PACKED, (100, 50)]
    for errors, compilations in ranks.run(2, compiled, family, batches, 1, 2):
        assert max(errors) < 1e-4
        assert compilations <= 3
