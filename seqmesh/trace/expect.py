"""What a recipe's step will hold and send, traced in processes of their own before the run starts.

    parent  --fork-->  child: FakeTensorMode, fake ranks, two steps  --pipe-->  Expected

A child may load, patch and crash: nothing of it stays. Of a pipeline the first and the last stage are traced,
one of which holds most: the first has most micro-batches under way, the last has the loss. Each has a child,
as what DTensor remembers of a mesh would meet the next one.
"""

from dataclasses import replace
from functools import partial

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from seqmesh.processes import ChildError, in_a_child
from seqmesh.trace.allocations import KINDS
from seqmesh.trace.tracing import trace_step
from seqmesh.train.config import Config
from seqmesh.train.expected import Expected


def expect(config: Config, vocabulary: int) -> Expected:
    """Trace a recipe. Takes seconds, half a minute for a model of 8 billion parameters.

    Args:
        config: the run; each of its sequences is taken to be one document.
        vocabulary: token ids of the model.
    """
    # Fake tensors of a GPU need one; sizes are the same. A check compares bits, of which they have none.
    on_cpu = replace(config, run=replace(config.run, device="cpu", check_every=0))
    found = []
    for stage in sorted({0, config.mesh.pp - 1}):
        found.append(_in_a_child(on_cpu, vocabulary, stage))
        if found[-1].unknown:
            return found[-1]
    return max(found, key=lambda one: one.peak_bytes)


def _in_a_child(config: Config, vocabulary: int, stage: int) -> Expected:
    try:
        return in_a_child(partial(_traced, config, vocabulary, stage))
    # Whatever a trace cannot do, the run may.
    except (ChildError, ValueError) as error:
        return _unknown(str(error)[:200])


def _traced(config: Config, vocabulary: int, stage: int) -> Expected:
    try:
        found = trace_step(config, vocabulary=vocabulary, stage=stage)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return _unknown(
            "how large its tensors are depends on their numbers, as where experts choose their tokens"
        )
    return Expected(
        rank=stage * config.mesh.world // config.mesh.pp,
        peak_bytes=found.memory.peak_bytes,
        peak_phase=found.memory.peak_phase,
        memory={kind: getattr(found.memory, kind) for kind in KINDS},
        sent=found.sent,
    )


def _unknown(why: str) -> Expected:
    return Expected(memory={}, sent={}, unknown=why)
