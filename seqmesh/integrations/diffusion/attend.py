"""diffusers' attention, answered by seqmesh.

diffusers has two ways to attention, and neither is patched:

    dispatch    a processor names a backend and hands on its `_parallel_config`. We register one backend more,
                "seqmesh", and what we put in `_parallel_config` is what attends. The names are a closed Enum,
                so ours is an instance of it that is no member.
    legacy      a processor calls `scaled_dot_product_attention` itself (SD3, CogVideoX). Ours calls the
                processor that was there, and answers that one function while it runs.

Both are put into copies of a model's processors, so models that share a processor do not share a mesh.
Private names of diffusers: pyproject.toml pins its versions.

Legend: b batch, n this rank's tokens, h heads, d head dim.
"""

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor
from torch.overrides import TorchFunctionMode

from seqmesh.integrations.diffusion.plan import Stream
from seqmesh.integrations.diffusion.shards import TokenShards

NAME = "seqmesh"
"""Our key in diffusers' table of attention backends."""


class CurrentShards:
    """The shards of the forward that runs, or of the one whose blocks a checkpoint computes again."""

    def __init__(self) -> None:
        self.shards: TokenShards | None = None


class SequenceAttention:
    """What attends in place of a processor's backend; travels as its `_parallel_config`."""

    def __init__(self, current: CurrentShards, stream: Stream, kernel: str, *, takes_masks: bool) -> None:
        self._current = current
        self._stream: Stream = stream
        self._kernel = kernel
        self._takes_masks = takes_masks
        """Whether the model makes masks at its attention from what has become bands already."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention of this rank's rows: three times (b, n, h, d) -> (b, n, h, d).

        Raises:
            ValueError: before the model's first forward, or with a mask that its plan knows nothing of.
        """
        shards = self._current.shards
        if shards is None:
            raise ValueError(
                "a block of a plugged-in transformer was called by itself, so its rank's tokens are unknown;"
                " call the transformer, or unplug it first"
            )
        if mask is not None and not self._takes_masks:
            raise ValueError(
                f"attention got a mask of shape {tuple(mask.shape)} that its model's plan does not know;"
                " pass padding as the arguments of the model's forward, not through attention_kwargs"
            )
        return shards.attend(q, k, v, self._stream, scale, self._kernel)


def backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """`SequenceAttention` as diffusers calls a backend: three times (b, n, h, d) -> (b, n, h, d).

    `enable_gqa` needs no honouring: fewer K/V heads are seen from the shapes.

    Raises:
        ValueError: no SequenceAttention, a dropout, or a causal mask.
    """
    del enable_gqa
    if not isinstance(_parallel_config, SequenceAttention):
        raise ValueError(
            f"the attention backend {NAME!r} got {_parallel_config!r} in place of a plugged-in transformer's"
            " schedule; choose it by seqmesh.integrations.diffusers.plug_in, not by name"
        )
    _check_plain(dropout_p, is_causal)
    return _parallel_config(query, key, value, attn_mask, scale)


def _check_plain(dropout_p: float, is_causal: bool) -> None:
    if dropout_p > 0 or is_causal:
        raise ValueError(
            f"attention was called with dropout_p={dropout_p}, is_causal={is_causal}, which no plan knows;"
            " use 0.0 and False"
        )


def backend_name() -> AttentionBackendName:
    """Our name as diffusers' dispatch takes it, registered. Repeating it is harmless.

    Raises:
        ValueError: somebody else's function has that name.
    """
    for name, taken in _AttentionBackendRegistry._backends.items():
        if name == NAME:
            if taken is not backend:
                raise ValueError(
                    f"diffusers already has another attention backend {NAME!r} ({taken});"
                    " load only one library that registers this name"
                )
            # The same object for all blocks: the compiler compares it by identity.
            known: AttentionBackendName = name
            return known
    name = str.__new__(AttentionBackendName, NAME)
    name._name_ = name._value_ = NAME
    _AttentionBackendRegistry.register(name)(backend)
    return name


def with_attention(processor: Any, attend: SequenceAttention) -> Any:
    """A processor that does what the given one does, but attends by `attend`."""
    if not hasattr(processor, "_parallel_config"):
        return LegacyProcessor(processor, attend)
    ours = copy(processor)
    ours._attention_backend = backend_name()
    ours._parallel_config = attend
    return ours


def still_attends(processor: Any) -> bool:
    """Whether a processor of `with_attention` is as it was: diffusers' own switches write to processors."""
    if isinstance(processor, LegacyProcessor):
        return True
    attends: Any = processor._parallel_config
    return isinstance(attends, SequenceAttention) and processor._attention_backend == NAME


class LegacyProcessor:
    """A processor that calls `scaled_dot_product_attention` itself, with that call answered by seqmesh."""

    def __init__(self, inner: Any, attend: SequenceAttention) -> None:
        self.inner = inner
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """As the processors of CogVideoX and SD3 are called; SD3 knows no `image_rotary_emb`."""
        more = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}
        with _AnswersAttention(self._attend):
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **more)


class _AnswersAttention(TorchFunctionMode):
    """While active in this thread, `scaled_dot_product_attention` is a SequenceAttention."""

    def __init__(self, attend: SequenceAttention) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return self._answer(*args, **(kwargs or {}))

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """PyTorch's signature; three times (b, h, n, d) -> (b, h, n, d)."""
        del enable_gqa
        _check_plain(dropout_p, is_causal)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return self._attend(q, k, v, attn_mask, scale).transpose(1, 2)
