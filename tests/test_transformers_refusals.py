"""What a Hugging Face model would get wrong on a sequence shard is refused; what it would not is accepted."""

from typing import Any

import pytest
import torch
import transformers
from hf_models import (
    SIZES,
    VOCABULARY,
    both_masks,
    encoder_config,
    inputs,
    model_of,
    plugged,
    refusal,
)
from tiny_models import build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from seqmesh import Schedule, SequenceMesh, masks
from seqmesh.integrations.transformers import NAME, plug_in, refuse_padding


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schedule": None}, "pass schedule=Schedule.build"),
        ({"position_ids": None}, "would count from 0 on every rank"),
        ({"attention_mask": torch.ones(1, 33)}, "the mask lives in the schedule"),
        ({"labels": torch.ones(1, 33, dtype=torch.int64)}, "would shift them inside the shard"),
        ({"use_cache": True}, "K/V cache"),
        ({"logits_to_keep": 1}, "would keep the shard.s last tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 33])}, "cu_seq_lens_q"),
        (
            {"input_ids": torch.ones(1, 30, dtype=torch.int64), "position_ids": torch.arange(30)[None]},
            "30 tokens",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(change: dict[str, Any], said: str) -> None:
    model, call = plugged()
    with pytest.raises(ValueError, match=said) as error:
        model(**(call | change))
    assert "\n" not in str(error.value)


def test_attention_dropout_is_refused_in_training_and_harmless_otherwise() -> None:
    model, call = plugged(attention_dropout=0.1)
    with pytest.raises(ValueError, match="set attention_dropout=0"):
        model.train()(**call)
    assert model.eval()(**call).logits.shape == (1, 33, VOCABULARY)


def test_a_window_that_the_mask_does_not_keep_to_is_refused() -> None:
    model = plug_in(model_of("mistral"))
    _, call = plugged()
    said = "sliding window of 5 tokens but its schedule's mask lets tokens 16 apart meet"
    with pytest.raises(ValueError, match=said):
        model(**call)


def test_a_sliding_schedule_of_another_layout_is_refused() -> None:
    model, call = plugged()
    other = Schedule.build(masks.sliding_window(30, 3), SequenceMesh.build())
    with pytest.raises(ValueError, match="another layout"):
        model(**call, sliding_schedule=other)


def test_a_padding_mask_is_refused_even_when_the_inner_model_is_called() -> None:
    """transformers drops a 2-D mask silently for attention names without a mask function."""
    model, call = plugged()
    padding = torch.ones(1, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"LlamaModel.* got an attention_mask"):
        model.model(**call, attention_mask=padding)
    with pytest.raises(ValueError, match="attention_mask was given"):
        refuse_padding(attention_mask=padding)


ROPE: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
        "factor": 2.0,
    },
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
}


def rope(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **ROPE[kind]}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_depend_on_the_longest_local_position_are_refused(kind: str) -> None:
    assert f"RoPE of type {kind}" in refusal(plug_in, model_of("llama", rope_parameters=rope(kind)))
    in_config_only = model_of("llama")
    in_config_only.config.rope_parameters = {"full_attention": rope(kind)}
    assert f"RoPE of type {kind}" in refusal(plug_in, in_config_only)
    in_module_only = model_of("llama")
    in_module_only.model.rotary_emb.rope_type = {"full_attention": "default", "sliding_attention": kind}
    assert "use rope_type default, linear, yarn or llama3" in refusal(plug_in, in_module_only)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rotary_frequencies_that_are_fixed_are_accepted(kind: str) -> None:
    model, call = plugged(rope_parameters=rope(kind))
    assert model(**call).logits.shape == (1, 33, VOCABULARY)


@pytest.mark.parametrize(
    "head",
    [
        transformers.BertForSequenceClassification,
        transformers.BertForQuestionAnswering,
        transformers.BertForMultipleChoice,
        transformers.BertForPreTraining,
    ],
)
def test_a_head_that_pools_over_the_sequence_is_refused(head: Any) -> None:
    assert "would pool the shard; use the base model" in refusal(plug_in, head(encoder_config("bert")))


def test_a_llama_that_classifies_sequences_is_refused() -> None:
    model = transformers.LlamaForSequenceClassification(model_of("llama").config)
    assert "would pool the shard" in refusal(plug_in, model)


@pytest.mark.parametrize(("kind", "pooler"), [("bert", "BertPooler"), ("albert", "Linear")])
def test_a_pooler_in_a_base_model_is_refused_and_the_model_without_it_runs(kind: str, pooler: str) -> None:
    said = refusal(plug_in, transformers.AutoModel.from_config(encoder_config(kind)))
    assert f"has a {pooler} at 'pooler'" in said
    assert "add_pooling_layer=False" in said
    model = plug_in(transformers.AutoModel.from_config(encoder_config(kind), add_pooling_layer=False))
    _, call = plugged()
    assert model(**call).last_hidden_state.shape == (1, 33, 32)


@pytest.mark.parametrize("head", [transformers.BertForMaskedLM, transformers.BertForTokenClassification])
def test_labels_are_refused_where_the_loss_is_not_the_causal_one(head: Any) -> None:
    model = plug_in(head(encoder_config("bert")))
    _, call = plugged()
    labels = torch.zeros(1, 33, dtype=torch.int64)
    assert model(**call).logits.shape[:2] == (1, 33)
    said = refusal(model, **call, labels=labels, shift_labels=labels, num_items_in_batch=33)
    assert "seqmesh.train.loss.next_token_loss on the logits" in said


