"""Training of plugged-in transformers: checkpoints, adapters and compiled blocks change no number."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusion_models import Example, exactly, example, run, worst
from oracle import mesh_of
from ranks import Ranks
from torch import Tensor, nn

from seqmesh import SequenceMesh
from seqmesh.integrations.diffusers import plug_in

CLASSES = ("flux", "flux2", "qwen-edit", "wan-5b", "ltx", "hunyuan", "cogvideox-5b", "sd3.5", "z-image")
TOLERANCE = 1e-10

Gradients = dict[str, Tensor]


def summed(grads: Gradients) -> Gradients:
    """Of all ranks; one process without a group has them already."""
    if dist.is_initialized():
        for grad in grads.values():
            dist.all_reduce(grad)
    return grads


def maybe_plugged(model: nn.Module, ulysses: int, ring: int) -> None:
    if dist.is_initialized():
        plug_in(model, mesh_of(ulysses, ring))


def agrees(ranks: Ranks, function: Callable[..., Gradients], *args: Any, world: int = 4) -> None:
    """A function's gradients on ranks, summed there, are those that it has in this process."""
    error, where = worst(ranks.run(world, function, *args)[0], function(*args))
    assert error <= TOLERANCE, f"the gradient of {where} is off by {error:.1e} of its largest entry"


def with_checkpoints(name: str) -> Gradients:
    case = example(name)
    case.model.enable_gradient_checkpointing()
    case.model.train()
    maybe_plugged(case.model, 2, 2)
    return summed(run(case)[1])


@pytest.mark.parametrize("name", CLASSES)
def test_gradient_checkpointing_changes_no_gradient(ranks: Ranks, name: str) -> None:
    agrees(ranks, with_checkpoints, name)


def of_two_forwards(order: str) -> Gradients:
    """Two prompts of one length with different padding: both forwards come before the first backward."""
    model, arguments = example("qwen", batch=1)
    model.enable_gradient_checkpointing()
    model.train()
    maybe_plugged(model, 2, 2)
    losses = []
    with exactly():
        for seen in (1, 4):
            mask = torch.ones(1, 7, dtype=torch.int64)
            mask[0, seen:] = 0
            out = model(**arguments | {"encoder_hidden_states_mask": mask}, return_dict=False)[0]
            losses.append(out.square().sum() * seen)
        if order == "after another forward":
            model(**arguments, return_dict=False)
        if order == "at once":
            torch.stack(losses).sum().backward()
        else:
            losses[0].backward()
            losses[1].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return summed(trained)


@pytest.mark.parametrize("order", ["one by one", "after another forward", "at once"])
def test_blocks_computed_again_attend_by_the_masks_of_their_own_forward(ranks: Ranks, order: str) -> None:
    agrees(ranks, of_two_forwards, order)


def with_adapters(after_plugging: bool) -> Gradients:
    """LoRA on attention, and on the first and last layers, which the hooks are on."""
    from peft import LoraConfig

    case = example("flux")
    if not after_plugging:
        maybe_plugged(case.model, 2, 2)
    targets = ["to_q", "to_k", "to_v", "add_k_proj", "x_embedder", "proj_out"]
    case.model.add_adapter(LoraConfig(r=2, target_modules=targets))
    if after_plugging:
        maybe_plugged(case.model, 2, 2)
    make = torch.Generator().manual_seed(3)
    adapters = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    for parameter in adapters.values():
        parameter.data = torch.randn(parameter.shape, generator=make, dtype=torch.float64) * 0.3
    grads = run(Example(case.model, case.arguments))[1]
    assert all("lora" in name for name in adapters)
    return summed({name: grads[name] for name in adapters})


@pytest.mark.parametrize("after_plugging", [False, True])
def test_adapters_may_be_added_before_and_after(ranks: Ranks, after_plugging: bool) -> None:
    agrees(ranks, with_adapters, after_plugging)


def compiled(name: str, backend: str) -> float:
    """On one rank: the largest difference to eager, of output and gradients."""
    import torch._dynamo

    warnings.simplefilter("ignore")  # PyTorch's compiler warns about its own deprecations
    torch._dynamo.reset()
    results = []
    for is_compiled in (False, True):
        case = example(name, batch=2)
        plug_in(case.model, mesh_of(1, 2))
        if is_compiled:
            for block in blocks_of(case.model):
                block.compile(fullgraph=True, backend=backend)
        out, grads, _ = run(case)
        results.append(grads | {"out": out})
    return worst(results[1], results[0])[0]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    lists = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
    return [block for name in lists for block in getattr(model, name, [])]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "backend"),
    [("flux", "aot_eager"), ("qwen-edit", "eager"), ("sd3.5", "eager"), ("z-image", "eager")],
)
def test_compiled_blocks_are_full_graphs_with_the_eager_numbers(
    ranks: Ranks, name: str, backend: str
) -> None:
    assert max(ranks.run(2, compiled, name, backend)) <= TOLERANCE


def compilations(model: nn.Module, calls: list[dict[str, Any]]) -> int:
    """How often blocks are compiled in some calls, on the 1 x 1 mesh."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    plug_in(model, SequenceMesh.build())
    for block in blocks_of(model):
        block.compile(fullgraph=True, backend=counter)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's compiler warns about its own deprecations
        for arguments in calls:
            model(**arguments)
    return counter.frame_count


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["qwen", "wan", "ltx"])
def test_blocks_of_one_class_are_compiled_once(name: str) -> None:
    model, arguments = example(name)
    assert len(blocks_of(model)) == 2
    assert compilations(model, [arguments, arguments]) == 1


@pytest.mark.filterwarnings("default")
def test_other_sizes_need_no_new_graph_if_the_compiler_may_take_them_for_variables() -> None:
    model, arguments = example("flux")
    calls = []
    for text, image in ((5, 15), (7, 14), (3, 12), (6, 11), (4, 13), (2, 9), (8, 10)):
        sizes = {
            "hidden_states": torch.randn(2, image, 4),
            "encoder_hidden_states": torch.randn(2, text, 12),
            "img_ids": torch.zeros(image, 3),
            "txt_ids": torch.zeros(text, 3),
        }
        calls.append(arguments | {key: given.double() for key, given in sizes.items()})
    with torch._dynamo.config.patch(
        allow_unspec_int_on_nn_module=True, force_nn_module_property_static_shapes=False
    ):
        # Two classes of blocks: a graph each for the first size, and one for all others.
        assert compilations(model, calls) <= 4


def sharded_weights() -> Gradients:
    """FSDP2 over all ranks of the mesh, summing: weights and gradients are whole again for the comparison."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    case = example("flux")
    if dist.is_initialized():
        plug_in(case.model, mesh_of(2, 2))
        for module in (*blocks_of(case.model), case.model):
            fully_shard(module)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP's, of blocks that return views: nothing changes them in place
        run(case)
    grads = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def test_fully_sharded_weights_have_the_gradients_of_one_rank(ranks: Ranks) -> None:
    agrees(ranks, sharded_weights)
