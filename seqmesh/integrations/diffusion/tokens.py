"""How many text and image tokens a call has, and which of them are padding.

Each function takes the model's config and the arguments of its forward by name, as `ModelPlan.count` wants
it. All look only at shapes and masks, which are the same on every rank.

Legend: b batch, s tokens, c channels, f frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

Rows = tuple[tuple[bool, ...], ...]
"""For each sample, which tokens are seen."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The joint sequence of a call."""

    text: int
    image: int
    seen_text: Rows | None = None
    """None: all of them."""
    seen_image: Rows | None = None


def packed(_: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Image (b, s, c) beside text (b, s, c)."""
    return Tokens(text=arguments["encoder_hidden_states"].shape[1], image=arguments["hidden_states"].shape[1])


def packed_with_mask(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """The same, with a mask of the text (b, s), 1 for tokens that are seen; holes are legal.

    Raises:
        ValueError: a mask of another shape.
    """
    tokens = packed(config, arguments)
    mask = arguments["encoder_hidden_states_mask"]
    if mask is None:
        return tokens
    expected = arguments["encoder_hidden_states"].shape[:2]
    if mask.shape != expected:
        raise ValueError(
            f"encoder_hidden_states_mask has shape {tuple(mask.shape)} for text of {tuple(expected)};"
            " pass one number for each text token of each sample"
        )
    return Tokens(text=tokens.text, image=tokens.image, seen_text=_rows(mask))


def image_alone(_: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Image (b, s, c); the text is not in the sequence."""
    return Tokens(text=0, image=arguments["hidden_states"].shape[1])


def video_patches(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Video (b, c, f, h, w) in patches of three sizes; the text is not in the sequence."""
    return Tokens(text=0, image=_patches(arguments["hidden_states"].shape[2:], config.patch_size))


def hunyuan_video(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Video (b, c, f, h, w) beside text (b, s, c), of which a sample has as many tokens as its mask has ones.

    The model itself counts the ones and takes so many tokens from the left, so this does too.
    """
    sizes = (config.patch_size_t, config.patch_size, config.patch_size)
    image = _patches(arguments["hidden_states"].shape[2:], sizes)
    text = arguments["encoder_hidden_states"].shape[1]
    counts = arguments["encoder_attention_mask"].sum(dim=1).tolist()
    seen = tuple(tuple(at < count for at in range(text)) for count in counts)
    return Tokens(text=text, image=image, seen_text=seen)


def frames_of_pictures(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Video (b, f, c, h, w), in patches of height and width, and of frames if the config says so."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    sizes = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    text = arguments["encoder_hidden_states"].shape[1]
    return Tokens(text=text, image=_patches((frames, height, width), sizes))


def picture(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """An image (b, c, h, w) in square patches beside text (b, s, c)."""
    sizes = (config.patch_size, config.patch_size)
    image = _patches(arguments["hidden_states"].shape[2:], sizes)
    return Tokens(text=arguments["encoder_hidden_states"].shape[1], image=image)


def padded_to_32(_: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Images (c, f, h, w) and texts (s, c), a list of each, of any sizes: each padded to a multiple of 32.

    A sample's text follows its image at once, so the sequence is cut as one stream; what a shorter sample
    lacks at the end is padding.

    Raises:
        ValueError: lists of lists, which are several images a sample.
    """
    images, texts = arguments["x"], arguments["cap_feats"]
    if any(isinstance(image, list) for image in images):
        raise ValueError(
            "x holds several images a sample, each with a time-step of its own, which is not supported;"
            " pass one image a sample, or unplug the transformer"
        )
    sizes = (arguments["f_patch_size"], arguments["patch_size"], arguments["patch_size"])
    lengths = [
        _up_to_32(_patches(image.shape[1:], sizes)) + _up_to_32(len(text))
        for image, text in zip(images, texts, strict=True)
    ]
    longest = max(lengths)
    if min(lengths) == longest:
        return Tokens(text=0, image=longest)
    seen = tuple(tuple(at < length for at in range(longest)) for length in lengths)
    return Tokens(text=0, image=longest, seen_image=seen)


def _up_to_32(tokens: int) -> int:
    return -(-tokens // 32) * 32


def _patches(shape: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    return prod(length // size for length, size in zip(shape, sizes, strict=True))


def _rows(mask: Tensor) -> Rows:
    return tuple(tuple(row) for row in mask.bool().tolist())
