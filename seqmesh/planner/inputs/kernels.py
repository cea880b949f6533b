"""How fast attention's kernels are, by the generation of the GPU; and all assumptions of a GPU and a stack.

Rates are of long blocks at head dim 128, as a share of the bf16 peak; how they fall with short blocks and
small heads is in assumptions.py and cost/attention.py. FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608),
Figures 5 and 6, measured it and FlashAttention-2 on H100 at up to 16K tokens. Its backward is not causal
there: what the causal mask costs the forward is taken off the backward too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Gpu
from seqmesh.planner.inputs.stack import Stack
from seqmesh.planner.inputs.tables import unknown


@dataclass(frozen=True, kw_only=True)
class AttentionRates:
    """One kernel on one generation of GPUs."""

    forward: float
    backward: float
    small_head: float
    """At head dim 64, of the rate at 128."""
    source: str


_FIGURES = "arXiv 2407.08608, Figures 5 and 6"
RATES: Mapping[tuple[str, str], AttentionRates] = {
    ("fa2", "ampere"): AttentionRates(
        forward=0.62,
        backward=0.52,
        small_head=0.8,
        source="assumption; FlashAttention-2 reports 0.5 to 0.73 forward and 0.4 to 0.63 backward on A100",
    ),
    ("fa2", "ada"): AttentionRates(
        forward=0.55, backward=0.45, small_head=0.8, source="assumption; between A100's and H100's"
    ),
    ("fa2", "hopper"): AttentionRates(
        forward=0.35,
        backward=0.30,
        small_head=0.89,
        source=f"335 of 989 TFLOP/s forward, 322 backward without mask: {_FIGURES}",
    ),
    ("cudnn", "hopper"): AttentionRates(
        forward=0.67,
        backward=0.54,
        small_head=0.80,
        source="663 of 989 TFLOP/s forward, 535 backward: measured on an H200, 16K causal rows (docs/gpu.md)",
    ),
    ("fa3", "hopper"): AttentionRates(
        forward=0.64,
        backward=0.555,
        small_head=0.82,
        source=f"616 of 989 TFLOP/s forward, 561 backward without mask: {_FIGURES}",
    ),
    ("fa2", "blackwell"): AttentionRates(
        forward=0.154,
        backward=0.13,
        small_head=0.89,
        source="assumption; H100's TFLOP/s: it uses none of what is new in Blackwell",
    ),
    ("cudnn", "blackwell"): AttentionRates(
        forward=0.55,
        backward=0.48,
        small_head=0.80,
        source="FlashAttention-4: 1613 of 2250 TFLOP/s forward, 1.3 of cuDNN's; backward as on H100, assumed",
    ),
    ("fa2", "cdna3"): AttentionRates(
        forward=0.35, backward=0.27, small_head=0.8, source="assumption; composable kernels on MI300X"
    ),
}
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
