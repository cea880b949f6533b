"""Session set-up: the server of ranks is forked here, before PyTorch has run anything."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch  # imported before the fork, so that ranks start at once
from plan_command import Run
from ranks import Ranks
from train_command import TEXT

_RANKS = Ranks()


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Pools of real gloo ranks."""
    return _RANKS


def pytest_unconfigure() -> None:
    """End every rank, whatever the tests did."""
    _RANKS.close()


@pytest.fixture(autouse=True, scope="module")
def _end_ranks_of_many_meshes(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.module.__name__.startswith(("test_parallel", "test_train", "test_plan")):
        _RANKS.end()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of text to train on."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)
