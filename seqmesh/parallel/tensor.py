"""Tensor parallelism by the model's own plan: ranks of tp share every matrix, and each computes some heads.

    q, k, v, gate, up      rows of the weight (Shard 0)     a rank's heads, a rank's share of the MLP
    o, down                columns (Shard 1)                partial sums, all-reduced
    embedding, head        tokens of the vocabulary         the loss takes the head's shard (loss.py)
    norms                  whole on every rank

transformers has such a plan for most of its models, and styles that carry it out with DTensor; `plan_of`
takes it. Two things it leaves to us, where a weight that is whole on every rank has a gradient of which each
rank makes a part:

- norms of q and k (Qwen3), see gradients.py.
- fewer K/V heads than ranks: each rank computes those that its query heads use, from the whole weight.

Attention then runs on a rank's heads: ulysses divides those, ring its rows.

Source: Megatron-LM (Shoeybi et al. 2019); transformers.distributed.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from seqmesh.parallel.adapters import Styles, adapted_styles, linear_of, whole_adapters
from seqmesh.parallel.anatomy import Anatomy
from seqmesh.parallel.dims import ParallelDims
from seqmesh.parallel.gradients import SumOfGradients, replaced, shard_gradient_of, sum_gradients_of
from seqmesh.parallel.sharded_rows import share_rows
from seqmesh.parallel.split import PassThrough

_PARTIAL_GRADIENT = "replicated_with_grad_allreduce"
"""transformers' style for whole weights whose gradient is a sum over ranks."""
_PACKED = "packed_"
"""How styles begin that shard each of two matrices which are one parameter (gate and up of experts)."""
_KEYS_AND_VALUES = ("k_proj", "v_proj")


def plan_of(model: PreTrainedModel, dims: ParallelDims, experts: int = 1) -> Styles:
    """What transformers shares how over the ranks of tp, and of adapters what goes with it.

    Args:
        model: whole.
        dims: of the mesh.
        experts: ranks that share a layer's experts, which tp then leaves alone; 1: tp shares each.

    Raises:
        ValueError: a model without a plan for its layers, or heads that do not divide.
    """
    config, degree = model.config, dims.tp
    _check_heads(type(model).__name__, config.num_attention_heads, config.num_key_value_heads, degree)
    try:
        plan: Styles = model._resolve_parallel_plans(distributed(dims, experts))[0]
    except ValueError as error:
        raise ValueError(f"tp={degree}: {error}") from None
    layers = Anatomy.of(model).layers
    of_layers = next(name for name, part in model.named_modules() if part is layers) + "."
    if not any(name.startswith(of_layers) for name in plan):
        raise ValueError(
            f"tp={degree} with {type(model).__name__}, for whose layers transformers has no plan of tensor"
            " parallelism; use tp=1"
        )
    return adapted_styles(model, plan)


def distributed(dims: ParallelDims, experts: int) -> DistributedConfig:
    """The degrees as transformers has them; what fsdp shares is its business only beside experts.

    Raises:
        ValueError: spread experts, and tp does not divide the ranks that share them.
    """
    if experts == 1:
        return DistributedConfig(tp_size=dims.tp)
    return DistributedConfig(tp_size=dims.tp, ep_size=experts, fsdp_size=dims.shards)


def check_ranges(model: PreTrainedModel, dims: ParallelDims, experts: int = 1) -> None:
    """Refuse what cannot be loaded or saved by ranges of rows: two matrices in one parameter, each shared.

    Raises:
        ValueError: a model with such parameters, or without a plan.
    """
    packed = [path for path, style in plan_of(model, dims, experts).items() if style.startswith(_PACKED)]
    if packed:
        raise ValueError(
            f"tp={dims.tp} with {type(model).__name__}: {packed[0]} has two matrices in one, and a rank's"
            " shard of it is not a range of rows, as loading and saving take it to be; use tp=1, or of a"
            f" mixture experts={dims.tp}, a multiple of tp, which leaves each expert whole"
        )


