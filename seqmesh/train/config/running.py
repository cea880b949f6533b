"""[run]: where and how a run happens."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from seqmesh.train.config.rules import STRICT, at_least, require

AUTO = "auto"
"""Of `resume`."""
LONGEST_TIMEOUT_S = 1e6
"""12 days: beyond some 1e9 seconds the C++ clocks of PyTorch overflow, and a rank would give up at once."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how the run happens."""

    folder: str = ""
    """Folder for the results, new or empty; default: runs/ and the time of the start."""
    timeout_s: float = 120.0
    """Seconds after which a rank that waits for another gives up; at most 1e6."""
    threads: int = 1
    """CPU threads of each rank."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where ranks compute: on CPU over gloo, or each on a GPU over NCCL."""
    trace: bool = True
    """Whether a step is traced before the start, in seconds: what memory a rank needs, and what it sends."""
    profile: str = ""
    """A profile of this machine (seqmesh bench --profile), for the plan beside the report."""
    tensorboard: bool = False
    """Whether metrics are written for TensorBoard too."""
    checkpoint_every: int = 0
    """Steps from one checkpoint to the next; 0: only at the end and when the run is stopped."""
    keep: int = 2
    """Complete checkpoints that stay."""
    check_every: int = 0
    """Compute every Nth step twice, and compare all bits of gradients and exchanges; at every step compare
    those of weights with what was written. 0: never."""
    resume: str = ""
    """Folder of a run to continue from its newest checkpoint, in that folder unless `folder` names another;
    "auto": `folder` itself if it has a checkpoint, else a new run there, for launchers that start anew.
    What is trained on which text must be what it was; the mesh and how memory is saved may change."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        at_least("run", self, timeout_s=1, threads=1, checkpoint_every=0, keep=1, check_every=0)
        require(
            self.timeout_s <= LONGEST_TIMEOUT_S,
            f"run.timeout_s={self.timeout_s}: use at most {LONGEST_TIMEOUT_S:.0f} seconds",
        )
        require(
            self.resume != AUTO or self.folder != "",
            'run.resume="auto" goes on in run.folder, which is not given; give one with --folder',
        )
        for name in ("folder", "resume", "profile"):
            path = getattr(self, name)
            require(
                "\0" not in path,
                f"run.{name}={path!r} has a NUL character, which no path may have; remove it",
            )
