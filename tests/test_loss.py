"""The loss is the mean over all valid tokens of all ranks, whatever rank holds them."""

import pytest
import torch
from torch.nn import functional as F

from seqmesh.train.loss import next_token_loss

VOCABULARY = 11


def logits_and_labels(n: int, valid: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(1, n, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (1, n), generator=generator)
    ignored = torch.rand(1, n, generator=generator) >= valid
    return logits.requires_grad_(), labels.masked_fill(ignored, -100)


@pytest.mark.parametrize("shares", [(40,), (10, 30), (1, 38, 1), (0, 40), (13, 13, 14)])
@pytest.mark.parametrize("chunk_rows", [7, 4096])
def test_shares_of_any_size_sum_to_the_global_mean_with_its_gradient(
    shares: tuple[int, ...], chunk_rows: int
):
    logits, labels = logits_and_labels(40)
    expected = F.cross_entropy(logits[0], labels[0])
    (expected_grad,) = torch.autograd.grad(expected, logits)
    count = int((labels != -100).sum())
    parts = zip(logits.split(shares, 1), labels.split(shares, 1), strict=True)
    total = sum(next_token_loss(part, label, count, chunk_rows=chunk_rows) for part, label in parts)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [0, 5])
def test_a_rank_without_a_valid_label_gives_zero_and_still_runs_its_backward(n: int):
    hidden = torch.randn(1, n, 4, requires_grad=True)
    head = torch.randn(VOCABULARY, 4, requires_grad=True)
    loss = next_token_loss(hidden @ head.T, torch.full((1, n), -100), label_count=9)
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert not head.grad.any()


def test_low_precision_logits_are_summed_in_fp32():
    logits, labels = logits_and_labels(64, valid=1.0)
    low = logits.detach().to(torch.bfloat16).requires_grad_()
    loss = next_token_loss(low, labels, 64, chunk_rows=10)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(low.detach()[0].double(), labels[0])
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    loss.backward()
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


def test_a_count_of_this_rank_alone_is_refused():
    logits, labels = logits_and_labels(10, valid=1.0)
    said = "label_count=9 but this rank alone has 10 labels; pass the count of the global batch"
    with pytest.raises(ValueError, match=said):
        next_token_loss(logits, labels, 9)
    with pytest.raises(ValueError, match="label_count=0"):
        next_token_loss(logits, torch.full((1, 10), -100), 0)


def test_labels_of_another_shape_are_refused():
    logits, labels = logits_and_labels(10)
    with pytest.raises(ValueError, match=r"logits \(1, 10, 11\) with labels \(1, 9\)"):
        next_token_loss(logits, labels[:, 1:], 10)
