"""A training step of ONE rank of a large job, alone on one device: real kernels, no links.

    seqmesh bench gpu-step                                          rank 0 of 16: LLaMA3-8B, 212,992 tokens
    seqmesh bench gpu-step recipe.toml --gpu h100-sxm --steps 5     of any recipe without a pipeline
    seqmesh bench gpu-step --device cpu                             a tiny model, in fp32: that it runs

What runs is `Trainer.step`: the transformers model made parallel, attention with all its stages, the loss,
the backward, the gradients' reduction, clipping, AdamW. The other ranks do not exist: each collective copies
what this rank sends until it has as much as would arrive (arrivals.py). So kernels, launches, memory
and copies are real, and nothing waits for a link. Weights are noise, every packed sequence is one document.

MFU is of the whole job's model FLOPs over all its ranks, each of which would take this rank's time: what a
job reaches whose exchanges are hidden. The planner's figure is of the same: its compute terms, without links.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from seqmesh.bench.arrivals import arrivals_filled
from seqmesh.bench.gpu_rank import device_name
from seqmesh.bench.report import header, opened, write_json
from seqmesh.foresee import cluster_for, known_as
from seqmesh.planner.cost.estimate import COMPUTE
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster
from seqmesh.planner.inputs.of_recipe import of_recipe
from seqmesh.trace.fake_ranks import fake_ranks, weights_of_noise
from seqmesh.trace.tracing import text_of
from seqmesh.train import device as devices
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from seqmesh.train.data import VOCAB_SIZE
from seqmesh.train.recipe import load
from seqmesh.train.trainer import Trainer

LLAMA3_8B_208K = Config(
    mesh=MeshConfig(ulysses=8, ring=2),
    model=ModelConfig(
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        intermediate=14336,
        vocabulary=128256,
        rope_theta=500000.0,
    ),
    data=DataConfig(seq_len=212_992),
    train=TrainConfig(lr=3e-5, zero=3, precision="bf16", checkpointing="selective"),
    run=RunConfig(device="cuda"),
)
"""The paper's headline job on the mesh that the planner proposes."""
TINY = replace(
    LLAMA3_8B_208K,
    model=ModelConfig(hidden=64, layers=2, heads=8, kv_heads=2, intermediate=128, vocabulary=512),
    data=DataConfig(seq_len=2048),
    train=replace(LLAMA3_8B_208K.train, precision="fp32"),
    run=RunConfig(device="cpu"),
)
PAPER_MFU = 0.47
"""USP (Fang & Zhao 2024), Table 6: LLaMA3-8B, 208K tokens, 2 x 8 A800, all s^2 pairs counted."""


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """What was measured, and what the planner says of the same."""

    ranks: int
    tokens: int
    """Of a step, over all ranks."""
    seconds: float
    """Median of a step."""
    spread: tuple[float, float]
    """The fastest and the slowest step."""
    mfu_mask: float
    """Of the peak below, counting the mask's exact pairs."""
    mfu_noncausal: float
    """Counting seq_len^2 pairs, as the paper does."""
    peak_flops_per_s: float
    peak_source: str
    memory_bytes: int
    """High-water mark: of tensors on a GPU, of the process on CPU."""
    bytes_sent: int
    """By attention, of this rank: to nobody."""
    predicted_seconds: float | None
    """The planner's compute terms; None for a GPU that it does not know."""
    predicted_memory_bytes: int | None
    priced_otherwise: tuple[str, ...]


def run_gpu_step(recipe: str | None, device: str, gpu: str, steps: int, json_path: Path | None) -> int:
    """Time and print everything: the exit code.

    Raises:
        ValueError: no such device, recipe or GPU, or json_path cannot be written; before anything is timed.
    """
    config = _config(recipe, device)
    if steps < 1:
        raise ValueError(f"--steps {steps}: time one step at least")
    devices.check(config.run.device)
    about = {**header(), "device": device_name(config.run.device), "work": _in_words(config)}
    console = opened(about, json_path)
    found = measure(config, _cluster(config, gpu), steps)
    for name, value in _lines(found).items():
        console.print(f"{name:<8} {value}", markup=False)
    write_json({**about, **asdict(found)}, json_path)
    return 0


def _config(recipe: str | None, device: str) -> Config:
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device {device}: a rank is timed on cuda or cpu; use one of them")
    config = load(recipe) if recipe is not None else LLAMA3_8B_208K if device == "cuda" else TINY
    if config.mesh.pp > 1:
        raise ValueError(
            f"mesh.pp={config.mesh.pp}: a stage alone receives nothing to compute on; use mesh.pp=1"
        )
    if config.mesh.world == 1:
        raise ValueError("a job of one rank has no other ranks to leave out; use seqmesh train")
    run = replace(config.run, device="cuda" if device == "cuda" else "cpu")
    return replace(config, run=run, train=replace(config.train, compare_steps=0))


