"""[model] folder: a Hugging Face model as it lies on disk; its config.json, and its weights if it has some.

    config.json               the model; a copy goes into the run's folder, for `seqmesh export` and --resume
    *.safetensors             what training starts from: each rank maps the files and reads its shards
      of other names          (experts by themselves, as Mixtral's): rank 0 converts them, and sends each rank
                              its shards
      none                    random weights from the seed

Nothing is downloaded, and no code of the folder is run.
"""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from seqmesh.integrations.layers import CHUNKED, FULL, SLIDING
from seqmesh.parallel.load import check_folder, names_in_folder, stored_names
from seqmesh.processes import first_line
from seqmesh.train.fingerprint import fingerprint
from seqmesh.train.paths import expanded
from seqmesh.train.sizes import ModelSizes

_CONFIG = "config.json"
Weights = Literal["none", "own", "converted"]


def path_of(folder: str) -> Path:
    """The folder.

    Raises:
        ValueError: there is none, or it has no config.json.
    """
    path = expanded(folder, "model.folder=", "model.folder")
    if not (path / _CONFIG).is_file():
        what = "has no config.json" if path.is_dir() else "is no folder"
        raise ValueError(f"model.folder={folder!r} {what}; pass a folder that save_pretrained wrote")
    return path


def build_random(folder: str, seed: int) -> PreTrainedModel:
    """The model with random fp32 weights, the same wherever it is made.

    Raises:
        ValueError: a config.json of which no causal language model can be made.
    """
    config = config_of(folder)
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Configurations and models have checks, and exceptions, of their own.
    except Exception as error:
        raise _no_model(folder, error) from None


def build_converted(folder: str) -> PreTrainedModel:
    """The whole model with the folder's weights, on the host: for names that need conversion."""
    return AutoModelForCausalLM.from_pretrained(
        path_of(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
    )


def config_of(folder: str) -> PreTrainedConfig:
    """Its configuration.

    Raises:
        ValueError: it cannot be read, or names a model that transformers does not have.
    """
    path = path_of(folder)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise _no_model(folder, error) from None


def _no_model(folder: str, error: Exception) -> ValueError:
    what = first_line(error)
    return ValueError(
        f"model.folder={folder!r} is no causal language model of transformers ({what});"
        " pass a folder that save_pretrained wrote"
    )


def weights_of(folder: str, hollow: PreTrainedModel) -> Weights:
    """Whether there are weights, and by whose names.

    Args:
        folder: the model's.
        hollow: the model on the meta device.

    Raises:
        ValueError: weights that are not all of the model, or have other shapes.
    """
    path = path_of(folder)
    if not any(path.glob("*.safetensors")):
        _check_no_other_weights(path)
        return "none"
    if names_in_folder(hollow) <= stored_names(path):
        check_folder(hollow, path)
        return "own"
    _check_convertible(folder, path)
    return "converted"


def _check_no_other_weights(path: Path) -> None:
    """Weights that are not read must not be taken for none."""
    others = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(pattern)
    )
    if others:
        raise ValueError(
            f"model.folder={str(path)!r} has {others[0]}, and weights are read from .safetensors alone; load"
            " it by from_pretrained and save it by save_pretrained, or remove it to start from random weights"
        )


def _check_convertible(folder: str, path: Path) -> None:
    """Convert names and shapes, and no number: on the meta device nothing is read."""
    try:
        _, found = AutoModelForCausalLM.from_pretrained(
            path, device_map="meta", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        what = first_line(error)
        raise ValueError(
            f"the weights of model.folder={folder!r} cannot be read ({what}); restore its files"
        ) from None
    wrong = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if wrong:
        raise ValueError(
            f"model.folder={folder!r} lacks {len(wrong)} parameters of the model, or has them in other"
            f" shapes, such as {wrong[0]}; pass all .safetensors files of this model"
        )


def check_trainable(model: PreTrainedModel, sizes: ModelSizes, seq_len: int) -> None:
    """Refuse a model that would train otherwise on one rank, or of which a checkpoint would lose a part.

    Raises:
        ValueError: what draws random numbers, tables of too few positions, or buffers that are weights.
    """
    name = type(model).__name__
    chance = [path for path, part in model.named_modules() if isinstance(part, nn.Dropout) and part.p > 0]
    given = model.config.to_dict()
    chance += [key for key, value in given.items() if value and ("jitter" in key or "layerdrop" in key)]
    chance += [f"attention of layer {call.layer}" for call in sizes.calls if call.dropout > 0]
    if chance:
        raise ValueError(
            f"{name} draws random numbers ({chance[0]}), each rank others than one rank would;"
            " set dropouts and jitter to 0 in config.json"
        )
    rows = given.get("max_position_embeddings") or 0
    for path, part in model.named_modules():
        is_of_positions = "position" in path or path.endswith("wpe")
        if isinstance(part, nn.Embedding) and is_of_positions and rows < seq_len:
            raise ValueError(
                f"{name} has learned positions ({path}) for {rows} tokens and data.seq_len={seq_len};"
                f" use data.seq_len <= {rows}"
            )
    types = set(given.get("layer_types") or ())
    for kind, layers in ((SLIDING, sizes.kinds.sliding), (CHUNKED, sizes.kinds.chunked)):
        if kind in types and not layers:
            raise ValueError(
                f"{name} has layers of type {kind}, and no size of it in config.json; add the size, or make"
                f" them {FULL}"
            )
    kept = {full for full, _ in model.named_buffers()} & model.state_dict().keys()
    if kept:
        raise ValueError(
            f"{name} has weights that are no parameters ({min(kept)}), which a run's checkpoints do not hold;"
            " use another model"
        )


def copy_in(run: Path) -> Path:
    """Where a run keeps its model's config.json."""
    return run / "model"


def copy(folder: str, run: Path) -> None:
    """Keep the folder's config.json in a run's folder. Files of weights stay where they are."""
    own = copy_in(run)
    own.mkdir(exist_ok=True)
    source = path_of(folder) / _CONFIG
    if not (own / _CONFIG).exists() or not source.samefile(own / _CONFIG):
        shutil.copyfile(source, own / _CONFIG)


def described(folder: str | Path) -> str:
    """Equal for folders of one model: its config.json but for the version that wrote it, files and sizes."""
    path = path_of(str(folder))
    files = sorted(path.glob("*.safetensors"))
    listed = "".join(f"{file.name} {file.stat().st_size}\n" for file in files)
    return fingerprint([_content(path), listed.encode()])


def is_same_model(folder: str, run: Path) -> bool:
    """Whether a folder's config.json is the one that a run has kept."""
    kept = copy_in(run)
    return (kept / _CONFIG).is_file() and _content(path_of(folder)) == _content(kept)


def _content(path: Path) -> bytes:
    """config.json without what transformers writes of itself and of the dtype on disk."""
    try:
        read = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path / _CONFIG)!r}: {error}; restore it") from None
    ignored = ("transformers_version", "dtype", "torch_dtype", "_name_or_path")
    return json.dumps({key: read[key] for key in sorted(read) if key not in ignored}).encode()
