"""Layers of transformers' hybrid models that carry a state along the sequence, run on shards.

A mixer (Qwen3NextGatedDeltaNet, BambaMixer, ...) projects its tokens and calls two or three functions that
mix them: a short convolution, then a delta rule or a scan. These functions are globals of transformers'
module. A plugged mixer runs its own forward with those names bound to ours: a copy of the function with other
globals, on this instance alone. Neither the class nor the module of transformers changes.

Each of ours takes the model's own function as the kernel, and the schedule, which transformers hands on from
the model's forward like any keyword.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from seqmesh.engine.recurrent.convolution import convolve
from seqmesh.engine.recurrent.layers import recur
from seqmesh.engine.recurrent.rules import DeltaRule, Mamba2
from seqmesh.engine.sharding import Schedule

_CONVOLUTION = "causal_conv1d_fn"
_DELTA_RULE = "torch_chunk_gated_delta_rule"
_KIMI_RULE = "chunk_kimi_delta_attention"
_SCAN = "mamba2_chunk_scan"
_FUSED_SCAN = "mamba2_split_conv1d_scan_combined"
_DELTA = (_CONVOLUTION, _DELTA_RULE)
_KIMI = (_CONVOLUTION, _KIMI_RULE)
_MAMBA2 = (_CONVOLUTION, _FUSED_SCAN, _SCAN)

MIXERS: dict[str, tuple[str, ...]] = {
    "Qwen3NextGatedDeltaNet": _DELTA,
    "Qwen3_5GatedDeltaNet": _DELTA,
    "Qwen3_5MoeGatedDeltaNet": _DELTA,
    "OlmoHybridGatedDeltaNet": _DELTA,
    "KimiLinearDeltaAttention": _KIMI,
    "BailingHybridDeltaAttention": _KIMI,
    "NemotronHMamba2Mixer": _MAMBA2,
    "BambaMixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "Zamba2MambaMixer": _MAMBA2,
    "Lfm2ShortConv": (_CONVOLUTION,),
    "Lfm2MoeShortConv": (_CONVOLUTION,),
}
"""Classes of mixers, and the functions by which they mix tokens."""


def is_mixer(module: nn.Module) -> bool:
    """Whether a module is a mixer that runs on shards."""
    return type(module).__name__ in MIXERS


def mixers_of(module: nn.Module) -> list[nn.Module]:
    """Those in a module."""
    return [part for part in module.modules() if is_mixer(part)]


def bind(mixer: nn.Module) -> None:
    """Have a mixer call our functions in place of its own, in place.

    Raises:
        ValueError: a mixer that does not call what is known of it, or whose forward has been replaced.
    """
    _rebind(mixer, _OURS)


def rebind(mixer: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Have a mixer that is bound call other functions, as of `by_name`, in place."""
    del mixer.forward
    _rebind(mixer, functions)


@contextmanager
def bound_to(mixer: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """A mixer that calls other functions, as of `by_name`, in place of its own, for a while.

    Raises:
        ValueError: as `bind`.
    """
    _rebind(mixer, functions)
    try:
        yield
    finally:
        del mixer.forward


def _rebind(mixer: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> None:
    kind = type(mixer).__name__
    forward = inspect.unwrap(type(mixer).forward)
    names, known = MIXERS[kind], forward.__globals__
    missing = [name for name in names if name not in forward.__code__.co_names or name not in known]
    if missing:
        raise ValueError(
            f"{kind} does not call {', '.join(missing)}, by which seqmesh knows that it mixes tokens;"
            " use a version of transformers that seqmesh was tested with (see docs/hybrids.md)"
        )
    if "forward" in vars(mixer) or hasattr(mixer, "_hf_hook"):
        raise ValueError(
            f"the forward of {kind} has been replaced (by accelerate's offload hooks, for example), which"
            " would be lost; plug in the model before"
        )
    ours = {name: partial(functions[name], MixerFunction.of(known, name)) for name in names}
    # Without a name of a module, so that torch.compile looks into these globals and not into the module's.
    seen = {name: value for name, value in known.items() if name != "__name__"} | ours
    copied = FunctionType(forward.__code__, seen, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    mixer.forward = MethodType(copied, mixer)


class MixerFunction(NamedTuple):
    """A model's own function."""

    function: Callable[..., Any]
    path: str
    """By which an operator finds it."""

    @staticmethod
    def of(names: dict[str, Any], name: str) -> "MixerFunction":
        """The function of a name among a module's."""
        return MixerFunction(names[name], f"{names['__name__']}:{name}")


def convolution(
    kernel: MixerFunction,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    schedule: Schedule,
    **others: Any,
) -> Tensor:
    """`causal_conv1d_fn` on shards: (b, c, n) -> (b, c, n)."""
    _refuse(_CONVOLUTION, others)
    return convolve(kernel.function, hidden_states, weight, bias, activation, schedule, kernel.path)


def delta_rule(
    kernel: MixerFunction,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    schedule: Schedule,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """A gated delta rule on shards: q, k (b, n, h', k), v (b, n, h, v) -> (b, n, h, v), no final state."""
    _refuse(f"{_DELTA_RULE} or {_KIMI_RULE}", others)
    rows = {"query": query, "key": key, "value": value, "g": g, "beta": beta}
    return recur(DeltaRule(kernel.function, use_qk_l2norm_in_kernel, kernel.path), rows, schedule), None


def scan(
    kernel: MixerFunction,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    schedule: Schedule,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **others: Any,
) -> Tensor:
    """Mamba-2's scan on shards: x (b, n, h, p), dt (b, n, h), B, C (b, n, g, s) -> (b, n, h, p)."""
    _refuse(_SCAN, others)
    tensors = {"hidden_states": hidden_states, "dt": dt, "A": A, "B": B, "C": C}
    tensors |= {name: x for name, x in (("D", D), ("dt_bias", dt_bias)) if x is not None}
    return recur(Mamba2(kernel.function, chunk_size, dt_softplus, dt_limit, kernel.path), tensors, schedule)


_ASKS = (
    "initial_state",
    "initial_states",
    "output_final_state",
    "return_final_states",
    "cu_seqlens",
    "seq_idx",
    "z",
)
"""Keywords that ask for what is not done here. Others are dropped, as transformers' own functions do."""


def _refuse(function: str, others: dict[str, Any]) -> None:
    asked = [name for name in _ASKS if others.get(name) is not None and others[name] is not False]
    if asked:
        raise ValueError(
            f"{function} got {', '.join(asked)}, but documents and states are the schedule's; leave that out"
        )


def by_name(
    *, convolution: Callable[..., Any], delta_rule: Callable[..., Any], scan: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Functions in place of transformers', by their names there. Each takes a `MixerFunction` first."""
    return {
        _CONVOLUTION: convolution,
        _DELTA_RULE: delta_rule,
        _KIMI_RULE: delta_rule,
        _SCAN: scan,
        _FUSED_SCAN: _no_fused_scan,
    }


def _no_fused_scan(kernel: MixerFunction, *_: Any, **__: Any) -> None:
    """The kernel that projects, convolves, scans and projects in one: None, for "there is none here"."""
    del kernel


_OURS = by_name(convolution=convolution, delta_rule=delta_rule, scan=scan)
