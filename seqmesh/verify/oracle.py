"""What a case is held to: dense attention in fp64 from the definition, and one device in the case's dtype.

    oracle       softmax of all pairs in fp64 under autograd: the right answer
    one device   scaled_dot_product_attention with a dense mask: how wrong one device is in this dtype

A learned sink is, for one device, one more key whose logit is the mask's last column and whose value is zero.
A softcap it has not: there the definition is computed in the dtype that adds up (fp32 for half precisions)
and its results are rounded once, which is the least that any kernel could be wrong.

Legend: b batch, s queries, t keys, h query heads, g K/V heads, d head dim of queries and keys, e of values.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmesh.engine.merge import accumulator_dtype
from seqmesh.verify.cases import AttentionCase

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Results = dict[str, Tensor]
"""out, dq, dk, dv, and dsinks if there are sinks: global, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Global:
    """The tensors of a case, whole, in the dtype that attention gets."""

    q: Tensor
    """(b, s, h, d)"""
    k: Tensor
    """(b, t, g, d)"""
    v: Tensor
    """(b, t, g, e)"""
    weights: Tensor
    """(b, s, h, e), of the outputs in the loss"""
    sinks: Tensor | None
    """(h,)"""


def input_dtype(case: AttentionCase) -> torch.dtype:
    """Of q, k and v: an autocast starts from fp32."""
    return torch.float32 if case.mode == "autocast" else DTYPES[case.dtype]


def make(case: AttentionCase) -> Global:
    """Normal numbers from the case's seed, the same on every rank."""
    mask = case.made_mask()
    source = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(input_dtype(case))

    b, d = case.batch, case.head_dim
    e = d if case.value_head_dim is None else case.value_head_dim
    return Global(
        q=normal(b, mask.q_len, case.heads, d),
        k=normal(b, mask.k_len, case.kv_heads, d),
        v=normal(b, mask.k_len, case.kv_heads, e),
        # Exact in every dtype that the output may have.
        weights=normal(b, mask.q_len, case.heads, e).to(DTYPES[case.dtype]),
        sinks=normal(case.heads) if case.sinks else None,
    )


def dense(case: AttentionCase, given: Global) -> Results:
    """The right answer: the definition in fp64."""
    return _by_definition(case, given, torch.float64)


def one_device(case: AttentionCase, given: Global, device: torch.device) -> Results:
    """What a device makes of the case alone, in its dtype."""
    if case.softcap is not None:
        return _rounded_once(case, given)
    leaves = _leaves(given, input_dtype(case), device)
    allowed = _allowed(case).to(device)
    with autocast_of(case, device):
        out = _sdpa(leaves, allowed, case)
    return _with_gradients(out, given.weights.to(device, out.dtype), leaves)


def _rounded_once(case: AttentionCase, given: Global) -> Results:
    """The definition in the dtype that adds up; results in the dtypes that attention returns."""
    dtype = DTYPES[case.dtype]
    q, k, v = (x.to(dtype) for x in (given.q, given.k, given.v))  # where an autocast rounds them
    found = _by_definition(case, replace(given, q=q, k=k, v=v), accumulator_dtype(dtype))
    return {name: x.to(dtype if name == "out" else input_dtype(case)) for name, x in found.items()}


def autocast_of(case: AttentionCase, device: torch.device) -> torch.autocast:
    """The autocast that a case asks for, which may be none."""
    return torch.autocast(device.type, dtype=DTYPES[case.dtype], enabled=case.mode == "autocast")


def _allowed(case: AttentionCase) -> Tensor:
    return torch.from_numpy(case.made_mask().dense())


def _leaves(given: Global, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v and, if there are any, sinks."""
    tensors = [x for x in (given.q, given.k, given.v, given.sinks) if x is not None]
    return [x.detach().to(device, dtype).requires_grad_() for x in tensors]


def _with_gradients(out: Tensor, weights: Tensor, leaves: list[Tensor]) -> Results:
    grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    names = ("dq", "dk", "dv", "dsinks")
    found = {"out": out.detach().cpu()}
    found |= {name: grad.cpu() for name, grad in zip(names, grads, strict=False)}
    return found


def _by_definition(case: AttentionCase, given: Global, dtype: torch.dtype) -> Results:
    """softmax(scale q k^T, softcapped, where allowed) v; a query that sees nothing is 0."""
    leaves = _leaves(given, dtype, torch.device("cpu"))
    q, k, v, *sinks = leaves
    repeat = case.heads // case.kv_heads
    logits = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(repeat, 2)) * case.head_dim**-0.5
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    allowed = _allowed(case)
    sees_nothing = ~allowed.any(1)[:, None]
    # The softmax of a row of -inf alone is NaN: such a row is 0 by definition, whatever stands here.
    logits = logits.masked_fill(~allowed, -torch.inf).masked_fill(sees_nothing, 0.0)
    if sinks:
        column = sinks[0][None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, column), -1)
    shares = logits.softmax(-1)[..., : allowed.shape[1]].masked_fill(sees_nothing, 0.0)
    out = torch.einsum("bhst,bthd->bshd", shares, v.repeat_interleave(repeat, 2))
    return _with_gradients(out, given.weights.to(dtype), leaves)


def _sdpa(leaves: list[Tensor], allowed: Tensor, case: AttentionCase) -> Tensor:
    """(b, s, h, e) of PyTorch's own attention, with a dense mask."""
    q, k, v = (x.transpose(1, 2) for x in leaves[:3])
    sees_nothing = ~allowed.any(1)[:, None]
    mask = allowed | sees_nothing  # nothing to see would be NaN; its output is put to 0 below
    if case.sinks:
        sinks = leaves[3]
        logits = torch.zeros(mask.shape, dtype=sinks.dtype, device=sinks.device).masked_fill(
            ~mask, -torch.inf
        )
        h, (s, t) = case.heads, mask.shape
        mask = torch.cat((logits.expand(h, s, t), sinks[:, None, None].expand(h, s, 1)), -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=case.heads != case.kv_heads)
    return out.masked_fill(sees_nothing, 0.0).transpose(1, 2)
