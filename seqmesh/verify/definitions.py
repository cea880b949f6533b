"""The recurrences of hybrid models by their definitions, token by token, in the dtype of their inputs.

transformers' own kernels compute in fp32 whatever they are given, so a model in fp64 is an oracle only with
these in their place. They take what those kernels take.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmesh.integrations.mixers import MixerFunction, bound_to, by_name, mixers_of

_NORM_EPS = 1e-6
"""Under the square root of the norms of queries and keys, in every family."""


@contextmanager
def by_definition(model: nn.Module) -> Iterator[None]:
    """A model whose mixers compute by definition. It is not plugged in."""
    definitions = by_name(convolution=_convolution, delta_rule=_delta_rule, scan=_scan)
    with ExitStack() as stack:
        for mixer in mixers_of(model):
            stack.enter_context(bound_to(mixer, definitions))
        yield


def _convolution(kernel: MixerFunction, *args: Any, **kwargs: Any) -> Any:
    return kernel.function(*args, **kwargs)  # which computes in the dtype of its weights


def _delta_rule(kernel: MixerFunction, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    del kernel
    return delta_rule(*args, **kwargs)


def _scan(kernel: MixerFunction, *args: Tensor, **kwargs: Any) -> Tensor:
    del kernel
    return mamba2(*args, **kwargs)[0]


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """S <- e^g S; S <- S + beta k (v - S^T k)^T; o = S^T q / sqrt(k).

    Args:
        query: (b, n, h', k), as the keys; h' divides h.
        key: (b, n, h', k)
        value: (b, n, h, v)
        g: (b, n, h) logs of the decays, or (b, n, h, k), a gate a channel: Kimi's.
        beta: (b, n, h)
        initial_state: (b, h, k, v); default: zero.
        use_qk_l2norm_in_kernel: divide queries and keys by their norms.

    Returns:
        (b, n, h, v) outputs, and the final state.
    """
    if use_qk_l2norm_in_kernel:
        query, key = (x * (x.square().sum(-1, keepdim=True) + _NORM_EPS).rsqrt() for x in (query, key))
    groups = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(groups, 2) for x in (query * key.shape[-1] ** -0.5, key))
    gate = (g if g.ndim == 4 else g[..., None]).exp()
    b, _n, h, v = value.shape
    state = value.new_zeros(b, h, key.shape[-1], v) if initial_state is None else initial_state
    outs = []
    for t in range(value.shape[1]):
        state = gate[:, t, :, :, None] * state
        new = beta[:, t, :, None] * (value[:, t] - torch.einsum("bhk,bhkv->bhv", key[:, t], state))
        state = state + key[:, t, :, :, None] * new[:, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return torch.stack(outs, 1), state


def mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """S <- e^(dt A) S + dt x B^T; y = S C + D x.

    Args:
        x: (b, n, h, p) beside dt (b, n, h); A, D and dt_bias are (h,).
        B: (b, n, g, s), as C; g divides h.
        dt_softplus: use softplus(dt + bias), within dt_limit.
        initial_states: (b, h, p, s); default: zero.

    Returns:
        (b, n, h, p) outputs, and the final state.
    """
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    groups = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(groups, 2), C.repeat_interleave(groups, 2)
    b, _n, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1]) if initial_states is None else initial_states
    outs = []
    for t in range(x.shape[1]):
        new = (x[:, t] * dt[:, t, :, None])[..., None] * B[:, t, :, None]
        state = (A * dt[:, t]).exp()[..., None, None] * state + new
        outs.append(torch.einsum("bhps,bhs->bhp", state, C[:, t]))
    out = torch.stack(outs, 1)
    return (out if D is None else out + D[:, None] * x), state
