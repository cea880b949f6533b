"""What is done to a model beside its degrees: how ZeRO shards, what is recomputed, how pipelines run."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Recompute = Literal["none", "selective", "full"]
PipelineOrder = Literal["1f1b", "interleaved", "zero_bubble"]


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Choices that change memory and time, and no number that training computes but by rounding."""

    zero: int = 3
    """What the ranks of fsdp share: 0 nothing; 1 optimiser states; 2 parameters and gradients too, whole from
    a step's first forward to its last backward; 3 those as well, whole only while a layer computes."""
    param_dtype: torch.dtype | None = None
    """What layers compute in, such as bfloat16; the parameters that the optimiser sees keep their dtype, and
    gradients are reduced in fp32. Default: the parameters' dtype."""
    reduce_each: bool = False
    """Reduce the gradients of every micro-batch, which keeps them sharded in between. Default: once a step,
    after its last micro-batch, which sends less."""
    recompute: Recompute = "none"
    """What the backward computes again: nothing; "selective": all but attention and matrix products; "full":
    all of a layer but attention."""
    offload: bool = False
    """Keep the inputs of recomputed layers on the host."""
    experts: int = 1
    """Ranks of fsdp and tp over which a layer's experts are spread (expert parallelism), a multiple of tp; 1:
    each gathers all."""
    balance: float = 0.0
    """What the loss that keeps experts evenly used is multiplied by (router_aux_loss_coef)."""
    offload_optimizer: bool = False
    """Keep parameters, gradients and optimiser states on the host (FSDP2's offload); the optimiser steps
    there. On CPU they are there already."""
    shard_norms: bool = False
    """Let ranks of tp share the tokens of norms and residuals, which each has whole otherwise."""
    mlp_rows: int | None = None
    """Tokens of an MLP whose intermediate results exist at once; default: all."""
    loss_rows: int = 1024
    """Tokens whose logits exist at once."""
    pipeline: PipelineOrder = "1f1b"
    """In which order a pipeline rank runs its micro-batches: "1f1b" with one stage a rank; "interleaved" and
    "zero_bubble" with two."""

    def __post_init__(self) -> None:
        """Refuse choices that do not exist, or not together."""
        for name, choices in (("recompute", Recompute), ("pipeline", PipelineOrder)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}; use one of {get_args(choices)}")
        _check_sharding(self)
        if self.offload and self.recompute == "none":
            raise ValueError('offload=True keeps the inputs of recomputed layers; use recompute="full" too')
        if self.pipeline == "zero_bubble" and (self.zero == 3 or self.recompute != "none"):
            # Gradients of weights come after those of inputs, by a second walk over the graph: of parameters
            # that were freed in between FSDP loses them, and a selective checkpoint allows one walk.
            raise ValueError(
                f'pipeline="zero_bubble" with zero={self.zero} and recompute={self.recompute!r}: it makes the'
                ' gradients of weights later; use zero=2 (or less) and recompute="none"'
            )
        if self.mlp_rows is not None and self.mlp_rows < 1:
            raise ValueError(f"mlp_rows={self.mlp_rows}: a tile has at least 1 token; use 4096, or None")
        if not (0 <= self.balance < float("inf")):
            raise ValueError(f"balance={self.balance}: a loss is added with a finite weight of at least 0")


def _check_sharding(plan: ParallelPlan) -> None:
    if plan.zero not in (0, 1, 2, 3):
        raise ValueError(f"zero={plan.zero!r}: ZeRO has stages 0 to 3; choose one")
    if plan.zero < 2 and plan.param_dtype is not None:
        raise ValueError(
            f"zero={plan.zero} with param_dtype={plan.param_dtype}: parameters in another dtype than the"
            " optimiser's are made when they are gathered, which is done from zero=2 on; use zero=2"
        )
    if plan.experts < 1 or (plan.experts > 1 and plan.zero < 2):
        raise ValueError(
            f"experts={plan.experts} with zero={plan.zero}: experts are spread over ranks that share"
            " parameters; use zero=2 or 3, and experts >= 1"
        )
    if plan.offload_optimizer and plan.zero < 2:
        raise ValueError(
            f"offload_optimizer=True with zero={plan.zero}: what is sharded can be kept on the host; use"
            " zero=2 or 3"
        )
