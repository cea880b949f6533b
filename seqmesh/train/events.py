"""What a run tells its observer, who shows the progress and writes the files: plain records from rank 0."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Started:
    """Facts known before the first step."""

    parameters: int
    trained: int
    """Of these, those that train."""
    matmul_parameters: int
    """Weights that multiply a token's activations: without the input embedding, norms, and experts that a
    token is not routed to."""
    peak_flops_per_s: float
    """Matmul FLOP/s of all ranks together, measured on all of them at the same time."""
    device_name: str
    """Of rank 0's device, as PyTorch calls it; "cpu"."""
    available_bytes: int
    """What each rank can use, on the one that can use least: of its GPU, or its share of the machine."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimiser step, over all ranks."""

    step: int
    """From 1."""
    loss: float
    """Mean cross entropy in nats over all valid tokens of all ranks; with train.balance, so many times the
    balance loss is added."""
    grad_norm: float
    """Before clipping."""
    lr: float
    seconds: float
    tokens: int
    labels: int
    """Tokens that predict something: the loss's denominator."""
    documents: int
    area: int
    """Allowed (query, key) pairs of a layer; the mean over layers, rounded, where windows differ."""
    layout: str
    flops: float
    """Model FLOPs with the exact mask area, forward and backward."""
    tokens_per_s: float
    mfu_mask: float
    """`flops` / (seconds * peak)."""
    mfu_noncausal: float
    """The same with seq_len^2 pairs per packed sequence: the convention that ignores masks.

    Always the larger number.
    """
    bytes_sent: int
    """Sent along the sequence, heads, rows, states and halos, counted at the collectives, all ranks."""
    bytes_scheduled: int
    """What the schedules say, all ranks."""
    bytes_agree: bool
    """Whether counted and scheduled bytes are equal on every rank."""
    sent: dict[str, int]
    """Bytes sent to other ranks by axis of the mesh, whoever sends them, all ranks."""
    data_seconds: float
    """Reading and sharding text and making schedules, mean over ranks."""
    waiting_seconds: float
    """In collectives, for their messages and for slower ranks, mean over ranks. On GPUs the host's alone."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """After the last step: the checkpoint is written."""

    peak_memory_bytes: tuple[int, ...]
    """High-water mark of each rank: its resident set, libraries included, or what tensors took on its GPU."""
    grown_memory_bytes: int
    """The same of the rank that grew most, less what it had before it made its model."""
    held_bytes: dict[str, int]
    """Parameters, gradients and optimiser states of the rank that has most of each."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The first steps again, on one rank that holds every sequence whole."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    largest_loss_difference: float
    largest_grad_norm_difference: float
    """Relative to norms above 1."""

    @property
    def largest_difference(self) -> float:
        """Of both."""
        return max(self.largest_loss_difference, self.largest_grad_norm_difference)


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """Instead of the rest: the run was asked to stop, and has saved what it can go on from."""

    step: int
    """Steps taken; if none, nothing is saved."""
    signal: int
    """What asked."""


Event = Started | StepMetrics | Trained | Compared | Stopped
