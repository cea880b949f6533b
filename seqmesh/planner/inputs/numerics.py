"""Bytes of one number, by what it is, for each of the precisions that can be asked for."""

from dataclasses import dataclass, replace

from seqmesh.planner.inputs.tables import unknown


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Bytes of one number, by what it is."""

    element: int = 2
    """Weights, activations and what is sent: 2 for bf16, 4 for fp32."""
    gradient: int = 4
    """Gradients as they are accumulated and reduced.

    fp32 by default, as Megatron-LM and FSDP2's reduce_dtype do.
    """
    optimizer: int = 12
    """Per parameter: Adam's two moments, and an fp32 master copy unless the weights are fp32 themselves."""
    fp8_products: bool = False
    """Whether the layers' linear products take their operands in fp8; attention and head stay in bf16."""

    @property
    def update(self) -> int:
        """Bytes that AdamW reads and writes for a parameter.

        Its state twice, the gradient, and the weight (read too if it is fp32).
        """
        weight_passes = 2 if self.element == 4 else 1
        return 2 * self.optimizer + self.gradient + self.element * weight_passes


BF16 = Numerics()
FP32 = Numerics(element=4, gradient=4, optimizer=8)

PRECISIONS = {"bf16": BF16, "fp8-linear": replace(BF16, fp8_products=True), "fp32": FP32}
"""Values of `--precision`."""
GRADIENTS = {"fp32": 4, "bf16": 2}
"""Values of `--gradients`, and bytes of a gradient."""


def numerics_for(precision: str, gradients: str) -> Numerics:
    """Bytes of numbers for `--precision` and `--gradients`.

    Raises:
        ValueError: an unknown precision, or gradients in another one than fp32 weights.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if gradients not in GRADIENTS:
        raise unknown("gradient precision", gradients, GRADIENTS)
    chosen = PRECISIONS[precision]
    if precision == "fp32":
        if gradients != "fp32":
            raise ValueError(
                f"--gradients {gradients} with --precision fp32: gradients have the weights' precision;"
                " remove --gradients"
            )
        return chosen
    return replace(chosen, gradient=GRADIENTS[gradients])
