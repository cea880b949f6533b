"""What a run took of each rank's memory, gathered at its end."""

from torch.utils._pytree import tree_leaves

from seqmesh.parallel.shards import local_part
from seqmesh.train import device as devices
from seqmesh.train.checkpoint_state import states_of_this_rank
from seqmesh.train.events import Trained
from seqmesh.train.gathering import gather_numbers
from seqmesh.train.trainer import Trainer

HELD = ("parameters", "gradients", "optimizer")


def memory_used(trainer: Trainer) -> Trained:
    """Of all ranks, after the last step. A collective."""
    peak = devices.peak_memory_bytes(trainer.config.run.device)
    mine = [peak, peak - trainer.memory_before, *_held_bytes(trainer)]
    everyone = gather_numbers(mine, trainer.mesh.dims.world)
    peaks, grown, *held = ([int(number) for number in column] for column in zip(*everyone, strict=True))
    return Trained(
        peak_memory_bytes=tuple(peaks),
        grown_memory_bytes=max(grown),
        held_bytes={kind: max(column) for kind, column in zip(HELD, held, strict=True)},
    )


def _held_bytes(trainer: Trainer) -> list[int]:
    """Bytes of each of `HELD` on this rank."""
    weights = list(trainer.model.parameters())
    grads = [weight.grad for weight in weights if weight.grad is not None]
    states = tree_leaves(list(states_of_this_rank(trainer.optimizer).state.values()))
    return [sum(local_part(x).nbytes for x in kind) for kind in (weights, grads, states)]
