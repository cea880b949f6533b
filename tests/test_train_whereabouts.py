"""A rank that is gone is named, with the step and the stage that it was in."""

import torch.distributed as dist

from seqmesh.processes import Place
from seqmesh.train.whereabouts import STAGES, SharedBoard, StoreBoard, Whereabouts, blame, least_advanced

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")


def place(rank: int, world: int) -> Place:
    return Place(rank=rank, world=world, rendezvous="env://")


def board(world: int, step: int = 3) -> StoreBoard:
    """On which all ranks are in the update of a step."""
    made = StoreBoard(dist.HashStore())  # type: ignore[attr-defined]
    for rank in range(world):
        made.note(rank, step, "update")
    return made


def test_a_board_has_what_each_rank_noted_last() -> None:
    for made in (SharedBoard(2), StoreBoard(dist.HashStore())):  # type: ignore[attr-defined]
        assert made.of(1) == Whereabouts(0, "start")
        made.note(1, 2**40, "clip")
        made.note(1, 7, "data")
        assert made.of(0) == Whereabouts(0, "start")
        assert made.of(1) == Whereabouts(7, "data")
        assert str(made.of(1)) == "in step 7 (data)"
        assert str(made.of(0)) == "before the first step"


def test_the_rank_that_others_wait_for_is_the_least_advanced() -> None:
    made = SharedBoard(4)
    for rank, (step, stage) in enumerate([(3, "facts"), (3, "clip"), (4, "data"), (3, "clip")]):
        made.note(rank, step, stage)
    assert least_advanced([0, 1, 2, 3], made) == 1
    assert least_advanced([3, 2, 0], made) == 3
    assert [Whereabouts(1, stage).order for stage in STAGES] == [(1, n) for n in range(len(STAGES))]


def test_a_rank_that_fails_by_itself_says_so_and_others_quote_it() -> None:
    made = board(2)
    said = "rank 1 failed in step 3 (update): ArithmeticError: no"
    assert blame(ArithmeticError("no"), place(1, 2), made) == said
    assert blame(LOST, place(0, 2), made) == said


def test_ranks_that_lost_another_name_the_one_that_says_nothing() -> None:
    made = board(3)
    made.note(2, 3, "clip")
    made.gave_up(0, "")
    said = blame(LOST, place(1, 3), made)
    assert said.startswith(
        "rank 2 was killed or hangs in step 3 (clip); rank 1 waited for it: RuntimeError: [gloo"
    )


def test_ranks_that_all_lost_each_other_say_what_they_saw() -> None:
    made = board(2)
    made.gave_up(0, "")
    assert blame(LOST, place(1, 2), made).startswith("rank 1 failed in step 3 (update): RuntimeError: [gloo")


def test_a_rank_without_a_store_says_what_it_saw() -> None:
    assert blame(LOST, place(0, 1), SharedBoard(1)).startswith(
        "rank 0 failed before the first step: RuntimeE"
    )
