"""Trees: mask, positions and predictions by brute force; attention and a model against paths run apart."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hf_models import VOCABULARY, model_of
from hypothesis import given
from hypothesis import strategies as st
from oracle import mesh_of
from ranks import Ranks
from torch import Tensor, nn
from torch.nn import functional as F
from wrong_input import refused

from seqmesh import Schedule, attention, layouts, masks
from seqmesh.integrations.transformers import plug_in
from seqmesh.layouts import load
from seqmesh.masks import Band, Mask, Tree

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]

TREES = {
    "one prompt, eight completions": Tree(lengths=(12, *[4] * 8), parents=(None, *[0] * 8)),
    "branches of branches": Tree(lengths=(7, 5, 3, 9, 4, 2, 6), parents=(None, 0, 1, 1, 0, 4, 4)),
    "level by level": Tree(lengths=(7, 5, 4, 3, 9, 2, 6), parents=(None, 0, 0, 1, 1, 2, 2)),
    "a chain": Tree(lengths=(5, 6, 7), parents=(None, 0, 1)),
    "two prompts and empty segments": Tree(
        lengths=(6, 0, 5, 8, 0, 3, 0), parents=(None, 0, 1, None, 3, 4, 3)
    ),
}


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    count = draw(st.integers(0, 7))
    parents = [draw(st.none() | st.integers(0, n - 1)) if n else None for n in range(count)]
    return Tree(lengths=tuple(draw(st.integers(0, 4)) for _ in parents), parents=tuple(parents))


def tokens_of(tree: Tree, path: tuple[int, ...]) -> list[int]:
    return [token for segment in path for token in range(tree.starts[segment], tree.starts[segment + 1])]


def brute_paths(tree: Tree) -> list[list[int]]:
    """Tokens of every path, from the definition: each leaf, and its parents up to a root."""
    found = []
    for leaf in range(len(tree.lengths)):
        if leaf in tree.parents:
            continue
        path = []
        segment: int | None = leaf
        while segment is not None:
            path.insert(0, segment)
            segment = tree.parents[segment]
        found.append(tokens_of(tree, tuple(path)))
    return found


@pytest.mark.fast
@given(trees())
def test_every_token_sees_its_ancestors_and_itself(tree: Tree) -> None:
    expected = np.zeros((sum(tree.lengths),) * 2, dtype=bool)
    for path in brute_paths(tree):
        for at, token in enumerate(path):
            expected[token, path[: at + 1]] = True
            assert tree.positions[token] == at
    np.testing.assert_array_equal(tree.mask.dense(), expected)
    assert masks.tree(list(tree.lengths), list(tree.parents)) == tree.mask
    assert [tokens_of(tree, path) for path in tree.paths] == brute_paths(tree)
    assert len(tree.positions) == sum(tree.lengths)


@pytest.mark.fast
@given(trees(), st.integers(1, 9))
def test_a_window_counts_tokens_of_the_path(tree: Tree, window: int) -> None:
    expected = np.zeros((sum(tree.lengths),) * 2, dtype=bool)
    for path in brute_paths(tree):
        for at, token in enumerate(path):
            expected[token, path[max(0, at + 1 - window) : at + 1]] = True
    np.testing.assert_array_equal(tree.window(window).dense(), expected)


@pytest.mark.fast
def test_a_window_makes_no_bands_for_ancestors_out_of_its_reach() -> None:
    chain = Tree(lengths=(10,) * 30, parents=(None, *range(29)))
    assert len(chain.window(11).bands) == 30 + 29
    assert len(chain.window(12).bands) == 30 + 29 + 28


@pytest.mark.fast
@given(st.data(), trees())
def test_predictions_weigh_each_step_by_the_paths_that_take_it(data: st.DataObject, tree: Tree) -> None:
    paths = brute_paths(tree)
    weights = data.draw(st.none() | st.lists(st.integers(-5, 5), min_size=len(paths), max_size=len(paths)))
    expected: dict[tuple[int, int], float] = {}
    for path, weight in zip(paths, weights or [1] * len(paths), strict=True):
        for step in pairwise(path):
            expected[step] = expected.get(step, 0) + weight
    sources, targets, got = tree.predictions(weights)
    assert len(set(targets)) == len(targets)
    assert dict(zip(zip(sources, targets, strict=True), got, strict=True)) == expected


@pytest.mark.fast
def test_in_depth_first_order_a_segment_is_one_band_and_a_chain_is_one() -> None:
    tree = TREES["branches of branches"]
    assert len(tree.mask.bands) == len(tree.lengths)
    assert TREES["a chain"].mask == masks.causal(18)
    assert masks.tree([4, 0, 5], [None, 0, 1]) == masks.causal(9)
    # The first completion has a completion of its own, right behind it: together one band.
    chain = (Band(2, 5, 2, 5, 0), Band(0, 6, 0, 2, 0), Band(5, 6, 5, 6, 0))
    assert masks.tree([2, 1, 2, 1], [None, 0, 1, 0]) == Mask(6, 6, chain)


@pytest.mark.fast
def test_eight_completions_that_share_three_quarters_have_a_third_of_the_tokens() -> None:
    tree = Tree(lengths=(750, *[250] * 8), parents=(None, *[0] * 8))
    apart = sum(len(tokens_of(tree, path)) for path in tree.paths)
    assert sum(tree.lengths) / apart == 2.75 / 8


@pytest.mark.fast
@pytest.mark.parametrize("ring", [8, 64])
def test_a_balanced_layout_spreads_a_tree_evenly(ring: int) -> None:
    mask = masks.tree([98304, *[32768] * 8], [None, *[0] * 8])
    worst = {}
    for layout in (layouts.auto(mask, ring), layouts.zigzag(mask.q_len, ring)):
        worst[layout.name] = max(load.areas(mask, layout)) * ring / mask.area
    assert worst["balanced"] <= 1.005
    assert worst["zigzag"] > 1.15


@pytest.mark.fast
@pytest.mark.parametrize(
    ("what", "build_tree"),
    [
        ("a tree of 2 lengths and 1 parents", lambda: masks.tree([3, 4], [None])),
        ("segment 1 has -4 tokens", lambda: masks.tree([3, -4], [None, 0])),
        ("segment 1 continues segment 1, which does not", lambda: masks.tree([3, 4], [None, 1])),
        ("segment 0 continues segment -1", lambda: masks.tree([3], [-1])),
        ("2.5 is not a whole number of tokens", lambda: masks.tree([2.5], [None])),
        ("window=0: a token sees at least itself", lambda: TREE.window(0)),
        ("2.5 is not a whole number", lambda: TREE.window(2.5)),
        ("weights=[1.0] of a tree of 2 paths", lambda: TREE.predictions([1.0])),
        ("of a tree of 2 paths; pass one finite", lambda: TREE.predictions([1.0, float("nan")])),
    ],
)
def test_what_is_no_tree_is_refused_with_the_rule_and_the_remedy(what: str, build_tree: Any) -> None:
    refused(what, build_tree)


TREE = Tree(lengths=(2, 1, 1), parents=(None, 0, 0))
WEIGHTS = [1.0, -0.5, 2.0, 0.25, 3.0, -1.0, 0.5, 1.5]
"""Of up to eight paths."""
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def inputs(s: int) -> list[Tensor]:
    """Global q, k, v and the outputs' weights in the loss: (1, s, heads, d) each."""
    make = torch.Generator().manual_seed(s)
    shapes = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(1, s, heads, HEAD_DIM, generator=make, dtype=torch.float64) for heads in shapes]


