"""A point as a command line of torchtitan or of Megatron-LM, and what that program runs otherwise.

    point                torchtitan                      Megatron-LM
    ulysses 8, ring 2    context parallelism of 16       the same, --cp-comm-type a2a+p2p over 8 and 2
    ZeRO-3               reshard after every forward     --use-megatron-fsdp, optim_grads_params
    loss in tiles        named as missing                named as missing

Names of flags: torchtitan/config/configs.py (commit 0014ac2), whose README calls the command line frozen;
Megatron-LM's megatron/training/arguments.py (commit d98e8a6). None of these commands was run here.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import layers_of_a_stage
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import MegatronBridgeStack
from seqmesh.planner.inputs.tables import unknown
from seqmesh.planner.output.emit import comment, emit

Flags = Mapping[str, str | int | bool | None]
"""Flags in their order with their values. A switch is True; what is None or False is left out."""


class OtherProgram(NamedTuple):
    """What is written for a program, of a job and a point."""

    start: str
    """The command, with places for `nodes`, GPUs of `each`, and the `config` of the model."""
    flags: Callable[[Job, Point], Flags]
    missing: Callable[[Job, Point], Iterator[str]]
    """What of the point it does not run as it was priced."""


def emit_for(program: str, job: Job, point: Point) -> tuple[str, list[str]]:
    """What to write for a program, and the lines that name what it does not run as it was priced.

    For seqmesh that is a recipe (emit.py), for another the command as a shell script.

    Raises:
        ValueError: an unknown program, or a model that seqmesh train cannot build.
    """
    if program == "seqmesh":
        return emit(job, point)
    if program not in PROGRAMS:
        raise unknown("program", program, PROGRAMS)
    start, flags_of, missing_of = PROGRAMS[program]
    missing = [*missing_of(job, point), *_alike(job, point)]
    title = f"{job.model.name} on {job.cluster.gpus} x {job.cluster.gpu.name}: {point}"
    comments = [f"{title}. Not run by {program} as it was priced:", *(f"- {one}" for one in missing)]
    config = "".join(letter if letter.isalnum() else "_" for letter in job.model.name)  # llama3_8b
    command = [start.format(nodes=job.cluster.nodes, each=job.cluster.gpus_per_node, config=config)]
    for name, value in flags_of(job, point).items():
        if value is True:
            command.append(f"    {name}")
        elif value is not None and value is not False:
            command.append(f"    {name} {value}")
    lines = ["#!/bin/sh", *map(comment, comments), " \\\n".join(command)]
    return "\n".join(lines) + "\n", missing


def _alike(job: Job, point: Point) -> Iterator[str]:
    """What neither program runs."""
    if point.pool:
        yield "one pool: it has none; documents of several sequences are not spread over one ring"
    if job.documents:
        yield f"{len(job.documents)} documents: packing, and a mask that keeps them apart, are its data set's"
    if point.tiling != "none":
        yield f"tiling={point.tiling}: it makes all logits of a micro-batch at once; expect more memory"
    if point.offloads_activations:
        yield f"offload={point.offload}: it does not keep full checkpoints on the host"
    if not job.model.is_plain:
        mixers = "layers that carry a state, " if job.model.mixer else ""
        own = f"{mixers}experts, windows and latent attention"
        yield f"{job.model.name}: add the program's own flags for {own}"
    if point.pipeline != "1f1b" and _interleaved(job, point)[0] is None:
        yield f"pipeline={point.pipeline}: this command runs 1f1b; add the program's own flags for it"
    if job.numerics.fp8_products:
        yield "products in fp8: this command computes in bf16; add the program's own flags for it"
    if point.used(job.axes) != point.used():
        yield f"axes={','.join(job.axes)}: it has its own order"
    yield "data: tokenizer, text, learning rate and what else it needs are its own flags"
    if job.stack.program == "seqmesh":
        yield "time and memory: they were priced with seqmesh's attention, whose exchanges differ"


def _interleaved(job: Job, point: Point) -> tuple[int | None, bool]:
    """Layers of each interleaved stage, and whether embedding and head count as one; None: no such stages."""
    if point.virtual == 1:
        return None, False
    # Whatever it was priced for, both programs can count the ends.
    layers = layers_of_a_stage(job.model.layers, point.pp, point.virtual, counts_ends=True)
    return layers or None, layers * point.pp * point.virtual > job.model.layers


def _torchtitan(job: Job, point: Point) -> Flags:
    whole = point.zero == 0
    piped = point.pp > 1
    pipeline = "--parallelism.pipeline_parallel"
    layers, count_ends = _interleaved(job, point) if piped else (None, False)
    ends = int(count_ends) if layers else None
    return {
        "--parallelism.data_parallel_replicate_degree": point.dp if whole else 1,
        "--parallelism.data_parallel_shard_degree": 1 if whole else point.dp,
        "--parallelism.context_parallel_degree": point.sp,
        "--parallelism.tensor_parallel_degree": point.tp,
        f"{pipeline}_degree": point.pp,
        "--parallelism.expert_parallel_degree": point.experts,
        "--parallelism.fsdp_reshard_after_forward": (None, "never", "never", "always")[point.zero],
        f"{pipeline}_schedule": ("Interleaved1F1B" if layers else "1F1B") if piped else None,
        f"{pipeline}_microbatch_size": point.micro_batch if piped else None,
        f"{pipeline}_layers_per_stage": layers,
        f"{pipeline}_first_stage_less_layers": ends,
        f"{pipeline}_last_stage_less_layers": ends,
        "--training.seq_len": job.seq_len,
        "--training.local_batch_size": point.micro_batch * (job.micro_batches(point) if piped else 1),
        "--training.global_batch_size": job.global_batch,
        "--activation_checkpoint.mode": point.checkpointing,
        "--training.enable_cpu_offload": point.offloads_optimizer,
    }


def _not_by_torchtitan(job: Job, point: Point) -> Iterator[str]:
    if not job.model.name.startswith("llama3-"):
        yield f"{job.model.name}: name its own MODULE and CONFIG, of the same sizes"
    if job.cluster.nodes > 1:
        yield f"{job.cluster.nodes} nodes: run_train.sh starts one; give torchrun --nnodes"
    if point.offloads_optimizer:
        yield f"offload={point.offload}: it moves weights and gradients to the host as well"
    if point.ulysses > 1:
        yield (
            f"ulysses={point.ulysses}: its context parallelism exchanges K/V rows, not heads; these are"
            f" {point.sp} ranks of one ring"
        )
    if point.zero == 1 or (point.zero == 0 and point.sp > 1):
        yield f"zero={point.zero}: FSDP2 shards weights and gradients too, over dp x cp"


def _megatron(job: Job, point: Point) -> Flags:
    half = job.numerics.element == 2
    full = point.checkpointing == "full"
    granularity = None if point.checkpointing == "none" else point.checkpointing
    return {
        **_megatron_mesh(job, point),
        "--micro-batch-size": point.micro_batch,
        "--global-batch-size": job.global_batch,
        **_megatron_model(job),
        "--use-distributed-optimizer": point.zero >= 1,
        "--use-megatron-fsdp": point.zero >= 2,
        "--data-parallel-sharding-strategy": {2: "optim_grads", 3: "optim_grads_params"}.get(point.zero),
        "--no-gradient-accumulation-fusion": point.zero >= 2,
        "--ckpt-format": "fsdp_dtensor" if point.zero >= 2 else None,
        "--bf16": half,
        "--grad-reduce-in-bf16": half and job.numerics.gradient == 2,
        "--recompute-granularity": granularity,
        "--recompute-method": "uniform" if full else None,
        "--recompute-num-layers": 1 if full else None,
        "--optimizer-cpu-offload": point.offloads_optimizer,
    }


def _megatron_mesh(job: Job, point: Point) -> Flags:
    as_bridge = isinstance(job.stack, MegatronBridgeStack)
    layers, count_ends = _interleaved(job, point)
    spread = point.experts > 1
    exchanges = [name for name, size in (("a2a", point.ulysses), ("p2p", point.ring)) if size > 1]
    return {
        "--tensor-model-parallel-size": point.tp,
        "--sequence-parallel": point.tp > 1,
        "--tp-comm-overlap": point.tp > 1 and as_bridge,
        "--pipeline-model-parallel-size": point.pp,
        "--num-layers-per-virtual-pipeline-stage": layers,
        "--account-for-embedding-in-pipeline-split": count_ends,
        "--account-for-loss-in-pipeline-split": count_ends,
        "--context-parallel-size": point.sp,
        "--expert-model-parallel-size": point.experts if spread else None,
        "--moe-token-dispatcher-type": "flex" if spread and as_bridge else None,
        "--moe-enable-deepep": spread and as_bridge,
        "--cp-comm-type": "+".join(exchanges) or None,
        "--hierarchical-context-parallel-sizes": (
            f"{point.ulysses} {point.ring}" if len(exchanges) == 2 else None
        ),
    }


def _megatron_model(job: Job) -> Flags:
    m = job.model
    grouped = m.kv_heads != m.heads
    return {
        "--seq-length": job.seq_len,
        "--max-position-embeddings": job.seq_len,
        "--num-layers": m.layers,
        "--hidden-size": m.hidden,
        "--ffn-hidden-size": m.intermediate,
        "--num-attention-heads": m.heads,
        "--kv-channels": m.head_dim,
        "--group-query-attention": grouped,
        "--num-query-groups": m.kv_heads if grouped else None,
        "--swiglu": m.gated,
        "--normalization": "RMSNorm" if m.gated else None,
        "--disable-bias-linear": m.gated,
        "--untie-embeddings-and-output-weights": not m.tied_embeddings,
    }


def _not_by_megatron(job: Job, point: Point) -> Iterator[str]:
    if point.checkpointing == "selective":
        yield "checkpointing=selective: it repeats attention's core, and nothing else"
    kv_heads = job.model.kv_heads // point.tp
    if kv_heads % point.ulysses:
        yield f"ulysses={point.ulysses} with {kv_heads} K/V heads on a rank of tp: its a2a needs a divisor"


PROGRAMS: Mapping[str, OtherProgram] = {
    "torchtitan": OtherProgram(
        "NGPU={each} MODULE=llama3 CONFIG={config} ./run_train.sh", _torchtitan, _not_by_torchtitan
    ),
    "megatron": OtherProgram(
        "torchrun --nnodes {nodes} --nproc-per-node {each} pretrain_gpt.py", _megatron, _not_by_megatron
    ),
}
"""Values of `--emit-for`, beside seqmesh."""
