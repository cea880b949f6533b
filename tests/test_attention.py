"""Attention on real ranks against the dense fp64 oracle: output and all gradients.

Over layout x mask x mesh x heads x length.
"""

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from flash_ops import EmulatedFlash
from oracle import Case, assemble, attend, build, compare, dense, local_inputs
from ranks import Ranks

from seqmesh import attention, masks
from seqmesh.engine.kernels import Kernel
from seqmesh.engine.ulysses import unit_last_stride
from seqmesh.masks import Band, Mask
from seqmesh.schedule.heads import OVERLAPPED_CHUNKS

MESHES = [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (4, 2), (2, 4), (1, 8)]
EVERY_MESH = [
    pytest.param((u, r), id=f"u{u}r{r}", marks=[pytest.mark.fast] if (u, r) == (2, 2) else [])
    for u, r in MESHES
]

MASKS = {
    "causal": masks.causal(48),
    "causal, odd length": masks.causal(53),
    "full, odd length": masks.full(41),
    "window": masks.sliding_window(61, 9),
    "window with sink tokens": masks.sliding_window(45, 6, sink_tokens=3),
    "documents": masks.documents([5, 1, 23, 0, 12, 9]),
    "documents, not causal": masks.documents([5, 1, 23, 12, 9], causal=False),
    "windows in documents": masks.documents([30, 3, 17]) & masks.sliding_window(50, 7),
    "prefix": masks.prefix_lm(47, 13),
    "chunked": masks.chunked(50, 16),
    "fewer tokens than ranks": masks.causal(3),
    "one token": masks.causal(1),
    "no token": masks.causal(0),
    "rows that see nothing": Mask(33, 33, (Band(4, 20, 2, 30, lo=1, hi=6), Band(25, 33, 0, 10, lo=20))),
    "looks ahead": Mask(40, 40, (Band(0, 40, 0, 40, lo=-6, hi=-1),)),
    "cross": masks.cross(29, 51),
    "cross, causal to the end": Mask(20, 51, (Band(0, 20, 0, 51, lo=-31),)),
}


def check(ranks: Ranks, cases: list[Case]) -> None:
    """Run cases of any world sizes, batched by world, and compare each with the oracle."""
    by_world = defaultdict(list)
    for case in cases:
        by_world[case.ulysses * case.ring].append(case)
    for world, group in by_world.items():
        results = ranks.run(world, attend, group)
        for n, case in enumerate(group):
            compare(case, assemble(case, [rank[n] for rank in results]), dense(case))


