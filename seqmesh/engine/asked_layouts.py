"""The layouts of queries and keys, as `Schedule.build` is asked for them: by name, or as they are."""

from seqmesh import layouts
from seqmesh.layouts import Layout
from seqmesh.masks import Mask


def layouts_of(
    mask: Mask, ring: int, layout: str | Layout, kv_layout: str | Layout | None
) -> tuple[Layout, Layout]:
    """Layouts of the queries and of the keys, as of `Schedule.build`."""
    if kv_layout is None and mask.q_len == mask.k_len:
        q_layout = keys = _named(layout, mask, ring)
    else:
        keys = _layout_of_keys(mask, ring, layout if kv_layout is None else kv_layout)
        q_layout = _named(layout, mask, ring, keys)
    for held in (q_layout, keys):
        if held.ring != ring:
            raise ValueError(
                f"the layout is for ring={held.ring} but the mesh has ring={ring}; build it for {ring}"
            )
    return q_layout, keys


def _layout_of_keys(mask: Mask, ring: int, layout: str | Layout) -> Layout:
    """A layout of the keys by themselves; nothing balances them for the queries that see them."""
    if isinstance(layout, Layout):
        return layout
    name = "contiguous" if layout in ("auto", "balanced") else layout
    return layouts.named(name, mask, mask.k_len, ring)


def _named(layout: str | Layout, mask: Mask, ring: int, keys: Layout | None = None) -> Layout:
    """A layout of the queries that was given or named; over `keys`, if those have one of their own."""
    if isinstance(layout, Layout):
        return layout
    if keys is not None and keys.ring == ring and layout in ("auto", "balanced"):
        choose = layouts.auto if layout == "auto" else layouts.balanced
        return choose(mask, ring, kv_layout=keys)
    return layouts.named(layout, mask, mask.q_len, ring)
