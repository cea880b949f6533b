"""What hybrid models cannot do on shards is refused before any layer runs, with what to do instead."""

import inspect

import pytest
import torch
from hf_models import refusal
from hybrid_models import FAMILIES, hybrid
from ranks import Ranks
from transformers import PreTrainedModel

from seqmesh import Schedule, SequenceMesh, masks
from seqmesh.generate import ShardedCache
from seqmesh.integrations import mixers
from seqmesh.integrations.transformers import plug_in
from seqmesh.masks import Mask


def call_of(model: PreTrainedModel, mask: Mask, layout: str = "auto", ring: int = 1) -> str:
    """What a forward says."""
    schedule = Schedule.build(mask, SequenceMesh.build(ring=ring), layout)
    ids = schedule.shard(torch.arange(3, 3 + mask.q_len)[None], 1)
    return refusal(model, ids, position_ids=ids, schedule=schedule)


@pytest.fixture(scope="module")
def lfm2() -> PreTrainedModel:
    return plug_in(hybrid("lfm2"))


@pytest.mark.parametrize("mask", [masks.full(8), masks.sliding_window(8, 3), masks.prefix_lm(8, 3)])
def test_masks_that_are_not_documents_are_refused(lfm2: PreTrainedModel, mask: Mask) -> None:
    assert "not one of whole causal documents" in call_of(lfm2, mask)


def test_a_cache_of_the_mesh_is_refused(lfm2: PreTrainedModel) -> None:
    ids = torch.arange(3, 9)[None]
    cache = ShardedCache(SequenceMesh.build(), lfm2.config)
    with torch.no_grad():
        said = refusal(lfm2, ids, past_key_values=cache)
    assert "carry a state along the sequence, which no K/V cache of the mesh holds" in said


def on_two_ranks(layout: str, tokens: int) -> str:
    return call_of(plug_in(hybrid("lfm2")), masks.causal(tokens), layout, ring=2)


def test_strided_layouts_and_ranks_without_tokens_are_refused_on_every_rank(ranks: Ranks) -> None:
    for said in ranks.run(2, on_two_ranks, "striped", 8):
        assert "'striped' has strided spans" in said
    for said in ranks.run(2, on_two_ranks, "contiguous", 1):
        assert "has 1 tokens on 2 ranks, and its mixers fail on a rank that holds none" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_mixers_call_the_functions_that_are_bound(family: str) -> None:
    """Fails when transformers moves them."""
    model = hybrid(family)
    found = [module for module in model.modules() if mixers.is_mixer(module)]
    assert found
    for mixer in found:
        mixers.bind(mixer)
        names = mixer.forward.__func__.__globals__
        for name in mixers.MIXERS[type(mixer).__name__]:
            assert names[name].args[0].function is inspect.unwrap(type(mixer).forward).__globals__[name]


def test_a_mixer_that_calls_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mixers.MIXERS, "Lfm2ShortConv", ("causal_conv1d_fn", "another_scan"))
    said = refusal(plug_in, hybrid("lfm2"))
    assert "Lfm2ShortConv does not call another_scan, by which seqmesh knows that it mixes tokens" in said


def test_a_mixer_whose_forward_is_replaced_is_refused() -> None:
    model = hybrid("lfm2")
    mixer = next(module for module in model.modules() if mixers.is_mixer(module))
    mixer.forward = mixer.forward
    assert "the forward of Lfm2ShortConv has been replaced" in refusal(plug_in, model)


@pytest.mark.parametrize(
    ("function", "asked"),
    [
        (mixers.convolution, "seq_idx"),
        (mixers.delta_rule, "initial_state"),
        (mixers.scan, "return_final_states"),
    ],
)
def test_what_a_mixer_asks_for_beside_is_refused(function: object, asked: str) -> None:
    x = torch.zeros(1, 2, 2)
    schedule = Schedule.build(masks.causal(2), SequenceMesh.build())
    more = {"chunk_size": 1} if function is mixers.scan else {}
    given = 3 if function is mixers.convolution else 6
    said = refusal(function, *[x] * given, schedule=schedule, **more, **{asked: True})
    assert f"got {asked}, but documents and states are the schedule's" in said
