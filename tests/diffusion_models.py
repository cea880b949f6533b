"""Tiny random transformers of every class in the plan table, with inputs of odd lengths, for the tests.

Heads are 3, or 5 where more ulysses ranks need them; nothing divides by 2 or 4.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NAMES = ("flux", "flux2", "qwen", "qwen-edit", "wan", "wan-i2v", "wan-5b", "ltx", "hunyuan", "cogvideox",
         "cogvideox-5b", "sd3", "sd3.5", "z-image")  # fmt: skip


class Example(NamedTuple):
    """A model and the arguments of its forward."""

    model: nn.Module
    arguments: dict[str, Any]


def example(name: str, heads: int = 3, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> Example:
    """The same numbers in every process."""
    torch.manual_seed(1)
    model, arguments = _MAKERS[name.replace("-", "_").replace(".", "_")](heads, batch)
    for parameter in model.parameters():
        if not parameter.abs().sum():  # gates and pads that begin at zero would hide errors
            nn.init.normal_(parameter, std=0.2)
    return Example(model.to(dtype).eval(), {key: _cast(given, dtype) for key, given in arguments.items()})


def _cast(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, tuple | list):
        return type(given)(_cast(one, dtype) for one in given)
    return given.to(dtype) if torch.is_tensor(given) and given.is_floating_point() else given


@contextmanager
def exactly() -> Iterator[None]:
    """Models that cast to fp32 inside (norms, RoPE, gates) compute in fp64 all the way."""
    plain_float, plain_to = torch.Tensor.float, torch.Tensor.to

    def float_or_double(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else plain_float(x)

    def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_narrowed = x.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
        return x if is_narrowed else plain_to(x, *args, **kwargs)

    torch.Tensor.float, torch.Tensor.to = float_or_double, to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = plain_float, plain_to  # type: ignore[method-assign]


def run(case: Example) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The output, gradients of all parameters and of all floating inputs, of a loss over the whole output."""
    model, arguments = case
    leaves = {}
    for key, given in arguments.items():
        if torch.is_tensor(given) and given.is_floating_point():
            leaves[key] = arguments[key] = given.detach().clone().requires_grad_()
    model.zero_grad()
    with exactly():
        out = model(**arguments, return_dict=False)[0]
        flat = torch.cat([one.flatten() for one in out]) if isinstance(out, list) else out.flatten()
        weights = torch.randn(len(flat), generator=torch.Generator().manual_seed(5), dtype=flat.dtype)
        (flat * weights).sum().backward()
    grads = {key: _grad(parameter) for key, parameter in model.named_parameters()}
    return flat.detach(), grads, {key: _grad(leaf) for key, leaf in leaves.items()}


