"""[lora]: adapters that train in place of the model's weights."""

from dataclasses import dataclass
from typing import Any, ClassVar

from seqmesh.train.config.rules import STRICT, at_least, require

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters (Hu et al. 2021), as peft has them: W x + alpha / rank B A x, and A and B train."""

    rank: int = 0
    """Rows of A; 0: no adapters, all weights train."""
    alpha: float = 16.0
    """What B A is multiplied by, times the rank."""
    targets: str = ALL_LINEAR
    """Names of the linear layers that are adapted, as "q_proj,v_proj"; "all-linear": all but the head."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        at_least("lora", self, rank=0, alpha=0)
        require(self.alpha > 0, f"lora.alpha={self.alpha}: adapters would do nothing; use a positive number")
        require(
            all(name and name == name.strip() for name in self.names),
            f"lora.targets={self.targets!r}: write names with commas between, as q_proj,v_proj, or"
            f' "{ALL_LINEAR}"',
        )

    @property
    def names(self) -> list[str]:
        """The names of `targets`, one by one."""
        return self.targets.split(",")
