"""What a run will hold, send and take, before it runs: traced by the trainer, priced by the planner.

    seqmesh train RECIPE              said at the start, and beside what was measured at the end
    seqmesh train RECIPE --dry-run    said, and no more

The planner prices machines that it knows: GPUs by their name in PyTorch, eight a node, and measured profiles.
"""

from pathlib import Path

from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, known_gpus, known_gpus_of, load_gpu
from seqmesh.planner.inputs.of_recipe import nodes_for, of_recipe
from seqmesh.trace.expect import expect
from seqmesh.train.config import Config
from seqmesh.train.expected import Foresight, Predicted
from seqmesh.train.paths import expanded

GPUS_PER_NODE = 8


def known_as(device_name: str) -> str:
    """The planner's name of a GPU by PyTorch's, "NVIDIA H200" say; "" if it has none.

    Of two builds of one chip, the first that the planner lists.
    """
    words = device_name.lower().replace("-", " ").split()
    return next((name for name in known_gpus() if name.split("-")[0] in words), "")


def cluster_for(ranks: int, gpu: str, profile: Path | None = None) -> Cluster:
    """Nodes of eight of a GPU that the planner, or a profile, knows, as many as ranks need.

    Raises:
        ValueError: no such GPU, or ranks that do not fill nodes.
    """
    extra = [] if profile is None else [profile]
    return nodes_for(Cluster(gpu=load_gpu(gpu, extra), nodes=1, gpus_per_node=GPUS_PER_NODE), ranks)


def predict(config: Config, vocabulary: int, device_name: str) -> Predicted | None:
    """The planner's price of a recipe; None for a machine or a mesh that it cannot price.

    Args:
        config: the run; each of its sequences is taken to be one document. The first GPU of run.profile goes
            before the device's name.
        vocabulary: token ids of the model.
        device_name: of a rank's device in PyTorch.

    Raises:
        ValueError: a profile that cannot be read.
    """
    given = config.run.profile
    profile = expanded(given, "run.profile=", "--profile") if given else None
    gpu = known_as(device_name) if profile is None else _first_of(profile)
    if not gpu:
        return None
    try:
        cluster = cluster_for(config.mesh.world, gpu, profile)
        priced = of_recipe(config, cluster, vocabulary=vocabulary)
        estimate = CostModel(priced.job).estimate(priced.point)
    except ValueError:  # a mesh that fills no nodes, a precision without a rate
        return None
    return Predicted(
        seconds=estimate.seconds,
        mfu_mask=estimate.mfu_causal,
        memory_bytes=estimate.memory.total,
        machine=f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}",
        priced_otherwise=priced.missing,
    )


def _first_of(profile: Path) -> str:
    names = known_gpus_of(profile)
    if not names:
        raise ValueError(
            f"run.profile={str(profile)!r} has no [gpu.NAME] table; give what seqmesh bench --profile wrote"
        )
    return names[0]


FORESIGHT = Foresight(expect, predict)
