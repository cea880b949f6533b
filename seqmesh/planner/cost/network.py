"""Links and collectives: where the ranks of a mesh axis sit, and how long what they exchange takes.

    16 GPUs on 2 nodes, tp 2, ulysses 4, ring 2     node 0: ranks 0 ... 7     node 1: ranks 8 ... 15
        a ulysses group    0 2 4 6                  one node: scale-up links
        a ring group       0 8                      two nodes: the network, one card each
        the replicas       0 2 4 6 8 10 12 14       two nodes, four GPUs of each: half a node

Time of a message = latency + bytes / rate. The latency of a collective grows with its group: a ring passes
all ranks; a tree, at a lower rate, the logarithm of nodes; the faster one is taken. A collective that goes
round all ranks (all-gather, reduce-scatter, all-reduce) crosses from node to node through as many network
cards as its group may use; an all-to-all sends most of its bytes off the node, from every GPU's own card.

Sources: NCCL's bus bandwidth (nccl-tests), its latencies (graph/tuning.cc); alpha-beta model (Hockney 1994).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster

NETWORK = "network"
PCIE = "pcie"
SCALE_UP = "scale_up"


@dataclass(frozen=True, kw_only=True)
class Group:
    """A process group on the machine."""

    size: int
    per_node: int
    """Its ranks that share a node, at most."""
    nodes: int
    gpus_per_node: int

    @property
    def off_node(self) -> float:
        """Share of a rank's peers that sit on other nodes."""
        return (self.size - self.per_node) / (self.size - 1) if self.size > 1 else 0.0


