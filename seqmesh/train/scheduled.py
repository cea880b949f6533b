"""What a step's schedules say that a rank sends: attention's heads and rows, states and halos of hybrids."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.sharding import Schedule
from seqmesh.integrations.calls import LayerCall
from seqmesh.integrations.recurrent_calls import RecurrentCall
from seqmesh.parallel.batch import LocalBatch
from seqmesh.train.sizes import ModelSizes


def scheduled_bytes(
    sizes: ModelSizes, layers: Collection[int], batches: Sequence[LocalBatch], *, tp: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes in a step, forward and backward, by axis.

    Args:
        sizes: of the model.
        layers: those that this rank computes.
        batches: its micro-batches.
        tp: ranks that share the heads.
        dtype: of what layers compute in.
    """
    total = {"ulysses": 0, "ring": 0, "sequence": 0}
    attention = Counter(replace(call, layer=0) for call in sizes.calls if call.layer in layers)
    recurrent = Counter(replace(call, layer=0) for call in sizes.recurrent if call.layer in layers)
    for batch in batches:
        for call, count in attention.items():
            for axis, sent in attention_bytes(call, batch.schedule_of(call), tp, dtype).items():
                total[axis] += count * sent
        axis = _axis_of_all(batch.schedule)
        for mixed, count in recurrent.items():
            total[axis] += count * recurrence_bytes(mixed, batch.schedule, tp, dtype)
    return total


def attention_bytes(call: LayerCall, schedule: Schedule, tp: int, dtype: torch.dtype) -> dict[str, int]:
    """Of a layer's attention, by axis."""
    sent = schedule.traffic(
        batch=1,
        heads=call.heads // tp,
        kv_heads=max(1, call.kv_heads // tp),
        head_dim=call.key_dim,
        value_head_dim=call.value_dim,
        dtype=dtype,
    )
    return {
        "ulysses": sent.heads_forward + sent.heads_backward,
        "ring": sent.rows_forward + sent.rows_backward,
    }


def _axis_of_all(schedule: Schedule) -> str:
    """The axis of all ranks of a sequence."""
    if schedule.mesh.ulysses == 1:
        return "ring"
    return "ulysses" if schedule.mesh.ring == 1 else "sequence"


def recurrence_bytes(call: RecurrentCall, schedule: Schedule, tp: int, dtype: torch.dtype) -> int:
    """Of a layer's convolution, whole on every rank of tp, or recurrence, of the rank's heads."""
    rank, chains = schedule.mesh.rank, schedule.chains
    states = chains.state_traffic(rank, call.heads_of(tp), call.state, call.transition)
    rows = chains.halo_traffic(rank, call.width)
    halos = sum(rows) * call.channels * dtype.itemsize
    return sum(states) * accumulator_dtype(dtype).itemsize + halos
