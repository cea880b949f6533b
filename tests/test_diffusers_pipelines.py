"""Whole pipelines on 4 ranks give the pixels of one rank; seeds, bytes and numbers of tokens."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusion_models import Example, exactly, example, run
from oracle import mesh_of
from ranks import Ranks

from seqmesh.engine.exchange import CountBytes
from seqmesh.integrations.diffusers import plug_in, same_seed, unplug
from seqmesh.integrations.diffusion.shards import TokenShards
from seqmesh.integrations.diffusion.tokens import Tokens


def pixels(name: str, ulysses: int, ring: int) -> list[Any]:
    """On one rank: the 8-bit pixels of the pipeline alone, of the plugged-in one, and unplugged again."""
    import diffusion_pipelines

    tiny = getattr(diffusion_pipelines, name)()
    found = []
    with exactly(), torch.no_grad():
        for change in (None, lambda model: plug_in(model, mesh_of(ulysses, ring)), unplug):
            if change is not None:
                change(tiny.pipe.transformer)
            image = tiny.call(generator=torch.Generator().manual_seed(2))
            found.append((image * 255).round().to(torch.uint8))
    return found


@pytest.mark.filterwarnings("default")  # diffusers warns about its own deprecations
@pytest.mark.parametrize(("ulysses", "ring"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_whole_pipeline_gives_the_pixels_of_one_rank(
    ranks: Ranks, name: str, ulysses: int, ring: int
) -> None:
    results = ranks.run(4, pixels, name, ulysses, ring)
    want = results[0][0]
    assert want.float().std() > 1  # not an even grey
    for alone, plugged, unplugged in results:
        assert torch.equal(plugged, want)
        assert torch.equal(alone, want)
        assert torch.equal(unplugged, want)


def with_own_seeds(agree: bool) -> Any:
    """On one rank: what a pipeline without a generator gives, where every rank was seeded differently."""
    import diffusion_pipelines

    tiny = diffusion_pipelines.flux()
    mesh = mesh_of(2, 2)
    plug_in(tiny.pipe.transformer, mesh)
    torch.manual_seed(100 + dist.get_rank())
    seed = same_seed(mesh) if agree else None
    try:
        return seed, tiny.call()
    except ValueError as error:
        return seed, str(error)


@pytest.mark.filterwarnings("default")
def test_ranks_that_draw_other_noise_are_refused_on_every_rank(ranks: Ranks) -> None:
    for _, message in ranks.run(4, with_own_seeds, False):
        assert "ranks of one mesh got different hidden_states, so" in message
        assert "same_seed(mesh)" in message


@pytest.mark.filterwarnings("default")
def test_one_seed_for_all_ranks_makes_them_agree(ranks: Ranks) -> None:
    results = ranks.run(4, with_own_seeds, True)
    assert {seed for seed, _ in results} == {100}
    assert all(torch.equal(image, results[0][1]) for _, image in results)


def with_roundings(compare_inputs: bool) -> Any:
    """On one rank: the change of the output where every rank's text is rounded differently, or the error."""
    model, arguments = example("flux")
    alone = run(Example(model, dict(arguments)))[0]
    plug_in(model, mesh_of(2, 2), compare_inputs=compare_inputs)
    rounded = arguments["encoder_hidden_states"] * (1 + 1e-13 * dist.get_rank())
    try:
        out = run(Example(model, arguments | {"encoder_hidden_states": rounded}))[0]
    except ValueError as error:
        return str(error)
    return (out - alone).abs().max().item()


def test_inputs_that_are_rounded_differently_are_refused_unless_nobody_compares(ranks: Ranks) -> None:
    for message in ranks.run(4, with_roundings, True):
        assert "got different encoder_hidden_states, so" in message
        assert "compare_inputs=False" in message
    assert max(ranks.run(4, with_roundings, False)) <= 1e-10


def plain_values_differ() -> str:
    """On one rank: the error where ranks were given other numbers beside the same tensors."""
    model, arguments = example("ltx")
    plug_in(model, mesh_of(2, 2))
    other = {"height": 5, "width": 3} if dist.get_rank() == 2 else {}
    with pytest.raises(ValueError, match="got different") as error:
        model(**arguments | other)
    return str(error.value)


def test_plain_values_are_compared_too(ranks: Ranks) -> None:
    for message in ranks.run(4, plain_values_differ):
        assert "got different height, width, so" in message


def chosen_seeds() -> list[int]:
    mesh = mesh_of(2, 2)
    return [same_seed(mesh, seed) for seed in (7, (1 << 64) - 1, 1 << 63)]


