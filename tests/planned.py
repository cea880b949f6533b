"""Jobs for tests of the planner's costs, and parts of their estimates."""

from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.numerics import numerics_for
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import stack_named


def job(
    stack: str = "seqmesh",
    model: str = "llama3-8b",
    gpu: str = "h100-sxm",
    *,
    nodes: int = 1,
    seq_len: int = 8192,
    batch: int = 8,
    precision: str = "bf16",
) -> Job:
    return Job(
        model=load_model(model),
        cluster=Cluster(gpu=load_gpu(gpu), nodes=nodes, gpus_per_node=8),
        seq_len=seq_len,
        global_batch=batch,
        numerics=numerics_for(precision, "fp32"),
        stack=stack_named(stack),
    )


def seconds_of(costs: CostModel, point: Point, name: str) -> float:
    return sum(term.seconds for term in costs.estimate(point).terms if term.name == name)
