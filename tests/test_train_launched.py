"""`seqmesh train` as one of the ranks that torchrun starts: they join, agree, and end together."""

import json
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from train_command import TEXT, TIMEOUT_S, TINY, command, environment

from seqmesh.provenance import versions
from seqmesh.train.launch import agree_on_versions


def joined(rank: int, world: int, port: int, cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    """A rank as torchrun starts it."""
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        command("train", *TINY, *arguments),
        cwd=cwd,
        env=environment() | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """Below the ports that the kernel gives to whoever asks for any: ranks of other tests do all the time."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as bound:
            try:
                bound.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def test_a_world_that_is_not_ulysses_x_ring_is_refused_on_every_rank(text: Path) -> None:
    ranks = [joined(rank, 2, free_port(), text.parent) for rank in range(2)]
    for rank in ranks:
        _, error = rank.communicate(timeout=TIMEOUT_S)
        assert rank.returncode == 2
        assert error.splitlines() == [
            "seqmesh: error: mesh.ring=2 x mesh.ulysses=2 needs 4 ranks but the launcher started 2; start 4,"
            " or choose degrees whose product is 2"
        ]


def test_a_mistake_that_one_launched_rank_sees_ends_all_of_them(text: Path) -> None:
    """Rank 0 alone looks at the run folder: the others must not wait for it."""
    (text.parent / "taken").mkdir()
    (text.parent / "taken" / "mine").write_text("")
    port = free_port()
    more = ("--ring=1", "--data", str(text), "--folder", "taken")
    ranks = [joined(rank, 2, port, text.parent, *more) for rank in range(2)]
    for rank in ranks:
        _, error = rank.communicate(timeout=TIMEOUT_S)
        assert rank.returncode == 2
        assert "'taken' is not empty" in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("difference", "said"), [("lr", "configuration"), ("text", "text")])
def test_launched_ranks_with_another_recipe_or_text_are_named_on_every_rank(
    tmp_path: Path, difference: str, said: str
) -> None:
    port = free_port()
    texts = [TEXT, TEXT]
    rates = [1e-3, 1e-3]
    if difference == "text":
        texts[1] += "more"
    else:
        rates[1] = 2e-3
    ranks = []
    for rank, (text, lr) in enumerate(zip(texts, rates, strict=True)):
        cwd = tmp_path / str(rank)
        cwd.mkdir()
        (cwd / "fox.txt").write_text(text)
        ranks.append(joined(rank, 2, port, cwd, "--ring=1", "--data=fox.txt", f"--lr={lr}"))
    for process in ranks:
        _, error = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 2, error
        assert len(error.splitlines()) == 1
        assert f"rank 1 has another {said} than rank 0; " in error


def said_of_versions(mine: list[dict[str, str]]) -> str:
    """On one rank."""
    try:
        agree_on_versions(len(mine), mine[torch.distributed.get_rank()])
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_with_another_version_is_named_on_every_rank(ranks: Ranks) -> None:
    same = versions()
    assert same.keys() == {"python", "seqmesh", "torch", "transformers"}
    assert ranks.run(2, said_of_versions, [same, same]) == ["", ""]
    said = ranks.run(2, said_of_versions, [same, same | {"torch": "1.0"}])
    expected = f"rank 1 runs torch 1.0 where rank 0 runs {same['torch']}; install the same versions on every"
    assert [one.removesuffix(" machine") for one in said] == [expected] * 2


def test_a_launched_rank_that_meets_nobody_ends_with_one_line(text: Path) -> None:
    rank = joined(1, 2, free_port(), text.parent, "--ring=1", "--data", str(text), "--timeout_s=1")
    _, error = rank.communicate(timeout=TIMEOUT_S)
    assert rank.returncode == 1
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("seqmesh: error: rank 1 failed before the first step: ")


def test_a_signal_to_one_launched_rank_stops_all_after_the_same_step(text: Path) -> None:
    port = free_port()
    folder = text.parent / "asked"
    more = ("--ring=1", "--data", str(text), "--steps=100000", "--folder", str(folder))
    ranks = [joined(rank, 2, port, text.parent, *more) for rank in range(2)]
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], outputs
    steps = len(metrics.read_text().splitlines())
    assert outputs[0][1].splitlines() == [
        f"seqmesh: stopped by SIGTERM after {steps} steps; step-{steps} is saved:"
        f" seqmesh train {folder}/config.toml --resume {folder}"
    ]
    assert outputs[1][1] == ""


def test_launched_ranks_join_and_train(text: Path) -> None:
    port = free_port()
    folder = text.parent / "joined"
    more = ("--ring=1", "--data", str(text), "--steps=3", "--folder", str(folder))
    ranks = [joined(rank, 2, port, text.parent, *more) for rank in range(2)]
    outputs = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert json.loads((folder / "report.json").read_text())["matches_one_rank"] is True
    assert outputs[0][1] == ""
    assert outputs[1] == ("", "")
