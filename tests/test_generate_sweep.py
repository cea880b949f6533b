"""Every model type that is right on a mesh generates one rank's logits there.

A prompt, a few tokens, a second prompt long enough to be sharded: against the same calls on one rank with
transformers' own cache.
"""

import re
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from tiny_models import VOCABULARY, build
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from seqmesh import SequenceMesh
from seqmesh.generate import ShardedCache
from seqmesh.integrations.mixers import is_mixer
from seqmesh.integrations.transformers import plug_in

LIMIT = 1e-5
"""Norms, rotary tables and routers of fp64 models compute in fp32."""
PAGE = Path(__file__).parent.parent / "docs" / "models.md"


def right_on_a_mesh() -> list[str]:
    (row,) = re.findall(r"^\| right \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return re.findall(r"`([^`]+)`", row)


def steps(model: PreTrainedModel, cache: Cache) -> list[Tensor]:
    """Logits of the last token after a prompt, two more tokens, and a second prompt."""
    generator = torch.Generator().manual_seed(1)
    found = []
    at = 0
    for tokens in (21, 1, 1, 13, 1):
        ids = torch.randint(2, VOCABULARY, (1, tokens), generator=generator)
        positions = torch.arange(at, at + tokens)[None]
        at += tokens
        with torch.no_grad():
            out = model(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(out.logits[:, -1])
    return found


def on_mesh(kind: str) -> Tensor:
    model = plug_in(build(kind).eval())
    cache = ShardedCache(SequenceMesh.build(ulysses=2), model.config)
    return torch.stack(steps(model, cache))


KINDS = right_on_a_mesh()
HYBRIDS = [kind for kind in KINDS if any(map(is_mixer, build(kind, device="meta").modules()))]


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_hybrid_is_refused_before_any_layer_runs(kind: str) -> None:
    model = plug_in(build(kind).eval())
    cache = ShardedCache(SequenceMesh.build(), model.config)
    with pytest.raises(ValueError, match=r"carry a state along the sequence, which no K/V cache of the mesh"):
        steps(model, cache)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HYBRIDS])
def test_a_model_type_generates_what_one_rank_does(ranks: Ranks, kind: str) -> None:
    got = ranks.run(2, on_mesh, kind)
    model = build(kind).eval()
    expected = torch.stack(steps(model, DynamicCache(config=model.config)))
    error = max(float((one - expected).abs().max() / expected.abs().max()) for one in got)
    assert error < LIMIT
    assert torch.equal(got[0], got[1])
