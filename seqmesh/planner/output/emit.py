"""A point as a recipe for `seqmesh train`, with a comment for everything of it that the trainer does not run.

    point: tp 2, ulysses 4, ring 2, ZeRO-1, bf16, ...       recipe: ulysses 4, ring 2, and "# - tp=2: ..."

The trainer spreads every sequence over ulysses x ring CPU ranks of one machine with whole weights on each, in
fp32, over a text of bytes. The recipe has the point's sequence mesh, model and batch; nothing of the rest is
left out silently.
"""

import json
from collections.abc import Iterator
from typing import Any

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import AXES, Point
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig


def emit(job: Job, point: Point) -> tuple[str, list[str]]:
    """The recipe as TOML, and the lines that name what the trainer does not run.

    Those lines are comments of the recipe too.

    Raises:
        ValueError: the trainer cannot build this model at all, in the trainer's own words.
    """
    sections = _sections(job, point)
    try:
        Config(
            mesh=MeshConfig(**sections["mesh"]),
            model=ModelConfig(**sections["model"]),
            data=DataConfig(**sections["data"]),
        )
    except ValueError as error:
        raise ValueError(f"seqmesh train cannot run {job.model.name}: {error}") from None
    missing = [*_degrees(job, point), *_knobs(job, point), *_model(job)]
    lines = [
        _comment(f"{job.model.name} on {job.cluster.gpus} x {job.cluster.gpu.name}: {point}"),
        _comment("Planned, but not run by seqmesh train:"),
        *(_comment(f"- {text}") for text in missing),
    ]
    for name, values in sections.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n", missing


def _sections(job: Job, point: Point) -> dict[str, dict[str, Any]]:
    """What a recipe can say of the point."""
    m = job.model
    return {
        "mesh": {"ulysses": point.ulysses, "ring": point.ring, "layout": job.layout},
        "model": {
            "hidden": m.hidden,
            "layers": m.layers,
            "heads": m.heads,
            "kv_heads": m.kv_heads,
            "intermediate": m.intermediate,
            "tie_embeddings": m.tied_embeddings,
        },
        "data": {"seq_len": job.seq_len, "sequences": job.global_batch},
    }


def _degrees(job: Job, point: Point) -> Iterator[str]:
    """Axes of the mesh besides the sequence's."""
    if point.tp > 1:
        yield f"tp={point.tp}: every rank holds whole layers"
    if point.dp > 1:
        yield f"dp={point.dp}: all {job.global_batch} sequences of a step go through one ulysses x ring mesh"
    if point.pp > 1:
        yield f"pp={point.pp}: every rank holds all {job.model.layers} layers"
    if point.gpus != point.sp:
        yield f"{point.gpus} ranks: the recipe starts ulysses x ring = {point.sp}"
    yield (
        f"{job.cluster.nodes} x {job.cluster.gpus_per_node} {job.cluster.gpu.name}:"
        " the ranks are CPU processes of one machine"
    )


def _knobs(job: Job, point: Point) -> Iterator[str]:
    """Memory savers and the numbers' precision."""
    if point.zero:
        yield f"zero={point.zero}: weights, gradients and optimizer states are whole on every rank"
    if point.checkpointing != "none":
        yield f"checkpointing={point.checkpointing}: all activations are kept"
    if point.offload != "none":
        yield f"offload={point.offload}: nothing is moved to the host"
    if point.tiling != "none":
        yield f"tiling={point.tiling}: the loss's softmax is always tiled, the output head and the MLP never"
    if point.micro_batch < job.global_batch:
        yield f"micro_batch={point.micro_batch}: a step takes its {job.global_batch} sequences at once"
    if job.numerics.element == 2:
        yield "bf16: the trainer computes in fp32"
    if job.axes != AXES:
        yield f"axes={','.join(job.axes)}: the trainer's mesh has ulysses and ring only, in its own order"


def _model(job: Job) -> Iterator[str]:
    """The model's shape where a recipe cannot say it, and the text."""
    m = job.model
    yield f"vocabulary={m.vocabulary}: the trainer is byte-level and has its own small vocabulary"
    if m.head_dim * m.heads != m.hidden:
        yield f"head_dim={m.head_dim}: the trainer's is hidden / heads = {m.hidden // m.heads}"
    if not m.gated:
        yield "a feed-forward network of two matrices: the trainer's Llama has three (SwiGLU)"
    if m.sliding_window is not None:
        yield f"sliding_window={m.sliding_window}: the trainer's Llama attends to the whole document"
    if job.documents:
        yield f"{len(job.documents)} documents of given lengths: the trainer packs the documents of its text"
    yield "rotary base: a plan has none; the recipe keeps the trainer's default"


def _comment(text: str) -> str:
    """One line of TOML, whatever a user called a model."""
    return "# " + "".join(letter if letter.isprintable() else " " for letter in text)
