"""Dispatch modes and operators: what a selective checkpoint keeps, and what others see inside of an operator.

Within an operator of ours no dispatch mode is active. A selective activation checkpoint wants it so: it keeps
the operator's outputs, or runs it again, as one. A mode that counts collectives wants to look inside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_SELECTIVE = tuple(
    type(context)
    for context in create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)
)
"""The dispatch modes of a selective checkpoint: of its forward, and of its recomputation."""

_WATCHING: ContextVar[tuple[TorchDispatchMode, ...]] = ContextVar("_WATCHING", default=())
"""Dispatch modes that are to see inside the operator, from the outermost to the innermost."""


def is_selectively_checkpointed() -> bool:
    """Whether a selective activation checkpoint looks at every operator, to keep or to replay its outputs."""
    return any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack())


@contextmanager
def seen_inside() -> Iterator[None]:
    """Around the call of an operator: modes other than a selective checkpoint's see what happens in it."""
    others = tuple(mode for mode in _get_current_dispatch_mode_stack() if not isinstance(mode, _SELECTIVE))
    token = _WATCHING.set(others)
    try:
        yield
    finally:
        _WATCHING.reset(token)


@contextmanager
def watched() -> Iterator[None]:
    """Within an operator no dispatch mode is active: those that watch are, for a while.

    Pushed, not entered: some modes count from zero when they are entered.
    """
    modes = _WATCHING.get()
    for mode in modes:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in modes:
            _pop_mode()


@contextmanager
def with_graph() -> Iterator[None]:
    """Within an operator nothing has a graph, whatever grad mode says. Here it has."""
    keys = torch._C.DispatchKeySet
    hidden = keys(torch._C.DispatchKey.AutogradCPU) | keys(torch._C.DispatchKey.ADInplaceOrView)
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() - hidden
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
