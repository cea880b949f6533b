"""The mesh above the schedule in one picture: who swaps heads with whom, and who computes which pair when."""

from pathlib import Path

from seqmesh.layouts import Layout
from seqmesh.masks import Mask
from seqmesh.picture.canvas import figure, save
from seqmesh.picture.mesh import mesh_size, put_mesh
from seqmesh.picture.schedule import ScheduleDrawing

BETWEEN = 0.25
"""Inches of white."""


def draw_both(mask: Mask, layout: Layout, ulysses: int, path: Path, stages: int | None = None) -> None:
    """Draw the mesh of a layout's ring and of so many ulysses ranks, and below it the schedule.

    Args:
        mask: of s queries and s keys.
        layout: of s tokens, over at most 8 ring ranks.
        ulysses: ulysses degree, at most 8.
        path: file to write; its ending says the format.
        stages: see `ring_schedule`.

    Raises:
        ValueError: a degree above 8, a mask whose lengths differ, or a layout that does not fit it.
        ImportError: matplotlib is not installed.
    """
    across, down = mesh_size(ulysses, layout.ring)
    schedule = ScheduleDrawing.of(mask, layout, stages)
    page = figure(max(across, schedule.width), down + BETWEEN + schedule.height)
    put_mesh(page, 0.0, ulysses, layout.ring)
    schedule.put(page, down + BETWEEN)
    save(page, path)
