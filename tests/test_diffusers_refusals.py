"""What a diffusion transformer cannot do on sequence shards is refused, with the remedy; and unplugging."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusion_models import Example, example, run, worst
from hf_models import refusal
from oracle import mesh_of
from ranks import Ranks
from torch import nn

from seqmesh import SequenceMesh
from seqmesh.integrations.diffusers import plug_in, unplug
from seqmesh.integrations.diffusion.attend import NAME, backend, backend_name
from seqmesh.integrations.diffusion.models import PLANS
from seqmesh.integrations.diffusion.refusals import check_tokens
from seqmesh.integrations.diffusion.tokens import Tokens


def plugged(name: str = "flux") -> Example:
    case = example(name)
    plug_in(case.model, SequenceMesh.build())
    return case


def call(case: Example, **more: Any) -> Any:
    return case.model(**case.arguments | more, return_dict=False)[0]


def test_a_class_without_a_plan_is_refused_by_name() -> None:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=4
    )
    message = refusal(plug_in, model, SequenceMesh.build())
    assert message.startswith("DiTTransformer2DModel has no plan for sequence shards; pass the transformer")
    assert "FluxTransformer2DModel" in message


@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns about itself
def test_a_compiled_transformer_is_refused() -> None:
    message = refusal(plug_in, torch.compile(example("flux").model), SequenceMesh.build())
    assert "plug in before you compile" in message


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("FSDPFluxTransformer2DModel", "plug in before fully_shard"),
        ("PeftModel", "pass its get_base_model()"),
    ],
)
def test_a_transformer_in_a_wrapper_is_refused(kind: str, remedy: str) -> None:
    wrapper = type(kind, (nn.Module,), {"get_base_model": lambda self: self})()
    assert refusal(plug_in, wrapper, SequenceMesh.build()).endswith(remedy)


def test_plugging_in_twice_and_unplugging_twice_are_refused() -> None:
    model = plugged().model
    assert "plugged in already; unplug it first" in refusal(plug_in, model, SequenceMesh.build())
    unplug(model)
    assert "is not plugged in" in refusal(unplug, model)


def test_native_parallelism_is_refused() -> None:
    model = example("flux").model
    model._parallel_config = object()
    message = refusal(plug_in, model, SequenceMesh.build())
    assert "diffusers' own parallelism on" in message
    assert "do not call enable_parallelism" in message


def test_token_replacement_is_refused() -> None:
    model = example("hunyuan").model
    model.register_to_config(image_condition_type="token_replace")
    message = refusal(plug_in, model, SequenceMesh.build())
    assert "image_condition_type='token_replace', which is not supported" in message


def test_ip_adapters_are_refused_as_processors_and_as_arguments() -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = example("flux").model
    model.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(24, 8))
    message = refusal(plug_in, model, SequenceMesh.build())
    assert "'transformer_blocks.0.attn' by FluxIPAdapterAttnProcessor" in message
    message = refusal(call, plugged(), joint_attention_kwargs={"ip_adapter_image_embeds": []})
    assert "joint_attention_kwargs with ip_adapter_image_embeds" in message
    assert "unload_ip_adapter" in message


@pytest.mark.parametrize(
    ("name", "argument", "given", "what"),
    [
        ("flux", "controlnet_block_samples", [torch.zeros(1)], "ControlNet residuals"),
        ("flux", "controlnet_single_block_samples", [torch.zeros(1)], "ControlNet residuals"),
        ("qwen", "controlnet_block_samples", [torch.zeros(1)], "ControlNet residuals"),
        ("sd3", "block_controlnet_hidden_states", [torch.zeros(1)], "ControlNet residuals"),
        ("z-image", "controlnet_block_samples", {0: torch.zeros(1)}, "ControlNet residuals"),
        ("z-image", "siglip_feats", [[torch.zeros(1)]], "several images a sample"),
        ("flux2", "kv_cache_mode", "extract", "K/V cache of reference images"),
        ("flux2", "num_ref_tokens", 3, "K/V cache of reference images"),
        ("flux", "joint_attention_kwargs", {"attention_mask": torch.zeros(1)}, "not supported"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_refused(
    name: str, argument: str, given: Any, what: str
) -> None:
    message = refusal(call, plugged(name), **{argument: given})
    assert f"got {argument}" in message
    assert what in message


def test_several_images_a_sample_are_refused() -> None:
    case = plugged("z-image")
    message = refusal(call, case, x=[[image] for image in case.arguments["x"]])
    assert "x holds several images a sample" in message


def test_a_lora_scale_alone_is_legal() -> None:
    case = plugged()
    assert torch.equal(call(case, joint_attention_kwargs={"scale": 1.0}), call(case))


def test_a_cache_of_blocks_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    case = plugged()
    case.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert "a cache of blocks, whose decisions would differ" in refusal(call, case)


def test_dropout_is_refused_in_training_only() -> None:
    case = plugged()
    case.model.transformer_blocks[0].attn.to_out[1].p = 0.1
    call(case)
    case.model.train()
    assert "dropout 0.1 at 'transformer_blocks.0.attn.to_out.1'" in refusal(call, case)


def test_a_processor_set_after_plugging_in_is_refused_and_stays_after_unplugging() -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    case = plugged()
    other = FluxAttnProcessor()
    case.model.single_transformer_blocks[0].attn.set_processor(other)
    message = refusal(call, case)
    assert "'single_transformer_blocks.0.attn' was replaced after plug_in, by FluxAttnProcessor" in message
    unplug(case.model)
    assert case.model.single_transformer_blocks[0].attn.processor is other


def test_a_backend_set_after_plugging_in_is_refused() -> None:
    case = plugged()
    case.model.set_attention_backend("native")
    assert "was given another backend, or a parallel_config, after plug_in" in refusal(call, case)


def test_a_model_without_a_part_that_the_plan_cuts_is_refused() -> None:
    model = example("flux").model
    model.head = model.proj_out
    del model.proj_out
    message = refusal(plug_in, model, SequenceMesh.build())
    assert "has nothing at 'proj_out', where its plan cuts or gathers tokens" in message


def test_a_processor_that_two_models_share_is_changed_for_the_plugged_one_only() -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    shared = FluxAttnProcessor()
    first, second = example("flux"), example("flux")
    for case in (first, second):
        case.model.set_attn_processor(shared)
    plug_in(first.model, SequenceMesh.build())
    assert shared._parallel_config is None
    assert set(map(id, _processors(second.model).values())) == {id(shared)}
    torch.testing.assert_close(call(first), call(second))


def test_attention_that_the_plan_does_not_know_is_refused() -> None:
    case = example("flux")
    case.model.transformer_blocks[0].extra = example("flux").model.transformer_blocks[0].attn
    message = refusal(plug_in, case.model, SequenceMesh.build())
    assert "attention at 'transformer_blocks.0.extra' that its plan does not know" in message


def test_a_forward_with_an_argument_that_the_plan_does_not_know_is_refused() -> None:
    from diffusers import FluxTransformer2DModel

    class Newer(FluxTransformer2DModel):
        def forward(self, *args: Any, guidance_map: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, guidance_map=guidance_map, **kwargs)

    Newer.__name__ = "FluxTransformer2DModel"
    model = example("flux").model
    model.__class__ = Newer
    message = refusal(plug_in, model, SequenceMesh.build())
    assert "its plan differ in the arguments" in message
    assert "guidance_map" in message


def test_a_tensor_with_another_number_of_tokens_is_refused() -> None:
    case = plugged()
    message = refusal(call, case, img_ids=torch.zeros(14, 3))
    assert "img_ids has shape (14, 3), with 14 entries for the 15 image tokens" in message


def test_masks_of_another_shape_are_refused() -> None:
    case = plugged("qwen")
    message = refusal(call, case, encoder_hidden_states_mask=torch.ones(2, 6))
    assert "encoder_hidden_states_mask has shape (2, 6) for text of (2, 7)" in message


def test_a_block_called_by_itself_is_refused() -> None:
    case = plugged()
    block = case.model.transformer_blocks[0]
    message = refusal(
        block, torch.zeros(1, 3, 24).double(), torch.zeros(1, 3, 24).double(), torch.zeros(1, 24).double()
    )
    assert "called by itself" in message


def test_our_backend_by_name_alone_is_refused() -> None:
    q = torch.zeros(1, 3, 2, 4)
    assert "choose it by seqmesh.integrations.diffusers.plug_in" in refusal(backend, q, q, q)


def test_somebody_elses_backend_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    monkeypatch.setitem(_AttentionBackendRegistry._backends, backend_name(), lambda: None)
    assert f"already has another attention backend {NAME!r}" in refusal(backend_name)


def four_ranks() -> SequenceMesh:
    return replace(SequenceMesh.alone(), ulysses=2, ring=2)


def test_fewer_tokens_than_the_ranks_need_are_refused() -> None:
    hunyuan, flux = PLANS["HunyuanVideoTransformer3DModel"], PLANS["FluxTransformer2DModel"]
    message = refusal(check_tokens, "M(...)", hunyuan, Tokens(text=3, image=9), four_ranks())
    assert "M(...) has 3 text tokens for 4 ranks, and each needs 1; pad the text to 4 tokens" in message
    check_tokens("M(...)", hunyuan, Tokens(text=4, image=9), four_ranks())
    message = refusal(check_tokens, "M(...)", flux, Tokens(text=9, image=3), four_ranks())
    assert "M(...) has 3 image tokens for 4 ranks" in message


@pytest.mark.parametrize("name", ["flux", "sd3.5", "z-image"])
def test_unplugging_leaves_the_model_as_it_was(name: str) -> None:
    case = example(name)
    before = _processors(case.model)
    hooks = _hooks(case.model)
    attributes = set(vars(case.model))
    plug_in(case.model, SequenceMesh.build())
    assert _processors(case.model) != before
    unplug(case.model)
    assert _processors(case.model) == before
    assert _hooks(case.model) == hooks
    assert set(vars(case.model)) == attributes


def _processors(model: nn.Module) -> dict[str, Any]:
    return {at: module.processor for at, module in model.named_modules() if hasattr(module, "processor")}


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def with_little_text(name: str) -> float:
    """On one rank: two text tokens for four ranks, plugged in against alone."""
    model, arguments = example(name)
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :2]
    if "txt_ids" in arguments:
        arguments["txt_ids"] = arguments["txt_ids"][..., :2, :]
    want, want_grads, _ = run(Example(model, dict(arguments)))
    plug_in(model, mesh_of(2, 2))
    out, grads, _ = run(Example(model, dict(arguments)))
    for grad in grads.values():
        dist.all_reduce(grad)
    return worst(grads | {"out": out}, want_grads | {"out": want})[0]


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3.5"])
def test_ranks_without_text_are_legal_where_the_blocks_let_them(ranks: Ranks, name: str) -> None:
    assert max(ranks.run(4, with_little_text, name)) <= 1e-10


def fused(name: str) -> float:
    """On one rank: a model whose projections were fused before it was plugged in."""
    case = example(name)
    case.model.fuse_qkv_projections()
    with torch.no_grad():
        alone = call(case)
        plug_in(case.model, mesh_of(2, 2))
        return (call(case) - alone).abs().max().item()


@pytest.mark.parametrize("name", ["flux", "cogvideox-5b", "sd3"])
def test_fused_projections_are_legal(ranks: Ranks, name: str) -> None:
    # Without gradients, and with the models' own casts to fp32.
    assert max(ranks.run(4, fused, name)) <= 1e-5


def too_few_heads() -> str:
    case = example("flux", heads=3)
    plug_in(case.model, mesh_of(4, 1))
    return refusal(call, case)


def test_fewer_heads_than_ulysses_ranks_are_refused_on_every_rank(ranks: Ranks) -> None:
    for message in ranks.run(4, too_few_heads):
        assert "ulysses=4" in message
        assert "3 query heads" in message
