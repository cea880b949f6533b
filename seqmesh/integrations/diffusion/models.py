"""The plan table: one entry a model of diffusers. docs/diffusion.md says how to add one.

An entry lists every argument of the model's forward, as of the versions of diffusers that pyproject.toml
pins. `plug_in` compares: an argument that an entry does not know is refused, not ignored.
"""

from seqmesh.integrations.diffusion import tokens
from seqmesh.integrations.diffusion.plan import (
    Kept,
    ModelPlan,
    ModuleCuts,
    Refused,
    Stream,
    StreamCut,
    WholeArgument,
    WholeLength,
)

_CONTROLNET = Refused(
    "ControlNet residuals, which are of the whole image", "leave them out, or unplug the transformer"
)
_CACHE = Refused("a K/V cache of reference images, which is not sharded", "leave it out")

_IMAGE = StreamCut(stream="image", dim=1)
_TEXT = StreamCut(stream="text", dim=1)
_TIME_STEPS = StreamCut(stream="image", dim=1, per_token=True)


def _rotary(dim: int) -> tuple[StreamCut, StreamCut]:
    """Cosines and sines of the image's positions."""
    return (StreamCut(stream="image", dim=dim),) * 2


_TOKENS_AND_IDS: dict[str, StreamCut | Kept | Refused] = {
    "hidden_states": _IMAGE,
    "encoder_hidden_states": _TEXT,
    "img_ids": StreamCut(stream="image", dim=-2),
    "txt_ids": StreamCut(stream="text", dim=-2),
}
_DOUBLE_AND_SINGLE: dict[str, Stream] = {
    "transformer_blocks.*.attn": "joint",
    "single_transformer_blocks.*.attn": "joint",
}
"""Blocks that keep text and image apart, and then blocks that do not."""

FLUX = ModelPlan(
    text_first=True,
    count=tokens.packed,
    arguments=_TOKENS_AND_IDS
    | {
        "pooled_projections": Kept.WHOLE,
        "timestep": Kept.WHOLE,
        "guidance": Kept.WHOLE,
        "joint_attention_kwargs": Kept.LORA_SCALE,
        "controlnet_block_samples": _CONTROLNET,
        "controlnet_single_block_samples": _CONTROLNET,
        "controlnet_blocks_repeat": Kept.WHOLE,
        "return_dict": Kept.WHOLE,
    },
    attention=_DOUBLE_AND_SINGLE,
    processors=("FluxAttnProcessor",),
)

