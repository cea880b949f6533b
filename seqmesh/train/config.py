"""The configuration of a training run: a frozen dataclass for each section of a recipe.

The defaults are the default recipe (recipes/stdlib.toml spells them out; a test keeps the two equal). Types
are checked by recipe.py, ranges and combinations here, so a `Config` that exists can be run.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}
"""How pydantic reads a section: no unknown key, no conversion between types.

An int is a float, nothing else is anything else.
"""

AXES = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
"""Of the mesh, from the slowest links to the fastest."""
LONGEST_TIMEOUT_S = 1e6
"""12 days: beyond some 1e9 seconds the C++ clocks of PyTorch overflow, and a rank would give up at once."""


def _require(rule: bool, message: str) -> None:
    if not rule:
        raise ValueError(message)


def _at_least(section: str, config: object, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        # Python's integers have no end, PyTorch's have 64 bits.
        if isinstance(value, int):
            _require(
                bound <= value < 2**63,
                f"{section}.{name}={value}: use a value of at least {bound} and below 2^63",
            )
        else:
            _require(
                math.isfinite(value) and value >= bound,
                f"{section}.{name}={value}: use a finite value of at least {bound}",
            )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The degree of every parallelism, from the outermost axis to the innermost: the ranks' product."""

    pp: int = 1
    """Pipeline stages: ranks that hold different layers; at most model.layers."""
    dp_replicate: int = 1
    """Copies of what dp_shard ranks share, each with sequences of its own (HSDP)."""
    dp_shard: int = 1
    """Ranks with sequences of their own, which share parameters as train.zero says."""
    ring: int = 2
    """Ranks that exchange K/V rows."""
    ulysses: int = 2
    """Ranks that swap sequence shards for head shards; at most the query heads of a tp rank."""
    tp: int = 1
    """Ranks that share every matrix; divides model.heads."""
    pool: bool = False
    """Whether dp_shard x ring ranks are one ring for all sequences of a step, placed by the balanced layout:
    short documents whole on a rank, long ones over several, and no rank waits for a longer one."""
    layout: Literal["auto", "contiguous", "zigzag", "striped", "balanced"] = "auto"
    """Which tokens each ring rank holds; auto looks at every batch's documents."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _at_least("mesh", self, **dict.fromkeys(AXES, 1))
        _require(
            not self.pool or self.layout in ("auto", "balanced"),
            f"mesh.layout={self.layout!r} with mesh.pool: a pool places documents by the balanced layout;"
            " leave mesh.layout out",
        )

    @property
    def degrees(self) -> dict[str, int]:
        """Axis -> degree, from the outermost to the innermost, as the ranks run them."""
        found = {axis: int(getattr(self, axis)) for axis in AXES}
        if self.pool:
            found |= {"dp_shard": 1, "ring": self.dp_shard * self.ring}
        return found

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return math.prod(self.degrees.values())

    @property
    def data_parallel(self) -> int:
        """Groups of ranks that have sequences of their own."""
        return self.degrees["dp_replicate"] * self.degrees["dp_shard"]

    @property
    def placement(self) -> str:
        """The layout of every batch."""
        return "balanced" if self.pool else self.layout


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder from scratch, in the terms of transformers' configurations."""

    architecture: str = "llama"
    """Model type in transformers: llama, or a dense decoder with the same fields (mistral, qwen2, ...)."""
    hidden: int = 192
    """hidden_size."""
    layers: int = 3
    """num_hidden_layers."""
    heads: int = 4
    """num_attention_heads; divides `hidden`."""
    kv_heads: int = 2
    """num_key_value_heads; divides `heads`."""
    intermediate: int = 512
    """intermediate_size of the gated MLP."""
    vocabulary: int = 0
    """Token ids of the embeddings; 0: those of the data."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    tie_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _at_least(
            "model", self, hidden=1, layers=1, heads=1, kv_heads=1, intermediate=1, rope_theta=1, vocabulary=0
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads};"
            f" use a divisor of {self.heads}",
        )
        _require(
            self.hidden % self.heads == 0 and self.head_dim % 2 == 0,
            f"model.hidden={self.hidden} over model.heads={self.heads} is not an even head dim,"
            f" which rotary embeddings need; use a multiple of {2 * self.heads}",
        )

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.hidden // self.heads


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it is packed (data.py)."""

    path: str = "stdlib"
    """A text file, a folder of text files, or "stdlib": the source of this Python's standard library."""
    seq_len: int = 8192
    """Tokens (bytes) of a packed sequence."""
    sequences: int = 1
    """Packed sequences in a step, over all ranks."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _at_least("data", self, seq_len=16, sequences=1)
        _require(
            "\0" not in self.path,
            f"data.path={self.path!r} has a NUL character, which no path may have; remove it",
        )
        _require(
            self.path != "",
            'data.path="" is empty; give a text file, a folder of text files, or "stdlib"',
        )

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.sequences


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation: AdamW, linear warm-up, cosine decay."""

    steps: int = 64
    """Optimiser steps."""
    minutes: float = 0.0
    """Stop after this many minutes even if steps are left; 0 for no limit."""
    lr: float = 3e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The last learning rate over the peak one."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """On matrices; vectors and norms have none."""
    clip: float = 1.0
    """Largest gradient norm."""
    seed: int = 0
    """Of the weights and of the order of documents; 0 <= seed < 2^63."""
    zero: int = 0
    """What ranks with the same parameters share (ZeRO): 0 nothing; 1 optimiser states; 2 gradients and
    parameters too, which are whole from a step's first forward to its last backward; 3 those as well."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward computes again: "selective" all but attention and matrix products, "full" all but
    attention."""
    offload: Literal["none", "activations", "optimizer", "both"] = "none"
    """What is kept on the host: the inputs of recomputed layers; parameters and optimiser states."""
    tiling: Literal["none", "mlp"] = "none"
    """Whether MLPs take 4,096 tokens at a time. The loss always takes 1,024."""
    shard_norms: bool = False
    """Whether ranks of tp share the tokens of norms and residuals, which each has whole otherwise."""
    micro_batch: int = 0
    """Packed sequences that go through the model at once; 0: all that a data-parallel rank has."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What layers compute in; weights, gradients that are summed and optimiser states are fp32. bf16 needs
    zero >= 2."""
    pipeline: Literal["1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """In which order a pipeline rank runs its micro-batches."""
    compare_steps: int = 3
    """First steps that are repeated on one rank afterwards, to compare loss and gradient norm; 0: none."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        none = ("minutes", "lr", "min_lr_ratio", "warmup", "weight_decay", "seed", "compare_steps")
        _at_least("train", self, steps=1, **dict.fromkeys((*none, "zero", "micro_batch"), 0))
        _require(self.zero <= 3, f"train.zero={self.zero}: ZeRO has stages 0 to 3; use one of them")
        _require(
            self.precision == "fp32" or self.zero >= 2,
            f'train.precision="bf16" with train.zero={self.zero}: weights in bf16 are made when they are'
            " gathered; use train.zero=2 or 3",
        )
        _require(
            self.offload in ("none", "optimizer") or self.checkpointing != "none",
            f'train.offload="{self.offload}" keeps the inputs of recomputed layers; use'
            ' train.checkpointing="full" too',
        )
        _require(
            self.offload in ("none", "activations") or self.zero >= 2,
            f'train.offload="{self.offload}" with train.zero={self.zero}: what is sharded can be kept on the'
            " host; use train.zero=2 or 3",
        )
        _require(
            self.pipeline != "zero-bubble" or (self.zero < 3 and self.checkpointing == "none"),
            f'train.pipeline="zero-bubble" with train.zero={self.zero} and train.checkpointing='
            f'"{self.checkpointing}": it makes the gradients of weights later; use train.zero <= 2 and'
            ' train.checkpointing="none"',
        )
        _require(
            math.isfinite(self.clip) and self.clip > 0,
            f"train.clip={self.clip}: use a positive gradient norm",
        )
        _require(self.min_lr_ratio <= 1, f"train.min_lr_ratio={self.min_lr_ratio}: use a ratio of at most 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how the run happens."""

    folder: str = ""
    """Folder for the results, new or empty; default: runs/ and the time of the start."""
    timeout_s: float = 120.0
    """Seconds after which a rank that waits for another gives up; at most 1e6."""
    threads: int = 1
    """CPU threads of each rank."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where ranks compute: on CPU over gloo, or each on a GPU over NCCL."""
    checkpoint_every: int = 0
    """Steps from one checkpoint to the next; 0: only at the end and when the run is stopped."""
    keep: int = 2
    """Complete checkpoints that stay."""
    resume: str = ""
    """Folder of a run to continue from its newest checkpoint, in that folder unless `folder` names another.
    What is trained on which text must be what it was; the mesh and how memory is saved may change."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _at_least("run", self, timeout_s=1, threads=1, checkpoint_every=0, keep=1)
        _require(
            self.timeout_s <= LONGEST_TIMEOUT_S,
            f"run.timeout_s={self.timeout_s}: use at most {LONGEST_TIMEOUT_S:.0f} seconds",
        )
        for name in ("folder", "resume"):
            path = getattr(self, name)
            _require(
                "\0" not in path,
                f"run.{name}={path!r} has a NUL character, which no path may have; remove it",
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _check_heads(self.mesh, self.model)
        _check_stages(self)
        self.micro_batches  # noqa: B018  (raises if the sequences do not divide)

    @property
    def micro_batch(self) -> int:
        """Packed sequences of a micro-batch."""
        return self.train.micro_batch or self.data.sequences // self.mesh.data_parallel

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        mine, rest = divmod(self.data.sequences, self.mesh.data_parallel)
        _require(
            rest == 0 and mine > 0,
            f"data.sequences={self.data.sequences} does not divide over {self.mesh.data_parallel}"
            f" data-parallel ranks; use a multiple of {self.mesh.data_parallel}",
        )
        count, rest = divmod(mine, self.micro_batch)
        _require(
            rest == 0,
            f"train.micro_batch={self.micro_batch} does not divide the {mine} sequences of a data-parallel"
            f" rank; use a divisor of {mine}",
        )
        return count


def _check_heads(mesh: MeshConfig, model: ModelConfig) -> None:
    _require(
        model.heads % mesh.tp == 0,
        f"mesh.tp={mesh.tp} does not divide model.heads={model.heads}; use a divisor of {model.heads}",
    )
    _require(
        model.kv_heads % mesh.tp == 0 or mesh.tp % model.kv_heads == 0,
        f"mesh.tp={mesh.tp} with model.kv_heads={model.kv_heads}: neither divides the other; use a tp that"
        " divides them or that they divide",
    )
    heads = model.heads // mesh.tp
    idle = mesh.ulysses - heads
    share = "" if mesh.tp == 1 else f" / mesh.tp={mesh.tp}"
    _require(
        idle <= 0,
        f"mesh.ulysses={mesh.ulysses} with model.heads={model.heads}{share} query heads"
        f" leaves {idle} ranks without a head;"
        f" use mesh.ulysses <= {heads} and put the rest on mesh.ring",
    )


def _check_stages(config: "Config") -> None:
    mesh, train = config.mesh, config.train
    _require(
        mesh.tp > 1 or not train.shard_norms,
        "train.shard_norms with mesh.tp=1: no other rank has the same tokens; leave it out",
    )
    if mesh.pp == 1:
        _require(
            train.pipeline == "1f1b",
            f'train.pipeline="{train.pipeline}" with mesh.pp=1: there are no stages to order; leave it out',
        )
        return
    stages = mesh.pp * (1 if train.pipeline == "1f1b" else 2)
    _require(
        config.model.layers >= stages,
        f"model.layers={config.model.layers} for {stages} pipeline stages; use fewer, each needs a layer",
    )
    _require(
        not config.model.tie_embeddings,
        f"model.tie_embeddings with mesh.pp={mesh.pp}: the first and the last stage would both have them;"
        " use mesh.pp=1, or model.tie_embeddings=false",
    )
    count = config.micro_batches
    _require(
        count >= mesh.pp and (train.pipeline == "1f1b" or count % mesh.pp == 0),
        f"{count} micro-batches of train.micro_batch={config.micro_batch} sequences for mesh.pp={mesh.pp}"
        f" in the order {train.pipeline}; use more data.sequences, or a smaller train.micro_batch, for"
        f" {'at least' if train.pipeline == '1f1b' else 'a multiple of'} {mesh.pp}",
    )
