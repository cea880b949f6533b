"""A point as a command line of torchtitan or of Megatron-LM, and what that program runs otherwise.

    point                torchtitan                      Megatron-LM
    ulysses 8, ring 2    context parallelism of 16       the same, --cp-comm-type a2a+p2p over 8 and 2
    ZeRO-3               reshard after every forward     --use-megatron-fsdp, optim_grads_params
    loss in tiles        named as missing                named as missing

Names of flags: torchtitan/config/configs.py (commit 0014ac2), whose README calls the command line frozen;
Megatron-LM's megatron/training/arguments.py (commit d98e8a6). None of these commands was run here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import layers_of_a_stage
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import MegatronBridgeStack, MegatronStack
from seqmesh.planner.inputs.tables import unknown
from seqmesh.planner.output.emit import comment


@dataclass
class Command:
    """A command that grows."""

    start: str
    flags: dict[str, str] = field(default_factory=dict)
    """In their order; an empty value for a switch."""
    missing: list[str] = field(default_factory=list)
    """What of the point it does not run as it was priced."""

    def text(self, title: str) -> str:
        """A shell script: the title and what is missing as comments, then the command, a flag a line."""
        lines = ["#!/bin/sh", comment(title), *(comment(f"- {one}") for one in self.missing)]
        flags = [f"    {name} {value}".rstrip() for name, value in self.flags.items()]
        return "\n".join([*lines, " \\\n".join([self.start, *flags])]) + "\n"


def emit_for(program: str, job: Job, point: Point) -> tuple[str, list[str]]:
    """The command as a shell script, and the lines that name what the program does not run as it was priced.

    Raises:
        ValueError: another program.
    """
    if program not in PROGRAMS:
        raise unknown("program", program, PROGRAMS)
    command = PROGRAMS[program](job, point)
    command.missing += _alike(job, point)
    title = f"{job.model.name} on {job.cluster.gpus} x {job.cluster.gpu.name}: {point}"
    return command.text(f"{title}. Not run by {program} as it was priced:"), command.missing


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
    if point.pipeline == "zero-bubble" or (point.virtual > 1 and not _interleaved(job, point)):
        yield f"pipeline={point.pipeline}: this command runs 1f1b; add the program's own flags for it"
    if job.numerics.fp8_products:
        yield "products in fp8: this command computes in bf16; add the program's own flags for it"
    if point.used(job.axes) != point.used():
        yield f"axes={','.join(job.axes)}: it has its own order"
    yield "data: tokenizer, text, learning rate and what else it needs are its own flags"
    yield "time and memory: they were priced with seqmesh's attention, whose exchanges differ"


def _interleaved(job: Job, point: Point) -> tuple[int, bool] | None:
    """Layers of each interleaved stage, and whether embedding and head count as one; None: no such stages."""
    either = replace(job, stack=MegatronStack())  # whatever it was priced for, both programs can count them
    layers = layers_of_a_stage(either, point.pp, point.virtual) if point.virtual > 1 else 0
    return (layers, layers * point.pp * point.virtual > job.model.layers) if layers else None


def _torchtitan(job: Job, point: Point) -> Command:
    command = Command(f"NGPU={job.cluster.gpus_per_node} MODULE=llama3 CONFIG={_config(job)} ./run_train.sh")
    if not job.model.name.startswith("llama3-"):
        command.missing.append(f"{job.model.name}: name its own MODULE and CONFIG, of the same sizes")
    if job.cluster.nodes > 1:
        command.missing.append(f"{job.cluster.nodes} nodes: run_train.sh starts one; give torchrun --nnodes")
    whole = point.zero == 0
    count = job.micro_batches(point)
    flags = {
        "data_parallel_replicate_degree": point.dp if whole else 1,
        "data_parallel_shard_degree": 1 if whole else point.dp,
        "context_parallel_degree": point.sp,
        "tensor_parallel_degree": point.tp,
        "pipeline_parallel_degree": point.pp,
        "expert_parallel_degree": point.experts,
    }
    command.flags |= {f"--parallelism.{name}": str(value) for name, value in flags.items()}
    if not whole:
        command.flags["--parallelism.fsdp_reshard_after_forward"] = "always" if point.zero == 3 else "never"
    command.flags |= _torchtitan_pipeline(job, point)
    local = point.micro_batch * (count if point.pp > 1 else 1)
    command.flags |= {
        "--training.seq_len": str(job.seq_len),
        "--training.local_batch_size": str(local),
        "--training.global_batch_size": str(job.global_batch),
        "--activation_checkpoint.mode": point.checkpointing,
    }
    if point.offloads_optimizer:
        command.flags["--training.enable_cpu_offload"] = ""
        command.missing.append(f"offload={point.offload}: it moves weights and gradients to the host as well")
    if point.ulysses > 1:
        command.missing.append(
            f"ulysses={point.ulysses}: its context parallelism exchanges K/V rows, not heads; these are"
            f" {point.sp} ranks of one ring"
        )
    if point.zero == 1 or (point.zero == 0 and point.sp > 1):
        command.missing.append(f"zero={point.zero}: FSDP2 shards weights and gradients too, over dp x cp")
    return command


def _torchtitan_pipeline(job: Job, point: Point) -> dict[str, str]:
    if point.pp == 1:
        return {}
    flags = {"schedule": "1F1B", "microbatch_size": str(point.micro_batch)}
    if stages := _interleaved(job, point):
        layers, count_ends = stages
        flags |= {"schedule": "Interleaved1F1B", "layers_per_stage": str(layers)}
        for end in ("first", "last"):
            flags[f"{end}_stage_less_layers"] = str(int(count_ends))
    return {f"--parallelism.pipeline_parallel_{name}": value for name, value in flags.items()}


def _config(job: Job) -> str:
    """The configuration of a model: llama3_8b of llama3-8b."""
    return "".join(letter if letter.isalnum() else "_" for letter in job.model.name)


def _megatron(job: Job, point: Point) -> Command:
    nodes, each = job.cluster.nodes, job.cluster.gpus_per_node
    command = Command(f"torchrun --nnodes {nodes} --nproc-per-node {each} pretrain_gpt.py")
    command.flags |= _megatron_mesh(job, point)
    command.flags |= {
        "--micro-batch-size": str(point.micro_batch),
        "--global-batch-size": str(job.global_batch),
        **_megatron_model(job),
        **_megatron_zero(point),
    }
    if job.numerics.element == 2:
        command.flags["--bf16"] = ""
        if job.numerics.gradient == 2:
            command.flags["--grad-reduce-in-bf16"] = ""
    if point.checkpointing == "full":
        command.flags |= {"--recompute-granularity": "full", "--recompute-method": "uniform"}
        command.flags["--recompute-num-layers"] = "1"
    if point.checkpointing == "selective":
        command.flags["--recompute-granularity"] = "selective"
        command.missing.append("checkpointing=selective: it repeats attention's core, and nothing else")
    if point.offloads_optimizer:
        command.flags["--optimizer-cpu-offload"] = ""
    kv_heads = job.model.kv_heads // point.tp
    if kv_heads % point.ulysses:
        command.missing.append(
            f"ulysses={point.ulysses} with {kv_heads} K/V heads on a rank of tp: its a2a needs a divisor"
        )
    return command


def _megatron_mesh(job: Job, point: Point) -> dict[str, str]:
    flags = {"--tensor-model-parallel-size": str(point.tp)}
    as_bridge = isinstance(job.stack, MegatronBridgeStack)
    if point.tp > 1:
        flags |= {"--sequence-parallel": "", **({"--tp-comm-overlap": ""} if as_bridge else {})}
    flags["--pipeline-model-parallel-size"] = str(point.pp)
    if stages := _interleaved(job, point):
        layers, count_ends = stages
        flags["--num-layers-per-virtual-pipeline-stage"] = str(layers)
        if count_ends:
            flags["--account-for-embedding-in-pipeline-split"] = ""
            flags["--account-for-loss-in-pipeline-split"] = ""
    flags["--context-parallel-size"] = str(point.sp)
    if point.experts > 1:
        flags["--expert-model-parallel-size"] = str(point.experts)
        flags |= {"--moe-token-dispatcher-type": "flex", "--moe-enable-deepep": ""} if as_bridge else {}
    if point.ulysses > 1 and point.ring > 1:
        flags |= {"--cp-comm-type": "a2a+p2p"}
        flags["--hierarchical-context-parallel-sizes"] = f"{point.ulysses} {point.ring}"
    elif point.sp > 1:
        flags["--cp-comm-type"] = "a2a" if point.ulysses > 1 else "p2p"
    return flags


def _megatron_model(job: Job) -> dict[str, str]:
    m = job.model
    flags = {
        "--seq-length": str(job.seq_len),
        "--max-position-embeddings": str(job.seq_len),
        "--num-layers": str(m.layers),
        "--hidden-size": str(m.hidden),
        "--ffn-hidden-size": str(m.intermediate),
        "--num-attention-heads": str(m.heads),
        "--kv-channels": str(m.head_dim),
    }
    if m.kv_heads != m.heads:
        flags |= {"--group-query-attention": "", "--num-query-groups": str(m.kv_heads)}
    if m.gated:
        flags |= {"--swiglu": "", "--normalization": "RMSNorm", "--disable-bias-linear": ""}
    if not m.tied_embeddings:
        flags["--untie-embeddings-and-output-weights"] = ""
    return flags


def _megatron_zero(point: Point) -> dict[str, str]:
    if point.zero == 0:
        return {}
    flags = {"--use-distributed-optimizer": ""}
    if point.zero >= 2:
        strategy = "optim_grads" if point.zero == 2 else "optim_grads_params"
        flags |= {"--use-megatron-fsdp": "", "--data-parallel-sharding-strategy": strategy}
        flags |= {"--no-gradient-accumulation-fusion": "", "--ckpt-format": "fsdp_dtensor"}
    return flags


PROGRAMS: Mapping[str, Callable[[Job, Point], Command]] = {"torchtitan": _torchtitan, "megatron": _megatron}
"""Values of `--emit-for`, beside seqmesh."""
