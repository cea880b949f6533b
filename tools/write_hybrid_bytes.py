"""Writes the table of docs/hybrids.md: what a layer with a state sends, beside two other ways.

    passed        seqmesh: states and halos along the chains of cut documents, sharded by head
    all-gather    every rank gets all states and transitions, padded to the rank where most leave
    all-to-all    heads for tokens and back: what is convolved, decays and the like there, outputs home

Bytes of the rank that sends most, one layer, forward, one sequence; states in fp32, the rest in bf16. Run it
when `Chains` or the presets change: python tools/write_hybrid_bytes.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from seqmesh import layouts, masks
from seqmesh.layouts import Layout
from seqmesh.masks import Mask
from seqmesh.planner.cost.recurrent import FP32, passed_states
from seqmesh.planner.inputs.documents import parse_documents
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.schedule.chains import chains_of

PAGE = Path(__file__).parent.parent / "docs" / "hybrids.md"
START = "<!-- by tools/write_hybrid_bytes.py -->"
END = "<!-- end -->"
MODELS = ("qwen3-next-80b-a3b", "nemotron-h-8b")
SIZES = ((8, 128 * 1024), (64, 1024 * 1024))
"""Ranks of the ring, and tokens."""
BF16 = 2


class LayerBytes(NamedTuple):
    """Of the rank that sends most."""

    passed: float
    all_gather: float
    all_to_all: float


def layer_bytes(model: ModelShape, mask: Mask, layout: Layout) -> LayerBytes:
    """What a layer of a model sends in a forward of one sequence."""
    mixer = model.mixer
    assert mixer is not None
    chains, ranks = chains_of(mask, layout, 1), layout.ring
    heads, numbers, transition = mixer.state
    most = max(map(len, chains.leaving))
    # The product in without the gate of the output, which stays at home.
    there = mixer.matrices(model.hidden)[0].columns - mixer.inner
    return LayerBytes(
        passed=passed_states(mixer, chains, 1, BF16).forward.most,
        all_gather=FP32 * heads * (numbers + transition) * most * (ranks - 1),
        all_to_all=max(layout.counts) * BF16 * (there + mixer.inner) * (ranks - 1) / ranks,
    )


def rows() -> Iterator[tuple[str, LayerBytes]]:
    """What each row of the table is of, and its bytes."""
    for name in MODELS:
        model = load_model(name)
        for ranks, tokens in SIZES:
            lengths = parse_documents("lognormal:7,1.3", tokens)
            packed = masks.documents(lengths)
            for what, mask, layout in (
                ("one document, zigzag", masks.causal(tokens), layouts.zigzag(tokens, ranks)),
                (f"{len(lengths)} documents, balanced", packed, layouts.balanced(packed, ranks)),
            ):
                said = f"{name}, {ranks} ranks, {tokens // 1024}K tokens, {what}"
                yield said, layer_bytes(model, mask, layout)


def table() -> str:
    """In MB, as Markdown."""
    lines = ["| MB | states passed | all-gather of states | heads all-to-all |", "|---|---|---|---|"]
    for said, sent in rows():
        lines.append(f"| {said} | " + " | ".join(f"{size / 1e6:.1f}" for size in sent) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    page = PAGE.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n{table()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
