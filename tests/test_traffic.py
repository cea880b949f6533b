"""Bytes that a rank sends, counted at every collective, against what schedules and sizes say."""

import pytest
import torch
import torch.distributed as dist
from meshes import mesh_of
from ranks import Ranks

from seqmesh.engine.exchange import CountBytes
from seqmesh.parallel import ParallelDims
from seqmesh.parallel.shards import local_part
from seqmesh.parallel.traffic import CountTraffic
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from seqmesh.train.data import Corpus
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

ELEMENTS = 24
BYTES = ELEMENTS * 4


def sent_by_collectives(world: int) -> dict[str, int]:
    """What each kind of collective is counted as, on this rank. A collective."""
    group = mesh_of(ParallelDims(dp_shard=world)).group("fsdp")
    rank = dist.get_rank()
    x = torch.zeros(ELEMENTS)
    uneven = [ELEMENTS - world + 1, *[1] * (world - 1)]  # most of it to rank 0
    received = [uneven[rank]] * world
    works = {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "all_gather": lambda: dist.all_gather([torch.zeros(ELEMENTS) for _ in range(world)], x, group=group),
        "all_gather_into": lambda: torch.ops._c10d_functional.all_gather_into_tensor(
            x, world, group.group_name
        ),
        "reduce_scatter": lambda: torch.ops._c10d_functional.reduce_scatter_tensor(
            x, "sum", world, group.group_name
        ),
        "broadcast": lambda: dist.broadcast(x, group=group, group_src=0),
        "all_to_all": lambda: dist.all_to_all_single(torch.zeros_like(x), x, group=group),
        "uneven": lambda: dist.all_to_all_single(
            torch.zeros(sum(received)), x, received, uneven, group=group
        ),
        "barrier": lambda: dist.barrier(group=group),
        "send": lambda: (
            dist.send(x, group=group, group_dst=1)
            if rank == 0
            else dist.recv(x, group=group, group_src=0)
            if rank == 1
            else None
        ),
    }
    found = {}
    for name, work in works.items():
        with CountTraffic() as sent:
            work()
        assert {name for name, _ in sent.by_group} <= {group.group_name}
        found[name] = sent.total
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_each_collective_counts_what_goes_to_others(ranks: Ranks, world: int) -> None:
    for rank, found in enumerate(ranks.run(world, sent_by_collectives, world)):
        to_others = [ELEMENTS - world + 1, *[1] * (world - 1)]
        to_others.pop(rank)
        assert found == {
            "all_reduce": 2 * BYTES * (world - 1) // world,
            "all_gather": BYTES * (world - 1),
            "all_gather_into": BYTES * (world - 1),
            "reduce_scatter": BYTES * (world - 1) // world,
            "broadcast": BYTES * (world - 1) // world,
            "all_to_all": BYTES * (world - 1) // world,
            "uneven": 4 * sum(to_others),
            "barrier": 0,
            "send": BYTES if rank == 0 else 0,
        }


def config_of(mesh: dict[str, int], **train: object) -> Config:
    return Config(
        mesh=MeshConfig(**{"ring": 1, "ulysses": 1, **mesh}),
        model=ModelConfig(hidden=64, layers=4, heads=4, kv_heads=2, intermediate=96, vocabulary=260),
        data=DataConfig(seq_len=256, sequences=4),
        train=TrainConfig(micro_batch=1, **train),  # type: ignore[arg-type]
    )


def sent_in_a_step(config: Config) -> tuple[dict[str, int], int, dict[str, int]]:
    """By axis; by attention; and bytes of this rank's parameters, or shards of them."""
    corpus = Corpus(source="zeros", documents=(bytes(255),))
    trained = Trainer(config, corpus, dims_of(config.mesh).build(), peak_flops_per_s=1.0)
    trained.step()
    with CountBytes() as of_attention, CountTraffic() as sent:
        trained.step()
    sizes = {"embedding": 0, "layers": 0, "head": 0}
    for name, parameter in trained.model.named_parameters():
        kind = "layers" if ".layers." in name else "embedding" if "embed" in name else "head"
        sizes[kind] += local_part(parameter).nbytes
    return sent.by_axis(trained.mesh), of_attention.bytes_sent, sizes


def test_a_step_is_counted_by_axis(ranks: Ranks) -> None:
    """HSDP with ZeRO-3: gathered in forward and backward of each micro-batch, norm and head between them."""
    config = config_of({"dp_replicate": 2, "dp_shard": 1, "ring": 2, "ulysses": 2}, zero=3)
    micro_batches, shards = 2, 4
    for by_axis, of_attention, sizes in ranks.run(8, sent_in_a_step, config):
        assert by_axis["ring"] + by_axis["ulysses"] == of_attention > 0
        shard = sum(sizes.values())
        gathered = micro_batches * (2 * shard - sizes["head"])
        assert by_axis["fsdp"] == (gathered + shard) * (shards - 1)
        assert by_axis["dp_replicate"] == shard  # 2 (N - 1) / N of it, over 2 ranks


def test_stages_and_matrices_are_counted_too(ranks: Ranks) -> None:
    config = config_of({"pp": 2, "tp": 2, "dp_replicate": 2}, zero=0)
    hidden = 256 * 64 * 4  # bytes of a micro-batch's hidden states
    for by_axis, of_attention, sizes in ranks.run(8, sent_in_a_step, config):
        of_norm = by_axis["pp"] - 2 * hidden  # two micro-batches: forwards from stage 0, backwards from 1
        assert 0 < of_norm <= 16
        assert by_axis["replicas"] == sum(sizes.values())
        assert by_axis["tp"] >= 2 * 2 * 2 * hidden  # 2 layers, an all-reduce each for attention and MLP
        assert of_attention == 0


def test_an_axis_that_shares_its_group_with_another_is_told_apart(ranks: Ranks) -> None:
    """Without data parallelism, fsdp has the ranks of the ring, and may have its group."""
    config = config_of({"ring": 4}, zero=3)
    for by_axis, of_attention, sizes in ranks.run(4, sent_in_a_step, config):
        assert by_axis["ring"] == of_attention > 0
        shard = sum(sizes.values())
        assert by_axis["fsdp"] >= (4 * (2 * shard - sizes["head"]) + shard) * 3
