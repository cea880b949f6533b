"""Pipeline parallelism: stages of a model on ranks of pp, micro-batches of any lengths one after the other.

    1f1b, pp 2         rank 0   F0 F1 B0 F2 B1 F3 B2 B3            one stage a rank
                       rank 1      F0 B0 F1 B1 F2 B2 F3 B3
    interleaved        rank 0 has stages 0 and 2, rank 1 has 1 and 3: shorter bubbles, more messages
    zero_bubble        likewise, and weights' gradients are made where a rank would wait

PyTorch's schedules give the order. What they do not expect: every micro-batch has tokens, documents and an
attention schedule of its own. So hidden states are received in buffers of each micro-batch's size
(`UnevenStage`), and a micro-batch reaches every stage whole, as one object, beside the hidden states.

The loss is made by the last stage itself, so logits never travel nor exist. FSDP gathers a stage's parameters
once a step, also with zero=3, and reduces gradients after its last backward: the stages see to that.

Source: torch.distributed.pipelining; 1F1B (Narayanan et al. 2019, 2021), zero bubble (Qi et al. 2023).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import (
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from seqmesh.parallel.batch import LocalBatch
from seqmesh.parallel.dims import ParallelMesh
from seqmesh.parallel.part import ModelPart
from seqmesh.parallel.plan import ParallelPlan, PipelineOrder


class _Order(NamedTuple):
    """How a pipeline is run."""

    schedule: Any
    """PyTorch's class."""
    stages_a_rank: int


_ORDERS: dict[PipelineOrder, _Order] = {
    "1f1b": _Order(Schedule1F1B, 1),
    "interleaved": _Order(ScheduleInterleaved1F1B, 2),
    "zero_bubble": _Order(ScheduleInterleavedZeroBubble, 2),
}


def stage_count(mesh: ParallelMesh, plan: ParallelPlan) -> int:
    """Stages of the whole pipeline."""
    return mesh.dims.pp * _ORDERS[plan.pipeline].stages_a_rank


def stages_of_rank(mesh: ParallelMesh, plan: ParallelPlan) -> list[int]:
    """Which of them this rank has."""
    return list(range(mesh.rank("pp"), stage_count(mesh, plan), mesh.dims.pp))


class UnevenStage(PipelineStage):
    """A stage that receives another number of tokens with each micro-batch."""

    def __init__(
        self, part: ModelPart, stage: int, mesh: ParallelMesh, plan: ParallelPlan, rows: list[int]
    ) -> None:
        """`rows` are the tokens of every micro-batch that this rank has between layers."""
        self.rows = rows
        self.hidden_size: int = part.hf.config.hidden_size
        self.hidden_dtype = plan.param_dtype or part.hf.dtype
        device = torch.empty(0, device=mesh.device_type).device  # with its index
        hidden = torch.empty(1, rows[0], self.hidden_size, dtype=self.hidden_dtype, device=device)
        ids = torch.empty(1, rows[0], dtype=torch.int64, device=device)
        share = torch.empty((), device=device)
        super().__init__(
            part,
            stage,
            stage_count(mesh, plan),
            device,
            input_args=(ids if part.is_first else hidden.clone().requires_grad_(),),
            output_args=((share if part.is_last else hidden).requires_grad_(),),
            group=mesh.group("pp"),
        )

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        self._size_buffers(self.args_recv_info)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        self._size_buffers(self.grad_recv_info)

    def _size_buffers(self, received: dict[int, Any]) -> None:
        """Give each micro-batch's hidden states, or their gradients, the room that they need."""
        for number, rows in enumerate(self.rows):
            for info in received.get(number, ()):
                if info.buffer is not None:
                    info.buffer = info.buffer.new_empty(1, rows, self.hidden_size)


def run_pipeline(
    parts: Sequence[ModelPart], mesh: ParallelMesh, plan: ParallelPlan, batches: Sequence[LocalBatch]
) -> Tensor:
    """Forward and backward of all micro-batches through all stages. A collective over all ranks.

    Returns:
        This rank's share of the loss, (): 0 on ranks without the last stage.

    Raises:
        ValueError: on all ranks alike, a number of micro-batches that the order cannot run.
    """
    order = _ORDERS[plan.pipeline]
    count = len(batches)
    _check_count(count, mesh, plan)
    shared = mesh.dims.tp if plan.shard_norms else 1
    rows = [-(-batch.input_ids.shape[1] // shared) for batch in batches]
    numbers = stages_of_rank(mesh, plan)
    stages = [
        UnevenStage(part, number, mesh, plan, rows) for part, number in zip(parts, numbers, strict=True)
    ]
    runner = order.schedule(
        stages if order.stages_a_rank > 1 else stages[0],
        n_microbatches=count,
        loss_fn=lambda share, _: share,
        scale_grads=False,
    )
    losses: list[Tensor] = []
    inputs: list[Any] = [(batch.input_ids,) if parts[0].is_first else () for batch in batches]
    beside = [{"batch": batch} for batch in batches]
    # The public step() cuts one batch along its first dim; this is what it does and calls with the pieces.
    for stage in stages:
        stage.has_backward = True
        stage.clear_runtime_states()
    runner._step_microbatches(inputs, beside, [None] * count, losses, return_outputs=False)
    zero = torch.zeros((), device=mesh.device_type)
    return torch.stack([share.detach() for share in losses]).sum() if losses else zero


def _check_count(count: int, mesh: ParallelMesh, plan: ParallelPlan) -> None:
    """Refuse a number of micro-batches that the order cannot run."""
    stages_a_rank = _ORDERS[plan.pipeline].stages_a_rank
    if count < mesh.dims.pp or (stages_a_rank > 1 and count % mesh.dims.pp):
        rule = "at least as many as" if stages_a_rank == 1 else "a multiple of"
        raise ValueError(
            f"{count} micro-batches for pp={mesh.dims.pp} in the order {plan.pipeline!r}, which needs {rule}"
            " its ranks; cut the step into more micro-batches"
        )
