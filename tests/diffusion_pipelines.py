"""Tiny random pipelines of FLUX and Wan, without text encoders: prompts are given as embeddings."""

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor


class TinyPipeline(NamedTuple):
    """A pipeline, and a call of it that gives pixels between 0 and 1."""

    pipe: DiffusionPipeline
    call: Callable[..., Tensor]


def flux() -> TinyPipeline:
    """The example's pipeline, in fp64: an image of 112 x 80 pixels, 35 image tokens beside 512 of text."""
    example = _example("flux")
    pipe = example.tiny_pipeline()
    for part in (pipe.transformer, pipe.vae):
        part.double()
    prompt = {name: embeds.double() for name, embeds in example.tiny_prompt().items()}
    sizes = {"height": 112, "width": 80, "num_inference_steps": 3, "output_type": "np"}

    def call(generator: torch.Generator | None = None) -> Tensor:
        return torch.as_tensor(pipe(**prompt, **sizes, generator=generator).images)

    return _quiet(pipe, call)


def _example(name: str) -> ModuleType:
    """A program of examples/, as a module."""
    spec = spec_from_file_location(name, Path(__file__).parent.parent / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wan() -> TinyPipeline:
    """A video of 9 frames of 48 x 80 pixels, 45 tokens, with classifier-free guidance."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.double().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer.double().eval(),
    )
    prompts: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 7, 16).double(),
        "negative_prompt_embeds": torch.randn(1, 7, 16).double(),
    }
    sizes = {"height": 48, "width": 80, "num_frames": 9, "num_inference_steps": 3, "output_type": "np"}

    def call(generator: torch.Generator | None = None) -> Tensor:
        return torch.as_tensor(pipe(**prompts, **sizes, guidance_scale=5.0, generator=generator).frames)

    return _quiet(pipe, call)


def _quiet(pipe: DiffusionPipeline, call: Callable[..., Tensor]) -> TinyPipeline:
    pipe.set_progress_bar_config(disable=True)
    return TinyPipeline(pipe, call)