def _grad(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad.clone()


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest entry of the same tensor, and where it is."""
    assert got.keys() == want.keys()
    # Gradients that are zero but for rounding are compared on the scale of the others.
    floor = 1e-3 * max(x.abs().max().item() for x in want.values())
    errors = [
        ((got[key] - x).abs().max().item() / max(x.abs().max().item(), floor), key) for key, x in want.items()
    ]
    return max(errors)


_FLUX_SIZES = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "joint_attention_dim": 12,
}


def _flux_tokens(batch: int) -> dict[str, Any]:
    """Tokens, and what conditions them."""
    return {
        "hidden_states": torch.randn(batch, 15, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": torch.rand(batch),
        "guidance": torch.rand(batch),
    }


def _flux(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        **_FLUX_SIZES,
        num_attention_heads=heads,
        pooled_projection_dim=12,
        axes_dims_rope=[2, 2, 4],
        guidance_embeds=True,
    )
    return model, _flux_tokens(batch) | {
        "pooled_projections": torch.randn(batch, 12),
        "img_ids": torch.randn(15, 3),
        "txt_ids": torch.randn(5, 3),
    }


def _flux2(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        **_FLUX_SIZES,
        num_attention_heads=heads,
        timestep_guidance_channels=16,
        axes_dims_rope=[2, 2, 2, 2],
    )
    return model, _flux_tokens(batch) | {
        "img_ids": torch.randn(batch, 15, 4),
        "txt_ids": torch.zeros(batch, 5, 4),
    }


def _qwen(heads: int, batch: int, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=12,
        axes_dims_rope=(4, 2, 2),
        **more,
    )
    mask = torch.ones(batch, 7, dtype=torch.int64)
    mask[-1, 2:4] = 0  # a hole, and padding
    mask[-1, 6] = 0
    return model, {
        "hidden_states": torch.randn(batch, 15, 8),
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.rand(batch),
        "img_shapes": [[(1, 3, 5)]] * batch,
    }


def _qwen_edit(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    model, arguments = _qwen(heads, batch, zero_cond_t=True)
    return model, arguments | {"img_shapes": [[(1, 3, 3), (1, 2, 3)]] * batch}


def _wan(heads: int, batch: int, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **more,
    )
    return model, {
        "hidden_states": torch.randn(batch, 4, 3, 6, 10),  # 3 x 3 x 5 patches
        "timestep": torch.rand(batch) * 900,
        "encoder_hidden_states": torch.randn(batch, 7, 12),
    }


def _wan_i2v(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    model, arguments = _wan(heads, batch, image_dim=8, added_kv_proj_dim=12 * heads)
    # The model takes the last 512 for text and what comes before for the image.
    arguments["encoder_hidden_states"] = torch.randn(batch, 512, 12)
    return model, arguments | {"encoder_hidden_states_image": torch.randn(batch, 9, 8)}


def _wan_5b(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    model, arguments = _wan(heads, batch)
    return model, arguments | {"timestep": torch.rand(batch, 45) * 900}


def _ltx(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=heads,
        attention_head_dim=8,
        cross_attention_dim=8 * heads,
        num_layers=2,
        caption_channels=12,
    )
    mask = torch.ones(batch, 7, dtype=torch.int64)
    mask[-1, 4:] = 0
    return model, {
        "hidden_states": torch.randn(batch, 15, 8),
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "timestep": torch.rand(batch, 15) * 900,
        "encoder_attention_mask": mask,
        "num_frames": 1,
        "height": 3,
        "width": 5,
    }


def _hunyuan(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )
    mask = torch.zeros(batch, 7, dtype=torch.int64)
    mask[0, :5] = 1
    mask[-1, :3] = 1
    return model, {
        "hidden_states": torch.randn(batch, 4, 3, 3, 3),
        "timestep": torch.rand(batch) * 900,
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6.0),
    }


def _cogvideox(heads: int, batch: int, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=10,
        sample_height=6,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7,
        **more,
    )
    return model, {
        "hidden_states": torch.randn(batch, 3, 4, 6, 10),
        "encoder_hidden_states": torch.randn(batch, 7, 8),
        "timestep": torch.rand(batch) * 900,
    }


def _cogvideox_5b(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    model, arguments = _cogvideox(
        heads, batch, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True
    )
    return model, arguments | {"image_rotary_emb": (torch.randn(45, 16), torch.randn(45, 16))}


def _sd3(heads: int, batch: int, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=6,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=heads,
        caption_projection_dim=8 * heads,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        **more,
    )
    return model, {
        "hidden_states": torch.randn(batch, 4, 5, 5),
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "pooled_projections": torch.randn(batch, 12),
        "timestep": torch.rand(batch) * 900,
    }


def _sd3_5(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    return _sd3(heads, batch, dual_attention_layers=(0, 1))


def _z_image(heads: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16 * heads,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=12,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    sizes = [(8, 10), (6, 14), (12, 12)]
    texts = [7, 40, 5]
    return model, {
        "x": [torch.randn(4, 1, *sizes[at]) for at in range(batch)],
        "t": torch.rand(batch),
        "cap_feats": [torch.randn(texts[at], 12) for at in range(batch)],
    }


_MAKERS: dict[str, Callable[[int, int], tuple[nn.Module, dict[str, Any]]]] = {
    name: globals()[f"_{name}"] for name in (one.replace("-", "_").replace(".", "_") for one in NAMES)
}
