"""Session set-up: the server of ranks is forked here, before PyTorch has run anything."""

from collections.abc import Iterator

import pytest
import torch  # imported before the fork, so that ranks start at once
from ranks import Ranks

_RANKS = Ranks()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Pools of real gloo ranks."""
    yield _RANKS
    _RANKS.close()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
