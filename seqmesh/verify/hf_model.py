"""The model and the batch of `seqmesh verify --model`: a local folder or config.json, nothing downloaded.

Without weights the model gets random ones, the same on every rank. The batch is packed documents of random
ids: a few long ones, a few short ones, one of a single token, and a number of tokens that nothing divides.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from seqmesh import masks
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.sharding import Schedule
from seqmesh.integrations.transformers import plug_in
from seqmesh.masks import Mask
from seqmesh.processes import first_line

SEED = 0
TOKENS = 251
"""Of the batch, or as many as the model has positions."""
SHARES = (0.37, 0.004, 0.2, 0.02)
"""Of the first documents, in parts of the batch; the last one gets the rest."""
FULL = "full_attention"
SLIDING = "sliding_attention"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """A batch of one packed sequence."""

    lengths: tuple[int, ...]
    ids: Tensor
    """(1, s)"""
    labels: Tensor
    """(1, s), shifted inside documents; -100 at their ends"""
    positions: Tensor
    """(1, s), from 0 in every document"""

    @property
    def label_count(self) -> int:
        """Tokens that have something to predict."""
        return int((self.labels != -100).sum())


def has_weights(given: Path) -> bool:
    """Whether a folder holds weights; a config.json alone is asked for without those beside it."""
    return given.is_dir() and any(any(given.glob(pattern)) for pattern in WEIGHTS)


def config_file(given: Path) -> Path:
    """The config.json that was given, or that a folder holds.

    Raises:
        ValueError: there is none, or it names no model type.
    """
    file = given / "config.json" if given.is_dir() else given
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        named = None
    if not named:
        raise ValueError(
            f"--model {given}: no Hugging Face config.json with a model_type there;"
            " pass a local folder or file (nothing is downloaded)"
        )
    return file


def build(given: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with transformers' own attention, the same in every process.

    Raises:
        ValueError: transformers cannot build it.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    try:
        config = AutoConfig.from_pretrained(config_file(given), local_files_only=True)
        if has_weights(given):
            model = AutoModelForCausalLM.from_pretrained(
                given, config=config, local_files_only=True, dtype=torch.float32, **eager
            )
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager)
    # Each configuration class of transformers has checks, and exceptions, of its own.
    except Exception as error:
        what = first_line(error)
        raise ValueError(
            f"--model {given}: transformers cannot build it ({what}); pass a causal LM"
        ) from None
    return model.to(dtype).eval()


def check(given: Path) -> None:
    """Raise what building and plugging in would raise, without allocating or computing.

    Raises:
        ValueError: a model that transformers cannot build, or that cannot be plugged in.
    """
    logging.set_verbosity_error()
    file = config_file(given)
    with torch.device("meta"):
        plug_in(build(file, torch.float32))


def packed(vocabulary: int, most: int | None) -> PackedBatch:
    """The batch for a vocabulary and, if the model has a limit, at most so many tokens."""
    s = TOKENS if most is None else min(TOKENS, most)
    lengths = [max(1, int(share * s)) for share in SHARES]
    lengths.append(s - sum(lengths))
    source = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, vocabulary, (1, s), generator=source)
    labels = ids.roll(-1, 1)
    labels[0, torch.tensor(lengths).cumsum(0) - 1] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return PackedBatch(lengths=tuple(lengths), ids=ids, labels=labels, positions=positions)


def masks_of(config: Any, lengths: tuple[int, ...]) -> dict[str, Mask]:
    """What a model's layers see, by transformers' names of layer types: full, sliding, or both kinds."""
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ()) & {FULL, SLIDING}
    if not types:
        types = {FULL} if window is None else {SLIDING}
    documents = masks.documents(lengths)
    found = {FULL: documents} if FULL in types else {}
    if SLIDING in types:
        assert window is not None
        found[SLIDING] = documents & masks.sliding_window(sum(lengths), window)
    return found


def schedules_of(seen: Mapping[str, Mask], mesh: SequenceMesh) -> dict[str, Schedule]:
    """The keywords of a plugged-in model's forward."""
    first, *others = seen.values()
    schedule = Schedule.build(first, mesh)
    found = {"schedule": schedule}
    if others:
        found["sliding_schedule"] = Schedule.build(others[0], mesh, layout=schedule.layout)
    return found


def dense_masks(seen: Mapping[str, Mask], dtype: torch.dtype, device: torch.device) -> Any:
    """What transformers' own attention adds to its logits: (1, 1, s, s); by layer type if there are two."""
    dense = {}
    for name, mask in seen.items():
        forbidden = ~torch.from_numpy(mask.dense()).to(device)
        zeros = torch.zeros(1, 1, mask.q_len, mask.k_len, dtype=dtype, device=device)
        dense[name] = zeros.masked_fill(forbidden, torch.finfo(dtype).min)
    return dense if len(dense) > 1 else next(iter(dense.values()))
