"""What a run says before its first step."""

from dataclasses import replace

import pytest

from seqmesh.train.config import Config, DataConfig, MeshConfig, TrainConfig
from seqmesh.train.expected import Expected
from seqmesh.train.start import describe_available, describe_start
from seqmesh.train.units import in_bytes, in_memory

pytestmark = pytest.mark.fast

CONFIG = Config(
    mesh=MeshConfig(dp_replicate=2, dp_shard=2, ring=2, ulysses=4, tp=1),
    data=DataConfig(seq_len=8192, sequences=8),
    train=TrainConfig(micro_batch=1, zero=3, precision="bf16"),
)
EXPECTED = Expected(
    rank=0,
    peak_bytes=3 * 2**30,
    peak_phase="backward",
    memory={"parameters": 2**30, "gradients": 0, "activations": 2**31},
    sent={"ring": 4_500_000, "ulysses": 12_340_000, "fsdp": 59_200_000_000, "data": 24, "other": 294},
)


def test_the_mesh_the_step_and_the_memory_are_said_before_the_start() -> None:
    assert describe_start(CONFIG, 8_030_000_000, EXPECTED) == [
        "model      llama, 8,030.00 M parameters, bf16",
        "step       8 x 8,192 tokens, in 2 micro-batch(es) of 1 on each data-parallel rank;"
        " 1,024 tokens of one on each rank",
        "mesh       32 rank(s)",
        "  axis          ranks  with rank 0  others have           sends a step",
        "  dp_replicate  2      0 16         sequences",
        "  dp_shard      2      0 8          sequences",
        "  ring          2      0 4          tokens                4.5 MB",
        "  ulysses       4      0 1 2 3      tokens, then heads    12.3 MB",
        "  fsdp                              shards of parameters  59.2 GB",
        "memory     3 GiB of tensors expected on rank 0, in the backward:\n"
        "           parameters 1 GiB, activations 2 GiB",
    ]


def test_what_is_on_the_host_is_said_to_be_counted() -> None:
    offloading = replace(CONFIG, train=replace(CONFIG.train, offload="optimizer"))
    last = "           what is kept on the host (train.offload) is counted too"
    assert describe_start(offloading, 1, EXPECTED)[-1] == last


def test_a_long_axis_is_cut_and_one_rank_has_no_table() -> None:
    long = replace(CONFIG, mesh=MeshConfig(ring=16, ulysses=2))
    assert "  ring     16     0 2 4 ... 30  tokens" in describe_start(long, 1, None)
    alone = replace(CONFIG, mesh=MeshConfig(ring=1, ulysses=1), train=TrainConfig())
    assert [line.split()[0] for line in describe_start(alone, 1, None)] == ["model", "step", "mesh"]


def test_too_little_memory_is_said_with_what_to_do() -> None:
    assert describe_available(4 * 2**30, EXPECTED) == "available  4 GiB a rank"
    assert describe_available(4 * 2**30, None) == "available  4 GiB a rank"
    assert describe_available(3 * 2**30, EXPECTED) == "available  3 GiB a rank"
    assert "2 GiB a rank: LESS than is expected; use more ranks" in describe_available(2**31, EXPECTED)
    unknown = replace(EXPECTED, unknown="a reason")
    assert describe_available(1, unknown) == "available  1 B a rank"
    assert describe_start(CONFIG, 1, unknown)[-1] == "memory     not known: a reason"


def test_bytes_are_read_in_units_of_networks_and_of_memory() -> None:
    assert [in_bytes(n) for n in (0, 999, 1000, 1_234_567, 59.2e9, 4e15)] == [
        *("0 B", "999 B", "1 kB", "1.23 MB", "59.2 GB", "4e+03 TB"),
    ]
    assert [in_memory(n) for n in (900, 1024, 3 * 2**29, 2**40)] == ["900 B", "1 KiB", "1.5 GiB", "1 TiB"]
