"""`seqmesh verify`: which cases, on which ranks, and what is printed.

Exit codes: 0 every case passed; 1 one did not; 2 wrong input (cli.py prints it in one line).
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqmesh.verify.cases import DEVICES, AttentionCase, grid, parse

if TYPE_CHECKING:
    from seqmesh.verify.ranks import Where

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
    model: Path | None
    dtype: str | None
    nccl: bool
    flash: str | None


def _option(name: str, text: str) -> Any:
    return typer.Option(name, help=text)


def add_to(app: typer.Typer) -> None:
    """Add the command `verify`."""

    @app.command("verify")
    def verify_command(
        ulysses: Annotated[int | None, _option("--ulysses", "Ulysses degree of the mesh.")] = None,
        ring: Annotated[int | None, _option("--ring", "Ring degree of the mesh.")] = None,
        device: Annotated[str | None, _option("--device", "cpu (default) or cuda: ranks share GPUs.")] = None,
        nccl: Annotated[bool, _option("--nccl", "CUDA tensors by NCCL, a GPU a rank, not gloo.")] = False,
        flash: Annotated[str | None, _option("--flash", "FA3 or FA4, in place of flash attention 2.")] = None,
        quick: Annotated[bool, _option("--quick", "One mesh, under a minute.")] = False,
        as_json: Annotated[bool, _option("--json", "Print JSON.")] = False,
        case: Annotated[str | None, _option("--case", "Replay one case: a failure prints it.")] = None,
        model: Annotated[
            Path | None, _option("--model", "Verify a Hugging Face model instead: config.json or its folder.")
        ] = None,
        dtype: Annotated[str | None, _option("--dtype", "Of the model: fp32 (default), bf16, fp16.")] = None,
    ) -> int:
        """Prove attention on this machine: every mask, layout, dtype and kernel there, output and all
        gradients, against dense attention in fp64. Starts local ranks, or joins torchrun's.
        """
        replayed = None if case is None else parse(case)
        return verify(
            Wanted(
                ulysses=ulysses,
                ring=ring,
                device=device or ("cpu" if replayed is None else replayed.device),
                quick=quick,
                as_json=as_json,
                case=replayed,
                model=model,
                dtype=dtype,
                nccl=nccl,
                flash=flash,
            )
        )


def verify(wanted: Wanted) -> int:
    """Run what is wanted and print what came of it: the exit code."""
    _check(wanted)
    # Only now: this loads torch.
    from seqmesh.processes import place_from
    from seqmesh.verify.ranks import Where

    place = place_from(os.environ)
    meshes = _meshes(wanted, None if place is None else place.world)
    ulysses, ring = meshes[0]
    where = Where(
        device_type=wanted.device,
        world=ulysses * ring,
        place=place,
        nccl=wanted.nccl,
        flash=wanted.flash,
    )
    if wanted.model is not None:
        return _verify_model(wanted, wanted.model, meshes[0], where)
    return _verify_attention(wanted, meshes, where)


def _verify_attention(wanted: Wanted, meshes: Sequence[tuple[int, int]], where: "Where") -> int:
    from seqmesh.verify import report
    from seqmesh.verify.ranks import device_name, outcomes
    from seqmesh.verify.support import left_out, supported

    if wanted.case is not None:
        cases = [wanted.case]
    else:
        cases = list(grid(meshes, supported(wanted.device), quick=wanted.quick))
    found = []
    for outcome in outcomes(cases, where):
        found.append(outcome)
        _progress(len(found), len(cases))
    if where.place is not None and where.place.rank > 0:
        return 0
    about = report.header(device_name(wanted.device, wanted.flash))
    if wanted.as_json:
        print(json.dumps(report.as_json(about, found, left_out(wanted.device)), indent=1))
    elif wanted.case is not None:
        report.show_one(report.console(), found[0])
    else:
        report.show(report.console(), about, found, left_out(wanted.device))
    return int(not all(outcome.ok for outcome in found))


def _verify_model(wanted: Wanted, given: Path, mesh: tuple[int, int], where: "Where") -> int:
    # These load transformers.
    from seqmesh.processes import in_a_child
    from seqmesh.verify import hf_model, model, model_report
    from seqmesh.verify.ranks import device_name, last_line, on_ranks
    from seqmesh.verify.report import console, header

    # In a child: packages of kernels that a model imports may claim the GPU (flash-linear-attention), and
    # then no rank can be forked.
    in_a_child(partial(hf_model.check, given))
    ulysses, ring = mesh
    case = model.ModelCase(given=str(given), ulysses=ulysses, ring=ring, dtype=wanted.dtype or "fp32")
    try:
        found = list(on_ranks(model.compare_model, [case], where))
    except (RuntimeError, TimeoutError) as error:
        print(f"seqmesh: error: {last_line(error)}", file=sys.stderr)
        return 1
    if not found:  # a rank of torchrun that does not report
        return 0
    about = header(device_name(wanted.device, wanted.flash))
    if wanted.as_json:
        print(json.dumps(model_report.as_json(about, found[0]), indent=1))
    else:
        model_report.show(console(), about, found[0])
    return int(not found[0].ok)


def _progress(done: int, cases: int) -> None:
    """On stderr, and only for somebody who watches: one line that the next covers."""
    if sys.stderr.isatty():
        print(f"\r{done} of {cases} cases", end="\n" if done == cases else "", file=sys.stderr, flush=True)


def _check(wanted: Wanted) -> None:
    """Refuse what no rank could do, before torch is loaded."""
    if wanted.device not in DEVICES:
        raise ValueError(f"--device {wanted.device}: cases run on {' or '.join(DEVICES)}; use one of them")
    if wanted.case is not None and wanted.device != wanted.case.device:
        raise ValueError(f"--case has its own device, {wanted.case.device}; leave out --device")
    if wanted.nccl and wanted.device != "cuda":
        raise ValueError("--nccl moves CUDA tensors; add --device cuda")
    if wanted.flash is not None and wanted.device != "cuda":
        raise ValueError("--flash chooses what computes on CUDA; add --device cuda")
    for name, degree in (("--ulysses", wanted.ulysses), ("--ring", wanted.ring)):
        if degree is not None and degree < 1:
            raise ValueError(f"{name} {degree}: a degree is at least 1")
    if wanted.case is not None and (wanted.ulysses or wanted.ring or wanted.quick):
        raise ValueError("--case has its own mesh; leave out --ulysses, --ring and --quick")
    if wanted.model is not None and (wanted.case is not None or wanted.quick):
        raise ValueError("--model runs one model on one mesh; leave out --case and --quick")
    if wanted.model is None and wanted.dtype is not None:
        raise ValueError("--dtype is the model's; pass --model, or --case '...; dtype=...'")


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