def _token_ids(config: Config) -> int:
    """Of the model; its text is zeros."""
    return config.model.vocabulary or VOCAB_SIZE


def _cluster(config: Config, gpu: str) -> Cluster | None:
    """Nodes of the named GPU, or of the one that is here; None if the planner does not know it."""
    name = gpu or known_as(torch.cuda.get_device_name() if config.run.device == "cuda" else "")
    return cluster_for(config.mesh.world, name) if name else None


def measure(config: Config, cluster: Cluster | None, steps: int) -> RankStep:
    """Time steps of rank 0, after one that is not counted."""
    world = config.mesh.world
    peak, source = _peak(config, cluster)
    with fake_ranks(config) as mesh, arrivals_filled(), weights_of_noise(), torch.random.fork_rng(devices=[]):
        trainer = Trainer(config, text_of(config, _token_ids(config)), mesh, peak_flops_per_s=peak * world)
        trainer.step()
        taken = []
        for _ in range(steps):
            devices.finish(config.run.device)
            start = time.perf_counter()
            metrics = trainer.step()
            devices.finish(config.run.device)
            taken.append(time.perf_counter() - start)
    seconds = median(taken)
    scale = metrics.seconds / seconds  # its MFU is of the last step
    priced = None if cluster is None else of_recipe(config, cluster, vocabulary=_token_ids(config))
    estimate = None if priced is None else CostModel(priced.job).estimate(priced.point)
    return RankStep(
        ranks=world,
        tokens=config.data.tokens,
        seconds=seconds,
        spread=(min(taken), max(taken)),
        mfu_mask=metrics.mfu_mask * scale,
        mfu_noncausal=metrics.mfu_noncausal * scale,
        peak_flops_per_s=peak,
        peak_source=source,
        memory_bytes=devices.peak_memory_bytes(config.run.device),
        bytes_sent=metrics.bytes_sent // world,
        predicted_seconds=(
            None if estimate is None else estimate.by_cause(lambda term: term.seconds).get(COMPUTE, 0.0)
        ),
        predicted_memory_bytes=None if estimate is None else estimate.memory.total,
        priced_otherwise=() if priced is None else priced.missing,
    )


def _peak(config: Config, cluster: Cluster | None) -> tuple[float, str]:
    """FLOP/s of one device, and where the number is from."""
    is_half = config.train.precision == "bf16"
    if cluster is not None:
        return cluster.gpu.peak_flops_per_s(2 if is_half else 4), f"data sheet of {cluster.gpu.name}"
    dtype = torch.bfloat16 if is_half and config.run.device == "cuda" else torch.float32
    return devices.measure_matmul_flops_per_s(
        config.run.device, dtype
    ), "large matrix products, measured here"


def _in_words(config: Config) -> str:
    mesh, train = config.mesh, config.train
    degrees = " x ".join(f"{axis} {n}" for axis, n in mesh.degrees.items() if n > 1)
    return (
        f"rank 0 of {mesh.world} ({degrees}), {config.data.tokens:,} tokens a step, zero {train.zero},"
        f" {train.precision}, checkpointing {train.checkpointing}, tiling {train.tiling}"
    )


def _lines(found: RankStep) -> dict[str, str]:
    low, high = found.spread
    lines = {
        "step": f"{found.seconds:.3f} s ({low:.3f} to {high:.3f}), exchanges as local copies",
        "MFU": f"{found.mfu_mask:.1%} counting the mask's exact pairs, {found.mfu_noncausal:.1%} counting all"
        f" seq_len^2; of {found.peak_flops_per_s / 1e12:.3g} TFLOP/s, {found.peak_source}",
        "memory": f"{found.memory_bytes / 2**30:.2f} GiB at its peak",
    }
    if found.predicted_seconds is not None and found.predicted_memory_bytes is not None:
        lines["planner"] = (
            f"{found.predicted_seconds:.3f} s of compute, {found.predicted_memory_bytes / 2**30:.2f} GiB"
            + "".join(f"; {one}" for one in found.priced_otherwise)
        )
    lines["paper"] = (
        f"MFU {PAPER_MFU:.0%} with its links, on A800 (LLaMA3-8B, 208K tokens, 16 ranks, seq_len^2)"
    )
    return lines
