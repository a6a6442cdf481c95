"""The focal loss and its reduction, with numbers worked out by hand, and the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from regionspot.modeling.losses import Reduction, region_logits, sigmoid_focal_loss

# A logit of 0 is a probability of 1/2, so one (region, word) costs 0.25 * 0.5^2 * ln 2 if the word
# is right and 0.75 * 0.5^2 * ln 2 if it is not. A logit of ln 3 is a probability of 3/4.
RIGHT_AT_ZERO = 0.25 * 0.25 * math.log(2)
WRONG_AT_ZERO = 0.75 * 0.25 * math.log(2)
RIGHT_AT_LN3 = 0.25 * (1 / 4) ** 2 * math.log(4 / 3)
WRONG_AT_LN3 = 0.75 * (3 / 4) ** 2 * math.log(4)


def test_one_region_sums_over_words() -> None:
    loss = sigmoid_focal_loss(torch.zeros(1, 1, 3), torch.tensor([[1]]))
    assert loss.item() == pytest.approx(RIGHT_AT_ZERO + 2 * WRONG_AT_ZERO, rel=1e-6)
    assert loss.item() == pytest.approx(0.3032519, rel=1e-6)  # 0.4375 ln 2


def test_mean_over_regions_sum_over_words() -> None:
    logits = torch.tensor(
        [[[0.0, 0.0], [math.log(3), 0.0]], [[0.0, math.log(3)], [0.0, 0.0]]]
    )  # (B=2, N=2, V=2)
    targets = torch.tensor([[0, 0], [0, 1]])
    regions = [
        RIGHT_AT_ZERO + WRONG_AT_ZERO,
        RIGHT_AT_LN3 + WRONG_AT_ZERO,
        RIGHT_AT_ZERO + WRONG_AT_LN3,
        RIGHT_AT_ZERO + WRONG_AT_ZERO,
    ]
    assert sigmoid_focal_loss(logits, targets).item() == pytest.approx(sum(regions) / 4, rel=1e-6)


def authors_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The authors' `sigmoid_focal_loss` and `ce_loss` of (B, N, V), written out: they pad by
    repeating regions.
    """
    probability = logits.sigmoid()
    one_hot = F.one_hot(targets, logits.shape[-1]).float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    p_t = probability * one_hot + (1 - probability) * (1 - one_hot)
    loss = (0.25 * one_hot + 0.75 * (1 - one_hot)) * cross_entropy * (1 - p_t) ** 2
    num_boxes = logits.shape[1]
    return loss.mean(1).sum() / num_boxes * num_boxes


@pytest.mark.parametrize("counts", [(3,), (4, 4), (1, 10), (1, 2, 60)])
def test_images_weigh_alike_as_in_the_authors_code(counts: tuple[int, ...]) -> None:
    """The sum over images of each image's mean, divided by the number of images; in its gradient as
    well.
    """
    torch.manual_seed(0)
    most, images = max(counts), len(counts)
    logits = (3 * torch.randn(images, most, 7)).requires_grad_()
    targets = torch.randint(0, 7, (images, most))
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    # each region equally often
    repeated = torch.stack([torch.arange(most) * count // most for count in counts])
    rows = torch.arange(images)[:, None]
    expected = authors_loss(logits[rows, repeated], targets[rows, repeated]) / images
    found = sigmoid_focal_loss(logits, targets, valid)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_regions_weigh_alike_on_request() -> None:
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5))
    valid = torch.arange(5) < torch.tensor([1, 5])[:, None]
    means = [
        sigmoid_focal_loss(logits[b : b + 1, :n], targets[b : b + 1, :n]).item()
        for b, n in enumerate((1, 5))
    ]
    per_region = sigmoid_focal_loss(logits, targets, valid, reduction="per_region").item()
    assert per_region == pytest.approx((means[0] + 5 * means[1]) / 6, rel=1e-5)
    assert sigmoid_focal_loss(logits, targets, valid).item() == pytest.approx(
        sum(means) / 2, rel=1e-5
    )


@pytest.mark.parametrize("reduction", ["per_image", "per_region"])
def test_an_image_without_valid_regions_does_not_count(reduction: Reduction) -> None:
    logits, targets = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    valid = torch.tensor([[True] * 3, [False] * 3])
    alone = sigmoid_focal_loss(logits[:1], targets[:1])
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets, valid, reduction=reduction), alone
    )


@pytest.mark.parametrize("reduction", ["per_image", "per_region"])
def test_padding_counts_neither_above_nor_below(reduction: Reduction) -> None:
    logits = torch.zeros(2, 3, 2)
    logits[0, 2] = 50.0
    logits[1, 1:] = -50.0
    valid = torch.tensor([[True, True, False], [True, False, False]])
    targets = torch.tensor([[0, 1, 0], [1, -1, 10**6]])
    loss = sigmoid_focal_loss(logits, targets, valid, reduction=reduction)
    assert loss.item() == pytest.approx(RIGHT_AT_ZERO + WRONG_AT_ZERO, rel=1e-6)


def test_nothing_valid_is_zero_with_a_gradient() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    loss = sigmoid_focal_loss(
        logits, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool)
    )
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
