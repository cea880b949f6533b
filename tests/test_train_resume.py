"""A run that is resumed is the one that was never interrupted: to the bit, or by rounding on another mesh."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from checkpoint_runs import BASE, SAVED, TEXT, Trained, config_of, resumed, undisturbed
from ranks import Ranks

from seqmesh.train import step_folders
from seqmesh.train.checkpoint import Progress
from seqmesh.train.config import Config
from seqmesh.train.data import sequences
from seqmesh.train.recipe import dump
from seqmesh.train.resume import check_same_training

RANKS = 8
MIXES = {
    "sequence and zero 3": config_of(ulysses=2, ring=2, dp_shard=2, zero=3),
    "tensor, stages and zero 0": config_of(tp=2, pp=2, ring=2, micro_batch=2),
    "states of zero 1 over tensor and stages in turns": config_of(
        tp=2, pp=2, dp_shard=2, zero=1, micro_batch=1, pipeline="interleaved"
    ),
    "replicas of shards over tensor": config_of(dp_replicate=2, dp_shard=2, tp=2, zero=2),
}
MOVES = list(zip(MIXES, [*MIXES][1:] + [*MIXES][:1], strict=True))


class Runs:
    """One run of each mix that nothing interrupted, and the checkpoint that it left on its way."""

    def __init__(self, ranks: Ranks, home: Path) -> None:
        self.ranks = ranks
        self.home = home
        self._found: dict[str, list[Trained]] = {}

    def of(self, mix: str) -> tuple[list[Trained], Path]:
        """What every rank found, and the run's folder."""
        folder = self.home / mix
        if mix not in self._found:
            self._found[mix] = self.ranks.run(RANKS, undisturbed, MIXES[mix], folder)
        return self._found[mix], folder


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("mix", MIXES)
def test_a_run_resumed_on_its_mesh_is_the_undisturbed_one_to_the_bit(runs: Runs, mix: str) -> None:
    expected, folder = runs.of(mix)
    found = runs.ranks.run(RANKS, resumed, MIXES[mix], folder)
    for rank in range(RANKS):
        assert found[rank].losses == expected[rank].losses
        assert found[rank].norms == expected[rank].norms
    assert found[0].weights.keys() == expected[0].weights.keys()
    for name, weight in found[0].weights.items():
        assert torch.equal(weight, expected[0].weights[name]), name


def assert_equal_but_for_rounding(found: Trained, expected: Trained) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    for name, weight in found.weights.items():
        # AdamW divides a gradient by its own size: where one is nearly 0, its rounding is all that is left.
        torch.testing.assert_close(
            weight, expected.weights[name], rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (weight - expected.weights[name]).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_run_resumed_on_another_mesh_differs_by_rounding(runs: Runs, before: str, after: str) -> None:
    expected, folder = runs.of(before)
    assert_equal_but_for_rounding(runs.ranks.run(RANKS, resumed, MIXES[after], folder)[0], expected[0])


def test_eight_ranks_go_on_with_what_one_began_and_one_with_what_eight_began(
    runs: Runs, tmp_path: Path
) -> None:
    alone = undisturbed(BASE, tmp_path)
    again = resumed(BASE, tmp_path)
    assert (again.losses, again.norms) == (alone.losses, alone.norms)
    mesh = "replicas of shards over tensor"
    assert_equal_but_for_rounding(runs.ranks.run(RANKS, resumed, MIXES[mesh], tmp_path)[0], alone)
    expected, folder = runs.of(mesh)
    assert_equal_but_for_rounding(resumed(BASE, folder), expected[0])


@pytest.mark.parametrize("skip", [0, 1, 15, 16, 17, 40])
def test_skipped_sequences_are_those_that_would_have_come(skip: int) -> None:
    """Also across epochs, of which each has 16."""
    whole = list(islice(sequences(TEXT, seq_len=101, seed=3), 60))
    assert list(islice(sequences(TEXT, seq_len=101, seed=3, skip=skip), 15)) == whole[skip : skip + 15]


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (2, 9, 10, 30):
        step_folders.finish(step_folders.begin(tmp_path, step), keep=2)
        (tmp_path / "checkpoints" / f"step-{step + 1}.tmp").mkdir()  # left by a run that was killed
    assert [path.name for path in step_folders.complete(tmp_path)] == ["step-10", "step-30"]
    assert step_folders.newest(tmp_path).name == "step-30"


def refusal(config: Config, saved: Progress) -> str:
    """Why a run cannot be resumed with a configuration, in one line."""
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        check_same_training(config, TEXT, saved)
    return str(refused.value)


PROGRESS = Progress(step=SAVED, sequences=16, recipe=dump(BASE), text=TEXT.fingerprint, world=1)


@pytest.mark.parametrize("mix", MIXES)
def test_the_mesh_and_how_memory_is_saved_may_change(mix: str) -> None:
    check_same_training(MIXES[mix], TEXT, PROGRESS)


def test_what_else_changes_is_named_in_one_line() -> None:
    train, model, data = BASE.train, BASE.model, BASE.data
    other_rate = refusal(replace(BASE, train=replace(train, lr=0.5)), PROGRESS)
    assert other_rate.startswith("train.lr=0.5 but run.resume='' was trained with 0.001; leave it so")
    assert "model.layers=2 but" in refusal(replace(BASE, model=replace(model, layers=2)), PROGRESS)
    assert "data.seq_len=64 but" in refusal(replace(BASE, data=replace(data, seq_len=64)), PROGRESS)
    assert "has another text" in refusal(BASE, replace(PROGRESS, text="another"))
    assert "has taken all its train.steps=4" in refusal(BASE, replace(PROGRESS, step=4))
