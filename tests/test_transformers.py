"""Hugging Face models on sequence shards give the logits and gradients of eager attention on one device."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_models import KINDS, LENGTHS, MIXED, both_masks, inputs, model_of, plugged
from ranks import Ranks
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from seqmesh import Schedule, SequenceMesh, masks
from seqmesh.integrations.layers import furthest
from seqmesh.integrations.transformers import NAME, plug_in, register
from seqmesh.masks import Mask
from seqmesh.train.loss import next_token_loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_mesh(kind: str, ulysses: int, ring: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Global logits and gradients summed over ranks."""
    model = plug_in(model_of(kind))
    mesh = SequenceMesh.build(ulysses=ulysses, ring=ring)
    full, sliding = both_masks()
    schedule = Schedule.build(sliding if kind == "mistral" else full, mesh)
    more = {}
    if kind in MIXED:
        more["sliding_schedule"] = Schedule.build(sliding, mesh, layout=schedule.layout)
    ids, labels, positions = inputs()
    logits = model(
        schedule.shard(ids, 1), position_ids=schedule.shard(positions, 1), schedule=schedule, **more
    ).logits
    label_count = int((labels != -100).sum())
    next_token_loss(logits, schedule.shard(labels, 1), label_count).backward()
    grads = gradients(model)
    for grad in grads.values():
        dist.all_reduce(grad)
    return schedule.unshard(logits.detach(), 1), grads


def additive(mask: Mask) -> Tensor:
    """A mask as transformers adds it to the logits: (1, 1, q_len, k_len), 0 or -inf."""
    forbidden = ~torch.from_numpy(mask.dense())
    zeros = torch.zeros(1, 1, mask.q_len, mask.k_len, dtype=torch.float64)
    return zeros.masked_fill(forbidden, -torch.inf)


def eager(kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle: transformers' own eager attention over the whole sequence with dense masks."""
    model = model_of(kind)
    full, sliding = (additive(mask) for mask in both_masks())
    given: Any = full
    if kind == "mistral":
        given = sliding
    elif kind in MIXED:
        given = {"full_attention": full, "sliding_attention": sliding}
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


def test_no_dense_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = plugged()
    layer = model.model.layers[0]
    original = layer.forward
    seen = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["attention_mask"])
        return original(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", watched)
    model(**call)
    assert seen == [None]


def test_labels_shifted_before_sharding_can_use_the_models_own_loss() -> None:
    model, call = plugged()
    _, labels, _ = inputs()
    label_count = int((labels != -100).sum())
    out = model(**call, labels=labels, shift_labels=labels, num_items_in_batch=label_count)
    expected = nn.functional.cross_entropy(out.logits[0].float(), labels[0])
    torch.testing.assert_close(out.loss, expected, check_dtype=False)


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
    first = model(**call).logits
    second = model(**(call | {"schedule": other})).logits
    again = model(**call).logits
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
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = plug_in(LlamaForCausalLM(config))
    assert model.config._attn_implementation == NAME


def test_somebody_elses_name_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    register()
    register()  # ours may be registered again
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, lambda: None)
    with pytest.raises(ValueError, match="already has another 'seqmesh'"):
        register()