FLUX2 = ModelPlan(
    text_first=True,
    count=tokens.packed,
    arguments=_TOKENS_AND_IDS
    | {
        "timestep": Kept.WHOLE,
        "guidance": Kept.WHOLE,
        "joint_attention_kwargs": Kept.LORA_SCALE,
        "kv_cache": _CACHE,
        "kv_cache_mode": _CACHE,
        "num_ref_tokens": _CACHE,
        "ref_fixed_timestep": Kept.WHOLE,
        "return_dict": Kept.WHOLE,
    },
    attention=_DOUBLE_AND_SINGLE,
    processors=("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
)

QWEN_IMAGE = ModelPlan(
    text_first=True,
    count=tokens.packed_with_mask,
    arguments={
        "hidden_states": _IMAGE,
        "encoder_hidden_states": _TEXT,
        "encoder_hidden_states_mask": Kept.MASK,
        "timestep": Kept.WHOLE,
        "img_shapes": Kept.WHOLE,
        "guidance": Kept.WHOLE,
        "additional_t_cond": Kept.WHOLE,
        "attention_kwargs": Kept.LORA_SCALE,
        "controlnet_block_samples": _CONTROLNET,
        "return_dict": Kept.WHOLE,
    },
    modules=(
        # The model counts the text that it sees, which is this rank's, to make positions of it.
        ModuleCuts(
            path="pos_embed",
            arguments={"max_txt_seq_len": WholeLength("text")},
            outputs=(StreamCut(stream="image", dim=0), StreamCut(stream="text", dim=0)),
        ),
        # Which image tokens are noise and which are given (image editing).
        ModuleCuts(path="transformer_blocks.*", arguments={"modulate_index": _IMAGE}),
    ),
    attention={"transformer_blocks.*.attn": "joint"},
    processors=("QwenDoubleStreamAttnProcessor2_0",),
    # Its RoPE reshapes the text with a length left open, which no tokens at all do not allow.
    text_per_rank=1,
)

WAN = ModelPlan(
    count=tokens.video_patches,
    arguments={
        "hidden_states": Kept.WHOLE,
        "timestep": _TIME_STEPS,
        "encoder_hidden_states": Kept.WHOLE,
        "encoder_hidden_states_image": Kept.WHOLE,
        "attention_kwargs": Kept.LORA_SCALE,
        "return_dict": Kept.WHOLE,
    },
    modules=(
        ModuleCuts(path="patch_embedding", outputs=(StreamCut(stream="image", dim=2, flattened=True),)),
        ModuleCuts(path="rope", outputs=_rotary(1)),
    ),
    attention={"blocks.*.attn1": "joint"},
    local_attention=("blocks.*.attn2",),
    processors=("WanAttnProcessor",),
)

LTX = ModelPlan(
    count=tokens.image_alone,
    arguments={
        "hidden_states": _IMAGE,
        "encoder_hidden_states": Kept.WHOLE,
        "timestep": _TIME_STEPS,
        "encoder_attention_mask": Kept.WHOLE,
        "num_frames": Kept.WHOLE,
        "height": Kept.WHOLE,
        "width": Kept.WHOLE,
        "rope_interpolation_scale": Kept.WHOLE,
        "video_coords": Kept.WHOLE,
        "attention_kwargs": Kept.LORA_SCALE,
        "return_dict": Kept.WHOLE,
    },
    modules=(ModuleCuts(path="rope", outputs=_rotary(1)),),
    attention={"transformer_blocks.*.attn1": "joint"},
    local_attention=("transformer_blocks.*.attn2",),
    processors=("LTXVideoAttnProcessor",),
)

HUNYUAN_VIDEO = ModelPlan(
    text_first=False,
    count=tokens.hunyuan_video,
    arguments={
        "hidden_states": Kept.WHOLE,
        "timestep": Kept.WHOLE,
        "encoder_hidden_states": Kept.WHOLE,
        "encoder_attention_mask": Kept.WHOLE,
        "pooled_projections": Kept.WHOLE,
        "guidance": Kept.WHOLE,
        "attention_kwargs": Kept.LORA_SCALE,
        "return_dict": Kept.WHOLE,
    },
    modules=(
        ModuleCuts(path="x_embedder", outputs=(_IMAGE,)),
        ModuleCuts(path="context_embedder", outputs=(_TEXT,)),
        ModuleCuts(path="rope", outputs=_rotary(0)),
    ),
    attention=_DOUBLE_AND_SINGLE,
    local_attention=("context_embedder.token_refiner.refiner_blocks.*.attn",),
    masks_at_attention=True,
    processors=("HunyuanVideoAttnProcessor2_0",),
    # Its blocks take the text from the end of the rows, and [:-0] would be none of them.
    text_per_rank=1,
    config_refused={
        "image_condition_type": (
            "token_replace",
            "it modulates the first frame's tokens differently; use a model that concatenates latents",
        )
    },
)

COGVIDEOX = ModelPlan(
    text_first=True,
    count=tokens.frames_of_pictures,
    arguments={
        "hidden_states": Kept.WHOLE,
        "encoder_hidden_states": _TEXT,
        "timestep": Kept.WHOLE,
        "timestep_cond": Kept.WHOLE,
        "ofs": Kept.WHOLE,
        "image_rotary_emb": StreamCut(stream="image", dim=0),
        "attention_kwargs": Kept.LORA_SCALE,
        "return_dict": Kept.WHOLE,
    },
    modules=(
        # It adds positions to text and image at once, so it needs both whole.
        ModuleCuts(
            path="patch_embed",
            arguments={"text_embeds": WholeArgument("encoder_hidden_states")},
            outputs=(StreamCut(stream="joint", dim=1),),
        ),
    ),
    attention={"transformer_blocks.*.attn1": "joint"},
    processors=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
)

SD3 = ModelPlan(
    text_first=False,
    count=tokens.picture,
    arguments={
        "hidden_states": Kept.WHOLE,
        "encoder_hidden_states": Kept.WHOLE,
        "pooled_projections": Kept.WHOLE,
        "timestep": Kept.WHOLE,
        "block_controlnet_hidden_states": _CONTROLNET,
        "joint_attention_kwargs": Kept.LORA_SCALE,
        "skip_layers": Kept.WHOLE,
        "return_dict": Kept.WHOLE,
    },
    modules=(
        ModuleCuts(path="pos_embed", outputs=(_IMAGE,)),
        ModuleCuts(path="context_embedder", outputs=(_TEXT,)),
    ),
    # attn2 is 3.5's second attention, of the image alone.
    attention={"transformer_blocks.*.attn": "joint", "transformer_blocks.*.attn2": "image"},
    processors=("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"),
)

_SEVERAL_IMAGES = Refused("several images a sample", "pass one image a sample, or unplug the transformer")

Z_IMAGE = ModelPlan(
    count=tokens.padded_to_32,
    arguments={
        "x": Kept.WHOLE,
        "t": Kept.WHOLE,
        "cap_feats": Kept.WHOLE,
        "controlnet_block_samples": _CONTROLNET,
        "siglip_feats": _SEVERAL_IMAGES,
        "image_noise_mask": _SEVERAL_IMAGES,
        "patch_size": Kept.WHOLE,
        "f_patch_size": Kept.WHOLE,
        "joint_attention_kwargs": Kept.LORA_SCALE,
        "return_dict": Kept.WHOLE,
    },
    # No module makes the sequence: it is cut on its way into the layers. Refiners before them see it whole.
    modules=(
        ModuleCuts(path="layers.0", arguments={"x": _IMAGE}),
        ModuleCuts(path="layers.*", arguments={"freqs_cis": _IMAGE}),
    ),
    attention={"layers.*.attention": "joint"},
    local_attention=(
        "noise_refiner.*.attention",
        "context_refiner.*.attention",
        "siglip_refiner.*.attention",
    ),
    masks_at_attention=True,
    processors=("ZSingleStreamAttnProcessor",),
    last="all_final_layer.*",
)

PLANS: dict[str, ModelPlan] = {
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "Flux2Transformer2DModel": FLUX2,
    "FluxTransformer2DModel": FLUX,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "LTXVideoTransformer3DModel": LTX,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "SD3Transformer2DModel": SD3,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
}
"""By the class of the transformer."""