def test_labels_are_refused_where_a_causal_model_has_another_loss() -> None:
    model, call = plugged()
    model.loss_function = lambda logits, **_: logits.mean()
    labels = inputs()[1]
    said = refusal(model, **call, labels=labels, shift_labels=labels, num_items_in_batch=29)
    assert "not transformers' ForCausalLMLoss" in said


def test_router_logits_are_refused_for_their_local_auxiliary_loss() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    said = refusal(plug_in, model_of("mixtral", output_router_logits=True, **experts))
    assert "MixtralForCausalLM's config has output_router_logits=True" in said
    _, call = plugged()
    model = plug_in(model_of("mixtral", **experts))
    for value in (None, False):
        assert model(**call, output_router_logits=value).logits.shape == (1, 33, VOCABULARY)
    assert "pass output_router_logits=False" in refusal(model, **call, output_router_logits=True)
    model.config.output_router_logits = True
    assert "pass output_router_logits=False" in refusal(model, **call)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"position_ids": None}, "LlamaModel(...) got no position_ids"),
        ({"schedule": None}, "LlamaModel(...) got schedule=None"),
        ({"use_cache": True}, "LlamaModel(...) was asked for a K/V cache"),
    ],
)
def test_the_inner_model_is_guarded_like_the_outer(change: dict[str, Any], said: str) -> None:
    model, call = plugged()
    assert said in refusal(model.model, **(call | change))
    embeds = model.model.embed_tokens(call.pop("input_ids"))
    assert model(inputs_embeds=embeds, **call).logits.shape == (1, 33, VOCABULARY)
    assert model.model(inputs_embeds=embeds, **call).last_hidden_state.shape == (1, 33, 32)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_a_model_of_full_and_sliding_layers_needs_both_schedules(kind: str) -> None:
    model = plug_in(model_of(kind))
    _, call = plugged()
    full, sliding = (Schedule.build(mask, SequenceMesh.build()) for mask in both_masks())
    for schedule in (full, sliding):  # with the sliding one alone, the full layers would be windowed
        said = refusal(model, **(call | {"schedule": schedule}))
        assert "mixes sliding and other layers" in said
        assert "pass sliding_schedule=" in said
    assert model(**(call | {"schedule": full}), sliding_schedule=sliding).logits.shape == (1, 33, VOCABULARY)


def test_query_scales_from_local_positions_are_refused_where_their_rule_is_unknown() -> None:
    model = model_of("llama")
    model.model.layers[1].self_attn.attn_temperature_tuning = True
    said = refusal(plug_in, model)
    assert "attn_temperature_tuning at 'model.layers.1.self_attn', which scales queries" in said
    assert "build the model with attn_temperature_tuning=False" in said


def test_a_model_of_chunked_and_full_layers_needs_both_schedules_and_a_mask_of_chunks() -> None:
    model = plug_in(build("llama4_text"))
    _, call = plugged()
    mesh = SequenceMesh.build()
    full = Schedule.build(masks.causal(33), mesh)
    assert "mixes chunked and other layers" in refusal(model, **(call | {"schedule": full}))
    said = refusal(model, **(call | {"schedule": full}), chunked_schedule=full)
    assert "attends within chunks of 6 tokens but its schedule's mask lets tokens 32 apart meet" in said
    assert "build the schedule from mask & masks.chunked(s, 6)" in said
    other = Schedule.build(masks.chunked(30, 6), mesh)
    assert "chunked_schedule has another layout" in refusal(
        model, **(call | {"schedule": full}), chunked_schedule=other
    )
    chunked = Schedule.build(masks.chunked(33, 6), mesh)
    assert model(**(call | {"schedule": full}), chunked_schedule=chunked).logits.shape == (1, 33, VOCABULARY)


def test_a_model_that_loses_its_schedule_on_the_way_says_so() -> None:
    model = plug_in(build("nemotron"))
    _, call = plugged()
    assert "does not hand keyword arguments of its forward on to its attention" in refusal(model, **call)


def test_a_model_that_makes_a_mask_of_its_own_is_refused() -> None:
    model = plug_in(build("doge"))
    _, call = plugged()
    assert "an attention mask that its model has made itself" in refusal(model, **call)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("mamba", {}, "does not call its attention through transformers' AttentionInterface"),
        ("jamba", {"num_experts": 2}, "does not call its attention"),
        ("lfm3", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        ("recurrent_gemma", {"num_hidden_layers": 3}, "layers of type linear_attention"),
    ],
)
def test_a_model_that_needs_the_whole_sequence_cannot_be_plugged_in(
    kind: str, more: dict[str, Any], said: str
) -> None:
    logging.set_verbosity_error()
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, **(SIZES | more))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert said in refusal(plug_in, model)
    assert model.config._attn_implementation != NAME


def test_a_hidden_convolution_is_found() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.conv = nn.Conv1d(32, 32, 3)
    with pytest.raises(ValueError, match=r"Conv1d at 'model.layers.1.mlp.conv', which mixes tokens"):
        plug_in(model)


def test_what_is_not_a_transformers_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        plug_in(nn.Linear(2, 2))
