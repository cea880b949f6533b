"""Layers that carry a state along the sequence: their kernel, and the states and halos that travel.

    forward    halos there                          1 all-to-all, before the convolution
               pieces that a state enters, scouted  kernel FLOPs of inputs/mixers.py, of the rank with most
               states there, entering states back   2 all-to-alls
               all pieces                           kernel FLOPs
    backward   the same ways back; the kernel's products twice, and what entered states were read with

What travels is what engine/recurrent sends: `Chains.state_traffic` and `halo_traffic` of the documents of
the row that the step waits for. States are fp32, halos as the activations are. Ranks wait for the one that
sends most, and nothing hides: documents that lie whole on a rank would run meanwhile. A kernel takes the time
of its FLOPs at the rate of matrix products plus that of its inputs, outputs and chunk states through memory.
Both are unmeasured, and rather too fast.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from seqmesh.planner.cost.estimate import CostTerm, compute
from seqmesh.planner.cost.network import Group, Network
from seqmesh.planner.cost.step_loads import StepLoads
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.mixers import Mixer
from seqmesh.planner.inputs.point import Point
from seqmesh.schedule.chains import Chains

FP32 = 4
"""Bytes of a number of a state."""


class SentStates(NamedTuple):
    """Bytes that a rank sends for a layer in one direction: states and halos."""

    mean: float
    """On average over the ranks."""
    most: float
    """Of the rank that sends most."""


class PassedStates(NamedTuple):
    """What pieces of cut documents cost a layer."""

    entered: int
    """Tokens of pieces that a state enters, on the rank with most."""
    forward: SentStates
    backward: SentStates


def passed_states(mixer: Mixer, chains: Chains, batch: int, element: int) -> PassedStates:
    """Of one layer and micro-batch.

    Args:
        mixer: the layer.
        chains: of the documents of a sequence.
        batch: sequences side by side.
        element: bytes of a number of an activation.
    """
    heads, numbers, transition = mixer.state
    forward, backward = [], []
    for rank in range(chains.size):
        states = chains.state_traffic(rank, heads, numbers, transition)
        halos = chains.halo_traffic(rank, mixer.width)
        row = element * mixer.channels
        forward.append(batch * (FP32 * states.forward + row * halos.forward))
        backward.append(batch * (FP32 * states.backward + row * halos.backward))
    return PassedStates(
        entered=batch * max(chains.sizes(rank).tokens for rank in range(chains.size)),
        forward=SentStates(sum(forward) / chains.size, max(forward)),
        backward=SentStates(sum(backward) / chains.size, max(backward)),
    )


def streamed_by(mixer: Mixer) -> int:
    """Numbers of a token that pass through memory in a forward beside products and kernel.

    The convolution's in and out; each gate reads two and writes one.
    """
    return 2 * mixer.channels + 3 * mixer.gates * mixer.inner


class RecurrentLayers:
    """Time and bytes of the layers of a job that carry a state."""

    def __init__(self, job: Job, loads: StepLoads, network: Network, *, scouts: bool = True) -> None:
        """Without `scouts` what no schedule is needed for: a lower bound of the work."""
        self._job = job
        self._loads = loads
        self._network = network
        self._scouts = scouts
        self._of = lru_cache(maxsize=None)(self._passed)

    def flops(self) -> float:
        """Model FLOPs of a step with the states: forward, and twice that for the backward."""
        mixer = self._job.model.mixer
        tokens = self._job.seq_len * self._job.global_batch
        return 3.0 * mixer.layers * mixer.state_flops * tokens if mixer else 0.0

    def work(self, point: Point, runs: float) -> Iterator[CostTerm]:
        """The kernels of all layers, which a rank runs so many times; conversions of documents left out."""
        mixer = self._job.model.mixer
        if mixer is None or not mixer.kernel_flops():
            return
        job, tokens = self._job, self._job.tokens(point)
        entered = self.passed(point).entered if self._scouts else 0
        run = self._seconds(mixer.kernel_flops() * tokens, self._moved(mixer) * tokens)
        scouts = self._seconds(mixer.scout_flops * entered, self._moved(mixer) * entered)
        read = self._seconds(2 * mixer.state.heads * mixer.state.numbers * entered, 0)
        each = (3 + self._runs_again(point)) * run + self._forwards(point) * scouts + read
        yield compute("recurrence kernel", runs * mixer.layers / job.model.layers * each)

    def exchanges(self, point: Point, runs: float, group: Group) -> Iterator[CostTerm]:
        """States and halos on their way, in all layers."""
        mixer = self._job.model.mixer
        if mixer is None or group.size == 1:
            return
        passed, forwards = self.passed(point), self._forwards(point)
        calls = (3 if mixer.state.heads else 1) * (forwards + 1)
        sent = forwards * passed.forward.most + passed.backward.most
        if not sent:
            return
        seconds = self._network.all_to_all_seconds(group, sent, calls)
        seconds *= runs * mixer.layers / self._job.model.layers
        link = self._network.slowest_link(group)
        yield CostTerm(name="states and halos exchange", cause=link, seconds=seconds, exposed=seconds)

    def sent(self, point: Point, runs: float, group: Group) -> Iterator[dict[str, float]]:
        """Bytes per link class that one GPU sends in a step, on average."""
        mixer = self._job.model.mixer
        if mixer is None or group.size == 1:
            return
        passed = self.passed(point)
        each = self._forwards(point) * passed.forward.mean + passed.backward.mean
        runs *= mixer.layers / self._job.model.layers
        yield self._network.spread_bytes(group.off_node, runs * each)

    def passed(self, point: Point) -> PassedStates:
        """What a layer and micro-batch costs beyond a rank that has all."""
        return self._of(self._loads.chains(point), self._loads.batch(point))

    def _passed(self, chains: Chains, batch: int) -> PassedStates:
        mixer = self._job.model.mixer
        assert mixer is not None
        return passed_states(mixer, chains, batch, self._job.numerics.element)

    def _forwards(self, point: Point) -> int:
        """How often states and halos travel forward, pieces scouted: again where attention is."""
        return 1 + int(point.checkpointing == "full" and not self._job.stack.keeps_attention)

    def _runs_again(self, point: Point) -> int:
        """How often the backward runs the pieces again, from states that may have been kept."""
        selective = point.checkpointing == "selective" and self._job.stack.selective != "all"
        return int(selective or point.checkpointing == "full")

    def _moved(self, mixer: Mixer) -> float:
        """Bytes of a token through memory in a kernel: in, out, and states of chunks, written and read."""
        states = 2 * FP32 * mixer.state.heads * mixer.state.numbers / mixer.chunk
        return self._job.numerics.element * (mixer.channels + mixer.inner) + states

    def _seconds(self, flops: float, moved: float) -> float:
        job = self._job
        return flops / (job.peak * job.assumptions.matmul) + moved / job.memory_rate
