"""A schedule encoded as numbers, for torch.compile, comes back as it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmesh import layouts, masks
from seqmesh.engine.encoding import EncodedFields, decode, encode
from seqmesh.layouts import Layout
from seqmesh.masks import Band, Mask

pytestmark = pytest.mark.fast


BOUND = st.none() | st.integers(-9, 9)


def layout_of(name: str, s: int, ring: int) -> Layout:
    return {"zigzag": layouts.zigzag, "striped": layouts.striped, "contiguous": layouts.contiguous}[name](
        s, ring
    )


@given(
    st.lists(st.integers(0, 20), max_size=4),
    BOUND,
    BOUND,
    st.sampled_from(["zigzag", "striped", "contiguous"]),
    st.integers(1, 5),
    st.none() | st.integers(1, 3),
    st.booleans(),
)
def test_every_field_comes_back(
    lengths: list[int],
    lo: int | None,
    hi: int | None,
    name: str,
    ring: int,
    stages: int | None,
    own_keys: bool,
) -> None:
    s = sum(lengths)
    mask = masks.documents(lengths) & Mask(s, s, (Band(0, s, 0, s, lo, hi),))
    layout = layout_of(name, s, ring)
    fields = EncodedFields(
        mask=mask,
        ulysses=3,
        ulysses_rank=2,
        ring_rank=ring - 1,
        stages=stages,
        layout=layout,
        kv_layout=layouts.contiguous(s, ring) if own_keys else layout,
    )
    decoded = decode(encode(fields).numpy().tobytes())
    assert decoded == fields
    assert (decoded.kv_layout is decoded.layout) == (not own_keys)
