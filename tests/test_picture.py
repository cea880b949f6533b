"""Pictures and the text form of schedules: drawn from the schedules, the same file every time."""

import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqmesh import layouts, masks
from seqmesh.layouts import Layout
from seqmesh.masks import Band, Mask
from seqmesh.picture import describe, draw_chains, draw_mesh, draw_schedule
from seqmesh.picture.canvas import COLORS, EMPTY, rgb
from seqmesh.picture.grid import owners_image, sample_tokens
from seqmesh.picture.schedule import outline
from seqmesh.schedule import RingSchedule, ring_schedule
from seqmesh.schedule.ring import Stage

PACKED = masks.documents([90, 20, 60, 7, 40, 13])
CASES = {
    "causal zigzag": (masks.causal(64), layouts.zigzag(64, 4), None),
    "causal striped in two stages": (masks.causal(45), layouts.striped(45, 4), 2),
    "documents balanced": (PACKED, layouts.balanced(PACKED, 4, pairs_per_row=1), None),
    "window contiguous, all at once": (masks.sliding_window(50, 7, 2), layouts.contiguous(50, 3), 1),
    "one rank": (masks.causal(5), layouts.contiguous(5, 1), None),
    "more ranks than tokens": (masks.full(3), layouts.zigzag(3, 5), None),
    "no token": (masks.causal(0), layouts.zigzag(0, 2), None),
}
every_case = pytest.mark.parametrize(("mask", "layout", "stages"), CASES.values(), ids=CASES)


def schedules_of(mask: Mask, layout: Layout, stages: int | None) -> list[RingSchedule]:
    return [ring_schedule(mask, layout, layout, rank, stages) for rank in range(layout.ring)]


def size_of(picture: bytes) -> tuple[int, int]:
    assert picture.startswith(b"\x89PNG")
    return struct.unpack(">II", picture[16:24])


@every_case
def test_a_schedule_is_drawn(mask: Mask, layout: Layout, stages: int | None, tmp_path: Path) -> None:
    draw_schedule(mask, layout, tmp_path / "schedule.png", stages)
    picture = (tmp_path / "schedule.png").read_bytes()
    assert min(size_of(picture)) > 600
    assert len(picture) > 20_000


@every_case
def test_the_grid_shows_every_allowed_pair_in_its_ranks_colour(
    mask: Mask, layout: Layout, stages: int | None
) -> None:
    """The grid is read off blocks and receive buffers of all ranks; the mask's dense form is the oracle."""
    image = owners_image(sample_tokens(layout), schedules_of(mask, layout, stages))
    assert image.shape == (mask.q_len, mask.k_len, 3)
    np.testing.assert_array_equal(~np.isclose(image, rgb(EMPTY)).all(-1), mask.dense())
    for rank in range(layout.ring):
        for token in layout.positions(rank):
            if mask.dense()[token, token]:
                np.testing.assert_allclose(image[token, token], rgb(COLORS[rank]))


@every_case
def test_the_text_form_says_what_the_schedules_say(mask: Mask, layout: Layout, stages: int | None) -> None:
    schedules = schedules_of(mask, layout, stages)
    title, header, *lines, totals = describe(mask, layout, stages).split("\n")
    assert f"ring={layout.ring}" in title
    assert header.split() == ["rank", "stage", "receives", "sends", "computes", "pairs"]
    unread = iter(lines)
    for schedule in schedules:
        for number, stage in enumerate(schedule.stages):
            check_line(next(unread), schedule.ring_rank, number, stage)
    assert next(unread, None) is None
    assert totals.startswith(f"{mask.area:,} pairs")
    assert f"{sum(s.rows_received for s in schedules):,} K/V rows move" in totals


def check_line(line: str, rank: int, number: int, stage: Stage) -> None:
    """A line of the table says what the stage holds."""
    said_rank, said_stage, receives, sends, computes, pairs = re.split(r"\s{2,}", line)
    assert [int(said_rank), int(said_stage)] == [rank, number]
    if stage.receives:
        assert numbers_in(receives) == [stage.rows_received, *(t.peer for t in stage.receives)]
    else:
        assert numbers_in(receives) == []
    if stage.sends:
        assert numbers_in(sends) == [stage.rows_sent, *(t.peer for t in stage.sends)]
    else:
        assert numbers_in(sends) == []
    assert sum(numbers_in(computes)) == len(stage.blocks)
    assert int(pairs.replace(",", "")) == sum(block.area for block in stage.blocks)