@pytest.mark.parametrize("mesh", EVERY_MESH)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_on_every_mesh_and_layout(ranks: Ranks, name: str, mesh: tuple[int, int]) -> None:
    u, r = mesh
    mask = MASKS[name]
    layouts = ["auto", "contiguous", "zigzag", "striped"] + (["balanced"] if mask.q_len == mask.k_len else [])
    check(ranks, [Case(mask=mask, ulysses=u, ring=r, layout=layout) for layout in layouts])


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(4, 1), (4, 2), (6, 2), (6, 3), (5, 5), (7, 1), (8, 2), (9, 3), (12, 4), (13, 13)]
)
@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (4, 1), (2, 2), (4, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_any_number_of_query_and_kv_heads(
    ranks: Ranks, heads: int, kv_heads: int, mesh: tuple[int, int]
) -> None:
    u, r = mesh
    case = Case(mask=masks.causal(37), ulysses=u, ring=r, heads=heads, kv_heads=kv_heads, batch=2)
    check(ranks, [replace(case, head_chunks=chunks) for chunks in (None, 2, 3)])


@pytest.mark.parametrize("mask", ["causal, odd length", "cross"])
@pytest.mark.parametrize(
    "mesh",
    [(2, 1), (3, 1), pytest.param((2, 2), marks=pytest.mark.fast)],
    ids=lambda mesh: f"u{mesh[0]}r{mesh[1]}",
)
def test_chunks_of_heads_that_travel_beside_one_another_are_put_together_right(
    ranks: Ranks, mesh: tuple[int, int], mask: str
) -> None:
    """From six chunks on one is computed while the next one's heads travel and the last one's land."""
    u, r = mesh
    chunks = OVERLAPPED_CHUNKS
    case = Case(mask=MASKS[mask], ulysses=u, ring=r, heads=chunks * u, kv_heads=chunks * u)
    uneven = replace(case, heads=(chunks + 1) * u, kv_heads=(chunks + 1) * u, head_chunks=chunks)
    # Two query heads to each K/V head, and one K/V head that two ranks use: its gradients add up.
    shared = replace(case, heads=2 * (chunks * u + 1), kv_heads=chunks * u + 1)
    cases = [
        replace(case, head_chunks=chunks),
        replace(case, head_chunks=chunks - 1),
        replace(uneven, sinks=True, batch=2),
        replace(shared, head_chunks=chunks),
        replace(shared, head_chunks=chunks, dtype=torch.bfloat16),
    ]
    check(ranks, cases)


def test_a_chunk_may_have_as_many_heads_as_a_head_has_numbers(ranks: Ranks) -> None:
    """No size is taken for another by its value."""
    for u, r in ((1, 1), (1, 2), (2, 1)):
        case = Case(mask=masks.causal(21), ulysses=u, ring=r, heads=8 * u, kv_heads=8 * u, head_dim=4)
        check(ranks, [replace(case, head_chunks=2, batch=batch) for batch in (1, 4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 4), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_every_dtype_is_as_exact_as_it_can_be(
    ranks: Ranks, dtype: torch.dtype, mesh: tuple[int, int], kernel: str
) -> None:
    u, r = mesh
    case = Case(mask=masks.documents([20, 13]), ulysses=u, ring=r, layout="zigzag", heads=4, kv_heads=2)
    check(ranks, [replace(case, dtype=dtype, kernel=kernel)])


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_softcap_sinks_scale_and_batch(ranks: Ranks, mesh: tuple[int, int]) -> None:
    u, r = mesh
    case = Case(mask=masks.sliding_window(39, 11), ulysses=u, ring=r, heads=6, kv_heads=3)
    # Rows without a key: a sink takes all the weight, the output is 0.
    keyless = Case(mask=Mask(20, 20, (Band(5, 20, 0, 9, lo=0),)), ulysses=u, ring=r)
    cases = [
        replace(case, softcap=2.0),
        replace(case, sinks=True),
        replace(case, sinks=True, head_chunks=3, batch=2),
        replace(case, softcap=0.7, sinks=True, scale=0.9, batch=3),
        replace(case, scale=0.4),
        replace(keyless, sinks=True),
        replace(case, strided=True, batch=2),
    ]
    check(ranks, cases)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7])
def test_any_number_of_stages_from_ring_to_all_gather(ranks: Ranks, stages: int) -> None:
    for mask in (masks.causal(64), masks.documents([40, 3, 21])):
        case = Case(mask=mask, ring=8, stages=stages)
        check(ranks, [replace(case, layout=layout) for layout in ("zigzag", "contiguous", "striped")])


def sum_of_outputs(case: Case) -> list[list[float]]:
    """On one rank: how gradients of `out.sum()`, which sends back stride 0, differ from real ones."""
    schedule = build(case)
    found = []
    for loss in (lambda out: out.sum(), lambda out: (out * torch.ones_like(out)).sum()):
        (q, k, v), _, _ = local_inputs(case, schedule)
        loss(attention(q, k, v, schedule)).backward()
        found.append([x.grad for x in (q, k, v)])
    return [(a - b).abs().max().item() for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_a_head_may_have_one_number(ranks: Ranks, mesh: tuple[int, int]) -> None:
    case = Case(mask=masks.causal(13), ulysses=mesh[0], ring=mesh[1], head_dim=1)
    wide = replace(case, head_dim=3)
    check(ranks, [case, replace(case, value_head_dim=3), replace(wide, value_head_dim=1)])


def test_only_what_flash_kernels_cannot_read_is_copied() -> None:
    """They read the numbers of a head as one run of memory."""
    x = torch.randn(2, 6, 3, 8)
    for readable in (x, x.transpose(1, 2), x[:, ::2]):
        assert unit_last_stride(readable) is readable
    for scattered in (x.transpose(2, 3), x[..., ::2], x[..., :1].expand(2, 6, 3, 8)):
        copied = unit_last_stride(scattered)
        assert copied.stride(-1) == 1
        assert torch.equal(copied, scattered)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_an_expanded_incoming_gradient_is_read_right(ranks: Ranks, mesh: tuple[int, int]) -> None:
    case = Case(mask=masks.causal(21), ulysses=mesh[0], ring=mesh[1])
    for errors in ranks.run(mesh[0] * mesh[1], sum_of_outputs, case):
        assert max(errors) < 1e-14


def test_large_logits_neither_overflow_nor_lose_rows(ranks: Ranks) -> None:
    """exp of a difference of unnormalised sums would overflow here; merging by log-sum-exp must not."""
    case = Case(
        mask=masks.causal(40),
        ring=4,
        layout="contiguous",
        logit_scale=300.0,
        dtype=torch.float32,
        kernel="reference",
    )
    results = ranks.run(4, attend, [case])
    got, want = assemble(case, [rank[0] for rank in results]), dense(case)
    assert torch.isfinite(got.out).all()
    # Logits near 1000 carry an fp32 error of 1e-4 into the exponent: the tolerance follows from that, not
    # from the merge.
    assert (got.out - want.out).abs().max() < 2e-3


def test_the_result_is_the_same_bit_for_bit_when_repeated(ranks: Ranks) -> None:
    case = Case(
        mask=masks.documents([31, 33]),
        ulysses=2,
        ring=2,
        heads=4,
        kv_heads=1,
        dtype=torch.float32,
        layout="zigzag",
    )
    for rank in ranks.run(4, attend, [case, case, case]):
        for repeat in rank[1:]:
            for name, value in rank[0].items():
                assert value is None or (value == repeat[name]).all(), name


def random_mask(draw: random.Random) -> Mask:
    """Any named mask of up to 69 tokens, or one of two odd bands, or two of them intersected."""
    s = draw.randrange(1, 70)
    lengths = []
    while sum(lengths) < s:
        lengths.append(min(s - sum(lengths), draw.randrange(0, 25)))
    ahead_of_diagonal = Band(0, s // 2, 0, s, hi=draw.randrange(-5, 9))
    behind_it = Band(s // 2, s, s // 3, s, lo=draw.randrange(-9, 5))
    choices = [
        masks.documents(lengths, causal=draw.random() < 0.7),
        masks.causal(s),
        masks.sliding_window(s, draw.randrange(1, 20), draw.randrange(0, 4)),
        masks.prefix_lm(s, draw.randrange(0, s + 1)),
        masks.chunked(s, draw.randrange(1, 20)),
        Mask(s, s, (ahead_of_diagonal, behind_it)),
    ]
    mask = draw.choice(choices)
    return mask & draw.choice(choices) if draw.random() < 0.4 else mask


def random_case(draw: random.Random) -> Case:
    """Any mask x layout x mesh x heads x options that attention accepts."""
    u, r = draw.choice(MESHES)
    kv_heads = draw.randrange(1, 5)
    softcap = draw.choice([None, None, 1.5])
    kernels: list[str | Kernel] = ["auto", "auto", "reference"]
    if softcap is None:
        kernels.append(EmulatedFlash())
    return Case(
        mask=random_mask(draw),
        ulysses=u,
        ring=r,
        layout=draw.choice(["auto", "contiguous", "zigzag", "striped", "balanced"]),
        heads=kv_heads * draw.randrange(-(-u // kv_heads), 5 + u),
        kv_heads=kv_heads,
        head_dim=draw.choice([1, 2, 8, 20]),
        value_head_dim=draw.choice([None, None, 3, 16]),
        batch=draw.randrange(1, 4),
        softcap=softcap,
        sinks=draw.random() < 0.3,
        stages=draw.choice([None, "auto", draw.randrange(1, r)]) if r > 1 else None,
        head_chunks=draw.choice([None, 1, 2, 3]),
        strided=draw.random() < 0.3,
        kernel=draw.choice(kernels),
        seed=draw.randrange(1 << 30),
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_problems(ranks: Ranks, seed: int) -> None:
    draw = random.Random(seed)
    check(ranks, [random_case(draw) for _ in range(25)])


def test_values_may_have_a_head_dim_of_their_own(ranks: Ranks) -> None:
    """As in latent attention: keys of 192, values of 128."""
    for u, r in ((1, 1), (2, 1), (1, 2), (2, 2)):
        case = Case(
            mask=masks.causal(23), ulysses=u, ring=r, heads=6, kv_heads=3, head_dim=24, layout="zigzag"
        )
        kernels: list[str | Kernel] = ["cpu", "reference", EmulatedFlash()]
        shapes = [replace(case, value_head_dim=e, sinks=e == 16) for e in (1, 16, 40)]
        check(ranks, [replace(shape, kernel=kernel) for shape in shapes for kernel in kernels])


def test_half_precision_blocks_are_cut_by_rows_where_ranks_hold_many(ranks: Ranks) -> None:
    """A piece is computed and added before the next, so that a kernel's output stays small."""
    case = Case(mask=masks.causal(2600), ring=2, layout="zigzag", heads=1, kv_heads=1, dtype=torch.bfloat16)
    check(ranks, [case])


def minus_infinite_sink() -> tuple[torch.Tensor, torch.Tensor]:
    """On one rank: gradients of sinks of which one is -inf, with queries that see nothing."""
    schedule = build(Case(mask=Mask(8, 8, (Band(4, 8, 0, 8),))))
    q, k, v = (torch.randn(1, 8, 2, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.tensor([-torch.inf, 0.0], dtype=torch.float64, requires_grad=True)
    out = attention(q, k, v, schedule, sinks=sinks)
    out.square().sum().backward()
    return out.detach(), sinks.grad


def test_a_sink_of_minus_infinity_is_no_sink_and_has_no_nan_gradient(ranks: Ranks) -> None:
    ((out, grad),) = ranks.run(1, minus_infinite_sink)
    assert torch.isfinite(out).all()
    assert grad[0] == 0
    assert torch.isfinite(grad[1])


def kv_gradient_of_four_heads() -> torch.Tensor:
    """On one rank of four: dv (n, d) in bf16 of one K/V head whose query heads lie on a rank each."""
    schedule = build(Case(mask=masks.documents([1] * 8), ulysses=4))
    q = torch.randn(1, 2, 4, 8).bfloat16()
    k = torch.randn(1, 2, 1, 8).bfloat16()
    v = torch.randn(1, 2, 1, 8).bfloat16().requires_grad_()
    grad = torch.tensor([256.0, 1.0, 1.0, 0.0]).bfloat16().view(1, 1, 4, 1).expand(1, 2, 4, 8)
    attention(q, k, v, schedule).backward(grad)
    return v.grad[0, :, 0]


def test_gradients_of_a_kv_head_that_several_ulysses_ranks_use_add_up_in_fp32(ranks: Ranks) -> None:
    """A token that sees itself alone passes the gradient on as it is: dv = 256 + 1 + 1.

    The sum is exact in bf16, but 256 + 1 is not: added one by one in bf16 it would stay 256.
    """
    for grad in ranks.run(4, kv_gradient_of_four_heads):
        assert (grad == 258).all()
