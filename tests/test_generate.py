"""Generation on a K/V cache spread over a mesh gives one rank's logits, at every step and on every rank."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import hf_models
import pytest
import torch
from ranks import Ranks
from tiny_models import build as tiny
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache

from seqmesh import SequenceMesh
from seqmesh.engine.exchange import CountBytes
from seqmesh.generate import ShardedCache
from seqmesh.generate import forward as forward_module
from seqmesh.generate.held import tokens_of
from seqmesh.generate.moving import RowSizes, bytes_of_keys, bytes_of_queries, moves_queries
from seqmesh.generate.plan import ForwardPlan
from seqmesh.generate.sight import Sight
from seqmesh.integrations.transformers import plug_in

MESHES = [(1, 4), (2, 2), (4, 1)]
SIZES = {**hf_models.SIZES, "vocab_size": 64, "head_dim": 8, "eos_token_id": None, "pad_token_id": 0}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7))


def gemma3() -> PreTrainedModel:
    types = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=6, layer_types=types))


def gpt_oss() -> PreTrainedModel:
    types = ["sliding_attention", "full_attention"]
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "layer_types": types}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **more, experts_implementation="eager"))


Build = Callable[[], PreTrainedModel]
MODELS: list[Build] = [llama, mistral, gemma3, gpt_oss]


def llama4() -> PreTrainedModel:
    """Chunks, and a temperature that rises soon."""
    types = ["chunked_attention", "full_attention"]
    more = {"attention_chunk_size": 6, "layer_types": types, "no_rope_layers": [1, 0], "floor_scale": 4}
    more |= {"attn_temperature_tuning": True, "attn_scale": 0.5, "num_local_experts": 2}
    sizes = SIZES | {"intermediate_size_mlp": 48}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **more, experts_implementation="eager"))


def phi3() -> PreTrainedModel:
    """Q, K and V of one matrix."""
    return Phi3ForCausalLM(Phi3Config(**SIZES))


def deepseek_v3() -> PreTrainedModel:
    """Latent attention: caches what K and V are made from."""
    return tiny("deepseek_v3")


def made(build: Build) -> PreTrainedModel:
    """In fp64, with weights large enough for tokens to differ."""
    torch.manual_seed(0)
    model = build().double().eval()
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def prompt(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 60, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def answers(model: PreTrainedModel, ids: Tensor, **asked: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits of every step (steps, b, vocabulary)."""
    torch.manual_seed(5)
    always = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    asked = {**always, **asked}
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **asked)
    return out.sequences, torch.stack(out.logits)


def call(model: PreTrainedModel, ids: Tensor, cache: Any, **more: Any) -> Any:
    """The model itself, not `generate`, on the next tokens."""
    seen = cache.get_seq_length()
    positions = torch.arange(seen, seen + ids.shape[1])[None]
    with torch.no_grad():
        return model(**{"input_ids": ids, "position_ids": positions, "past_key_values": cache, **more})


def on_mesh(build: Build, ulysses: int, ring: int, ids: Tensor, asked: dict[str, Any]) -> tuple[Any, ...]:
    model = plug_in(made(build))
    cache = ShardedCache(SequenceMesh.build(ulysses=ulysses, ring=ring), model.config)
    tokens, logits = answers(model, ids, past_key_values=cache, **asked)
    return tokens, logits, [cache.layers[layer].count for layer in range(2)], cache.get_seq_length()


def check(got: list[tuple[Any, ...]], expected: tuple[Tensor, Tensor]) -> None:
    for tokens, logits, *_ in got:
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=1e-10, atol=1e-10)
        assert torch.equal(logits, got[0][1])


@pytest.mark.parametrize(("ulysses", "ring"), MESHES)
@pytest.mark.parametrize("build", MODELS)
def test_greedy_logits_are_one_ranks(ranks: Ranks, build: Build, ulysses: int, ring: int) -> None:
    ids = prompt(2, 37)
    check(ranks.run(4, on_mesh, build, ulysses, ring, ids, {}), answers(made(build), ids))


ASKED: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 11},
    "chunks of a few": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("build", [llama, gemma3])
def test_sampling_beams_and_chunks_give_one_ranks_tokens(
    ranks: Ranks, build: Build, asked: dict[str, Any]
) -> None:
    ids = prompt(2, 37)
    check(ranks.run(4, on_mesh, build, 2, 2, ids, asked), answers(made(build), ids, **asked))


@pytest.mark.parametrize("build", MODELS)
def test_prompts_of_different_lengths(ranks: Ranks, build: Build) -> None:
    ids = prompt(3, 29)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 13, 4)):
        mask[row, :padding] = ids[row, :padding] = 0
    asked = {"attention_mask": mask}
    check(ranks.run(4, on_mesh, build, 2, 2, ids, asked), answers(made(build), ids, **asked))