def numbers_in(cell: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", cell)]


def test_the_text_form_of_causal_zigzag_shows_the_three_quarters() -> None:
    assert describe(masks.causal(64), layouts.zigzag(64, 4)).endswith(
        "144 K/V rows move, 75 % of the 192 of a rotating ring"
    )


def test_long_sequences_are_sampled(tmp_path: Path) -> None:
    mask = masks.documents([300_000, 200_000, 500_000])
    for layout in (layouts.zigzag(1_000_000, 2), layouts.striped(1_000_000, 2)):
        draw_schedule(mask, layout, tmp_path / "long.png")
        assert len((tmp_path / "long.png").read_bytes()) > 20_000


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (4, 2), (2, 8)])
def test_a_mesh_is_drawn(ulysses: int, ring: int, tmp_path: Path) -> None:
    draw_mesh(ulysses, ring, tmp_path / "mesh.png")
    picture = (tmp_path / "mesh.png").read_bytes()
    assert min(size_of(picture)) > 500
    assert len(picture) > 20_000


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 4), (2, 3), (1, 1)])
def test_chains_are_drawn(ulysses: int, ring: int, tmp_path: Path) -> None:
    mask = masks.documents([30, 1, 29])
    draw_chains(mask, layouts.zigzag(60, ring), tmp_path / "chains.png", ulysses=ulysses)
    assert len((tmp_path / "chains.png").read_bytes()) > 10_000


def test_a_picture_of_chains_has_a_piece_a_box_a_state_an_arrow_and_a_halo_a_hatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two documents on a zigzag ring of 4: 8 spans, of which two touch and two are cut."""
    pages: list[Any] = []
    monkeypatch.setattr("seqmesh.picture.chains.save", lambda page, _: pages.append(page))
    draw_chains(masks.documents([44, 20]), layouts.zigzag(64, 4), tmp_path / "x.png")
    (axes,) = pages[0].axes
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert len(hatched) == 6
    assert len(axes.patches) - len(hatched) == 4 + 8  # a bar for each rank, a box for each piece
    assert sum(text.arrow_patch is not None for text in axes.texts if hasattr(text, "arrow_patch")) == 6


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_schedule(masks.causal(16), layouts.zigzag(16, 2), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_other_formats_follow_the_files_name(tmp_path: Path) -> None:
    draw_mesh(2, 2, tmp_path / "mesh.svg")
    assert "<svg" in (tmp_path / "mesh.svg").read_text()


def area_of(corners: list[tuple[float, float]]) -> float:
    """The shoelace formula."""
    doubled = 0.0
    for (a, b), (c, d) in zip(corners, [*corners[1:], corners[0]], strict=True):
        doubled += a * d - b * c
    return abs(doubled) / 2


@pytest.mark.parametrize(
    "band", [Band(2, 9, 1, 5), Band(0, 40, 0, 40, 0), Band(0, 60, 0, 60, 0, 11), Band(5, 45, 0, 40, None, 5)]
)
def test_a_blocks_outline_has_nearly_the_area_of_its_pairs(band: Band) -> None:
    """Up to half a pair for each row that a diagonal edge cuts."""
    assert abs(area_of(outline(band)) - band.area) <= 1


def test_refusals_name_the_rule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ring=9 does not fit in a picture; draw 1 to 8"):
        draw_schedule(masks.causal(90), layouts.zigzag(90, 9), tmp_path / "x.png")
    with pytest.raises(ValueError, match="ulysses=0 does not fit"):
        draw_mesh(0, 2, tmp_path / "x.png")
    with pytest.raises(ValueError, match="ranks=10 does not fit"):
        draw_chains(masks.causal(90), layouts.zigzag(90, 5), tmp_path / "x.png", ulysses=2)
    with pytest.raises(ValueError, match="4 queries and 6 keys: pictures show self-attention"):
        describe(masks.cross(4, 6), layouts.contiguous(4, 2))
    with pytest.raises(ValueError, match="layout holds 8 tokens but the mask has 9"):
        describe(masks.causal(9), layouts.contiguous(8, 2))


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    remedy = r"pictures need matplotlib, which is not installed; pip install 'seqmesh\[train\]'"
    with pytest.raises(ImportError, match=remedy):
        draw_mesh(1, 2, tmp_path / "x.png")
