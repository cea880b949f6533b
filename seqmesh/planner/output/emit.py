"""A point as a recipe for `seqmesh train`, with a comment for all of it that is not run as it was priced.

    point                                      recipe
    tp 2, ulysses 4, ring 2, dp 2              [mesh]   tp = 2, ulysses = 4, ring = 2, dp_shard = 2
    ring 16, one pool                          [mesh]   ring = 16, pool = true
    ZeRO-3, bf16, checkpointing full           [train]  zero = 3, precision = "bf16", checkpointing = "full"
    llama3-8b, 128K tokens, 4 sequences        [model], [data]
    mixtral-8x7b, experts over 8 of the ranks  [model]  experts = 8, experts_per_token = 2; [mesh] experts = 8
    gpt-oss-20b, whose layers differ           [model]  folder
    what the trainer has no key for, or        "# - head_dim=256: ..."
    refuses beside the rest

The text is bytes, unless data.tokenizer is added. Nothing is left out silently: a `_Setting`
that differs from the point says so.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import AXES, Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.train.recipe import config_of

BYTE_TOKENS = 259
"""Token ids of the trainer's text (a test keeps it equal)."""


class _Setting(NamedTuple):
    """The value of a recipe's key."""

    value: int | str | bool
    missing: str = ""
    """What of the point it does not say, and why; empty if it says it."""


def emit(job: Job, point: Point) -> tuple[str, list[str]]:
    """The recipe as TOML, and the lines that name what the trainer does not run as it was priced.

    Those lines are comments of the recipe too.

    Raises:
        ValueError: the trainer cannot build this model at all, in the trainer's own words.
    """
    if job.model.untrainable:
        raise ValueError(
            f"seqmesh train cannot run {job.model.name}: {job.model.untrainable}; use another model"
        )
    settings = {"mesh": _mesh(job, point), "model": _model(job), "data": _data(job)}
    settings |= {"train": _train(job, point), "run": {"device": _Setting("cuda")}}
    sections = {name: {key: one.value for key, one in keys.items()} for name, keys in settings.items()}
    config_of(sections, f"seqmesh train cannot run {job.model.name}: ")  # raises what the trainer refuses
    missing = [one.missing for keys in settings.values() for one in keys.values() if one.missing]
    missing += [*_machine(job, point), *_schedule(job, point), *_shape(job)]
    lines = [
        comment(f"{job.model.name} on {job.cluster.gpus} x {job.cluster.gpu.name}: {point}"),
        comment("Not run by seqmesh train as it was priced:"),
        *(comment(f"- {text}") for text in missing),
    ]
    for name, values in sections.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n", missing


def _mesh(job: Job, point: Point) -> dict[str, _Setting]:
    """The degrees, from the slowest links to the fastest as the trainer's axes are."""
    experts = {"experts": _Setting(point.experts)} if point.experts > 1 else {}
    return {
        "pp": _stages(job, point),
        "dp_shard": _Setting(point.dp),
        "ring": _Setting(point.ring),
        "ulysses": _Setting(point.ulysses),
        "tp": _Setting(point.tp),
        **experts,
        "pool": _Setting(point.pool),
        "layout": _Setting(job.layout),
    }


def _stages(job: Job, point: Point) -> _Setting:
    pp, count = point.pp, job.micro_batches(point)
    if pp > 1 and job.model.tied_embeddings:
        return _Setting(1, f"pp={pp}: the trainer does not cut a model whose embeddings are tied")
    if pp > count:
        return _Setting(1, f"pp={pp}: the trainer's stages need {pp} micro-batches, and there are {count}")
    return _Setting(pp)


def _model(job: Job) -> dict[str, _Setting]:
    m = job.model
    # Of a mixture, a folder says more than the shape: how its router chooses, which norms it has.
    if not m.is_said_by_keys or (m.mixture is not None and m.folder):
        return {"folder": _folder(m)}
    wide = m.head_dim * m.heads != m.hidden
    return {
        "hidden": _Setting(m.hidden),
        "layers": _Setting(m.layers),
        "heads": _Setting(m.heads),
        "kv_heads": _Setting(m.kv_heads),
        **({"head_dim": _Setting(m.head_dim)} if wide else {}),
        **_feed_forward(m),
        "vocabulary": _vocabulary(m.vocabulary),
        "tie_embeddings": _Setting(m.tied_embeddings),
    }


def _feed_forward(m: ModelShape) -> dict[str, _Setting]:
    if m.mixture is None:
        return {"intermediate": _Setting(m.intermediate)}
    return {
        "architecture": _Setting(m.mixture.architecture),
        "intermediate": _Setting(m.mixture.intermediate),
        "experts": _Setting(m.mixture.experts),
        "experts_per_token": _Setting(m.mixture.active),
    }


def _folder(m: ModelShape) -> _Setting:
    """Where the model is that keys cannot say: with layers of several kinds, or latent attention."""
    if m.folder:
        return _Setting(m.folder)
    what = "layers that differ (windows, or experts, in some), shared experts or latent attention"
    if m.mixer is not None:
        what = "layers that carry a state"
    return _Setting(
        m.name,
        f"model.folder={m.name}: no keys of the trainer say {what}; put its config.json there"
        f" ({m.source or 'with its weights'})",
    )


