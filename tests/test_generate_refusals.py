"""What a sharded cache cannot do is refused with the remedy, before anything is sent."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from test_generate import answers, call, llama, llama4, made, prompt
from transformers import PreTrainedModel

from seqmesh import SequenceMesh
from seqmesh.generate import ShardedCache
from seqmesh.integrations.transformers import plug_in


def plugged() -> tuple[PreTrainedModel, ShardedCache]:
    model = plug_in(made(llama))
    return model, ShardedCache(SequenceMesh.build(), model.config)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "labels": ({"labels": prompt(2, 5)}, r"got labels and a ShardedCache, with which no loss"),
    "hidden": ({"output_hidden_states": True}, r"output_hidden_states=True.*own tokens' only"),
    "types": ({"token_type_ids": prompt(2, 5)}, r"token_type_ids, which a ShardedCache does not know"),
    "positions": ({"position_ids": torch.arange(4)[None]}, r"position_ids of shape \(1, 4\) for 5 tokens"),
    "mask": ({"attention_mask": torch.ones(2, 4)}, r"\(2, 4\) for 2 sequences of 5 tokens, 0 of them"),
    "no positions": ({"position_ids": None}, r"position_ids none for 5 tokens; pass \(b, 5\)"),
    "4-D mask": ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"pass \(2, 5\), or none"),
    "no tokens": ({"input_ids": torch.empty(2, 0, dtype=torch.int64)}, "got no tokens"),
    "places of logits": ({"logits_to_keep": torch.tensor([1])}, "logits_to_keep"),
    "logits from the front": ({"logits_to_keep": -2}, "logits_to_keep=-2"),
    "one place of logits": ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep"),
    "places": ({"logits_to_keep": torch.tensor([1, 2])}, "logits_to_keep"),
    "schedule": ({"schedule": 1}, "schedule= and a ShardedCache, which makes its own"),
    "no cache": ({"use_cache": False}, "use_cache=False with a ShardedCache"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_cannot_be_honoured(given: dict[str, Any], message: str) -> None:
    model, cache = plugged()
    with pytest.raises(ValueError, match=message):
        call(model, prompt(2, 5), cache, **given)
    assert cache.state.plan is None


def test_a_forward_with_gradients() -> None:
    model, cache = plugged()
    with pytest.raises(ValueError, match=r"call it under torch\.no_grad"):
        model(prompt(2, 5), position_ids=torch.arange(5)[None], past_key_values=cache)


def test_a_configuration_that_asks_for_hidden_states() -> None:
    model, cache = plugged()
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        call(model, prompt(2, 5), cache)


def test_layers_that_share_keys_and_values() -> None:
    config = made(llama).config
    config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match="num_kv_shared_layers=1: layers without K"):
        ShardedCache(SequenceMesh.build(), config)


def test_a_layer_that_brings_nothing() -> None:
    model, cache = plugged()
    cache.update = lambda k, v, *_: (k, v)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="layer 0 did not put its K and V into the cache"):
        call(model, prompt(2, 5), cache)


def test_padding_that_shows_what_was_forgotten() -> None:
    model = plug_in(made(llama4))
    cache = ShardedCache(SequenceMesh.build(), model.config)
    mask = torch.ones(1, 15, dtype=torch.int64)
    call(model, prompt(1, 12), cache, attention_mask=mask[:, :12])
    call(model, prompt(1, 1), cache, attention_mask=mask[:, :13])
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="keep the padding of the calls before"):
        call(model, prompt(1, 1), cache, attention_mask=mask[:, :14])


def test_a_cache_of_other_sequences() -> None:
    model, cache = plugged()
    call(model, prompt(2, 5), cache)
    with pytest.raises(ValueError, match=r"got 3 sequences and a cache of 2; use .* reset\(\)"):
        call(model, prompt(3, 5), cache)


def test_a_model_that_is_not_plugged_in() -> None:
    cache = ShardedCache(SequenceMesh.build(), made(llama).config)
    with pytest.raises(ValueError, match=r"plug_in\(model\) first"):
        call(made(llama), prompt(2, 5), cache)


def test_a_cache_whose_forward_failed() -> None:
    model, cache = plugged()
    last = model.model.layers[1]
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(model, prompt(2, 5), cache)
    handle.remove()
    with pytest.raises(ValueError, match="did not finish"):
        call(model, prompt(2, 5), cache)
    cache.reset()
    call(model, prompt(2, 5), cache)


def test_tokens_are_not_taken_back() -> None:
    model, cache = plugged()
    with pytest.raises(ValueError, match=r"without an assistant model or prompt lookup"):
        answers(model, prompt(1, 9), past_key_values=cache, prompt_lookup_num_tokens=2)


def test_another_cache_than_ours() -> None:
    model, _ = plugged()
    with pytest.raises(ValueError, match=r"past_key_values=seqmesh\.generate\.ShardedCache"):
        answers(model, prompt(1, 9))


def with_a_seed_of_its_own() -> str:
    model = plug_in(made(llama))
    mesh = SequenceMesh.build(ring=4)
    cache = ShardedCache(mesh, model.config)
    torch.manual_seed(mesh.rank)
    asked = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 20}
    try:
        model.generate(prompt(1, 17), past_key_values=cache, **asked)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_sampled_different_tokens(ranks: Ranks) -> None:
    assert all("same seed everywhere" in message for message in ranks.run(4, with_a_seed_of_its_own))


def with_something_of_its_own(what: str) -> str:
    model = plug_in(made(llama))
    mesh = SequenceMesh.build(ring=4)
    cache = ShardedCache(mesh, model.config)
    ids = torch.tensor([[0], [1]])
    given: dict[str, Any] = {}
    if mesh.rank == 1:
        if what == "tokens":
            ids = torch.tensor([[2], [0]])  # the same sum of tokens times places
        if what == "positions":
            given = {"position_ids": torch.tensor([[3]])}
        if what == "logits":
            given = {"logits_to_keep": 1}
        if what == "padding":
            given = {"attention_mask": torch.tensor([[0], [1]])}
    try:
        call(model, ids, cache, **given)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["tokens", "positions", "padding", "logits"])
def test_ranks_that_were_given_different_inputs(ranks: Ranks, what: str) -> None:
    for message in ranks.run(4, with_something_of_its_own, what):
        assert "different tokens, positions or padding" in message
