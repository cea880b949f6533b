"""Hugging Face models on sequence shards: the same logits and gradients as eager attention on one device, or
a clear refusal.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import Ranks
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from seqmesh import Schedule, SequenceMesh, masks
from seqmesh.integrations.transformers import NAME, furthest, plug_in, refuse_padding, register
from seqmesh.masks import Mask
from seqmesh.train.loss import next_token_loss

VOCABULARY = 31
LENGTHS = [9, 1, 17, 6]
WINDOW = 5
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gpt_oss": {"head_dim": 8, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
}
"""Grouped heads; norms on q and k; every layer slides; mixed layers with softcap; mixed layers with sinks."""


def model_of(kind: str, **more: Any) -> PreTrainedModel:
    logging.set_verbosity_error()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **ids, **KINDS.get(kind, {}), **more
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).double()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels shifted inside documents, positions that restart: (1, s) each."""
    ids = torch.randint(2, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[0, torch.tensor(LENGTHS).cumsum(0) - 1] = -100
    return ids, labels, torch.cat([torch.arange(length) for length in LENGTHS])[None]


def both_masks() -> tuple[Mask, Mask]:
    documents = masks.documents(LENGTHS)
    return documents, documents & masks.sliding_window(sum(LENGTHS), WINDOW)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_mesh(kind: str, ulysses: int, ring: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Global logits and gradients summed over ranks."""
    model = plug_in(model_of(kind))
    mesh = SequenceMesh.build(ulysses=ulysses, ring=ring)
    full, sliding = both_masks()
    schedule = Schedule.build(sliding if kind == "mistral" else full, mesh)
    more = (
        {"sliding_schedule": Schedule.build(sliding, mesh, layout=schedule.layout)}
        if kind in ("gemma2", "gpt_oss")
        else {}
    )
    ids, labels, positions = inputs()
    logits = model(
        schedule.shard(ids, 1), position_ids=schedule.shard(positions, 1), schedule=schedule, **more
    ).logits
    next_token_loss(logits, schedule.shard(labels, 1), int((labels != -100).sum())).backward()
    grads = gradients(model)
    for grad in grads.values():
        dist.all_reduce(grad)
    return schedule.unshard(logits.detach(), 1), grads


def eager(kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle: transformers' own eager attention over the whole sequence with dense masks."""
    model = model_of(kind)
    dense = {
        name: torch.zeros(mask.q_len, mask.k_len, dtype=torch.float64).masked_fill(
            ~torch.from_numpy(mask.dense()), -torch.inf
        )[None, None]
        for name, mask in zip(("full_attention", "sliding_attention"), both_masks(), strict=True)
    }
    given = {"mistral": dense["sliding_attention"], "gemma2": dense, "gpt_oss": dense}.get(
        kind, dense["full_attention"]
    )
    ids, labels, positions = inputs()
    logits = model(ids, position_ids=positions, attention_mask=given, use_cache=False).logits
    nn.functional.cross_entropy(logits[0], labels[0]).backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (4, 1), (1, 4)])
def test_a_model_on_a_mesh_equals_eager_attention_on_one_device(
    ranks: Ranks, kind: str, ulysses: int, ring: int
) -> None:
    expected, expected_grads = eager(kind)
    for logits, grads in ranks.run(4, on_mesh, kind, ulysses, ring):
        # fp32 islands (norms, rotary tables, routers) are the same code on both sides; the rest is fp64.
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-7)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(
                grad, expected_grads[name], rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )


