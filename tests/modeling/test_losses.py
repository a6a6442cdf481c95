"""The focal loss and its reduction, with numbers worked out by hand, and the logits."""

from __future__ import annotations

import math

import pytest
import torch

from regionspot.modeling.losses import region_logits, sigmoid_focal_loss

# A logit of 0 is a probability of 1/2, so one (region, word) costs 0.25 * 0.5^2 * ln 2 if the word is right and
# 0.75 * 0.5^2 * ln 2 if it is not. A logit of ln 3 is a probability of 3/4.
RIGHT_AT_ZERO = 0.25 * 0.25 * math.log(2)
WRONG_AT_ZERO = 0.75 * 0.25 * math.log(2)
RIGHT_AT_LN3 = 0.25 * (1 / 4) ** 2 * math.log(4 / 3)
WRONG_AT_LN3 = 0.75 * (3 / 4) ** 2 * math.log(4)


def test_one_region_sums_over_words() -> None:
    loss = sigmoid_focal_loss(torch.zeros(1, 1, 3), torch.tensor([[1]]))
    assert loss.item() == pytest.approx(RIGHT_AT_ZERO + 2 * WRONG_AT_ZERO, rel=1e-6)
    assert loss.item() == pytest.approx(0.3032519, rel=1e-6)  # 0.4375 ln 2


def test_mean_over_regions_sum_over_words() -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]], [[0.0, math.log(3)], [0.0, 0.0]]])  # (B=2, N=2, V=2)
    targets = torch.tensor([[0, 0], [0, 1]])
    regions = [
        RIGHT_AT_ZERO + WRONG_AT_ZERO,
        RIGHT_AT_LN3 + WRONG_AT_ZERO,
        RIGHT_AT_ZERO + WRONG_AT_LN3,
        RIGHT_AT_ZERO + WRONG_AT_ZERO,
    ]
    assert sigmoid_focal_loss(logits, targets).item() == pytest.approx(sum(regions) / 4, rel=1e-6)


def test_one_image_equals_the_authors_reduction() -> None:
    logits = torch.linspace(-3, 3, 20).view(1, 4, 5)
    targets = torch.tensor([[0, 4, 2, 2]])
    elements = torch.stack(
        [sigmoid_focal_loss(logits[:, n : n + 1], targets[:, n : n + 1]) for n in range(4)]
    )  # of each region, summed over words
    authors = elements.mean() / 4 * 4  # mean over N, summed over classes, / N, x N
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets), authors)


def test_padding_counts_neither_above_nor_below() -> None:
    logits = torch.zeros(2, 3, 2)
    logits[0, 2] = 50.0
    logits[1, 1:] = -50.0
    valid = torch.tensor([[True, True, False], [True, False, False]])
    targets = torch.tensor([[0, 1, 0], [1, -1, 10**6]])
    loss = sigmoid_focal_loss(logits, targets, valid)
    assert loss.item() == pytest.approx(RIGHT_AT_ZERO + WRONG_AT_ZERO, rel=1e-6)


def test_nothing_valid_is_zero_with_a_gradient() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(1, 2, 3))  # type: ignore[arg-type]


def test_no_regions_is_zero() -> None:
    assert sigmoid_focal_loss(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.long)).item() == 0


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([[1]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * 1e4 + 0.25 * 1e4, rel=1e-5)
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_region_logits_are_scaled_cosines() -> None:
    regions = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    words = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]])
    expected = torch.tensor([[[60.0, 80.0, -100.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(region_logits(regions, words, 100.0), expected)
