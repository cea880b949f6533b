"""The check of bits: a bit that flips anywhere in a step is caught and named; nothing else is."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_runs import TEXT, config_of
from flips import PLACES, flip_bits
from meshes import mesh_of
from ranks import Ranks
from train_command import TINY, seqmesh_command

from seqmesh.train.bits import bit_sum, joined
from seqmesh.train.check import BitDifference, origin
from seqmesh.train.config import Config
from seqmesh.train.exchanges import Exchange
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

RANKS = 4
FLIPS = 10
HALVES = 2
"""Of a mix's flips: a request to ranks has 90 seconds, on a busy machine too."""
MIXES = {
    "sequence": config_of(ulysses=2, ring=2),
    "sequence of shards": config_of(ulysses=2, ring=2, zero=3, checkpointing="selective"),
    "tensor and stages": config_of(tp=2, pp=2, micro_batch=2, pipeline="interleaved"),
    "rows of tensor, states": config_of(tp=2, dp_shard=2, zero=1, shard_norms=True),
    "replicas of shards": config_of(dp_replicate=2, dp_shard=2, zero=2),
}


def trainer_of(config: Config) -> Trainer:
    small = replace(config.data, seq_len=53, sequences=4)
    checked = replace(config, data=small, run=replace(config.run, check_every=1))
    return Trainer(checked, TEXT, mesh_of(dims_of(checked.mesh)), peak_flops_per_s=1.0)


def flipped(config: Config, seed: int) -> list[tuple[str, int, str]]:
    return flip_bits(trainer_of(config), seed, FLIPS)


SAID = {
    "weight before": r": the weight [\w.]+ is not what the last update left on rank {rank};",
    "weight between": r": the weight [\w.]+ is not what the last update left on rank {rank};",
    "gradient": r": computed twice, the gradient of [\w.]+ differs on rank {rank};",
    "handed over": r": computed twice, what was handed over in .* differs on rank {rank};",
    # whoever received it
    "on the way": r": computed twice, what was received in .* differs on rank \d;",
    "received": r": computed twice, what was received in .* differs on rank {rank};",
}


@pytest.mark.parametrize("half", range(HALVES))
@pytest.mark.parametrize("mix", MIXES)
def test_a_bit_that_flips_anywhere_is_caught_and_named_on_every_rank(
    ranks: Ranks, mix: str, half: int
) -> None:
    found = ranks.run(RANKS, flipped, MIXES[mix], HALVES * [*MIXES].index(mix) + half)
    for mine in found:
        assert mine == found[0]
    assert len(found[0]) == FLIPS
    for place, rank, said in found[0]:
        assert re.search(SAID[place].format(rank=rank), said), (place, rank, said)


def test_the_flips_of_all_mixes_together_are_of_every_kind() -> None:
    """As `flips.py` draws them."""
    assert FLIPS * HALVES * len(MIXES) == 100
    assert set(SAID) == set(PLACES)


def flip_each_bit(x: torch.Tensor) -> list[int]:
    content = x.view(torch.uint8)
    sums = []
    for place in range(content.numel()):
        for bit in range(8):
            content[place] ^= 1 << bit
            sums.append(int(bit_sum(x)))
            content[place] ^= 1 << bit
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [1, 3, 8, 65])
def test_every_bit_changes_the_sum_of_bits(dtype: torch.dtype, size: int) -> None:
    x = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 9).to(dtype)
    assert int(bit_sum(x)) not in flip_each_bit(x)


@pytest.mark.parametrize("place", [0, 255, 256, 511, 512, 700, 1023])
def test_the_highest_bit_of_any_word_of_many_changes_the_sum_of_bits(place: int) -> None:
    x = torch.arange(1024, dtype=torch.int64)
    before = int(bit_sum(x))
    x[place] ^= -(2**63)
    assert int(bit_sum(x)) != before


def test_words_that_are_swapped_and_rounding_both_ways_change_the_sum_of_bits() -> None:
    x = torch.arange(3000, dtype=torch.int64)
    before = int(bit_sum(x))
    for one, other in ((0, 1), (3, 259), (0, 2999), (300, 2900)):
        changed = x.clone()
        changed[one] += 1
        changed[other] -= 1
        assert int(bit_sum(changed)) != before
    assert int(bit_sum(x[torch.arange(2999, -1, -1)])) != before


def test_a_sum_of_bits_is_of_values_and_their_order_alone() -> None:
    x = torch.randn(40, 50)
    assert int(bit_sum(x)) == int(bit_sum(x.t().contiguous().t())) == int(bit_sum(torch.cat([x, x])[40:]))
    odd = torch.arange(11, dtype=torch.uint8)
    assert int(bit_sum(odd[3:])) == int(bit_sum(odd[3:].clone()))
    assert int(bit_sum(torch.empty(0))) == 0


def test_joined_sums_tell_which_of_them_changed() -> None:
    assert joined([1, 2, 3]) != joined([2, 1, 3])
    assert joined([-(2**63)] * 3) != joined([-(2**63), 0, -(2**63)])
    assert -(2**63) <= joined([2**63 - 1] * 9) < 2**63


SENT = BitDifference("sent", Exchange("ring", "all-to-all", 4), is_received=False)
RECEIVED = BitDifference("received", Exchange("ring", "all-to-all", 4), is_received=True)
LATER = BitDifference("later", Exchange("tp", "all-reduce", 9), is_received=False)
GRADIENT = BitDifference("gradient")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([[], [GRADIENT]], (1, GRADIENT)),
        # rank 1 computed it, rank 0 has it from there
        ([[RECEIVED, LATER, GRADIENT], [SENT, RECEIVED, GRADIENT]], (1, SENT)),
        # changed on the way: nobody handed it over so
        ([[RECEIVED, LATER, GRADIENT], [GRADIENT]], (0, RECEIVED)),
        # a buffer that was set out early for a message that this rank's own mistake made another one
        ([[RECEIVED, LATER], [BitDifference("9", LATER.exchange, True), SENT]], (0, LATER)),
    ],
)
def test_the_origin_is_where_bits_changed_that_nobody_handed_over(
    found: Sequence[Sequence[BitDifference]], expected: tuple[int, BitDifference]
) -> None:
    assert origin(found) == expected


def test_a_checked_run_of_the_command_goes_to_its_end(text: Path, tmp_path: Path) -> None:
    arguments = ("--data", str(text), "--steps=3", "--ring=1", "--check", "2", "--compare-steps=0")
    done = seqmesh_command("train", *TINY, *arguments, "--folder", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "check_every = 2" in (tmp_path / "run" / "config.toml").read_text()
