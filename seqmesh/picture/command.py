"""`seqmesh draw`: a mesh, a schedule, or both, to a file; or the schedule as text.

--ulysses 4 --ring 2 --out mesh.png                          the mesh
--mask 'causal(64)' --ring 4 --out schedule.svg              the schedule
--mask 'causal(64)' --ulysses 2 --ring 4 --out both.svg      the mesh above the schedule
--mask 'causal(64)' --ring 4 --states --out chains.svg       documents cut over ranks, and states between them
--mask 'causal(64)' --ring 64                                the schedule as a table of text, for any size
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from seqmesh import layouts
from seqmesh.masks import Mask
from seqmesh.notation import mask_of

ENDINGS = (".svg", ".png", ".pdf")


def _option(name: str, text: str) -> Any:
    return typer.Option(name, help=text)


def add_to(app: typer.Typer) -> None:
    """Add the command `draw`."""
    names = ", ".join(layouts.NAMES)

    @app.command("draw")
    def draw_command(
        mask: Annotated[
            str | None, _option("--mask", "Such as 'documents([700, 300]) & sliding_window(1000, 256)'.")
        ] = None,
        layout: Annotated[str, _option("--layout", f"Who holds which token: {names}.")] = "auto",
        ulysses: Annotated[int, _option("--ulysses", "Ulysses degree.")] = 1,
        ring: Annotated[int, _option("--ring", "Ring degree.")] = 1,
        stages: Annotated[
            int | None, _option("--stages", "Exchanges of the ring (default: ring - 1).")
        ] = None,
        states: Annotated[
            bool, _option("--states", "Where documents are cut, for layers that carry a state.")
        ] = False,
        out: Annotated[
            Path | None, _option("--out", "Picture to write: .svg, .png or .pdf. Without it: text.")
        ] = None,
    ) -> int:
        """Draw a mesh and the schedule of a mask on it: who computes which pair, and what travels."""
        read = None if mask is None else mask_of(mask)
        if states:
            draw_states(read, layout, ulysses, ring, out)
        else:
            draw(read, layout, ulysses, ring, stages, out)
        return 0


def draw(
    mask: Mask | None, layout: str, ulysses: int, ring: int, stages: int | None, out: Path | None
) -> None:
    """Write the picture, or print the text.

    Raises:
        ValueError: degrees, a layout or an ending that cannot be drawn, or a file that cannot be written.
    """
    from seqmesh.picture import describe, draw_both, draw_mesh, draw_schedule

    _check(ulysses, ring, out)
    with _reported(out):
        if mask is None:
            if out is None:
                raise ValueError("nothing to draw: pass --mask for a schedule, or --out for a mesh")
            draw_mesh(ulysses, ring, out)
            return
        held = layouts.named(layout, mask, mask.q_len, ring)
        if out is None:
            print(describe(mask, held, stages))
        elif ulysses == 1:
            draw_schedule(mask, held, out, stages)
        else:
            draw_both(mask, held, ulysses, out, stages)


def draw_states(mask: Mask | None, layout: str, ulysses: int, ring: int, out: Path | None) -> None:
    """Write the picture of documents cut over ranks.

    Raises:
        ValueError: no mask or no file, degrees, a mask, a layout or an ending that cannot be drawn, or a file
            that cannot be written.
    """
    from seqmesh.picture import draw_chains

    _check(ulysses, ring, out)
    if mask is None or out is None:
        raise ValueError("--states is a picture of documents; pass --mask and --out")
    with _reported(out):
        draw_chains(mask, layouts.named(layout, mask, mask.q_len, ring), out, ulysses=ulysses)


def _check(ulysses: int, ring: int, out: Path | None) -> None:
    if out is not None and out.suffix not in ENDINGS:
        raise ValueError(f"--out {out}: its ending says the format; use {', '.join(ENDINGS)}")
    if ulysses < 1 or ring < 1:
        raise ValueError(
            f"ulysses={ulysses} x ring={ring}: a degree is at least 1; use 1 to leave an axis out"
        )


@contextmanager
def _reported(out: Path | None) -> Iterator[None]:
    """What is not the arguments' fault, as an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {str(out)!r}: {error.strerror}; choose another place") from None
    except ImportError as error:  # matplotlib: the message has the remedy
        raise ValueError(str(error)) from None
