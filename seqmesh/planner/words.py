"""A point in the words of tables, pictures and reasons: `u8 r2`, and `zero 3, loss in tiles`."""

from seqmesh.planner.inputs.point import Point

TILED = {"loss": "loss in tiles", "mlp": "MLP and loss in tiles"}
KEPT = {"selective": "selective checkpoints", "full": "full checkpoints"}
OFFLOADED = {
    "activations": "checkpoints on the host",
    "optimizer": "optimizer on the host",
    "both": "checkpoints and optimizer on the host",
}


def mesh_words(point: Point) -> str:
    """The degrees above 1: `tp2 u4 r2 dp2`, and the ranks that share experts: `ep8`."""
    degrees = {"tp": point.tp, "u": point.ulysses, "r": point.ring, "dp": point.dp, "pp": point.pp}
    degrees["ep"] = point.experts
    words = [f"{name}{size}" for name, size in degrees.items() if size > 1]
    words += ["pool"] if point.pool else []
    return " ".join(words) or "1 GPU"


def knob_words(point: Point) -> str:
    """The rest: `zero 3, 2 sequences at once, loss in tiles`."""
    words = [f"zero {point.zero}"]
    words += [f"{point.micro_batch} sequences at once"] if point.micro_batch > 1 else []
    for value, named in (
        (point.tiling, TILED),
        (point.checkpointing, KEPT),
        (point.offload, OFFLOADED),
    ):
        words += [named[value]] if value in named else []
    if point.pipeline != "1f1b":
        words.append(point.pipeline + (f" x{point.virtual}" if point.virtual > 1 else ""))
    return ", ".join(words)


def point_words(point: Point) -> str:
    """Both: `u8 r2 (zero 3)`."""
    return f"{mesh_words(point)} ({knob_words(point)})"
