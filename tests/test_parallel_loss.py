"""The loss from hidden states equals cross entropy of all logits, on one rank or a sharded vocabulary."""

import pytest
import torch
from meshes import mesh_of
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from seqmesh.parallel import HeadRule, ParallelDims, hidden_loss

ROWS, HIDDEN, VOCABULARY = 13, 8, 21


def given(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (1, n, H), weight (V, H), labels (1, n) of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (1, ROWS), generator=generator)
    labels[0, [2, 12]] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def expected(softcap: float | None) -> list[Tensor]:
    """Loss, gradient of hidden, gradient of weight, from whole logits."""
    hidden, weight, labels = given()
    logits = hidden[0] @ weight.T
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    loss = F.cross_entropy(logits, labels[0], reduction="sum") / 50
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_the_loss_is_cross_entropy_in_chunks_of_any_size(chunk_rows: int, softcap: float | None) -> None:
    hidden, weight, labels = given()
    loss = hidden_loss(hidden, weight, labels, 50, HeadRule(chunk_rows=chunk_rows, softcap=softcap))
    got = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
    for a, b in zip(got, expected(softcap), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def with_sharded_vocabulary(softcap: float | None) -> list[Tensor]:
    mesh = mesh_of(ParallelDims(tp=4))
    hidden, whole, labels = given()
    weight = distribute_tensor(whole.detach(), mesh.tp, [Shard(0)]).requires_grad_()
    loss = hidden_loss(hidden, weight, labels, 50, HeadRule(chunk_rows=4, softcap=softcap))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert isinstance(grads[1], DTensor)
    return [loss.detach(), grads[0], grads[1].full_tensor()]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_vocabulary_that_does_not_divide_by_tp(ranks: Ranks, softcap: float | None) -> None:
    for got in ranks.run(4, with_sharded_vocabulary, softcap):
        for a, b in zip(got, expected(softcap), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_logits_of_all_rows_never_exist() -> None:
    hidden = torch.randn(1, 300, 4, requires_grad=True)
    weight = torch.randn(50, 4, requires_grad=True)
    labels = torch.randint(0, 50, (1, 300))
    with LargestTensor() as seen:
        hidden_loss(hidden, weight, labels, 300, HeadRule(chunk_rows=7)).backward()
    assert seen.elements <= max(hidden.numel(), weight.numel(), 7 * 50)


class CountProducts(TorchDispatchMode):
    """Matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("is_trained", "is_frozen", "products"), [(True, False, 3), (True, True, 2), (False, False, 1)]
)
def test_logits_are_made_once(is_trained: bool, is_frozen: bool, products: int) -> None:
    hidden, weight, labels = given()
    if is_frozen:
        weight.requires_grad_(False)
    with CountProducts() as seen, torch.set_grad_enabled(is_trained):
        loss = hidden_loss(hidden, weight, labels, 50, HeadRule(chunk_rows=5))
        if is_trained:
            loss.backward()
    assert seen.count == 3 * products
    torch.testing.assert_close(loss.detach(), expected(None)[0], rtol=1e-12, atol=0)


def test_a_second_backward_gives_the_same_gradients_again() -> None:
    hidden, weight, labels = given()
    loss = 3 * hidden_loss(hidden, weight, labels, 50)
    for _ in range(2):
        got = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        for a, b in zip(got, expected(None)[1:], strict=True):
            torch.testing.assert_close(a, 3 * b, rtol=1e-12, atol=1e-14)


def test_a_rank_without_labels_gives_0_and_zero_gradients() -> None:
    hidden, weight, labels = given(torch.bfloat16)
    loss = hidden_loss(hidden, weight, torch.full_like(labels, -100), 50)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_count_below_ones_own_labels_is_refused() -> None:
    hidden, weight, labels = given()
    with pytest.raises(ValueError, match="label_count=3 but this rank alone has 11"):
        hidden_loss(hidden, weight, labels, 3)
    with pytest.raises(ValueError, match=r"need \(b, n, H\) and \(b, n\)"):
        hidden_loss(hidden, weight, labels[:, :4], 50)


def test_a_single_label_counts_as_one() -> None:
    hidden, weight, labels = given()
    one = torch.full_like(labels, -100)
    one[0, 3] = labels[0, 3]
    of_row = F.cross_entropy(hidden[0, 3:4] @ weight.T, labels[0, 3:4])
    torch.testing.assert_close(hidden_loss(hidden, weight, one, 1), of_row, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="label_count=0 but this rank alone has 0"):
        hidden_loss(hidden, weight, torch.full_like(labels, -100), 0)


@pytest.mark.parametrize("label", [-1, VOCABULARY])
def test_a_label_out_of_the_vocabulary_is_refused(label: int) -> None:
    hidden, weight, labels = given()
    labels[0, 1] = label
    with pytest.raises(ValueError, match="1 labels out of a vocabulary of 21: need 0 to 20, or -100"):
        hidden_loss(hidden, weight, labels, 50)


def with_a_whole_vocabulary_on_each() -> str:
    hidden, whole, labels = given()
    weight = distribute_tensor(whole.detach(), mesh_of(ParallelDims(tp=4)).tp, [Replicate()])
    try:
        hidden_loss(hidden, weight, labels, 50)
    except ValueError as error:
        return str(error)
    return ""


def test_a_vocabulary_that_is_not_sharded_by_rows_is_refused(ranks: Ranks) -> None:
    assert "need its rows sharded over a 1-D mesh" in ranks.run(4, with_a_whole_vocabulary_on_each)[0]
