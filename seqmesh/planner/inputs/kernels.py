"""How fast attention's kernels are, by the generation of the GPU; and all assumptions of a GPU and a stack.

Rates (data/kernels.toml) are of long blocks at head dim 128, as a share of the bf16 peak; how they fall with
short blocks and small heads is in assumptions.py and cost/attention.py. FlashAttention-3 (Shah et al. 2024,
arXiv 2407.08608), Figures 5 and 6, measured it and FlashAttention-2 on H100 at up to 16K tokens. Its backward
is not causal there: what the causal mask costs the forward is taken off the backward too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Gpu
from seqmesh.planner.inputs.stack import Stack
from seqmesh.planner.inputs.tables import read_data, unknown


@dataclass(frozen=True, kw_only=True)
class AttentionRates:
    """One kernel on one generation of GPUs."""

    forward: float
    backward: float
    small_head: float
    """At head dim 64, of the rate at 128."""
    source: str


def _read() -> dict[tuple[str, str], AttentionRates]:
    generations = read_data("kernels.toml")
    return {
        (kernel, generation): AttentionRates(**rates)
        for generation, kernels in generations.items()
        for kernel, rates in kernels.items()
    }


RATES: Mapping[tuple[str, str], AttentionRates] = _read()
"""By kernel and generation."""
NAMES = {"fa2": "FlashAttention-2", "fa3": "FlashAttention-3", "cudnn": "cuDNN"}
"""Kernels of attention: the values of `--attention`."""


def rates_of(kernel: str, gpu: Gpu) -> AttentionRates:
    """The rates of a kernel.

    Raises:
        ValueError: no kernel of this name, or one that does not run on this GPU.
    """
    if kernel not in NAMES:
        raise unknown("kernel of attention", kernel, NAMES)
    found = RATES.get((kernel, gpu.generation))
    if found is None:
        known = ", ".join(name for name, generation in RATES if generation == gpu.generation)
        raise ValueError(
            f"{NAMES[kernel]} has no known rate on {gpu.name} ({gpu.generation}); use --attention {known},"
            " or say attention_forward and attention_backward by --assume"
        )
    return found


def assumptions_of(gpu: Gpu, stack: Stack) -> Assumptions:
    """The assumptions of a stack on a GPU: the stack's, its kernel's, then the GPU's own.

    Raises:
        ValueError: a GPU's own assumption that is none, or out of range; a kernel that it cannot run.
    """
    kernel = stack.attention_kernel(gpu.generation)
    rates = rates_of(kernel, gpu)
    of_kernel = {
        "attention_forward": rates.forward,
        "attention_backward": rates.backward,
        "small_head_rate": rates.small_head,
    }
    found = (
        Assumptions()
        .override(stack.assumed, "the training stack (inputs/stack.py)")
        .override(of_kernel, f"{NAMES[kernel]}; {rates.source}")
        .override(gpu.overrides, f"[gpu.{gpu.name}.assumptions]")
    )
    return replace(found, defaults_of=(gpu, stack))
