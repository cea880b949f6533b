"""The configuration of a training run: a frozen dataclass for each section of a recipe.

The defaults are the default recipe (recipes/stdlib.toml spells them out; a test keeps the two equal). Types
are checked by recipe.py, ranges and combinations here, so a `Config` that exists can be run.

    rules.py   sizes.py   mesh.py   model.py   lora.py   data.py   optimisation.py   running.py  ->  whole.py
"""

from seqmesh.train.config.data import DataConfig
from seqmesh.train.config.lora import AdapterConfig
from seqmesh.train.config.mesh import AXES, MeshConfig
from seqmesh.train.config.model import ModelConfig
from seqmesh.train.config.optimisation import TrainConfig
from seqmesh.train.config.running import AUTO, LONGEST_TIMEOUT_S, RunConfig
from seqmesh.train.config.sizes import DecoderSizes
from seqmesh.train.config.whole import Config, check_fits

__all__ = [
    "AUTO",
    "AXES",
    "LONGEST_TIMEOUT_S",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "DecoderSizes",
    "MeshConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "check_fits",
]
