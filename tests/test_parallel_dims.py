"""One device mesh of all parallelisms: who is on which axis, and the views of it."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from seqmesh.parallel import ParallelDims

TIMEOUT = timedelta(seconds=60)


def places(dims: ParallelDims) -> dict[str, Any]:
    """On one rank: the ranks of each group that it is in, and where it stands."""
    mesh = dims.build("cpu", TIMEOUT)
    names = [*dims.degrees, "fsdp", "data", "replicas", "losses"]
    groups = {name: mesh.group(name) for name in names}
    found: dict[str, Any] = {
        name: dist.get_process_group_ranks(group) for name, group in groups.items() if group is not None
    }
    found["fsdp mesh"] = (mesh.fsdp.mesh_dim_names, mesh.fsdp.mesh.tolist())
    found["sequence"] = (mesh.sequence.ring, mesh.sequence.ulysses, mesh.sequence.rank)
    found["timeouts"] = {
        group._get_backend(torch.device("cpu")).options._timeout
        for group in groups.values()
        if group is not None
    }
    return found


def test_the_last_axis_is_the_innermost_and_sequence_ranks_share_parameters(ranks: Ranks) -> None:
    found = ranks.run(8, places, ParallelDims(pp=2, ring=2, tp=2))
    assert found[0]["tp"] == [0, 1]
    assert found[0]["ring"] == found[0]["fsdp"] == [0, 2]
    assert found[7]["pp"] == [3, 7]
    assert found[7]["losses"] == [1, 3, 5, 7]
    assert [rank["sequence"] for rank in found] == [(2, 1, 0), (2, 1, 0), (2, 1, 1), (2, 1, 1)] * 2
    assert "data" not in found[0]


def test_replicas_of_shards_are_a_second_axis(ranks: Ranks) -> None:
    found = ranks.run(8, places, ParallelDims(dp_replicate=2, dp_shard=2, ulysses=2))
    assert found[5]["fsdp"] == [4, 5, 6, 7]
    assert found[5]["data"] == [1, 3, 5, 7]
    assert found[5]["replicas"] == list(range(8))
    assert found[0]["fsdp mesh"] == (("dp_replicate", "fsdp"), [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_every_group_has_the_timeout(ranks: Ranks) -> None:
    for rank in ranks.run(4, places, ParallelDims(dp_shard=2, ring=2)):
        assert rank["timeouts"] == {TIMEOUT}


@pytest.mark.parametrize("degree", [0, -2, 1.5, True])
def test_a_degree_is_a_whole_number_from_1(degree: Any) -> None:
    with pytest.raises(ValueError, match=r"ring=.* at least 1; use 1 to leave"):
        ParallelDims(ring=degree)


def test_degrees_must_use_every_rank() -> None:
    with pytest.raises(ValueError, match=r"pp=2 x ring=3 needs 6 ranks but no process group"):
        ParallelDims(pp=2, ring=3).build()


def test_a_process_without_a_group_is_a_mesh_of_one_rank() -> None:
    mesh = ParallelDims().build()
    assert mesh.device_mesh is None
    assert mesh.sequence.size == 1
    assert mesh.group("losses") is None
    assert mesh.rank("pp") == 0
