"""What each rank of `seqmesh generate` does: load the model, read the prompt over the mesh, tell what comes.

Every rank has the whole weights; what is spread is the prompt's work and the cache. Rank 0 tells.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer

from seqmesh.engine.mesh import SequenceMesh
from seqmesh.generate.cache import ShardedCache
from seqmesh.integrations.transformers import plug_in
from seqmesh.processes import Place, first_line
from seqmesh.train import device as devices
from seqmesh.train.gathering import gather_objects

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is to be generated, and where."""

    model: Path
    prompt: str
    ulysses: int
    ring: int
    new_tokens: int
    chunk: int | None
    """Tokens of the prompt that are read at a time; None: all."""
    temperature: float
    """0: the likeliest token, always."""
    top_p: float
    seed: int
    device: devices.Device
    dtype: str


class Begun(NamedTuple):
    """The model is there."""

    prompt_tokens: int
    layers: int
    """Of all parts of the prompt."""
    longest: int | None
    """Positions that the model was made for, if it says so."""


class LayerRead(NamedTuple):
    """One more layer of a part of the prompt is done."""


class Text(NamedTuple):
    """More text."""

    text: str


class Done(NamedTuple):
    """The end, and what it took."""

    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds_after: float
    cache_bytes: list[int]
    """Keys and values of every rank."""
    peak_bytes: list[int]
    """Of every rank's process, or GPU."""


Tell = Callable[[Any], None]


def work(asked: GenerationRequest, place: Place, tell: Tell) -> None:
    """A rank's work.

    Raises:
        ValueError: no such model or tokenizer, or a prompt without a token.
    """
    if asked.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.world))
    devices.claim(asked.device, place.rank)
    told = tell if place.rank == 0 else _nothing
    ids, tokenizer = _prompt(asked)
    model = plug_in(_model(asked))
    mesh = SequenceMesh.build(ulysses=asked.ulysses, ring=asked.ring)
    cache = _ToldCache(mesh, model.config, told)
    tokens = ids.shape[1]
    parts = -(-tokens // (asked.chunk or tokens))
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    told(Begun(tokens, parts * len(cache.layers), longest))
    streamer = _Told(tokenizer, told)
    start = time.perf_counter()
    found = _generate(model, ids.to(model.device), cache, asked, streamer)
    stop = time.perf_counter()
    first = streamer.first or stop
    held = sum(x.nbytes for rows in cache.layers for x in (rows.keys, rows.values) if x is not None)
    everyone = gather_objects((held, devices.peak_memory_bytes(asked.device)), place.world)
    told(
        Done(
            prompt_tokens=tokens,
            new_tokens=found.shape[1] - tokens,
            prompt_seconds=first - start,
            seconds_after=stop - first,
            cache_bytes=[held for held, _ in everyone],
            peak_bytes=[peak for _, peak in everyone],
        )
    )


def _nothing(_: Any) -> None:
    """Other ranks than 0 tell nothing."""


def _prompt(asked: GenerationRequest) -> tuple[Tensor, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(asked.model, local_files_only=True)
    except Exception as error:  # tokenizers have exceptions of their own
        raise _unusable(asked.model, "no tokenizer that transformers reads", error) from None
    ids = tokenizer(asked.prompt, return_tensors="pt").input_ids
    if not ids.shape[1]:
        raise ValueError("the prompt has no token; pass a --prompt file with some text")
    return ids, tokenizer


def _model(asked: GenerationRequest) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            asked.model, dtype=DTYPES[asked.dtype], local_files_only=True
        )
    except Exception as error:  # so have models
        raise _unusable(asked.model, "no causal language model of transformers with weights", error) from None
    return model.to(asked.device).eval()


def _unusable(folder: Path, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"--model {folder}: {what} ({first_line(error)}); pass a folder that save_pretrained wrote"
    )


def _generate(
    model: PreTrainedModel, ids: Tensor, cache: ShardedCache, asked: GenerationRequest, streamer: "_Told"
) -> Tensor:
    """(1, prompt and new tokens), the same on every rank."""
    torch.manual_seed(asked.seed)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if asked.temperature > 0:
        how = {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
    found: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=asked.new_tokens,
        prefill_chunk_size=asked.chunk,
        streamer=streamer,
        **how,
    )
    return found


class _ToldCache(ShardedCache):
    """A cache that tells of every layer of the prompt."""

    def __init__(self, mesh: SequenceMesh, config: Any, tell: Tell) -> None:
        super().__init__(mesh, config)
        self._tell = tell

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if key_states.shape[2] > 1:
            self._tell(LayerRead())
        found: tuple[Tensor, Tensor] = super().update(key_states, *args, **kwargs)
        return found


class _Told(TextStreamer):  # type: ignore[misc]  # transformers has no types here
    """Tells text as it comes, and notes when the first token did."""

    def __init__(self, tokenizer: Any, tell: Tell) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt and self.first is None:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._tell(Text(text))
        if stream_end:
            self._tell(Text("\n"))
