"""The training stacks answer the planner's questions, each for itself."""

from dataclasses import replace

import pytest

from seqmesh.planner.candidates import meshes, with_savers
from seqmesh.planner.cost.fused_memory import FusedMemory
from seqmesh.planner.cost.step import MEMORY_MODELS, CostModel
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
FUSED = Job(model=load_model("llama3.2-1b"), cluster=CLUSTER, seq_len=8192)
TRAINER = replace(FUSED, stack=TrainerStack(), numerics=FP32)


def test_stacks_are_found_by_name_and_a_job_has_the_fused_one() -> None:
    named = {"fused": FusedStack(), "trainer": TrainerStack(), "paper": PaperStack()}
    assert {name: stack_named(name) for name in STACKS} == named
    assert FUSED.stack == FusedStack()
    with pytest.raises(ValueError, match=r"unknown stack 'trainr'; did you mean 'trainer'\? known: fused"):
        stack_named("trainr")


def test_each_stack_takes_its_own_memory_model() -> None:
    assert isinstance(CostModel(FUSED).memory, FusedMemory)
    assert isinstance(CostModel(TRAINER).memory, TrainerMemory)
    assert {type(stack) for stack in STACKS.values()} == set(MEMORY_MODELS)


def test_the_trainer_tries_one_zero_stage_and_no_savers_where_the_fused_stack_tries_all() -> None:
    assert {point.zero for point in meshes(FUSED, {})} >= {1, 2, 3}
    assert {point.zero for point in meshes(TRAINER, {})} == {0}
    point = Point(ulysses=2, ring=2)
    combinations = len(TILING) * len(CHECKPOINTING) * len(OFFLOAD)
    assert len(set(with_savers(FUSED, point, {}))) == combinations
    assert list(with_savers(TRAINER, point, {})) == [point]


def test_what_the_trainer_does_not_run_is_named_for_the_trainer_only() -> None:
    point = Point(tp=2, ulysses=2, zero=1)
    assert list(violations(FUSED, point)) == []
    named = list(violations(TRAINER, point))
    assert [text.partition(" ")[0] for text in named] == ["tp=2", "zero=1"]
    assert all(text.endswith("or --stack fused") for text in named)


def test_the_trainer_computes_in_fp32_and_refuses_to_be_asked_for_anything_else() -> None:
    assert FusedStack().numerics("bf16", "fp32") == BF16
    assert TrainerStack().numerics("bf16", "fp32") == FP32  # the options' defaults
    for precision, gradients, option in (("fp32", "fp32", "precision"), ("bf16", "bf16", "gradients")):
        with pytest.raises(ValueError, match=f"remove --{option}"):
            TrainerStack().numerics(precision, gradients)
