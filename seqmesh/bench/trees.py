"""What a tree saves: one prompt and its completions as one sequence, against each completion with its prompt.

    paths    p p p p p p a a     8 sequences, one batch, plain causal attention
             p p p p p p b b
    tree     p p p p p p a a b b ...     one sequence, attention over the tree

Both sides run the same decoder layers, forward and backward, in one process with as many threads, in turns.
With completions of a quarter of each path the tree has 0.34 of the paths' tokens and 0.51 of their pairs: a
model's time lies between the two. Here attention is 10% of the FLOPs, as in an 8B model at 6K tokens.

Legend: b batch, s tokens, h heads, d head dim.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.bench.figures import Figure, Spread
from seqmesh.processes import Workers

TARGET = 0.4


@dataclass(frozen=True, kw_only=True)
class TimedTree:
    """Sizes of what is timed, fp32."""

    prompt: int = 768
    completion: int = 256
    completions: int = 8
    hidden: int = 768
    heads: int = 12
    intermediate: int = 2048
    layers: int = 1
    threads: int = 2
    repeats: int = 5
    """Pairs of timed calls, after one that is not counted."""


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of (b, s, h, d) tensors."""


class Layer(nn.Module):
    """A decoder layer without positions: they cost both sides nothing worth timing."""

    def __init__(self, sizes: TimedTree) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=False)
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.gate_up = nn.Linear(sizes.hidden, 2 * sizes.intermediate, bias=False)
        self.down = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(b, s, hidden), as it comes."""
        qkv = self.qkv(F.rms_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1))
        x = x + self.out(attend(*qkv.unbind(2)).flatten(2))
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:])).chunk(2, -1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out


def measure(sizes: TimedTree) -> Iterator[Figure]:
    """The tree's time over the paths'. Forks a worker: call it before any tensor work."""
    with Workers(partial(_worker, sizes), threads=sizes.threads) as workers:
        ratios = Spread.of(workers.ask(None)[0])
    yield Figure(
        section="tree",
        what=f"{sizes.completions} completions sharing {sizes.prompt} of {sizes.prompt + sizes.completion}"
        " tokens, decoder layers forward + backward: tree / separate paths",
        measured=ratios.text(3),
        target=f"<= {TARGET}",
        ok=ratios.median <= TARGET if sizes.hidden >= TimedTree().hidden else None,
        exact=False,
        values=ratios.values("wall_ratio"),
    )


def _worker(sizes: TimedTree) -> Callable[[None], list[float]]:
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
    count = sizes.completions
    tree = masks.Tree(lengths=(sizes.prompt, *[sizes.completion] * count), parents=(None, *[0] * count))
    schedule = Schedule.build(tree.mask, SequenceMesh.build())
    as_tree = torch.randn(1, tree.starts[-1], sizes.hidden)
    as_paths = torch.randn(count, sizes.prompt + sizes.completion, sizes.hidden)

    def over_tree(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, schedule)

    def over_paths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, s, h, d) -> (b, h, s, d)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def seconds(x: Tensor, attend: Attend) -> float:
        start = time.perf_counter()
        for layer in layers:
            x = layer(x, attend)
        x.sum().backward()
        return time.perf_counter() - start

    def handle(_: None) -> list[float]:
        ratios = []
        for repeat in range(sizes.repeats + 1):
            if repeat % 2:
                paths_s = seconds(as_paths, over_paths)
                tree_s = seconds(as_tree, over_tree)
            else:
                tree_s = seconds(as_tree, over_tree)
                paths_s = seconds(as_paths, over_paths)
            ratios.append(tree_s / paths_s)
        return ratios[1:]  # the first calls fill caches

    return handle
