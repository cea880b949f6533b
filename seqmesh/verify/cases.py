"""Cases of `seqmesh verify` as data and as text: what one comparison is made of, and which are run.

    causal(53); ulysses=2 ring=2 layout=zigzag dtype=bf16 kernel=cpu heads=6 kv_heads=2 head_dim=8 batch=2

That text, printed when the case fails, is the case: `--case` reads it back. Pure: no torch, so a mistake in
it is found before torch is loaded.

Every row of the table, a mask family with a dtype and a kernel, meets every mesh and layout. Masks and
shapes, of which there are fewer, take turns along the row, each row beginning at another one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import get_type_hints

from seqmesh.layouts import NAMES as LAYOUTS
from seqmesh.masks import Mask
from seqmesh.notation import family_of, mask_of

DTYPES = ("fp64", "fp32", "bf16", "fp16")
DEVICES = ("cpu", "cuda")
MODES = ("eager", "compile", "checkpoint", "autocast")
"""How attention is called: as it is, in a full graph, recomputed in the backward, with fp32 inputs under an
autocast to the case's dtype."""


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One attention on a mesh, small enough for a dense oracle."""

    mask: str
    """As text, see notation.py."""
    ulysses: int = 1
    ring: int = 1
    layout: str = "auto"
    dtype: str = "fp32"
    kernel: str = "auto"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    value_head_dim: int | None = None
    """None: as `head_dim`."""
    batch: int = 1
    softcap: float | None = None
    sinks: bool = False
    mode: str = "eager"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no rank could run.

        Raises:
            ValueError: a name that is none, or a size below 1.
        """
        names = (("layout", LAYOUTS), ("dtype", DTYPES), ("mode", MODES), ("device", DEVICES))
        for name, known in names:
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)} is unknown; use {', '.join(known)}")
        for name in ("ulysses", "ring", "heads", "kv_heads", "head_dim", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} in a case; use at least 1")
        if self.value_head_dim is not None and self.value_head_dim < 1:
            raise ValueError(f"value_head_dim={self.value_head_dim} in a case; use at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} with kv_heads={self.kv_heads}; use a multiple")

    @property
    def world(self) -> int:
        """Ranks of the mesh."""
        return self.ulysses * self.ring

    @property
    def what(self) -> str:
        """Its row of the table: how attention is called if that is special, else the mask's families."""
        called = {"compile": "torch.compile", "checkpoint": "activation checkpointing"}
        return called.get(self.mode, self.mode) if self.mode != "eager" else family_of(self.mask)

    def made_mask(self) -> Mask:
        """The mask that the text spells out.

        Raises:
            ValueError: it spells none.
        """
        return mask_of(self.mask)

    def __str__(self) -> str:
        """The text that `parse` reads: the mask, and every other field that is not the default."""
        words = [f"{self.mask};"]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"{field.name}={int(value) if field.type is bool else value}")
        return " ".join(words)


def parse(text: str) -> AttentionCase:
    """The case that a text spells out.

    Raises:
        ValueError: what in it is no mask, no field or no number.
    """
    mask, _, rest = text.partition(";")
    mask_of(mask)
    types = get_type_hints(AttentionCase)
    del types["mask"]
    given: dict[str, object] = {}
    for word in rest.split():
        name, _, value = word.partition("=")
        if name not in types:
            raise ValueError(f"{word!r} in a case: {name!r} is no field; use {', '.join(types)}")
        given[name] = _read(word, value, types[name])
    return AttentionCase(mask=mask.strip(), **given)  # type: ignore[arg-type]


def _read(word: str, value: str, kind: object) -> object:
    """A field's value, as its type reads it."""
    try:
        if kind is str:
            return value
        if kind is bool:
            return bool(int(value))
        return float(value) if kind == float | None else int(value)
    except ValueError:
        raise ValueError(f"{word!r} in a case needs a number; write it as name=number") from None


FAMILIES: tuple[tuple[str, ...], ...] = (
    ("causal(53)", "causal(517)", "causal(3)"),
    ("full(41)", "full(48)"),
    ("sliding_window(61, 9)", "sliding_window(45, 6, sink_tokens=3)", "sliding_window(521, 150)"),
    (
        "documents([5, 1, 23, 0, 12, 9])",
        "documents([5, 1, 23, 12, 9], causal=False)",
        "documents([300, 217, 4])",
    ),
    (
        "documents([30, 3, 17]) & sliding_window(50, 7)",
        "documents([330, 190]) & sliding_window(520, 140)",
    ),
    ("prefix_lm(47, 13)", "prefix_lm(530, 201)"),
    ("chunked(50, 16)", "chunked(520, 300)"),
    ("cross(29, 51)", "cross(40, 16)"),
    ("tree([20, 9, 14, 5], [None, 0, 0, 1])", "tree([260, 150, 140], [None, 0, 0])"),
    ("rows([causal(20), sliding_window(20, 3)])",),
    ("from_cu_seqlens([0, 5, 33])",),
    ("from_position_ids([0, 1, 2, 0, 1, 0, 1, 2, 3])",),
    ("from_padding([1, 1, 1, 1, 1, 0, 0])",),
    ("from_key_mask([1, 1, 0, 1, 1, 1, 0, 0, 1])",),
    # Looks ahead only; rows that see nothing, and keys that nobody sees.
    (
        "Mask(40, 40, [Band(0, 40, 0, 40, lo=-6, hi=-1)])",
        "Mask(33, 33, [Band(4, 20, 2, 30, lo=1, hi=6), Band(25, 33, 0, 10, lo=20)])",
        "Mask(400, 400, [Band(0, 400, 0, 400, lo=-250, hi=-70)])",
    ),
)
"""Masks of a row: odd lengths, fewer tokens than some meshes have ranks, empty documents, empty rows.

The long ones are for kernels that cut bands: one of up to 128 x 128 pairs, or less than 128 diagonals, may
be a single call.
"""

