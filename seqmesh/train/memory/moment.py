"""What lives on a rank of the trainer at one moment of its step. peak.py says which moments there are."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What lives at one moment of the step, in bytes."""

    name: str
    parameters: int
    optimizer: int
    """AdamW's two states."""
    gradients: int
    """Of the weights that the rank holds."""
    zero_buffers: int = 0
    """ZeRO-2 and -3: gathered weights, gradients that are not reduced yet, and what they are packed in."""
    activations: int
    """Saved for the backward by layers not yet reached."""
    logits_transients: int = 0
    """A chunk's logits, what is made of them, and gradients of the head's weight before they are its own."""
    layer_transients: int = 0
    """Gradients of activations on their way, and of a tied head, which waits for the embedding's."""
    attention_transients: int = 0
    """Our engine's buffers in one backward.

    Gradients, received and returned rows, the kernel's compact copies.
    """
    update_transients: int = 0
    """Of AdamW, for one weight at a time."""
    host: int = 0
    """In the host's memory, not on the GPU."""

    @property
    def categories(self) -> dict[str, int]:
        """Bytes on the GPU, by field."""
        names = [field.name for field in fields(self) if field.name not in ("name", "host")]
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """All on the GPU."""
        return sum(self.categories.values())

    @property
    def everywhere(self) -> int:
        """All, where the host's memory is the device's too."""
        return self.total + self.host
