"""What must be known of a diffusion transformer to run it on sequence shards: the words of the plan table.

    tokens in  --  cut at the model's edges  --  blocks on this rank's rows  --  gather  --  image out
                   arguments, or outputs of       joint attention goes over       after the
                   embedders and of RoPE          the mesh, the rest stays        last layer

Cuts are at the edges, not in the blocks, where the model lets them be: then checkpoints and compilers see
blocks as they were. docs/diffusion.md works through an entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from seqmesh.integrations.diffusion.tokens import Tokens

Stream = Literal["text", "image", "joint"]
"""Tokens of one kind, each cut by the same joint layout; "joint" are both, in the model's order."""


@dataclass(frozen=True, kw_only=True)
class StreamCut:
    """A tensor, or a tuple or list of them, of which each rank keeps its tokens of a stream."""

    stream: Stream
    dim: int
    flattened: bool = False
    """The dims from `dim` on hold the tokens: frames, height, width. They become (n, 1, 1)."""
    per_token: bool = False
    """Only a tensor with a number for each token is cut: time-steps may also be one for a sample."""


class Kept(Enum):
    """What becomes of an argument that holds no tokens to cut."""

    WHOLE = "the same on every rank"
    MASK = "has become bands of the schedule: the model gets None"
    LORA_SCALE = "a dict in which only the LoRA scale is legal"


@dataclass(frozen=True)
class Refused:
    """An argument that must be absent (None, False or 0)."""

    what: str
    """What it asks for."""
    remedy: str


@dataclass(frozen=True)
class WholeArgument:
    """An argument of a module that the model took from a cut argument of its own, given back whole."""

    name: str
    """Of the model's argument."""


@dataclass(frozen=True)
class WholeLength:
    """A number of tokens that the model took from a cut tensor, given back for the whole stream."""

    stream: Stream


@dataclass(frozen=True, kw_only=True)
class ModuleCuts:
    """What is changed on the way into a module, and on the way out of it."""

    path: str
    """Names from the model on; * for each member of a list or a dict of modules."""
    arguments: Mapping[str, StreamCut | WholeArgument | WholeLength] = field(default_factory=dict)
    outputs: tuple[StreamCut, ...] = ()
    """By place in a tuple; one for a plain tensor."""


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One entry of the table."""

    text_first: bool = False
    """Order of the joint sequence; of no meaning without text tokens in it."""
    count: Callable[[Any, Mapping[str, Any]], Tokens]
    """Tokens of a call, from the model's config and its arguments by name."""
    arguments: Mapping[str, StreamCut | Kept | Refused]
    """Every argument of the model's forward."""
    modules: tuple[ModuleCuts, ...] = ()
    attention: Mapping[str, Stream]
    """Paths of attention modules that attend over the mesh, and over which stream."""
    local_attention: tuple[str, ...] = ()
    """Paths of attention modules that stay on the rank: to short text, or in text refiners."""
    masks_at_attention: bool = False
    """Whether the model hands attention a mask of its own making, which `count` has turned into bands."""
    processors: tuple[str, ...]
    """Classes of attention processors whose arithmetic is known to fit."""
    last: str = "proj_out"
    """Path of the module after which the image tokens are gathered, along dim 1."""
    text_per_rank: int = 0
    """Text tokens that the blocks' own slicing needs on every rank."""
    config_refused: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Values in the model's config that are refused, and what to do instead."""
