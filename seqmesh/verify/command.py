"""`seqmesh verify`: which cases, on which ranks, and what is printed.

Exit codes: 0 every case passed; 1 one did not; 2 wrong input (cli.py prints it in one line).
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from seqmesh.verify.cases import AttentionCase, grid, parse

LOCAL_RANKS = 4
"""Forked where nothing says how many: they make every kind of mesh."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line asks for."""

    ulysses: int | None
    ring: int | None
    device: str
    quick: bool
    as_json: bool
    case: AttentionCase | None


def add_to(app: typer.Typer) -> None:
    """Add the command `verify`."""

    @app.command("verify")
    def verify_command(
        ulysses: Annotated[int | None, typer.Option("--ulysses", help="Ulysses degree of the mesh.")] = None,
        ring: Annotated[int | None, typer.Option("--ring", help="Ring degree of the mesh.")] = None,
        device: Annotated[
            str, typer.Option("--device", help="cpu or cuda; ranks share GPUs if there are fewer.")
        ] = "cpu",
        quick: Annotated[bool, typer.Option("--quick", help="One mesh, under a minute.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
        case: Annotated[
            str | None, typer.Option("--case", help="Replay one case: the text printed with a failure.")
        ] = None,
    ) -> int:
        """Prove attention on this machine: every mask, layout, dtype and kernel there, output and all
        gradients, against dense attention in fp64. Starts local ranks, or joins torchrun's.
        """
        only = None if case is None else parse(case)
        return verify(
            Wanted(ulysses=ulysses, ring=ring, device=device, quick=quick, as_json=as_json, case=only)
        )


def verify(wanted: Wanted) -> int:
    """Run the cases and print what came of them: the exit code."""
    _check(wanted)
    # Only now: these load torch.
    from seqmesh.verify import report
    from seqmesh.verify.ranks import device_name, outcomes, place_from
    from seqmesh.verify.support import left_out, supported

    place = place_from(os.environ)
    meshes = _meshes(wanted, None if place is None else place.world)
    if wanted.case is not None:
        cases = [wanted.case]
    else:
        cases = list(grid(meshes, supported(wanted.device), quick=wanted.quick))
    found = []
    for outcome in outcomes(cases, meshes[0][0] * meshes[0][1], wanted.device, place):
        found.append(outcome)
        _progress(len(found), len(cases))
    if place is not None and place.rank > 0:
        return 0
    about = report.header(device_name(wanted.device))
    if wanted.as_json:
        print(json.dumps(report.as_json(about, found, left_out(wanted.device)), indent=1))
    elif wanted.case is not None:
        report.show_one(report.console(), found[0])
    else:
        report.show(report.console(), about, found, left_out(wanted.device))
    return int(not all(outcome.ok for outcome in found))


def _progress(done: int, cases: int) -> None:
    """On stderr, and only for somebody who watches: one line that the next covers."""
    if sys.stderr.isatty():
        print(f"\r{done} of {cases} cases", end="\n" if done == cases else "", file=sys.stderr, flush=True)


def _check(wanted: Wanted) -> None:
    """Refuse what no rank could do, before torch is loaded."""
    if wanted.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {wanted.device}: cases run on cpu or cuda; use one of them")
    for name, degree in (("--ulysses", wanted.ulysses), ("--ring", wanted.ring)):
        if degree is not None and degree < 1:
            raise ValueError(f"{name} {degree}: a degree is at least 1")
    if wanted.case is not None and (wanted.ulysses or wanted.ring or wanted.quick):
        raise ValueError("--case has its own mesh; leave out --ulysses, --ring and --quick")


def _meshes(wanted: Wanted, world: int | None) -> Sequence[tuple[int, int]]:
    """(ulysses, ring) of the meshes to try: all over as many ranks.

    Raises:
        ValueError: the launcher started another number of ranks than the degrees make.
    """
    if wanted.case is not None:
        chosen = [(wanted.case.ulysses, wanted.case.ring)]
    elif wanted.ulysses is None and wanted.ring is None:
        chosen = _every_kind(world or LOCAL_RANKS)
    elif world is not None and wanted.ulysses is None:
        chosen = [(world // (wanted.ring or 1), wanted.ring or 1)]
    elif world is not None and wanted.ring is None:
        chosen = [(wanted.ulysses or 1, world // (wanted.ulysses or 1))]
    else:
        chosen = [(wanted.ulysses or 1, wanted.ring or 1)]
    needed = chosen[0][0] * chosen[0][1]
    if world is not None and needed != world:
        raise ValueError(
            f"ulysses={chosen[0][0]} x ring={chosen[0][1]} needs {needed} ranks but the launcher started"
            f" {world}; start {needed}, or choose degrees whose product is {world}"
        )
    return chosen[:1] if wanted.quick else chosen


def _every_kind(world: int) -> list[tuple[int, int]]:
    """Both axes as evenly as they go, ring alone, ulysses alone."""
    even = max(degree for degree in range(1, int(world**0.5) + 1) if world % degree == 0)
    return list(dict.fromkeys([(even, world // even), (1, world), (world, 1)]))