def plugged(**more: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A llama on the 1 x 1 mesh, and a call that works."""
    ids, _, positions = inputs()
    schedule = Schedule.build(masks.documents(LENGTHS), SequenceMesh.build())
    return plug_in(model_of("llama", **more)), {
        "input_ids": ids,
        "position_ids": positions,
        "schedule": schedule,
    }


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
    with pytest.raises(
        ValueError, match=r"sliding window of 5 tokens but its schedule's mask lets tokens 16 apart meet"
    ):
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


def test_no_dense_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = plugged()
    seen = []
    original = model.model.layers[0].forward
    monkeypatch.setattr(
        model.model.layers[0],
        "forward",
        lambda *a, **k: seen.append(k["attention_mask"]) or original(*a, **k),
    )
    model(**call)
    assert seen == [None]


def test_labels_shifted_before_sharding_can_use_the_models_own_loss() -> None:
    model, call = plugged()
    _, labels, _ = inputs()
    out = model(**call, labels=labels, shift_labels=labels, num_items_in_batch=int((labels != -100).sum()))
    torch.testing.assert_close(
        out.loss, nn.functional.cross_entropy(out.logits[0].float(), labels[0]), check_dtype=False
    )


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    """The message of a ValueError, which must be one line."""
    with pytest.raises(ValueError, match=r"\S") as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


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


def encoder_config(kind: str) -> Any:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "embedding_size": 32,
    }
    more = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoConfig.for_model(kind, vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **more)


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
    assert "would pool the shard" in refusal(
        plug_in, transformers.LlamaForSequenceClassification(model_of("llama").config)
    )


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
    assert "not transformers' ForCausalLMLoss" in refusal(
        model, **call, labels=labels, shift_labels=labels, num_items_in_batch=29
    )


def test_router_logits_are_refused_for_their_local_auxiliary_loss() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    assert "MixtralForCausalLM's config has output_router_logits=True" in refusal(
        plug_in, model_of("mixtral", output_router_logits=True, **experts)
    )
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
        assert "mixes full and sliding layers" in said
        assert "pass sliding_schedule=" in said
    assert model(**(call | {"schedule": full}), sliding_schedule=sliding).logits.shape == (1, 33, VOCABULARY)


def test_query_scales_from_local_positions_are_refused() -> None:
    more = {
        "num_local_experts": 2,
        "layer_types": ["full_attention"] * 2,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
    }
    with torch.device("meta"):
        tuned, plain = (
            model_of("llama4_text", attn_temperature_tuning=tuning, **more) for tuning in (True, False)
        )
    assert "build the model with attn_temperature_tuning=False" in refusal(plug_in, tuned)
    assert plug_in(plain).config._attn_implementation == NAME


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("mamba", {}, "does not call its attention through transformers' AttentionInterface"),
        ("jamba", {"num_experts": 2}, "does not call its attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        ("recurrent_gemma", {"num_hidden_layers": 3}, "layers of type linear_attention"),
        ("llama4_text", {"num_local_experts": 2}, "layers of type chunked_attention"),
    ],
)
def test_a_model_that_needs_the_whole_sequence_cannot_be_plugged_in(
    kind: str, more: dict[str, Any], said: str
) -> None:
    logging.set_verbosity_error()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, **(sizes | more))
        )
    with pytest.raises(ValueError, match=said) as error:
        plug_in(model)
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation != NAME


def test_a_hidden_convolution_is_found() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.conv = nn.Conv1d(32, 32, 3)
    with pytest.raises(ValueError, match=r"Conv1d at 'model.layers.1.mlp.conv', which mixes tokens"):
        plug_in(model)


def test_what_is_not_a_transformers_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        plug_in(nn.Linear(2, 2))


def test_somebody_elses_name_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    register()
    register()  # ours may be registered again
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, lambda: None)
    with pytest.raises(ValueError, match="already has another 'seqmesh'"):
        register()


def test_plain_transformers_loads_a_saved_model(tmp_path: Any) -> None:
    model, call = plugged()
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    plain = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa", dtype=torch.float64)
    ids = call["input_ids"][:, : LENGTHS[0]]  # one document: plain causal attention
    torch.testing.assert_close(plain(ids).logits, model(**call).logits[:, : LENGTHS[0]], rtol=1e-6, atol=1e-7)


def test_two_meshes_or_masks_work_in_one_process() -> None:
    model, call = plugged()
    other = Schedule.build(masks.causal(33), SequenceMesh.build())
    first, second, again = (
        model(**(call | {"schedule": s})).logits for s in (call["schedule"], other, call["schedule"])
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("mask", "distance"),
    [
        (masks.causal(7), 6),
        (masks.sliding_window(9, 3), 2),
        (masks.documents([4, 2]), 3),
        (masks.full(5), 4),
        (masks.causal(0), 0),
    ],
)
def test_the_furthest_pair_of_a_mask(mask: Mask, distance: int) -> None:
    assert furthest(mask) == distance


def test_the_config_needs_no_change_for_llama() -> None:
    model = plug_in(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
            )
        )
    )
    assert model.config._attn_implementation == NAME
