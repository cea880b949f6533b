"""The loss that keeps a mixture's experts evenly used, right though a micro-batch's tokens lie on many ranks.

    E sum over experts e of  f_e P_e        f_e share of the tokens that are routed to e, over all layers
                                            P_e mean of the router's probabilities for e, likewise

It is a product of two means over all tokens of a micro-batch, so a mean of what ranks compute of their own
tokens would be another loss. f has no gradient: the ranks of a sequence add up their counts, E numbers a
micro-batch, and each then has a share whose sum is the loss:

    share of a rank  =  E sum over e of  f_e (all ranks)  x  P_e (this rank's tokens) / rows of all ranks

A step's loss is the mean of its micro-batches' losses, as gradient accumulation on one rank makes it.
Source: Switch Transformer (Fedus et al. 2021), eq. 4 to 6; transformers' load_balancing_loss_func.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqmesh.parallel.dims import ParallelMesh


class BalanceLoss:
    """Records the router's logits of every layer of a forward, and makes the loss of them."""

    def __init__(self, model: PreTrainedModel, mesh: ParallelMesh, coefficient: float) -> None:
        """Hook the routers of a model.

        Raises:
            ValueError: a model whose routers transformers does not name, or pipeline stages.
        """
        self.coefficient = coefficient
        self.top_k: int = getattr(model.config, "num_experts_per_tok", 0)
        self._group = mesh.group("sequence")
        self._recorded: list[Tensor] | None = None
        routers = _routers(model)
        if not routers or mesh.dims.pp > 1:
            found = f"pp={mesh.dims.pp}" if routers else f"{type(model).__name__}, which has no routers"
            raise ValueError(
                f"balance={coefficient} with {found}: the loss needs the routers of all layers; use a mixture"
                " of experts and pp=1"
            )
        for module, index in routers:
            module.register_forward_hook(lambda _, __, output, at=index: self._record(output, at))

    def start(self) -> None:
        """The forward begins: what routers say from now on counts."""
        self._recorded = []

    def _record(self, output: Any, index: int) -> None:
        # Recomputed layers call their routers once more, in the backward: nothing is recorded then.
        if self._recorded is not None:
            self._recorded.append(output[index] if isinstance(output, tuple) else output)

    def share(self, batch_count: int) -> Tensor:
        """This rank's share, one of `batch_count` micro-batches. A collective of a sequence's ranks."""
        recorded, self._recorded = self._recorded, None
        assert recorded
        experts = recorded[0].shape[-1]
        probabilities = [logits.flatten(0, -2).float().softmax(-1) for logits in recorded]
        counts = torch.zeros(experts + 1, device=recorded[0].device)  # and the rows of all layers
        for rows in probabilities:
            chosen = rows.topk(self.top_k, -1).indices.flatten()
            counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
            counts[experts] += rows.shape[0]
        if self._group is not None:
            dist.all_reduce(counts, group=self._group)
        all_rows = counts[experts]
        used = torch.stack([rows.sum(0) for rows in probabilities]).sum(0)
        loss = experts * (counts[:experts] / all_rows * used / all_rows).sum()
        return self.coefficient * loss / batch_count


def _routers(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """The modules that transformers records router logits of, and where in their output these are."""
    for part in model.modules():
        recorder = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is not None and hasattr(recorder, "target_class"):
            kind, index = recorder.target_class, recorder.index or 0
            return [(module, index) for module in part.modules() if isinstance(module, kind)]
    return []
