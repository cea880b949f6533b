"""What a K/V cache over ranks costs and saves: a prompt and new tokens, against one process.

    seqmesh bench generate [--quick] [--json FILE]

    one process    the same model and prompt, transformers' own attention and cache, both cores     1.00
    four ranks     ShardedCache, ulysses 2 x ring 2, on those two cores: reading the prompt         <= 1.15
                   K and V of a rank, of one process's                                              1/4
                   collectives of a new token, a layer                                              1

Sides take turns within one run, as in speed.py.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from seqmesh.bench.figures import Figure, Spread
from seqmesh.bench.report import run_figures
from seqmesh.bench.speed import Timing, clocked, in_turns, wall_seconds
from seqmesh.engine.exchange import CountBytes, Watch
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.generate import ShardedCache
from seqmesh.integrations.transformers import plug_in
from seqmesh.parallel.traffic import is_collective
from seqmesh.processes import Workers

PROMPT_TARGET = 1.15
LAYERS = 4
RANKS = 4
THREADS = 2
"""Of the one process."""


@dataclass(frozen=True, kw_only=True)
class GenerationSizes:
    """What is timed."""

    tokens: int = 8192
    new_tokens: int = 16
    hidden: int = 512
    heads: int = 8
    repeats: int = 5
    """Pairs that count."""
    is_judged: bool = True
    """Whether times are long enough to mean something."""


QUICK = GenerationSizes(tokens=512, new_tokens=2, hidden=64, repeats=1, is_judged=False)


class GenerationRun(NamedTuple):
    """One worker's part of a prompt and its new tokens."""

    prompt: Timing
    after: Timing
    cache_bytes: int
    """Keys and values after the prompt."""
    bytes_sent: int
    """By this rank for a new token."""
    collectives: int
    """Of a new token."""


def run_generation(quick: bool, json_path: Path | None) -> int:
    """Measure and print everything: the exit code. Forks workers: call it before any tensor work.

    Raises:
        ValueError: json_path cannot be written; before anything is measured.
    """
    return run_figures(measure_generation(QUICK if quick else GenerationSizes()), quick, json_path)


def measure_generation(sizes: GenerationSizes) -> Iterator[Figure]:
    """The figures, in the order of the table above."""
    with ExitStack() as stack:
        alone = stack.enter_context(Workers(partial(_alone, sizes), threads=THREADS))
        ranks = stack.enter_context(Workers(partial(_on_ranks, sizes), world=RANKS))
        pairs = in_turns(alone, ranks, None, sizes.repeats)
    section = f"generation, {sizes.tokens:,} tokens, {LAYERS} layers of {sizes.hidden}"
    yield from _times(section, sizes, pairs)
    yield from _counts(section, *pairs[-1])


Runs = list[GenerationRun]


def _times(section: str, sizes: GenerationSizes, pairs: list[tuple[Runs, Runs]]) -> Iterator[Figure]:
    parts: dict[str, Callable[[GenerationRun], Timing]] = {
        "reading the prompt": lambda run: run.prompt,
        f"{sizes.new_tokens} new tokens": lambda run: run.after,
    }
    for what, part in parts.items():
        ratio = Spread.of(
            [wall_seconds(map(part, ours)) / wall_seconds(map(part, plain)) for plain, ours in pairs]
        )
        is_prompt = what == "reading the prompt"
        yield Figure(
            section=section,
            what=f"{what}: time of {RANKS} ranks / one process's",
            measured=ratio.text(3),
            target=f"<= {PROMPT_TARGET}" if is_prompt else "",
            ok=ratio.median <= PROMPT_TARGET if is_prompt and sizes.is_judged else None,
            exact=False,
            values=ratio.values("wall_ratio"),
        )


def _counts(section: str, plain: Runs, ours: Runs) -> Iterator[Figure]:
    most = max(run.cache_bytes for run in ours)
    yield Figure(
        section=section,
        what="K and V of the fullest rank / one process's",
        measured=f"{most / plain[0].cache_bytes:.4f}",
        target="<= 0.251",
        ok=most / plain[0].cache_bytes <= 0.251,
        exact=True,
        values={"cache_bytes": most, "share": most / plain[0].cache_bytes},
    )
    collectives = max(run.collectives for run in ours)
    yield Figure(
        section=section,
        what="collectives of a new token without the digest's; bytes with it",
        measured=f"{collectives - 1} in {LAYERS} layers, {ours[0].bytes_sent:,} bytes a rank",
        target=f"{LAYERS}",
        ok=collectives - 1 == LAYERS,
        exact=True,
        values={"collectives": collectives - 1, "bytes_sent": ours[0].bytes_sent},
    )


def _model(sizes: GenerationSizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads // 2,
        vocab_size=512,
        max_position_embeddings=2 * sizes.tokens,
    )
    return LlamaForCausalLM(config).eval()


def _alone(sizes: GenerationSizes) -> Callable[[None], GenerationRun]:
    model = _model(sizes)

    def handle(_: None) -> GenerationRun:
        return _measured(model, DynamicCache(config=model.config), sizes)

    return handle


def _on_ranks(sizes: GenerationSizes) -> Callable[[None], GenerationRun]:
    model = plug_in(_model(sizes))
    mesh = SequenceMesh.build(ulysses=2, ring=2)

    def handle(_: None) -> GenerationRun:
        dist.barrier()  # requests reach the ranks one after the other
        return _measured(model, ShardedCache(mesh, model.config), sizes)

    return handle


class _CountCollectives(Watch):
    """Collectives, and messages, that are started."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += int(is_collective(func) and "wait" not in str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _measured(model: Any, cache: Any, sizes: GenerationSizes) -> GenerationRun:
    ids = torch.randint(3, 500, (1, sizes.tokens), generator=torch.Generator().manual_seed(1))

    def forward(tokens: Any) -> Any:
        seen = cache.get_seq_length()
        positions = torch.arange(seen, seen + tokens.shape[1])[None]
        return model(tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)

    prompt = clocked(lambda: forward(ids))
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    forward(ids[:, :1])  # makes room for more, once
    after = clocked(lambda: [forward(ids[:, :1]) for _ in range(sizes.new_tokens)])
    with CountBytes() as sent, _CountCollectives() as collectives:
        forward(ids[:, :1])
    return GenerationRun(prompt, after, held, sent.bytes_sent, collectives.count)