LONG = (
    "causal(2051)",
    "documents([1400, 37, 614])",
    "sliding_window(2051, 700)",
)
"""As long as the oracle's pairs in fp64 are small."""

SHAPES = (
    AttentionCase(mask="", heads=4, kv_heads=4, head_dim=16),
    AttentionCase(mask="", heads=6, kv_heads=2, head_dim=8, value_head_dim=24, batch=2),
    AttentionCase(mask="", heads=7, kv_heads=1, head_dim=24, sinks=True),
    AttentionCase(mask="", heads=5, kv_heads=5, head_dim=16, batch=2, softcap=2.0),
    AttentionCase(mask="", heads=6, kv_heads=3, head_dim=64, softcap=1.5, sinks=True),
)
"""Heads that do not divide by 2 or 4, grouped, one K/V head for all; wide values; batches; softcap; sinks."""

QUICK_LAYOUTS = ("zigzag", "striped", "balanced")


@dataclass(frozen=True, kw_only=True)
class Support:
    """A kernel and a dtype that can be tried here."""

    kernel: str
    dtype: str
    device: str
    softcap: bool
    """Whether the kernel takes a softcap in this dtype; where not, it is left out."""
    value_head_dim: bool
    """The same of values with a head dim of their own."""


def grid(
    meshes: Sequence[tuple[int, int]], supported: Sequence[Support], *, quick: bool
) -> Iterator[AttentionCase]:
    """All cases for these (ulysses, ring) meshes, row after row; then the ways of calling."""
    for row, texts in enumerate(FAMILIES):
        for number, support in enumerate(supported):
            for turn, (mesh, layout) in enumerate(_places(meshes, quick)):
                text = texts[(turn + number) % len(texts)]
                shape = SHAPES[(turn + number + row) % len(SHAPES)]
                case = _placed(replace(shape, mask=text, layout=layout, seed=turn), mesh, support)
                yield _with_layout_of_its_own(case)
    if not quick:
        yield from _long(meshes, supported)
    yield from _ways_of_calling(meshes[0], supported)


def _long(meshes: Sequence[tuple[int, int]], supported: Sequence[Support]) -> Iterator[AttentionCase]:
    """On a GPU, of which a short sequence keeps a part alone busy: a long one with every kernel and dtype."""
    gpus = [support for support in supported if support.device != "cpu"]
    for number, support in enumerate(gpus):
        for turn, mesh in enumerate(meshes):
            text = LONG[(turn + number) % len(LONG)]
            yield _placed(
                AttentionCase(mask=text, heads=8, kv_heads=2, head_dim=64, seed=turn), mesh, support
            )


def _places(meshes: Sequence[tuple[int, int]], quick: bool) -> Iterator[tuple[tuple[int, int], str]]:
    """Every mesh with every layout; without a ring they are all one."""
    for mesh in meshes:
        _, ring = mesh
        names = LAYOUTS if not quick else QUICK_LAYOUTS
        for layout in names if ring > 1 else names[:1]:
            yield mesh, layout


def _placed(case: AttentionCase, mesh: tuple[int, int], support: Support) -> AttentionCase:
    """The case on a mesh with a kernel: enough heads, and no softcap where the kernel has none."""
    ulysses, ring = mesh
    heads = case.heads
    if heads < ulysses:  # one group more than needed, so that they do not divide
        heads = case.kv_heads * (-(-ulysses // case.kv_heads) + 1)
    return replace(
        case,
        ulysses=ulysses,
        ring=ring,
        heads=heads,
        softcap=case.softcap if support.softcap else None,
        value_head_dim=case.value_head_dim if support.value_head_dim else None,
        kernel=support.kernel,
        dtype=support.dtype,
        device=support.device,
    )


def _with_layout_of_its_own(case: AttentionCase) -> AttentionCase:
    """Balanced and auto look at queries and keys as one: cross-attention has no such layout."""
    mask = case.made_mask()
    if mask.q_len != mask.k_len and case.layout == "balanced":
        return replace(case, layout="contiguous")
    return case


def _ways_of_calling(mesh: tuple[int, int], supported: Sequence[Support]) -> Iterator[AttentionCase]:
    """Recomputation and autocast with every kernel; one full graph."""
    packed = AttentionCase(mask="documents([20, 33])", layout="zigzag", heads=6, kv_heads=2, batch=2)
    for support in supported:
        case = _placed(packed, mesh, support)
        if support.dtype == "fp32":
            yield replace(case, mode="checkpoint")
        if support.dtype == "bf16":
            yield replace(case, mode="checkpoint")
            yield replace(case, mode="autocast")
    if supported:
        yield replace(_placed(packed, mesh, supported[0]), mode="compile")