def test_any_seed_of_64_bits_can_be_chosen(ranks: Ranks) -> None:
    for seeds in ranks.run(4, chosen_seeds):
        assert seeds == [7, (1 << 64) - 1, 1 << 63]


BYTES = 8
"""Of fp64, and of the whole numbers by which calls are compared."""


def counted(name: str, tokens: Tokens, attentions: int, channels: int, ulysses: int, ring: int) -> list[int]:
    """On one rank: bytes sent in a forward and a backward, and what the schedules say."""
    case = example(name)
    mesh = mesh_of(ulysses, ring)
    plug_in(case.model, mesh)
    with CountBytes() as count:
        run(Example(case.model, case.arguments))
    shards = TokenShards(tokens, mesh, text_first=True)
    expected = 0
    for samples, schedule in shards.groups:
        sent = schedule.traffic(batch=samples.count(2), heads=3, kv_heads=3, head_dim=8, dtype=torch.float64)
        expected += attentions * (sent.forward_bytes + sent.backward_bytes)
    # The image is gathered over ulysses and then over the ring. Calls are compared over both.
    rows = shards.image.rows
    expected += 2 * channels * BYTES * rows[mesh.ulysses_rank] * (ulysses - 1)
    expected += 2 * channels * BYTES * sum(rows) * (ring - 1)
    expected += 2 * (len(_argument_names(case)) * BYTES) * (ulysses - 1 + ring - 1)
    return [count.bytes_sent, expected]


def _argument_names(case: Example) -> list[str]:
    import inspect

    return list(inspect.signature(case.model.forward).parameters)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 4), (2, 2)])
@pytest.mark.parametrize(
    ("name", "tokens", "channels"),
    [
        ("flux", Tokens(text=5, image=15), 4),
        (
            "qwen",
            Tokens(text=7, image=15, seen_text=((True,) * 7, (True, True, False, False, True, True, False))),
            8,
        ),
    ],
)
def test_bytes_are_those_of_the_schedules_the_gather_and_the_comparison(
    ranks: Ranks, name: str, tokens: Tokens, channels: int, ulysses: int, ring: int
) -> None:
    for sent, expected in ranks.run(4, counted, name, tokens, 2, channels, ulysses, ring):
        assert sent == expected


def flux_at_1008(ulysses: int, ring: int) -> tuple[int, int, int]:
    """On one rank of FLUX.1 at 1008 x 1008: text tokens, image tokens, bytes sent by one attention."""
    shards = TokenShards(Tokens(text=512, image=63 * 63), mesh_of(ulysses, ring), text_first=True)
    (group,) = shards.groups
    sent = group.schedule.traffic(batch=1, heads=24, kv_heads=24, head_dim=128, dtype=torch.bfloat16)
    return len(shards.piece.text), len(shards.piece.image), sent.forward_bytes


ROW = 24 * 128 * 2
"""Bytes of one token in bf16."""


def test_flux_at_1008_by_1008_has_near_equal_tokens_and_moves_each_row_once(ranks: Ranks) -> None:
    for text, image, sent in ranks.run(4, flux_at_1008, 1, 4):
        assert text == 128
        assert image in (992, 993)
        # Ring: a rank's keys and values to each of the three others.
        assert sent == 3 * 2 * (text + image) * ROW


def test_flux_at_1008_by_1008_on_ulysses_swaps_three_quarters_of_its_rows(ranks: Ranks) -> None:
    for text, image, sent in ranks.run(4, flux_at_1008, 4, 1):
        rows = text + image
        # q, k and v of 18 heads for others; and 6 heads of the output for the rows of others.
        assert sent == 3 * rows * (18 * 128 * 2) + (4481 - rows) * (6 * 128 * 2)


def two_at_once() -> bool:
    """On one rank: two transformers on meshes of their own, called in turns."""
    first, second = example("flux"), example("flux")
    alone = run(Example(first.model, first.arguments))[0]
    plug_in(first.model, mesh_of(2, 2))
    plug_in(second.model, mesh_of(1, 4))
    results = [run(Example(*case))[0] for case in (first, second, first)]
    unplug(first.model)
    results.append(run(Example(*second))[0])
    return all(torch.allclose(result, alone, rtol=0, atol=1e-10) for result in results)


def test_two_transformers_on_two_meshes_work_in_one_process(ranks: Ranks) -> None:
    assert all(ranks.run(4, two_at_once))
