"""A transformer with everything put in: hooks at its edges, and processors that attend over the mesh.

    forward    arguments checked, counted and cut      pre-hook of the model
    modules    embedders, RoPE: outputs cut            hooks of the plan's modules
    blocks     attention over the mesh                 processors
    last       image tokens gathered                   hook of the last module

Nothing is global: all state is in one object for each plugged-in model, and is removed with it.
"""

import inspect
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seqmesh.engine.mesh import SequenceMesh
from seqmesh.integrations.diffusion.agree import check_alike
from seqmesh.integrations.diffusion.attend import (
    CurrentShards,
    SequenceAttention,
    still_attends,
    with_attention,
)
from seqmesh.integrations.diffusion.plan import (
    Kept,
    ModelPlan,
    ModuleCuts,
    StreamCut,
    WholeArgument,
    WholeLength,
)
from seqmesh.integrations.diffusion.refusals import check_call, check_tokens, modules_at, parameters_of
from seqmesh.integrations.diffusion.shards import TokenShards
from seqmesh.integrations.diffusion.tokens import Tokens

_KEPT_SHARDS = 8
"""Calls whose schedules are kept: the steps of a pipeline repeat one or two of them."""


class PluggedTransformer:
    """What `plug_in` put into a model."""

    def __init__(
        self, model: nn.Module, plan: ModelPlan, mesh: SequenceMesh, kernel: str, *, compare_inputs: bool
    ) -> None:
        self._model = model
        self._plan = plan
        self._mesh = mesh
        self._compare_inputs = compare_inputs
        self._signature = inspect.signature(type(model).forward)
        self._current = CurrentShards()
        self._whole: dict[str, Any] = {}
        """Arguments of the forward that runs, before they were cut."""
        self._shards_of = lru_cache(maxsize=_KEPT_SHARDS)(self._new_shards)
        self._processors: dict[str, tuple[Any, Any]] = {}
        """By path: the processor that was there, and ours."""
        self._hooked: dict[str, tuple[nn.Module, list[RemovableHandle]]] = {}
        for path, stream in plan.attention.items():
            attend = SequenceAttention(self._current, stream, kernel, takes_masks=plan.masks_at_attention)
            for at, module in modules_at(model, path):
                self._replace_processor(at, module, attend)
        self._entry = model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._hook_modules()

    def remove(self) -> None:
        """Take everything out again; a processor that somebody else has set since stays."""
        self._entry.remove()
        for _, handles in self._hooked.values():
            for handle in handles:
                handle.remove()
        for at, (before, ours) in self._processors.items():
            module: Any = self._model.get_submodule(at)
            if module.processor is ours:
                module.processor = before

    def _replace_processor(self, at: str, module: Any, attend: SequenceAttention) -> None:
        before = module.processor
        module.processor = with_attention(before, attend)
        self._processors[at] = before, module.processor

    def _hook_modules(self) -> None:
        """Hook the plan's modules, and those that have taken their place since: adapters replace layers."""
        wanted: dict[str, list[tuple[nn.Module, Any]]] = {}
        for cuts in self._plan.modules:
            for at, module in modules_at(self._model, cuts.path):
                wanted.setdefault(at, []).append((module, cuts))
        for at, module in modules_at(self._model, self._plan.last):
            wanted.setdefault(at, []).append((module, None))
        for at, entries in wanted.items():
            module = entries[0][0]
            hooked, handles = self._hooked.get(at, (None, []))
            if hooked is module:
                continue
            for handle in handles:
                handle.remove()
            self._hooked[at] = (
                module,
                [handle for _, cuts in entries for handle in self._hooks_of(module, cuts)],
            )

    def _hooks_of(self, module: nn.Module, cuts: ModuleCuts | None) -> list[RemovableHandle]:
        """Hooks of one entry of the plan; without one, that of the last module.

        They know the entry's path, not the module's own: else the compiler would compile every block anew.
        """
        if cuts is None:
            return [module.register_forward_hook(self._leave)]
        handles = []
        if cuts.arguments:
            hook = partial(self._into_module, cuts.path, parameters_of(module), cuts.arguments)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if cuts.outputs:
            handles.append(
                module.register_forward_hook(partial(self._out_of_module, cuts.path, cuts.outputs))
            )
        return handles

    def _enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the forward: check its arguments, lay out its tokens, keep this rank's."""
        bound = self._signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: given for name, given in bound.arguments.items() if given is not model}
        call = f"{type(model).__name__}(...)"
        self._check_processors(call)
        if self._compare_inputs:
            check_alike(self._mesh, call, arguments)
        check_call(model, self._plan, arguments)
        tokens = self._plan.count(self._model.config, arguments)
        check_tokens(call, self._plan, tokens, self._mesh)
        self._hook_modules()
        shards = self._shards_of(tokens)
        self._current.shards = shards
        self._whole = dict(arguments)
        return (), {name: self._kept(name, given, shards) for name, given in arguments.items()}

    def _check_processors(self, call: str) -> None:
        for at, (_, ours) in self._processors.items():
            module: Any = self._model.get_submodule(at)
            if module.processor is not ours:
                what = f"replaced after plug_in, by {type(module.processor).__name__}"
            elif not still_attends(ours):
                what = "given another backend, or a parallel_config, after plug_in"
            else:
                continue
            raise ValueError(
                f"{call}: the attention processor at {at!r} was {what}, and would attend to this rank's"
                " tokens only; unplug, set it, and plug in again"
            )

    def _new_shards(self, tokens: Tokens) -> TokenShards:
        return TokenShards(tokens, self._mesh, text_first=self._plan.text_first)

    def _kept(self, name: str, given: Any, shards: TokenShards) -> Any:
        """What the model gets of an argument."""
        rule = self._plan.arguments[name]
        if isinstance(rule, StreamCut):
            return shards.cut(given, rule, name)
        return None if rule is Kept.MASK else given

    def _into_module(
        self,
        path: str,
        places: list[str],
        cuts: Mapping[str, StreamCut | WholeArgument | WholeLength],
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a module, cut or given back whole."""
        given = list(args)
        for name, rule in cuts.items():
            place = places.index(name)
            if name in kwargs:
                kwargs[name] = self._given(f"{path}: {name}", kwargs[name], rule)
            elif place < len(given):
                given[place] = self._given(f"{path}: {name}", given[place], rule)
        return tuple(given), kwargs

    def _given(self, name: str, given: Any, rule: StreamCut | WholeArgument | WholeLength) -> Any:
        if isinstance(rule, WholeArgument):
            return self._whole[rule.name]
        shards = self._now()
        if isinstance(rule, WholeLength):
            return shards.length(rule.stream)
        return shards.cut(given, rule, name)

    def _out_of_module(
        self, path: str, cuts: tuple[StreamCut, ...], _: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        """Outputs of a module, cut: a tensor, or a tuple of as many as there are cuts."""
        del args
        shards = self._now()
        if isinstance(output, Tensor):
            return shards.cut(output, cuts[0], path)
        return tuple(shards.cut(one, cut, path) for one, cut in zip(output, cuts, strict=True))

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the last module: the whole image, on every rank."""
        del args
        self._whole = {}
        shards = self._now()
        whole: Tensor = _Recalled.apply(shards.gather(output), self._current, shards)
        return whole

    def _now(self) -> TokenShards:
        assert self._current.shards is not None  # the model's own hook comes first
        return self._current.shards


class _Recalled(torch.autograd.Function):
    """The identity, whose backward brings back the shards of its forward.

    A checkpoint computes blocks again in the backward, maybe after other forwards. The last module's backward
    comes before that of every block, so this is the place to say whose blocks they are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, current: CurrentShards, shards: TokenShards) -> Tensor:
        ctx.current = current
        ctx.shards = shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.current.shards = ctx.shards
        return grads[0], None, None
