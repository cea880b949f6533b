"""Every causal architecture that transformers can build tiny is right on a mesh, or refused with the reason.

On two ranks, zigzag, against each document alone on one: logits and the gradient of every parameter. The
table of docs/models.md is what this test expects, and is written by tools/write_models_table.py.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from tiny_models import CHUNK, MOST_PARAMETERS, NOT_TRIED, VOCABULARY, WINDOW, build, size
from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from seqmesh import Schedule, SequenceMesh, masks
from seqmesh.integrations.transformers import plug_in

LENGTHS = [13, 1, 9, 6]
LIMIT = 1e-4
"""Models are in fp64, but norms, rotary tables and routers compute in fp32, and a router's gradient is what
is left of terms that cancel: up to 2e-5 of its largest number. What goes wrong on shards is off by 0.05.
"""
PAGE = Path(__file__).parent.parent / "docs" / "models.md"


class Outcome(NamedTuple):
    """What came of a model."""

    refusal: str | None
    """Why it was refused, in plug_in's words or the forward's."""
    worst: float
    """Largest difference of logits or gradients, relative to the largest number of the tensor."""


def ids_and_labels() -> tuple[Tensor, Tensor]:
    """(1, s) token ids, and labels shifted inside documents."""
    ids = torch.randint(2, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[0, torch.tensor(LENGTHS).cumsum(0) - 1] = -100
    return ids, labels


def alone(kind: str, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle: transformers' own attention, each document by itself. Logits (s, vocabulary), gradients."""
    model = build(kind, **more)
    ids, labels = ids_and_labels()
    logits = []
    for document, wanted in zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True):
        positions = torch.arange(document.shape[1])[None]
        found = model(document, position_ids=positions, use_cache=False).logits[0]
        F.cross_entropy(found, wanted[0], reduction="sum").backward()
        logits.append(found.detach())
    return torch.cat(logits), _gradients(model)


def on_mesh(kind: str, more: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]] | str:
    """The same on this rank's mesh, gradients summed over ranks; or the message of a refusal."""
    try:
        model = plug_in(build(kind, **more))
        mesh = SequenceMesh.build(ring=dist.get_world_size())
        documents = masks.documents(LENGTHS)
        schedule = Schedule.build(documents, mesh, "zigzag")
        windows = documents & masks.sliding_window(sum(LENGTHS), WINDOW)
        chunks = masks.documents(min(CHUNK, n - at) for n in LENGTHS for at in range(0, n, CHUNK))
        sliding, chunked = (Schedule.build(m, mesh, schedule.layout) for m in (windows, chunks))
        ids, labels = ids_and_labels()
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        ids, labels, positions = (schedule.shard(x, 1) for x in (ids, labels, positions))
        schedules: dict[str, Any] = {"schedule": schedule}
        types = set(getattr(model.config, "layer_types", None) or ())
        if "sliding_attention" in types or _has_windows(model):
            schedules["sliding_schedule"] = sliding
        if "chunked_attention" in types:
            schedules["chunked_schedule"] = chunked
        logits = model(ids, position_ids=positions, **schedules).logits
    except ValueError as error:
        return str(error)
    F.cross_entropy(logits[0], labels[0], reduction="sum").backward()
    gradients = _gradients(model)
    for parameter in model.parameters():  # in one order: a rank without a gradient joins in
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(found)
        parameter.grad = found
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return schedule.unshard(logits.detach(), 1)[0], gradients


def _has_windows(model: torch.nn.Module) -> bool:
    holders = [model.config, *model.modules()]
    return any(getattr(holder, "sliding_window", None) is not None for holder in holders)


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sweep(ranks: Ranks, kind: str, **more: Any) -> Outcome:
    """What comes of a model type. Without memory first: some are large whatever their sizes are set to."""
    looked_at = build(kind, device="meta", **more)
    try:
        plug_in(looked_at)
    except ValueError as error:
        return Outcome(str(error), 0.0)
    assert size(looked_at) <= MOST_PARAMETERS, f"{kind} is not tiny and not refused"
    answers = ranks.run(2, on_mesh, kind, more)
    for answer in answers:
        if isinstance(answer, str):
            return Outcome(answer, 0.0)
    logits, gradients = alone(kind, **more)
    worst = 0.0
    for found, found_gradients in answers:
        worst = max(worst, _difference(found, logits))
        # A parameter that one rank alone never uses may have zeros here, from the sum over ranks.
        for name, gradient in found_gradients.items():
            expected = gradients.get(name)
            worst = max(
                worst, _difference(gradient, torch.zeros_like(gradient) if expected is None else expected)
            )
    return Outcome(None, worst)


def _difference(found: Tensor, expected: Tensor) -> float:
    scale = max(float(expected.abs().max()), 1e-3)
    return float((found - expected).abs().max()) / scale


def expected() -> dict[str, str]:
    """Of every model type on the page: "right", or the reason of the refusal."""
    found: dict[str, str] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 2 and "`" in cells[1]:
            found |= dict.fromkeys(cells[1].replace("`", "").split(", "), cells[0])
    return found


EXPECTED = expected()
TRIED = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_TRIED))


def reason(refusal: str, name: str) -> str:
    """What the page says of a refusal: without the model's name, places and remedy."""
    said = refusal.split(";")[0].replace(name, "it").split(": ")[-1]
    return re.sub(r" at '[^']*'|^it |^\w+ 0 ", "", said)


@pytest.mark.parametrize("kind", TRIED)
def test_a_model_is_right_on_a_mesh_or_refused_for_the_reason_on_the_page(ranks: Ranks, kind: str) -> None:
    outcome = sweep(ranks, kind)
    if outcome.refusal is None:
        assert outcome.worst <= LIMIT
        assert EXPECTED[kind] == "right"
    else:
        assert EXPECTED[kind] == reason(outcome.refusal, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def test_the_page_has_every_model_of_transformers_once() -> None:
    assert set(EXPECTED) == set(TRIED)
    page = PAGE.read_text()
    for kind, why in NOT_TRIED.items():
        assert f"`{kind}`: {why}" in page


def test_queries_that_llama_4_scales_by_position_are_scaled_by_the_position_in_the_document(
    ranks: Ranks,
) -> None:
    """From the second token on: the default leaves the first 8,192 alone."""
    assert sweep(ranks, "llama4_text", floor_scale=2) == (None, pytest.approx(0, abs=1e-6))
    assert sweep(ranks, "llama4_text", attn_temperature_tuning=False).refusal is None