def two_turns(build: Build, second: int, moves: bool | None) -> tuple[Any, ...]:
    """A second prompt on the same cache; `moves` says whether queries must be what moves."""
    model = plug_in(made(build))
    cache = ShardedCache(SequenceMesh.build(ulysses=2, ring=2), model.config)
    tokens, _ = answers(model, prompt(2, 37), past_key_values=cache)
    if moves is not None:
        forward_module.moves_queries = lambda *_: moves
    turn = torch.cat([tokens, prompt(2, second, seed=7)], 1)
    try:
        found = answers(model, turn, past_key_values=cache)
    finally:
        forward_module.moves_queries = moves_queries
    return *found, [tokens_of(spans) for spans in cache.state.held], cache.get_seq_length()


@pytest.mark.parametrize("moves", [True, False, None])
@pytest.mark.parametrize("second", [3, 23])
@pytest.mark.parametrize("build", MODELS)
def test_a_second_turn_on_the_same_cache(ranks: Ranks, build: Build, second: int, moves: bool | None) -> None:
    tokens, _ = answers(made(build), prompt(2, 37))
    turn = torch.cat([tokens, prompt(2, second, seed=7)], 1)
    got = ranks.run(4, two_turns, build, second, moves)
    check(got, answers(made(build), turn))
    # the last token's keys are never asked for
    assert got[0][3] == turn.shape[1] + 5
    assert max(got[0][2]) - min(got[0][2]) <= 1


def called(ulysses: int, ring: int, ids: Tensor, keep: int) -> list[Tensor]:
    """A sharded prompt, then a few tokens."""
    model = plug_in(made(llama))
    cache = ShardedCache(SequenceMesh.build(ulysses=ulysses, ring=ring), model.config)
    return [call(model, part, cache, logits_to_keep=keep).logits for part in ids.split([30, 5, 2], 1)]


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_a_call_gives_the_logits_that_are_asked_for(ranks: Ranks, keep: int) -> None:
    ids = prompt(2, 37)
    with torch.no_grad():
        whole = made(llama)(ids).logits.split([30, 5, 2], 1)
    for found in ranks.run(4, called, 2, 2, ids, keep):
        for logits, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(logits, expected[:, -keep:], rtol=1e-10, atol=1e-10)


def of_embeddings(ids: Tensor) -> Tensor:
    model = plug_in(made(llama))
    cache = ShardedCache(SequenceMesh.build(ring=4), model.config)
    embeddings = model.get_input_embeddings()(ids)
    return call(model, ids, cache, input_ids=None, inputs_embeds=embeddings).logits


def test_embeddings_are_sharded_as_tokens_are(ranks: Ranks) -> None:
    ids = prompt(1, 17)
    with torch.no_grad():
        expected = made(llama)(ids).logits
    torch.testing.assert_close(ranks.run(4, of_embeddings, ids)[3], expected, rtol=1e-10, atol=1e-10)


def rows_and_bytes(build: Build, ids: Tensor) -> tuple[list[int], list[int], int]:
    """Rows of each layer after a prompt and 40 tokens, bytes of each forward, tokens in all."""
    model = plug_in(made(build))
    cache = ShardedCache(SequenceMesh.build(ulysses=2, ring=2), model.config)
    sent = []
    for part in ids.split([ids.shape[1] - 40, *[1] * 40], 1):
        with CountBytes() as counted:
            call(model, part, cache, logits_to_keep=1)
        sent.append(counted.bytes_sent)
    return [cache.layers[layer].count for layer in range(2)], sent, cache.get_seq_length()


def test_a_new_token_sends_one_part_a_layer_and_a_digest(ranks: Ranks) -> None:
    for rows, sent, seen in ranks.run(4, rows_and_bytes, llama, prompt(2, 77)):
        # to 3 ranks: 2 layers, 2 sequences, 4 heads, 8 numbers and a log-sum-exp; a digest
        assert set(sent[1:]) == {3 * (2 * 2 * 4 * (8 + 1) * 8 + 8)}
        assert seen == 77
        assert all(abs(count - 77 / 4) < 1 for count in rows)


def bytes_of_a_second_prompt(moves: bool) -> tuple[int, int]:
    """Sent by this rank, and by all as the rule says: layers, digests, the last token's hidden state."""
    model = plug_in(made(llama))
    mesh = SequenceMesh.build(ulysses=2, ring=2)
    cache = ShardedCache(mesh, model.config)
    call(model, prompt(2, 37), cache)
    plan = ForwardPlan.of(mesh, cache.state.held, 37, 23)
    queries, keys, mask = plan.queries, plan.keys(0), Sight().mask(37, 23, 0, None)
    sizes = RowSizes(heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=8, lse_itemsize=8)
    if moves:
        a_layer = bytes_of_queries(2, queries, sizes)
    else:
        a_layer = bytes_of_keys([mask, mask], queries, keys, sizes)
    forward_module.moves_queries = lambda *_: moves
    try:
        with CountBytes() as counted:
            call(model, prompt(2, 23), cache, logits_to_keep=1)
    finally:
        forward_module.moves_queries = moves_queries
    return counted.bytes_sent, 2 * a_layer + 4 * 3 * 8 + 3 * 2 * 32 * 8


@pytest.mark.parametrize("moves", [True, False])
def test_a_second_prompt_sends_what_the_rule_counts(ranks: Ranks, moves: bool) -> None:
    found = ranks.run(4, bytes_of_a_second_prompt, moves)
    assert sum(sent for sent, _ in found) == found[0][1]


