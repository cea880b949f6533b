"""Kinds of layers: the pairs that each allows are those of its mask, and one layout serves all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqmesh import layouts, masks
from seqmesh.integrations.calls import LayerCall
from seqmesh.parallel import LayerKinds, PackedTokens, ParallelDims, shard_batch
from seqmesh.parallel.layer_kinds import allowed_pairs

pytestmark = pytest.mark.fast


def packed(lengths: list[int]) -> PackedTokens:
    ids = torch.arange(sum(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return PackedTokens(
        input_ids=ids, shift_labels=ids, position_ids=positions, mask=masks.documents(lengths)
    )


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 12), st.integers(1, 12))
def test_pairs_are_the_areas_of_the_masks(lengths: list[int], window: int, chunk: int) -> None:
    kinds = LayerKinds(full=1, sliding=2, chunked=3, window=window, chunk=chunk)
    found = kinds.masks_of(packed(lengths))
    assert found.full is not None
    assert found.sliding is not None
    assert found.chunked is not None
    assert found.full.area == sum(allowed_pairs(n) for n in lengths)
    assert found.sliding.area == sum(allowed_pairs(n, window=window) for n in lengths)
    assert found.chunked.area == sum(allowed_pairs(n, chunk=chunk) for n in lengths)
    assert kinds.counts() == (1, 2, 3)
    assert found.present() == (found.full, found.sliding, found.chunked)


def test_chunks_count_from_the_start_of_a_document() -> None:
    kinds = LayerKinds(chunked=1, chunk=3)
    alone = kinds.masks_of(packed([5])).chunked
    assert alone == masks.documents([3, 2])
    assert kinds.masks_of(packed([4, 5])).chunked == masks.documents([3, 1, 3, 2])


def test_the_layout_is_the_one_for_all_kinds_by_their_layers() -> None:
    lengths = [300, 20, 20, 20, 20, 20]
    kinds = LayerKinds(full=1, sliding=5, window=16)
    text = packed(lengths)
    found = kinds.masks_of(text)
    local = shard_batch(text, ParallelDims().build(), layers=kinds, layout="balanced")
    assert local.schedule.layout == layouts.balanced(found.present(), 1, weights=(1, 5))
    assert local.sliding_schedule is not None
    assert local.sliding_schedule.layout == local.schedule.layout
    assert local.chunked_schedule is None


def test_a_model_all_of_whose_layers_slide_has_one_schedule() -> None:
    local = shard_batch(packed([9]), ParallelDims().build(), layers=LayerKinds(sliding=4, window=2))
    assert local.schedule is local.sliding_schedule
    assert local.schedule.mask == masks.sliding_window(9, 2)


def call(layer: int, window: int | None = None, chunk: int | None = None) -> LayerCall:
    return LayerCall(
        layer=layer, heads=2, kv_heads=1, key_dim=4, value_dim=4, window=window, chunk=chunk, dropout=0.0
    )


def test_kinds_are_counted_from_what_layers_call() -> None:
    calls = [call(0), call(1, window=5), call(2, window=5), call(3, chunk=7)]
    assert LayerKinds.of(calls) == LayerKinds(full=1, sliding=2, chunked=1, window=5, chunk=7)
    assert LayerKinds.of([call(0)]) == LayerKinds(full=1)
    with pytest.raises(ValueError, match="windows of 5 and 6 tokens"):
        LayerKinds.of([call(0, window=5), call(1, window=6)])
    with pytest.raises(ValueError, match="chunks of 5 and 6 tokens"):
        LayerKinds.of([call(0, chunk=6), call(1, chunk=5)])


@pytest.mark.parametrize(
    "wrong",
    [{"sliding": 1}, {"full": 1, "window": 3}, {"chunked": 1, "chunk": 0}, {"full": 1, "sliding": -1}],
)
def test_limits_without_layers_and_layers_without_limits_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give a number of at least 1, for layers that have it"):
        LayerKinds(**wrong)


def test_a_model_has_a_layer() -> None:
    with pytest.raises(ValueError, match="a model has at least one layer"):
        LayerKinds()
