"""What a run says before its first step: who shares what, what a rank will hold and send, what is there.

    mesh       16 rank(s)
      axis     ranks  with rank 0  others have           sends a step
      ring     2      0 8          tokens                3.49 GB
      ulysses  8      0 1 2 ... 7  tokens, then heads    15.3 GB
      fsdp                         shards of parameters  59.2 GB
    memory     60 GiB of tensors expected on rank 0, in the backward:
               parameters 1.87 GiB, optimizer 3.74 GiB, activations 50.2 GiB, temporaries 4.18 GiB
    available  78.2 GiB a rank

Without ranks, too: `seqmesh train RECIPE --dry-run`.
"""

from math import prod

from seqmesh.train.config import Config
from seqmesh.train.expected import Expected
from seqmesh.train.units import in_bytes, in_memory, in_parameters

_OTHER = {
    "pp": "layers",
    "dp_replicate": "sequences",
    "dp_shard": "sequences",
    "ring": "tokens",
    "ulysses": "tokens, then heads",
    "tp": "parts of every matrix",
}
"""What ranks of an axis have that the others have not."""
_JOINED = {
    "sequence": "states of layers that carry one",
    "fsdp": "shards of parameters",
    "replicas": "gradients to be summed",
}
"""The same of flattened axes (parallel/dims.py). The others carry a few numbers only."""
SHOWN_RANKS = 5
_A_FEW_NUMBERS = 4096
"""Bytes of losses, norms and checksums."""


def describe_start(
    config: Config, parameters: int, expected: Expected | None, *, trained: int | None = None
) -> list[str]:
    """Lines on a run that is about to start.

    Args:
        config: the run.
        parameters: of the whole model.
        expected: of a step; None if it was not asked for.
        trained: of the parameters, those that train; None: all.
    """
    model, data = config.model, config.data
    sharing = config.mesh.degrees["ring"] * config.mesh.degrees["ulysses"]
    per_rank = data.seq_len * config.micro_batch / sharing
    lines = {
        "model": f"{model.name}, {in_parameters(parameters, trained)}, {config.train.precision}",
        "step": f"{data.sequences} x {data.seq_len:,} tokens, in {config.micro_batches} micro-batch(es) of"
        f" {config.micro_batch} on each data-parallel rank; {per_rank:,.0f} tokens of one on each rank",
        "mesh": f"{config.mesh.world} rank(s)",
    }
    shown = [f"{name:<10} {value}" for name, value in lines.items()]
    shown += _mesh_table(config, expected)
    if expected is not None:
        shown.append(f"{'memory':<10} {_memory(expected)}")
        if config.train.offload != "none":
            shown.append(f"{'':<10} what is kept on the host (train.offload) is counted too")
        if config.mesh.experts > 1 and not expected.unknown:
            shown.append(
                f"{'':<10} if routers send every expert as many tokens; a rank that gets more, holds more"
            )
    return shown


def describe_available(available: int, expected: Expected | None) -> str:
    """A line on what each rank can use, and whether that is enough.

    Args:
        available: bytes, on the rank that has fewest.
        expected: of a step; None if it was not asked for.
    """
    text = f"{'available':<10} {in_memory(available)} a rank"
    if expected is None or expected.unknown or expected.peak_bytes <= available:
        return text
    return (
        f"{text}: LESS than is expected; use more ranks of ring or ulysses, train.zero=3,"
        ' train.checkpointing="full" or train.offload'
    )


def _mesh_table(config: Config, expected: Expected | None) -> list[str]:
    """A row for each axis that has more than one rank, then for what joined axes send."""
    sent = dict(expected.sent) if expected is not None else {}
    rows = [("axis", "ranks", "with rank 0", "others have", "sends a step" if sent else "")]
    for axis, ranks in config.mesh.degrees.items():
        if ranks > 1:
            rows.append((axis, str(ranks), _beside_rank_0(config, axis), _OTHER[axis], _sent(sent, axis)))
    for axis, have in _JOINED.items():
        if sent.get(axis, 0) > _A_FEW_NUMBERS:
            rows.append((axis, "", "", have, _sent(sent, axis)))
    if config.mesh.experts > 1:  # ranks of the axes above, seen another way; their groups are no axis's
        rows.append(("experts", str(config.mesh.experts), "", "experts of a layer", _sent(sent, "other")))
    if len(rows) == 1:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(row).rstrip() for row in padded]


def _sent(sent: dict[str, int], axis: str) -> str:
    return in_bytes(sent[axis]) if axis in sent else ""


def _beside_rank_0(config: Config, axis: str) -> str:
    """The ranks that differ from rank 0 on this axis alone, itself included."""
    degrees = config.mesh.degrees
    inner = list(degrees)[list(degrees).index(axis) + 1 :]
    stride = prod(degrees[one] for one in inner)
    ranks = [str(place * stride) for place in range(degrees[axis])]
    if len(ranks) > SHOWN_RANKS:
        ranks[SHOWN_RANKS - 2 : -1] = ["..."]
    return " ".join(ranks)


def _memory(expected: Expected) -> str:
    if expected.unknown:
        return f"not known: {expected.unknown}"
    parts = ", ".join(f"{kind} {in_memory(size)}" for kind, size in expected.memory.items() if size)
    return (
        f"{in_memory(expected.peak_bytes)} of tensors expected on rank {expected.rank}, in the"
        f" {expected.peak_phase}:\n{'':<11}{parts}"
    )