@lru_cache(maxsize=4096)
def place(
    axes: tuple[str, ...], degrees: tuple[int, ...], members: frozenset[str], gpus_per_node: int
) -> Group:
    """The group of rank 0 over some mesh axes.

    Args:
        axes: all axes, from the fastest links to the slowest.
        degrees: their sizes.
        members: the axes that the group spans.
        gpus_per_node: consecutive ranks that share a node.
    """
    members = frozenset(
        axis for axis, degree in zip(axes, degrees, strict=True) if axis in members and degree > 1
    )
    if (evenly := _evenly_spaced(axes, degrees, members)) is not None:
        stride, size = evenly
        alike = min(size, -(-gpus_per_node // stride))
        nodes = size if stride >= gpus_per_node else (stride * (size - 1)) // gpus_per_node + 1
        return Group(size=size, per_node=alike, nodes=nodes, gpus_per_node=gpus_per_node)
    steps = []
    for at, (axis, degree) in enumerate(zip(axes, degrees, strict=True)):
        if axis in members:
            stride = prod(degrees[:at])
            steps.append(range(0, stride * degree, stride))
    on_node: dict[int, int] = {}
    for offsets in product(*steps):  # of every rank of the group, along each of its axes
        node = sum(offsets) // gpus_per_node
        on_node[node] = on_node.get(node, 0) + 1
    return Group(
        size=sum(on_node.values()),
        per_node=max(on_node.values()),
        nodes=len(on_node),
        gpus_per_node=gpus_per_node,
    )


def _evenly_spaced(
    axes: tuple[str, ...], degrees: tuple[int, ...], members: frozenset[str]
) -> tuple[int, int] | None:
    """The distance between ranks of a group, and their number; None if the distances differ."""
    at = [number for number, axis in enumerate(axes) if axis in members]
    if not at:
        return 1, 1
    between = degrees[at[0] : at[-1] + 1]
    if any(degree > 1 and axis not in members for axis, degree in zip(axes[at[0] :], between, strict=False)):
        return None
    return prod(degrees[: at[0]]), prod(between)


@dataclass(frozen=True)
class Network:
    """Rates of a cluster under the assumptions, and the time of what is exchanged."""

    cluster: Cluster
    assumptions: Assumptions

    @property
    def local(self) -> str:
        """The link class inside a node."""
        return PCIE if self.cluster.gpu.scale_up_bytes_per_s is None else SCALE_UP

    def rate(self, link: str) -> float:
        """Bytes/s of one GPU in one direction that a link class really gives."""
        gpu = self.cluster.gpu
        a = self.assumptions
        if link == NETWORK:
            return gpu.network_bytes_per_s * a.network
        if link == SCALE_UP:
            assert gpu.scale_up_bytes_per_s is not None
            return gpu.scale_up_bytes_per_s * a.scale_up
        assert link == PCIE, link
        return gpu.pcie_bytes_per_s * a.pcie

    def latency(self, link: str) -> float:
        """Seconds before the first byte."""
        a = self.assumptions
        return {NETWORK: a.network_latency, SCALE_UP: a.scale_up_latency, PCIE: a.pcie_latency}[link]

    def slowest_link(self, group: Group) -> str:
        """The slowest link class that a group uses."""
        return NETWORK if group.nodes > 1 else self.local

    def round_seconds(self, group: Group, sent: float, calls: float = 1) -> float:
        """Seconds of a collective that goes round all ranks: all-gather, reduce-scatter or all-reduce.

        Args:
            group: that takes part.
            sent: bytes that each rank sends, in all calls together.
            calls: each of them costs its latency.
        """
        if group.size == 1:
            return 0.0
        rate = self.rate(self.local)
        if group.nodes > 1:
            # The round crosses from node to node once, through the cards of the group's GPUs there. A group
            # that holds a part of a node is assumed to get one card only: Table 6 asked for it.
            partial = group.per_node < group.gpus_per_node and self.assumptions.one_nic_per_partial_node > 0
            cards = 1 if partial else group.per_node
            rate = min(rate, cards * self.rate(NETWORK))
        ring = sent / rate + calls * self._round_latency(group, group.nodes, group.size - group.nodes)
        if group.nodes == 1:
            return ring
        steps = 1 + (group.nodes - 1).bit_length()  # of a tree over the nodes, whose ranks are a chain each
        tree = calls * self._round_latency(group, steps, group.per_node - 1)
        return min(ring, sent / (rate * self.assumptions.tree_rate) + tree)

    def _round_latency(self, group: Group, nodes: int, inside: int) -> float:
        """Seconds of a collective that passes so many nodes and makes so many hops inside of them.

        The first hop is in the latency of its link.
        """
        a = self.assumptions
        hop = a.pcie_hop if self.local == PCIE else a.scale_up_hop
        across = max(0, nodes - 2) * a.network_hop
        return self.latency(self.slowest_link(group)) + across + (inside - (group.nodes == 1)) * hop

    def all_to_all_seconds(
        self, group: Group, sent: float, calls: float = 1, off_node: float | None = None
    ) -> float:
        """Seconds of an all-to-all, of which links of both classes carry their parts at once.

        Args:
            group: that takes part.
            sent: bytes that each rank sends to the others, in all calls together.
            calls: each of them costs its latency.
            off_node: the share of them that crosses to other nodes; default: that of the peers there.
        """
        if group.size == 1:
            return 0.0
        peers = group.per_node - 1
        crowd = 1.0
        if self.local == PCIE and peers > 1:  # streams to several peers share the GPU's one link
            crowd = 1 + self.assumptions.pcie_contention * (peers - 1)
        across = group.off_node if off_node is None else off_node
        inside = sent * (1 - across) * crowd / self.rate(self.local)
        outside = sent * across / self.rate(NETWORK)
        latency = self.latency(self.slowest_link(group)) + (group.size - 2) * self.assumptions.peer
        return max(inside, outside) + calls * latency

    def hop_seconds(self, group: Group, sent: float) -> float:
        """Seconds of one exchange between ring neighbours at some distance.

        All wait for the pair with the slowest link.
        """
        link = self.slowest_link(group)
        return sent / self.rate(link) + self.latency(link)

    def round_bytes(self, group: Group, sent: float) -> dict[str, float]:
        """Bytes that an average rank sends over each link class in a collective that goes round all ranks.

        Of the ranks that share a node one sends to the next node, the others to their neighbours.
        """
        across = sent / group.per_node if group.nodes > 1 else 0.0
        return {NETWORK: across, self.local: sent - across}

    def spread_bytes(self, off_node: float, sent: float) -> dict[str, float]:
        """The same where a share `off_node` of the bytes leaves the node."""
        return {NETWORK: sent * off_node, self.local: sent * (1 - off_node)}


def add_bytes(parts: Iterable[dict[str, float]]) -> dict[str, int]:
    """Sums by link class, in whole bytes; classes that nothing uses are left out."""
    total: dict[str, float] = {}
    for part in parts:
        for link, sent in part.items():
            total[link] = total.get(link, 0.0) + sent
    return {link: round(sent) for link, sent in sorted(total.items()) if sent > 0}
