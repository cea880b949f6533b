"""What a diffusion transformer would silently get wrong on sequence shards, each refused in one line.

`check_model` looks at a model once, when it is plugged in; `check_call` and `check_tokens` at every forward,
before any token is exchanged. They see only what is the same on every rank.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from seqmesh.engine.mesh import SequenceMesh
from seqmesh.integrations.diffusion.models import PLANS
from seqmesh.integrations.diffusion.plan import Kept, ModelPlan, Refused
from seqmesh.integrations.diffusion.tokens import Tokens


def modules_at(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules at a path of the plan table, with their full names; none where a model lacks the part."""
    found: list[tuple[str, nn.Module]] = [("", model)]
    for name in path.split("."):
        longer = []
        for at, parent in found:
            for child, module in parent.named_children():
                if name in ("*", child):
                    longer.append((f"{at}.{child}".lstrip("."), module))
        found = longer
    yield from found


def parameters_of(module: nn.Module) -> list[str]:
    """Names of a forward's arguments: of the class, as offloading wraps the forward of the module."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def plan_of(model: nn.Module) -> ModelPlan:
    """The entry of a transformer's class.

    Raises:
        ValueError: a class that the table does not have.
    """
    name = type(model).__name__
    if name in PLANS:
        return PLANS[name]
    if name == "OptimizedModule":
        remedy = "plug in before you compile, and compile its blocks (compile_repeated_blocks)"
    elif name.removeprefix("FSDP") in PLANS:
        remedy = "plug in before fully_shard"
    elif hasattr(model, "get_base_model"):
        remedy = "pass its get_base_model()"
    else:
        remedy = (
            f"pass the transformer of a pipeline, one of {', '.join(PLANS)}, or add an entry to"
            " seqmesh/integrations/diffusion/models.py"
        )
    raise ValueError(f"{name} has no plan for sequence shards; {remedy}")


def check_model(model: nn.Module, plan: ModelPlan) -> None:
    """Refuse a model of which the plan does not know a part.

    Raises:
        ValueError: what was found, and what to do instead.
    """
    name = type(model).__name__
    config: Any = model.config
    for key, (value, remedy) in plan.config_refused.items():
        if getattr(config, key, None) == value:
            raise ValueError(f"{name} has {key}={value!r}, which is not supported: {remedy}")
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(
            f"{name} has diffusers' own parallelism on, which would split the tokens a second time;"
            " load it without parallel_config, and do not call enable_parallelism"
        )
    unknown = set(parameters_of(model)) ^ set(plan.arguments)
    if unknown:
        raise ValueError(
            f"{name}.forward and its plan differ in the arguments {', '.join(sorted(unknown))};"
            " install a version of diffusers that seqmesh's pyproject.toml names"
        )
    for path in (plan.last, *(cuts.path for cuts in plan.modules)):
        if not any(modules_at(model, path)):
            raise ValueError(
                f"{name} has nothing at {path!r}, where its plan cuts or gathers tokens;"
                " install a version of diffusers that seqmesh's pyproject.toml names"
            )
    _check_attention(name, model, plan)


def _check_attention(name: str, model: nn.Module, plan: ModelPlan) -> None:
    """Every attention module must be known, and those over the mesh have a processor that is known."""
    over_the_mesh = {at for path in plan.attention for at, _ in modules_at(model, path)}
    local = {at for path in plan.local_attention for at, _ in modules_at(model, path)}
    for at, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None or at in local:
            continue
        kind = type(processor).__name__
        if at not in over_the_mesh:
            raise ValueError(
                f"{name} has attention at {at!r} that its plan does not know;"
                " install a version of diffusers that seqmesh's pyproject.toml names"
            )
        if kind not in plan.processors:
            raise ValueError(
                f"{name} attends at {at!r} by {kind}, which is not known to fit sequence shards;"
                f" use {' or '.join(plan.processors)} (for IP-adapters: pipe.unload_ip_adapter())"
            )


def check_call(model: nn.Module, plan: ModelPlan, arguments: Mapping[str, Any]) -> None:
    """Refuse what a forward is asked for and cannot do.

    Raises:
        ValueError: an argument, a cache of blocks, or a dropout.
    """
    call = f"{type(model).__name__}(...)"
    for name, given in arguments.items():
        rule = plan.arguments[name]
        if isinstance(rule, Refused) and _is_asked_for(given):
            raise ValueError(f"{call} got {name}, {rule.what}; {rule.remedy}")
        if rule is Kept.LORA_SCALE:
            _check_lora_scale(call, name, given)
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"{call} has a cache of blocks, whose decisions would differ between ranks;"
            " call disable_cache() first"
        )
    if model.training:
        _check_dropout(call, model)


def _is_asked_for(given: Any) -> bool:
    """Not None, False or 0; a tensor always is."""
    return given is not None and not (isinstance(given, bool | int | float) and not given)


def _check_lora_scale(call: str, name: str, given: Any) -> None:
    others = sorted(set(given or {}) - {"scale"})
    if not others:
        return
    remedy = "pass nothing but the LoRA scale in it"
    if any("ip_" in key for key in others):
        remedy = "IP-adapters attend to tokens of their own on every rank: call pipe.unload_ip_adapter()"
    raise ValueError(f"{call} got {name} with {', '.join(others)}, which are not supported; {remedy}")


def _check_dropout(call: str, model: nn.Module) -> None:
    for at, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"{call} is in training mode with dropout {module.p} at {at!r}, which each rank would draw"
                " for its own tokens, so the result would depend on the mesh; set it to 0, or call eval()"
            )


def check_tokens(call: str, plan: ModelPlan, tokens: Tokens, mesh: SequenceMesh) -> None:
    """Refuse a call with too few tokens for the ranks.

    Raises:
        ValueError: image tokens of which a rank would have none, or text tokens that its blocks need.
    """
    if tokens.image < mesh.size:
        raise ValueError(
            f"{call} has {tokens.image} image tokens for {mesh.size} ranks, and each needs one;"
            " use fewer ranks, or a larger image"
        )
    needed = plan.text_per_rank * mesh.size
    if tokens.text < needed:
        raise ValueError(
            f"{call} has {tokens.text} text tokens for {mesh.size} ranks, and each needs"
            f" {plan.text_per_rank}; pad the text to {needed} tokens (with zeros in its mask),"
            " or use fewer ranks"
        )
