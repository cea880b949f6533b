"""Training for the tests of `seqmesh.parallel`: a tiny model on a mesh, and plain transformers on one rank.

The oracle is transformers' own eager attention with dense masks, whole logits and PyTorch's cross entropy, in
one process without any of seqmesh.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from meshes import mesh_of
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import logging

from seqmesh import masks
from seqmesh.parallel import (
    LayerKinds,
    ParallelDims,
    ParallelModel,
    ParallelPlan,
    TokenBatch,
    pack,
    parallelize,
    shard_micro_batches,
)

VOCABULARY = 96
# eps keeps a gradient of 0 but for rounding from becoming a whole step of Adam
ADAMW = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)
STEPS = 3
MAX_NORM = 0.05
"""Below every norm here: clipping is part of what is compared."""
WINDOW = 7
MIXED: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "gpt_oss": {},
}
"""Models of full and sliding layers; the first also caps its logits, the second has sinks and experts."""
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 48,
        "moe_layer_start_index": 0,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
LENGTHS = ([41], [29, 18], [17, 1, 5], [25, 10, 6])
"""Documents of the micro-batches, which divide nothing."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, and how."""

    dims: ParallelDims
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    kind: str = "llama"
    tied: bool = False
    layers: int = 2
    kv_heads: int = 2
    micro_batches: int = 1
    """Of each data-parallel rank."""
    layout: str = "auto"
    adapted: str = ""
    """What has adapters of LoRA, which then train alone; as peft takes it."""

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.dims.dp_replicate * self.dims.dp_shard


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training gives; tensors are whole ones."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    parameters: dict[str, Tensor]
    """After the last step."""


LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}


def build(kind: str, tied: bool, layers: int, kv_heads: int, adapted: str = "") -> PreTrainedModel:
    """A tiny causal model in fp32, the same in every process; with adapters of LoRA in these modules."""
    logging.set_verbosity_error()
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **MIXED.get(kind, {}),
        **EXPERTS.get(kind, {}),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    if adapted:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of peft, for other models
            inject_adapter_in_model(LoraConfig(**(LORA | {"target_modules": adapted})), model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros, with which A has no gradient
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def built(run: Run) -> PreTrainedModel:
    """What a run trains."""
    return build(run.kind, run.tied, run.layers, run.kv_heads, run.adapted)


def on_meta(run: Run) -> PreTrainedModel:
    """The same without weights."""
    with torch.device("meta"):
        return built(run)


def micro_batch(step: int, number: int) -> TokenBatch:
    """Documents of other lengths each; of a single one the first half has no labels."""
    lengths = LENGTHS[(step + number) % len(LENGTHS)]
    generator = torch.Generator().manual_seed(100 * step + number)
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=generator)
    labels = ids.clone()
    if len(lengths) == 1:  # contiguous ranks of it have no label
        labels[:, : sum(lengths) // 2 + 2] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return TokenBatch(input_ids=ids, labels=labels, position_ids=positions)


def train(model: ParallelModel, run: Run) -> Outcome:
    """`STEPS` steps on one rank of a mesh."""
    kinds = LayerKinds(full=1, sliding=1, window=WINDOW) if run.kind in MIXED else LayerKinds(full=1)
    rank = model.mesh.rank("data")
    numbers = range(rank * run.micro_batches, (rank + 1) * run.micro_batches)
    optimizer = model.optimizer(ADAMW)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batches = shard_micro_batches(
            [micro_batch(step, number) for number in numbers],
            model.mesh,
            layout=run.layout,
            layers=kinds,
        )
        losses.append(model.total_loss(model.gradients(batches)))
        if step == 0:
            gradients = gradients_of(model.named_parameters())
        norms.append(model.clip(MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=parameters)


def gradients_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Of those that train; the others have none."""
    found = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            found[name] = whole(parameter.grad)
        else:
            assert parameter.grad is None, name
    return found


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def on_mesh(run: Run) -> Outcome:
    """On one rank of a pool."""
    model = built(run)
    return train(parallelize(model, mesh_of(run.dims), run.plan), run)


def additive(mask: masks.Mask) -> Tensor:
    """A mask as transformers adds it to the logits: (1, 1, s, s), 0 or -inf."""
    allowed = torch.from_numpy(mask.dense())[None, None]
    return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """As the head of transformers' models makes them."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()


@cache
def on_one_rank(
    kind: str,
    tied: bool,
    layers: int,
    kv_heads: int,
    micro_batches: int,
    balance: float = 0.0,
    adapted: str = "",
) -> Outcome:
    """The oracle: as many micro-batches a step, one after the other."""
    model = build(kind, tied, layers, kv_heads, adapted)
    optimizer = ADAMW([{"params": [p for p in model.parameters() if p.requires_grad]}])
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        packed = [pack(micro_batch(step, number)) for number in range(micro_batches)]
        count = sum(one.label_count for one in packed)
        losses.append(0.0)
        for one in packed:
            given: Any = additive(one.mask)
            if kind in MIXED:
                sliding = additive(one.mask & masks.sliding_window(one.mask.q_len, WINDOW))
                given = {"full_attention": given, "sliding_attention": sliding}
            more = {"output_router_logits": True} if balance else {}
            out = model.base_model(one.input_ids, position_ids=one.position_ids, attention_mask=given, **more)
            logits = logits_of(model, out.last_hidden_state)
            share = F.cross_entropy(logits[0].double(), one.shift_labels[0], reduction="sum") / count
            if balance:
                share = share + balance * load_balancing_loss_func(out.router_logits, 4, 2) / micro_batches
            share.backward()
            losses[-1] += share.item()
        if step == 0:
            gradients = gradients_of(model.named_parameters())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=parameters)


def check(outcomes: list[Outcome], run: Run, *, tolerance: float = 1e-5) -> None:
    """Every rank's outcome is that of one rank, and together they have all parameters."""
    batches = run.micro_batches * run.data
    same = (run.kind, run.tied, run.layers, run.kv_heads, batches, run.plan.balance, run.adapted)
    want = on_one_rank(*same)
    seen: set[str] = set()
    assert len({tuple(got.norms) for got in outcomes}) == 1  # to the bit
    for got in outcomes:
        assert_close("losses", torch.tensor(got.losses), torch.tensor(want.losses), tolerance)
        assert_close("norms", torch.tensor(got.norms), torch.tensor(want.norms), tolerance)
        for name, gradient in got.gradients.items():
            assert_close(f"gradient of {name}", gradient, want.gradients[name], tolerance)
        for name, parameter in got.parameters.items():
            assert (name in got.gradients) == (name in want.gradients)
            assert_close(name, parameter, want.parameters[name], tolerance)
        seen |= got.parameters.keys()
    assert seen == want.parameters.keys()


def assert_close(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Relative in the norm of the whole tensor."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} is not {tuple(want.shape)}"
    difference, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    assert difference <= tolerance * size, f"{what} differs by {difference:.1e} of {size:.1e}"