def share_matrices(
    model: PreTrainedModel, mesh: DeviceMesh, plan: Styles, *, shard_norms: bool = False
) -> None:
    """Share the matrices of a model, or of a part of one, in place. Before attention is plugged in.

    Args:
        model: with whole weights, the same on every rank, or on the meta device.
        mesh: the tp axis.
        plan: `plan_of` the whole model; what a part lacks is left out.
        shard_norms: let ranks share the rows of norms and residuals (sharded_rows.py).
    """
    here = {name for name, module in model.named_modules() if not isinstance(module, PassThrough)}
    here |= {name for name, _ in model.named_parameters()}
    rest = {name: style for name, style in plan.items() if name in here}
    partial = {name for name, style in rest.items() if style == _PARTIAL_GRADIENT}
    # Plans name the module, its weight, or both.
    own = sorted({name.removesuffix(".weight") for name in partial})
    few = [name for name in rest if _gives_keys_or_values(name)]
    if model.config.num_key_value_heads >= mesh.size():
        few = []
    tied = _tied(model)
    for name in [*own, *few, *tied]:
        for key in (name, f"{name}.weight", f"{name}.bias"):
            rest.pop(key, None)
    if shard_norms:
        for small in whole_adapters(model, plan):
            sum_gradients_of(small, mesh)
        rest = share_rows(model, mesh, rest)
    apply_tensor_parallelism(model, mesh, rest)
    for name in own:
        sum_gradients_of(model.get_submodule(name), mesh)
    for name in few:
        kv_heads = model.config.num_key_value_heads
        _compute_own_heads(model.get_submodule(name), kv_heads, mesh, sums_inputs=not shard_norms)
    if tied:
        model.tie_weights()
    if isinstance(getattr(model.get_input_embeddings(), "weight", None), DTensor):
        shard_gradient_of(model.get_input_embeddings())
    if not shard_norms:
        model.get_input_embeddings().register_forward_hook(own_memory)


def _gives_keys_or_values(name: str) -> bool:
    """Whether a module is k_proj or v_proj, or a part of it that gives as many heads."""
    return linear_of(name).endswith(_KEYS_AND_VALUES) and not name.endswith((".weight", ".bias"))


def own_memory(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """What leaves a DTensor is a view of it, from which FSDP cannot hang its hooks safely."""
    return output.clone()


def _check_heads(name: str, heads: int, kv_heads: int, degree: int) -> None:
    if heads % degree:
        raise ValueError(f"tp={degree} with the {heads} query heads of {name}: use a tp that divides them")
    if kv_heads % degree and degree % kv_heads:
        raise ValueError(
            f"tp={degree} with the {kv_heads} K/V heads of {name}: use a tp that divides them or that they"
            " divide"
        )


def _tied(model: PreTrainedModel) -> list[str]:
    """The output embedding's name if it is the input embedding's weight: that one is shared instead."""
    anatomy = Anatomy.of(model)
    return [name for name, module in model.named_modules() if anatomy.is_tied and module is anatomy.head]


def _compute_own_heads(module: nn.Module, kv_heads: int, mesh: DeviceMesh, *, sums_inputs: bool) -> None:
    """Let k_proj or v_proj give the one K/V head that this rank's query heads use.

    The gradient of its input is this rank's part of a sum, which is added up here if `sums_inputs`.
    """
    group = mesh.get_group()
    head = mesh.get_local_rank() * kv_heads // mesh.size()
    computes = module.forward

    def forward(x: Tensor) -> Any:
        weights = {}
        for name, parameter in module.named_parameters():
            size = parameter.shape[0] // kv_heads
            weights[name] = SumOfGradients.apply(parameter, group)[head * size : (head + 1) * size]
        with replaced(module, weights):
            return computes(SumOfGradients.apply(x, group) if sums_inputs else x)

    module.forward = forward