def test_a_layer_with_a_window_forgets_what_it_sees_no_more(ranks: Ranks) -> None:
    found = ranks.run(4, rows_and_bytes, gemma3, prompt(1, 77))
    windowed, full = (sum(rows[layer] for rows, _, _ in found) for layer in range(2))
    assert full == 77
    assert 5 <= windowed <= 6


def in_fp32(ids: Tensor) -> Tensor:
    model = plug_in(made(llama)).float()
    cache = ShardedCache(SequenceMesh.build(ulysses=2, ring=2), model.config)
    return answers(model, ids, past_key_values=cache)[1]


def test_fp32_logits_are_one_ranks_to_rounding(ranks: Ranks) -> None:
    ids = prompt(2, 37)
    for got in ranks.run(4, in_fp32, ids):
        torch.testing.assert_close(got, answers(made(llama), ids)[1].float(), rtol=1e-5, atol=1e-5)


def test_one_process_has_a_cache_too() -> None:
    ids = prompt(2, 9)
    model = plug_in(made(llama))
    cache = ShardedCache(SequenceMesh.build(), model.config)
    check([answers(model, ids, past_key_values=cache)], answers(made(llama), ids))
    cache.reset()
    check([answers(model, ids, past_key_values=cache)], answers(made(llama), ids))


def next_tokens(build: Build, world: int, counts: list[int], padding: list[int]) -> list[Tensor]:
    """Logits of calls with so many tokens each, of sequences with so much padding on the left."""
    model = made(build)
    model.set_attn_implementation("sdpa")  # eager has no answer for tokens that see nothing
    cache: Any = DynamicCache(config=model.config)
    if world:
        model = plug_in(model)
        cache = ShardedCache(SequenceMesh.build(ring=world), model.config)
    ids = prompt(len(padding), sum(counts)) % model.config.vocab_size
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = ids[row, :count] = 0
    found = []
    for stop, count in zip(accumulate(counts), counts, strict=True):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, stop - count : stop]
        out = call(
            model,
            ids[:, stop - count : stop],
            cache,
            position_ids=positions,
            attention_mask=mask[:, :stop],
            logits_to_keep=1,
        )
        found.append(out.logits[:, -1])
    return found


@pytest.mark.parametrize("counts", [[3, 1, 1, 1], [1, 2, 9, 1], [11, 1, 13, 1, 1]])
@pytest.mark.parametrize("padding", [[0], [2, 0]])
@pytest.mark.parametrize("build", [llama4, deepseek_v3])
def test_llama4_and_deepseek_give_one_ranks_logits(
    ranks: Ranks, build: Build, counts: list[int], padding: list[int]
) -> None:
    """Ranks that hold nothing yet; chunks that begin at the first real token."""
    counts = [counts[0] + max(padding), *counts[1:]]
    expected = next_tokens(build, 0, counts, padding)
    for found in ranks.run(2, next_tokens, build, 2, counts, padding):
        for logits, wanted in zip(found, expected, strict=True):
            # norms, routers and temperatures of fp64 models compute in fp32
            assert float((logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def under_autocast(ids: Tensor) -> Tensor:
    """The last rank holds nothing that these few tokens see."""
    model = plug_in(made(llama).float())
    cache = ShardedCache(SequenceMesh.build(ring=4), model.config)
    with torch.autocast("cpu", torch.bfloat16):
        return call(model, ids, cache).logits.float()


def test_autocast_where_a_rank_holds_nothing(ranks: Ranks) -> None:
    ids = prompt(1, 2)
    with torch.no_grad():
        expected = made(llama)(ids).logits.float()
    for found in ranks.run(4, under_autocast, ids):
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_a_cache_of_inference_mode_goes_on_outside_of_it() -> None:
    model = plug_in(made(llama))
    cache = ShardedCache(SequenceMesh.build(), model.config)
    ids = prompt(1, 9)
    with torch.inference_mode():
        call(model, ids[:, :7], cache)
        call(model, ids[:, 7:8], cache)
    with torch.no_grad():
        expected = made(llama)(ids).logits[:, -1:]
    torch.testing.assert_close(call(model, ids[:, 8:], cache).logits, expected, rtol=1e-10, atol=1e-10)


def base_models_tuple(ids: Tensor) -> Tensor:
    model = plug_in(made(llama).model)
    cache = ShardedCache(SequenceMesh.build(ring=4), model.config)
    hidden: Tensor = call(model, ids, cache, return_dict=False)[0]
    return hidden


def test_a_base_model_gives_all_hidden_states_also_as_a_tuple(ranks: Ranks) -> None:
    ids = prompt(2, 19)
    with torch.no_grad():
        expected = made(llama).model(ids).last_hidden_state
    for found in ranks.run(4, base_models_tuple, ids):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_rows_that_are_a_slice_of_more_do_not_keep_the_rest() -> None:
    model = plug_in(made(phi3))
    cache = ShardedCache(SequenceMesh.build(), model.config)
    call(model, prompt(1, 9), cache)
    for rows in cache.layers:
        assert rows.values.untyped_storage().nbytes() == rows.values.nbytes