def _vocabulary(rows: int) -> _Setting:
    if rows < BYTE_TOKENS:
        return _Setting(0, f"vocabulary={rows}: the trainer's tokens are {BYTE_TOKENS} bytes and marks")
    return _Setting(rows)


def _data(job: Job) -> dict[str, _Setting]:
    return {"seq_len": _Setting(job.seq_len), "sequences": _Setting(job.global_batch)}


def _train(job: Job, point: Point) -> dict[str, _Setting]:
    return {
        "zero": _zero(job, point),
        "checkpointing": _checkpointing(job, point),
        "offload": _offload(job, point),
        # The trainer's loss is always tiled.
        "tiling": _Setting("mlp" if point.tiling == "mlp" else "none"),
        # Ranks of tp are priced with norms and residuals sharded by tokens, as Megatron-LM has it.
        "shard_norms": _Setting(point.tp > 1),
        "micro_batch": _Setting(point.micro_batch),
        "precision": _precision(job),
        "pipeline": _pipeline(job, point),
    }


def _pipeline(job: Job, point: Point) -> _Setting:
    """The order of micro-batches, of which the trainer has two with two stages a rank."""
    asked = f"pipeline={point.pipeline}"
    if point.pipeline == "1f1b" or _stages(job, point).value == 1:
        return _Setting("1f1b", "" if point.pipeline == "1f1b" else f"{asked}: the recipe has no stages")
    needs = f"the trainer's has 2 stages a rank and needs {2 * point.pp} layers"
    if job.model.layers < 2 * point.pp:
        return _Setting("1f1b", f"{asked} with {job.model.layers} layers: {needs}")
    if job.micro_batches(point) % point.pp:
        return _Setting("1f1b", f"{asked}: the trainer's takes a multiple of {point.pp} micro-batches")
    if point.pipeline == "interleaved":
        more = "" if point.virtual == 2 else f"virtual={point.virtual}: the trainer's rank has 2 stages"
        return _Setting("interleaved", more)
    if point.zero == 3 or point.checkpointing != "none":
        return _Setting("1f1b", f"{asked}: the trainer's needs zero <= 2 and checkpointing=none")
    return _Setting("zero-bubble", f"{asked}: the trainer's is interleaved too, with 2 stages a rank")


def _checkpointing(job: Job, point: Point) -> _Setting:
    if point.checkpointing == "full" and not job.stack.keeps_attention:
        return _Setting("full", "checkpointing=full: the trainer keeps attention's results all the same")
    return _Setting(point.checkpointing)


def _zero(job: Job, point: Point) -> _Setting:
    """The trainer computes in bf16 from ZeRO-2 on, which reduces gradients once a step, as ZeRO-1 does."""
    if job.numerics.element == 4 or point.zero >= 2:
        return _Setting(point.zero)
    return _Setting(2, f"zero={point.zero} in bf16: the trainer's zero=2 makes bf16 of fp32 weights, sharded")


def _offload(job: Job, point: Point) -> _Setting:
    if not point.offloads_optimizer or int(_zero(job, point).value) >= 2:
        return _Setting(point.offload)
    return _Setting(
        "activations" if point.offloads_activations else "none",
        f"offload={point.offload} with zero={point.zero}: the trainer keeps optimizer states on the host"
        " from zero=2 on",
    )


def _precision(job: Job) -> _Setting:
    if job.numerics.element == 4:
        return _Setting("fp32")
    if job.numerics.fp8_products:
        return _Setting("bf16", "products in fp8: the trainer computes in bf16")
    if job.numerics.gradient == 2:
        return _Setting("bf16", "gradients in bf16: the trainer sums them in fp32")
    return _Setting("bf16")


def _machine(job: Job, point: Point) -> Iterator[str]:
    yield (
        f"{job.cluster.nodes} x {job.cluster.gpus_per_node} {job.cluster.gpu.name}:"
        " recipes/launch starts a rank for each GPU; on a laptop, add --device cpu"
    )
    if point.used(job.axes) != point.used():
        yield f"axes={','.join(job.axes)}: the trainer's are {','.join(AXES)}"


def _schedule(job: Job, point: Point) -> Iterator[str]:
    """When weights are whole, and gradients reduced."""
    count = job.micro_batches(point)
    if point.zero >= 2 and count > 1:
        yield (
            f"zero={point.zero} with {count} micro-batches: gradients are reduced once, after the last,"
            " and are whole until then"
        )
    if point.zero == 3 and point.pp > 1:
        yield f"zero=3 with pp={point.pp}: a stage's weights are gathered once a step, as with zero=2"


def _shape(job: Job) -> Iterator[str]:
    """The model's shape where a recipe cannot say it, and the text."""
    m = job.model
    yield "tokens: the trainer's are bytes; of the embeddings it uses the first rows"
    if job.documents:
        yield f"{len(job.documents)} documents of given lengths: the trainer packs the documents of its text"
    if "folder" in _model(job):
        return
    if not m.gated:
        yield "a feed-forward network of two matrices: the trainer's Llama has three (SwiGLU)"
    if m.sliding_window is not None:
        yield f"sliding_window={m.sliding_window}: the trainer's Llama attends to the whole document"
    yield "rotary base: a plan has none; the recipe keeps the trainer's default"


def comment(text: str) -> str:
    """One line of TOML or of a shell script, whatever a user called a model."""
    return "# " + "".join(letter if letter.isprintable() else " " for letter in text)
