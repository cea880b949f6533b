"""The training stacks answer the planner's questions, each for itself."""

from dataclasses import replace

import pytest

from seqmesh.planner.candidates import meshes, with_savers
from seqmesh.planner.cost.fused_memory import FusedMemory
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.cost.trainer_memory import TrainerMemory
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import violations
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.numerics import BF16, FP32
from seqmesh.planner.inputs.point import CHECKPOINTING, OFFLOAD, TILING, Point
from seqmesh.planner.inputs.stack import STACKS, FusedStack, PaperStack, TrainerStack, stack_named

pytestmark = pytest.mark.fast


CLUSTER = Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=4)
FUSED = Job(model=load_model("llama3.2-1b"), cluster=CLUSTER, seq_len=8192, stack=FusedStack())
TRAINER = replace(FUSED, stack=TrainerStack(), numerics=FP32)


def test_stacks_are_found_by_name_and_a_job_has_seqmeshs() -> None:
    named = {"fused": FusedStack(), "trainer": TrainerStack(), "paper": PaperStack()}
    assert {name: stack_named(name) for name in named} == named
    assert all(stack_named(name) == stack for name, stack in STACKS.items())
    assert replace(FUSED).stack == stack_named("fused")
    assert Job(model=FUSED.model, cluster=CLUSTER, seq_len=8192).stack == stack_named("seqmesh")
    with pytest.raises(ValueError, match=r"unknown stack 'trainr'; did you mean 'trainer'\? known: seqmesh"):
        stack_named("trainr")


def test_each_stack_takes_its_own_memory_model() -> None:
    for name, stack in STACKS.items():
        model = TrainerMemory if name == "trainer" else FusedMemory
        assert type(CostModel(replace(FUSED, stack=stack)).memory) is model


def test_stacks_try_every_zero_stage_and_the_savers_that_they_have() -> None:
    for job in (FUSED, TRAINER):
        assert {point.zero for point in meshes(job, {})} >= {1, 2, 3}
    point = Point(ulysses=2, ring=2)
    # Selective checkpoints are tried by the trainer only; the fused stack has them if they are pinned.
    combinations = len(TILING) * 2 * len(OFFLOAD)
    assert len(set(with_savers(FUSED, point, {}))) == combinations
    assert len(set(with_savers(FUSED, point, {"checkpointing": "selective"}))) == combinations / 2
    # Its loss is always tiled.
    tried = list(with_savers(TRAINER, point, {}))
    assert len(set(tried)) == (len(TILING) - 1) * len(CHECKPOINTING) * len(OFFLOAD)
    assert {one.tiling for one in tried} == {"loss", "mlp"}


def test_what_the_trainer_does_not_run_is_named_for_the_trainer_only() -> None:
    half = replace(TRAINER, numerics=BF16)
    for job, point, why in (
        (half, Point(tp=2, ulysses=2, zero=1), "bf16 with zero=1"),
        (TRAINER, Point(ulysses=4, zero=1, offload="optimizer"), "offload=optimizer with zero=1"),
        (TRAINER, Point(pp=2, ulysses=2), "pp=2 with 1 micro-batches"),
        (replace(TRAINER, global_batch=2), Point(pp=2, ulysses=2), "pp=2 with tied embeddings"),
    ):
        assert list(violations(replace(job, stack=FusedStack()), point)) == []
        named = list(violations(job, point))
        assert any(text.startswith(why) for text in named)
        assert all("use" in text for text in named)
    everything = Point(ulysses=2, dp=2, zero=3, checkpointing="selective", offload="both", tiling="mlp")
    assert list(violations(replace(half, global_batch=2), everything)) == []


def test_the_trainer_computes_in_fp32_by_default_and_sums_gradients_in_nothing_else() -> None:
    assert FusedStack().numerics(None, "fp32") == BF16
    assert TrainerStack().numerics(None, "fp32") == FP32
    assert TrainerStack().numerics("bf16", "fp32") == BF16
    with pytest.raises(ValueError, match="remove --gradients"):
        TrainerStack().numerics("bf16", "bf16")


def test_selective_checkpoints_cost_little_time_and_take_memory_between_the_others() -> None:
    for job in (replace(FUSED, cluster=replace(CLUSTER, gpus_per_node=8)), TRAINER):
        # Long enough for the peak to be where activations live.
        costs = CostModel(replace(job, seq_len=4 * job.seq_len))
        points = [Point(ulysses=4, checkpointing=kind) for kind in CHECKPOINTING]
        none, selective, full = (costs.estimate(point) for point in points)
        assert none.seconds < selective.seconds < full.seconds
        assert none.memory.total > selective.memory.total > full.memory.total
        # Attention and its exchanges are never repeated.
        assert selective.bytes_per_step == none.bytes_per_step


def test_full_checkpoints_of_the_trainer_keep_attentions_results() -> None:
    point = Point(ulysses=4, checkpointing="full")
    sent = [CostModel(job).estimate(point).bytes_per_step for job in (FUSED, TRAINER)]
    plain = [
        CostModel(job).estimate(point.but(checkpointing="none")).bytes_per_step for job in (FUSED, TRAINER)
    ]
    assert sum(sent[0].values()) > sum(plain[0].values())
    assert sent[1] == plain[1]