def over_tree(tree: Tree, mesh: tuple[int, int]) -> list[Tensor]:
    """On one rank: global output and gradients of q, k and v, of attention over the tree.

    The loss is the weighted sum over the paths of their outputs times fixed numbers, so a token's output
    counts once for each path that holds it.
    """
    ulysses, ring = mesh
    schedule = Schedule.build(tree.mask, mesh_of(ulysses, ring))
    q, k, v, numbers = (schedule.shard(x, 1) for x in inputs(tree.mask.q_len))
    local = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*local, schedule)
    through = torch.zeros(tree.mask.q_len, dtype=torch.float64)
    for path, weight in zip(tree.paths, WEIGHTS, strict=False):
        through[tokens_of(tree, path)] += weight
    (out * numbers * schedule.shard(through, 0)[None, :, None, None]).sum().backward()
    return [schedule.unshard(x, 1) for x in (out.detach(), *(x.grad for x in local))]


def path_by_path(tree: Tree) -> list[Tensor]:
    """The oracle: dense causal attention over each path by itself; gradients summed over the paths."""
    given = inputs(tree.mask.q_len)
    found = [torch.full_like(given[0], torch.nan), *(torch.zeros_like(x) for x in given[:3])]
    for path, weight in zip(brute_paths(tree), WEIGHTS, strict=False):
        q, k, v, numbers = (x[:, path].clone().requires_grad_() for x in given)
        repeated = (x.repeat_interleave(HEADS // KV_HEADS, 2) for x in (k, v))
        transposed = (x.transpose(1, 2) for x in (q, *repeated))
        out = F.scaled_dot_product_attention(*transposed, is_causal=True).transpose(1, 2)
        (weight * out * numbers).sum().backward()
        found[0][:, path] = out.detach()
        for total, x in zip(found[1:], (q, k, v), strict=True):
            total[:, path] += x.grad
    return found


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("name", TREES)
def test_attention_over_a_tree_is_that_of_its_paths_apart(
    ranks: Ranks, name: str, mesh: tuple[int, int]
) -> None:
    """In fp64, to the rounding of sums of a hundred terms of order 1 to 10."""
    tree = TREES[name]
    want = path_by_path(tree)
    for got in ranks.run(mesh[0] * mesh[1], over_tree, tree, mesh):
        for what, mine, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            error = (mine - theirs).abs().max() / theirs.abs().max()
            assert error <= 1e-12, f"{what} is off by {error:.2e} of its largest entry"


def ids_of(tree: Tree) -> Tensor:
    """Token ids (s,) of a tree."""
    return torch.randint(2, VOCABULARY, (sum(tree.lengths),), generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def model_over_tree(tree: Tree, mesh: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """On one rank: the loss over the tree and all gradients, each summed over ranks."""
    ulysses, ring = mesh
    model = plug_in(model_of("llama"))
    schedule = Schedule.build(tree.mask, mesh_of(ulysses, ring))
    ids = ids_of(tree)
    logits = model(
        schedule.shard(ids[None], 1),
        position_ids=schedule.shard(torch.tensor(tree.positions)[None], 1),
        schedule=schedule,
    ).logits[0]
    sources, targets, weights = (
        torch.tensor(column) for column in tree.predictions(WEIGHTS[: len(tree.paths)])
    )
    # Every rank knows all ids, so a step belongs to the rank of its source and needs no communication.
    place = torch.full((len(ids),), -1)
    place[schedule.positions()] = torch.arange(len(logits))
    here = place[sources] >= 0
    steps = F.cross_entropy(logits[place[sources[here]]], ids[targets[here]], reduction="none")
    loss = (steps * weights[here]).sum()
    loss.backward()
    grads = gradients(model)
    for summed in (loss.detach(), *grads.values()):
        if dist.get_world_size() > 1:
            dist.all_reduce(summed)
    return loss.detach(), grads


def model_path_by_path(tree: Tree) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle: transformers' own attention over each path by itself, summed."""
    model = model_of("llama")
    ids = ids_of(tree)
    total = torch.zeros((), dtype=torch.float64)
    for path, weight in zip(brute_paths(tree), WEIGHTS, strict=False):
        logits = model(ids[None, path], use_cache=False).logits[0]
        loss = weight * F.cross_entropy(logits[:-1], ids[path][1:], reduction="sum")
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("name", ["branches of branches", "one prompt, eight completions"])
def test_a_model_over_a_tree_has_the_loss_and_gradients_of_its_paths_apart(
    ranks: Ranks, name: str, mesh: tuple[int, int]
) -> None:
    tree = TREES[name]
    want, want_grads = model_path_by_path(tree)
    for got, got_grads in ranks.run(mesh[0] * mesh[1], model_over_tree, tree, mesh):
        # Norms compute in fp32: the last bit of a float there, 1.2e-7, is all that may differ.
        assert abs(got - want) <= 1e-8 * abs(want)
        assert got_grads.keys() == want_grads.keys()
        for parameter, grad in got_grads.items():
            theirs = want_grads[parameter]
            error = (grad - theirs).abs().max() / theirs.abs().max()
            assert error <= 1e-6, f"{parameter} is off by {error:.2e} of its largest entry"
