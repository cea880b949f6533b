"""From a data loader's batch to a rank's tokens: packing, labels, the count, and refusals that all share."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from seqmesh import masks
from seqmesh.parallel import LayerKinds, ParallelDims, TokenBatch, pack, shard_batch, shard_micro_batches

IDS = torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 9]])


def numbers(x: Tensor) -> list[int]:
    return x.flatten().tolist()


def test_padding_is_dropped_and_labels_stay_in_their_document() -> None:
    packed = pack(TokenBatch(input_ids=IDS, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1] * 5])))
    assert numbers(packed.input_ids) == [5, 6, 7, 1, 2, 3, 4, 9]
    assert numbers(packed.shift_labels) == [6, 7, -100, 2, 3, 4, 9, -100]
    assert numbers(packed.position_ids) == [0, 1, 2, 0, 1, 2, 3, 4]
    assert packed.mask == masks.documents([3, 5])
    assert packed.label_count == 6


@pytest.mark.parametrize("padding", [[[0, 0, 1, 1, 1]], [[1, 1, 1, 0, 0]]])
def test_padding_on_either_side_and_given_positions(padding: list[list[int]]) -> None:
    kept = torch.tensor(padding).bool()
    positions = torch.zeros(1, 5, dtype=torch.int64)
    positions[kept] = torch.tensor([0, 1, 0])
    batch = TokenBatch(input_ids=IDS[1:], attention_mask=kept, position_ids=positions)
    packed = pack(batch)
    assert packed.mask == masks.documents([2, 1])
    assert numbers(packed.input_ids) == numbers(IDS[1:][kept])


def test_all_three_descriptions_of_documents_agree() -> None:
    ids = torch.arange(10).view(2, 5)
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    a = pack(TokenBatch(input_ids=ids, position_ids=positions))
    b = pack(TokenBatch(input_ids=ids, cu_seqlens=torch.tensor([0, 2, 2, 5, 10], dtype=torch.int32)))
    assert a.mask == b.mask
    for name in ("input_ids", "shift_labels", "position_ids"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_labels_of_ones_own_are_shifted_too() -> None:
    labels = torch.tensor([[-100, -100, 7, 8, 9]])
    packed = pack(TokenBatch(input_ids=IDS[1:], labels=labels))
    assert numbers(packed.shift_labels) == [-100, 7, 8, 9, -100]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"labels": IDS[0]}, r"labels of shape \(5,\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1], [1] * 5])}, "padding at token 1 between"),
        ({"position_ids": torch.ones_like(IDS)}, "where documents begin is open"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens ends at 4 but input_ids holds 10"),
        (
            {"cu_seqlens": torch.tensor([0, 10]), "attention_mask": torch.ones_like(IDS)},
            "both say where documents are",
        ),
        ({"input_ids": IDS[0]}, r"need \(b, s\)"),
    ],
)
def test_what_is_open_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(TokenBatch(**({"input_ids": IDS} | more)))


def document(length: int, seed: int, labelled: int | None = None) -> TokenBatch:
    ids = torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    if labelled is not None:
        labels[:, labelled:] = -100
    return TokenBatch(input_ids=ids, labels=labels)


def counted(dims: ParallelDims) -> tuple[int, int, list[int]]:
    """On one rank: the count of the step, this rank's labels, its rows."""
    mesh = dims.build("cpu")
    data = mesh.rank("dp_shard")
    locals_ = shard_micro_batches([document(11, data), document(7, data, labelled=data + 2)], mesh)
    mine = sum(int((one.shift_labels != -100).sum()) for one in locals_)
    assert len({one.label_count for one in locals_}) == 1
    return locals_[0].label_count, mine, [one.input_ids.shape[1] for one in locals_]


@pytest.mark.parametrize("dims", [{"dp_shard": 2, "ring": 2}, {"dp_shard": 2, "ulysses": 2}, {"dp_shard": 4}])
def test_the_count_is_of_all_ranks_and_micro_batches(ranks: Ranks, dims: dict[str, int]) -> None:
    found = ranks.run(4, counted, ParallelDims(**dims))
    every = range(dims["dp_shard"])
    # 10 labels of 11 tokens, and of the second micro-batch those before its ignored ones
    assert {count for count, _, _ in found} == {sum(10 + data + 1 for data in every)}
    assert sum(mine for _, mine, _ in found) == found[0][0]
    assert sum(rows[0] for *_, rows in found) == 11 * len(every)


def refusal_of(dims: ParallelDims, case: str) -> str:
    """On one rank: why a step is refused."""
    mesh = dims.build("cpu")
    data = mesh.rank("dp_shard")
    batches = {
        "short": [document(9, 0), document(1 if data == 1 else 9, 1)],
        "number": [document(9, 0)] * (1 + data),
        "labels": [document(9, 0, labelled=0)],
    }[case]
    try:
        shard_micro_batches(batches, mesh)
    except ValueError as error:
        return str(error)
    return ""


def test_a_micro_batch_that_leaves_a_rank_without_a_token_is_refused_everywhere(ranks: Ranks) -> None:
    found = ranks.run(4, refusal_of, ParallelDims(dp_shard=2, ring=2), "short")
    assert all("ranks [1] refused a micro-batch" in message for message in found[:2])
    assert all("micro-batch 1: 1 tokens on ring=2 x ulysses=1 leave a rank" in m for m in found[2:])


@pytest.mark.parametrize(
    ("case", "message"), [("number", "[1, 2] micro-batches"), ("labels", "no token of this step")]
)
def test_what_no_step_can_have_is_refused_everywhere(ranks: Ranks, case: str, message: str) -> None:
    for found in ranks.run(4, refusal_of, ParallelDims(dp_shard=2, ring=2), case):
        assert message in found


def test_layers_that_slide_get_a_schedule_over_the_same_layout() -> None:
    local = shard_batch(
        document(20, 0), ParallelDims().build(), layers=LayerKinds(full=1, sliding=1, window=4)
    )
    assert local.sliding_schedule is not None
    assert local.sliding_schedule.layout == local.schedule.layout
    assert local.sliding_schedule.mask == masks.sliding_window(20, 4)
