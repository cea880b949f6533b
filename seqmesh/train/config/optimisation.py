"""[train]: optimisation, and what memory is spent on."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from seqmesh.train.config.rules import STRICT, at_least, require


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation: AdamW, linear warm-up, cosine decay."""

    steps: int = 64
    """Optimiser steps."""
    minutes: float = 0.0
    """Stop after this many minutes even if steps are left; 0 for no limit."""
    lr: float = 3e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The last learning rate over the peak one."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """On matrices; vectors and norms have none."""
    clip: float = 1.0
    """Largest gradient norm."""
    balance: float = 0.0
    """What the loss that keeps the experts of a mixture evenly used is multiplied by (router_aux_loss_coef in
    transformers); it is part of the loss that is reported. 0: none."""
    seed: int = 0
    """Of the weights and of the order of documents; 0 <= seed < 2^63."""
    zero: int = 0
    """What ranks with the same parameters share (ZeRO): 0 nothing; 1 optimiser states; 2 gradients and
    parameters too, which are whole from a step's first forward to its last backward; 3 those as well."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward computes again: "selective" all but attention and matrix products, "full" all but
    attention."""
    offload: Literal["none", "activations", "optimizer", "both"] = "none"
    """What is kept on the host: the inputs of recomputed layers; parameters and optimiser states."""
    tiling: Literal["none", "mlp"] = "none"
    """Whether MLPs take 4,096 tokens at a time. The loss always takes 1,024."""
    shard_norms: bool = False
    """Whether ranks of tp share the tokens of norms and residuals, which each has whole otherwise."""
    micro_batch: int = 0
    """Packed sequences that go through the model at once; 0: all that a data-parallel rank has."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What layers compute in; weights, gradients that are summed and optimiser states are fp32. bf16 needs
    zero >= 2."""
    pipeline: Literal["1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """In which order a pipeline rank runs its micro-batches."""
    compare_steps: int = 3
    """First steps that are repeated on one rank afterwards, to compare loss and gradient norm; 0: none."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        none = ("minutes", "lr", "min_lr_ratio", "warmup", "weight_decay", "balance", "seed", "compare_steps")
        at_least("train", self, steps=1, **dict.fromkeys((*none, "zero", "micro_batch"), 0))
        require(self.zero <= 3, f"train.zero={self.zero}: ZeRO has stages 0 to 3; use one of them")
        require(
            self.precision == "fp32" or self.zero >= 2,
            f'train.precision="bf16" with train.zero={self.zero}: weights in bf16 are made when they are'
            " gathered; use train.zero=2 or 3",
        )
        require(
            self.offload in ("none", "optimizer") or self.checkpointing != "none",
            f'train.offload="{self.offload}" keeps the inputs of recomputed layers; use'
            ' train.checkpointing="full" too',
        )
        require(
            self.offload in ("none", "activations") or self.zero >= 2,
            f'train.offload="{self.offload}" with train.zero={self.zero}: what is sharded can be kept on the'
            " host; use train.zero=2 or 3",
        )
        require(
            self.pipeline != "zero-bubble" or (self.zero < 3 and self.checkpointing == "none"),
            f'train.pipeline="zero-bubble" with train.zero={self.zero} and train.checkpointing='
            f'"{self.checkpointing}": it makes the gradients of weights later; use train.zero <= 2 and'
            ' train.checkpointing="none"',
        )
        require(
            math.isfinite(self.clip) and self.clip > 0,
            f"train.clip={self.clip}: use a positive gradient norm",
        )
        require(self.min_lr_ratio <= 1, f"train.min_lr_ratio={self.min_lr_ratio}: use a ratio of at most 1")
