"""The exchange of heads beside attention, by the order in which ranks issue and wait. No time is judged."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from ranks import Ranks

from seqmesh.bench.overlap import CHUNKS, RANKS, CallSpans, OverlapWork, _watched

SMALL = OverlapWork(tokens=64, head_dim=8, repeats=1)


def watched(chunks: int) -> CallSpans:
    return _watched(SMALL)(chunks)


def in_direction(spans: CallSpans, *, backward: bool) -> CallSpans:
    """The forward's or the backward's part."""
    exchanges = [one for one in spans.exchanges if (one.issue_s >= spans.backward_s) == backward]
    kernels = [times for times in spans.kernels if (times[0] >= spans.backward_s) == backward]
    return CallSpans(
        exchanges=tuple(exchanges),
        kernels=tuple(kernels),
        backward_s=spans.backward_s,
        seconds=spans.seconds,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_heads_travel_beside_the_kernel_of_the_chunk_before_and_results_beside_the_next(
    ranks: Ranks, backward: bool
) -> None:
    chunks = CHUNKS["overlapped"]
    for spans in ranks.run(RANKS, watched, chunks):
        found = in_direction(spans, backward=backward)
        there = [one for one in found.exchanges if not one.is_home]
        home = [one for one in found.exchanges if one.is_home]
        assert len(there) == len(home) == len(found.kernels) == chunks
        for chunk, (start, stop) in enumerate(found.kernels):
            assert there[chunk].arrived_s <= start
            assert home[chunk].issue_s >= stop
            if chunk + 1 < chunks:
                assert there[chunk + 1].issued_s <= start
                assert there[chunk + 1].wait_s >= stop
            if chunk:
                assert home[chunk - 1].issued_s <= start
                assert home[chunk - 1].wait_s >= stop


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_with_few_chunks_no_kernel_runs_while_heads_travel(ranks: Ranks, backward: bool) -> None:
    chunks = CHUNKS["one after the other"]
    for spans in ranks.run(RANKS, watched, chunks):
        found = in_direction(spans, backward=backward)
        assert len(found.kernels) == chunks
        assert [one.is_home for one in found.exchanges] == [False, True] * chunks
        for one, after in pairwise(found.exchanges):
            assert one.arrived_s <= after.issue_s
        for start, stop in found.kernels:
            assert all(one.arrived_s <= start or one.issue_s >= stop for one in found.exchanges)


def test_what_is_exposed_is_issuing_and_waiting(ranks: Ranks) -> None:
    spans = ranks.run(RANKS, watched, 4)[0]
    assert 0 < spans.waited_s < spans.exposed_s < spans.seconds
    assert 0 < spans.computed_s < spans.seconds - spans.exposed_s
    issuing = sum(one.issued_s - one.issue_s for one in spans.exchanges)
    assert spans.exposed_s == pytest.approx(issuing + spans.waited_s)


def test_both_sides_are_printed_written_and_drawn(tmp_path: Path) -> None:
    file, picture = tmp_path / "overlap.json", tmp_path / "overlap.png"
    command = [sys.executable, "-c", "from seqmesh.cli import main; main()", "bench", "overlap"]
    command += ["--tokens", "64", "--repeats", "1", "--json", str(file), "--plot", str(picture)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    sides = json.loads(file.read_text())["sides"]
    assert {side["name"]: side["chunks"] for side in sides} == CHUNKS
    for side in sides:
        assert side["name"] in run.stdout
        assert len(side["shown"]) == RANKS
        assert all(len(rank["exchanges"]) == 4 * side["chunks"] for rank in side["shown"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 1}, "use 2 tokens and 1 repeat at least"),
        ({"repeats": 0}, "use 2 tokens and 1 repeat at least"),
        ({"heads": 24}, "24 heads do not make equal chunks; use a multiple of 16"),
    ],
    ids=str,
)
def test_sizes_with_nothing_to_show_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OverlapWork(**wrong)
