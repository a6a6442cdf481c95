"""Region logits and the focal loss they are trained with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_OFFSET = 1e-7

Reduction = Literal["per_image", "per_region"]


def region_logits(
    region_embeddings: Tensor, text_embeddings: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """Scaled cosine of every region with every word.

    Args:
        region_embeddings: (B, N, E) from `RegionHead`.
        text_embeddings: (V, E) unit rows, as `Vocabulary.embeddings` holds them.
        logit_scale: CLIP's own, already exponentiated.

    Returns:
        (B, N, V). A softmax over V scores the words; training applies a sigmoid to each.
    """
    norms = region_embeddings.norm(dim=-1, keepdim=True) + NORM_OFFSET  # (B, N, 1)
    return logit_scale * (region_embeddings / norms) @ text_embeddings.T


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "per_image",
) -> Tensor:
    """Computes the focal loss of each (region, word) as a yes-or-no question (arXiv 1708.02002),
    summed over words.

    "per_image" takes the mean over the valid regions of each image, then the mean over images that
    have any: an image of 60 regions weighs as much as one of 1. This is the authors' objective up
    to a constant: their code sums the images' means over the B images of one GPU, so its gradient
    is B times this one (B = 2 in their runs). AdamW does not depend on that factor, but gradient
    clipping does: their threshold of 1 is `max_grad_norm` 1 / B here. "per_region" takes the mean
    over all valid regions of the batch, so crowded images dominate. Both agree where all images
    have equally many regions. A batch without any valid region gives 0.

    Args:
        logits: (B, N, V).
        targets: (B, N) int, the index of each region's word; ignored where not valid.
        valid: (B, N) bool, False for padding; None if there is none.

    Returns:
        A scalar in float32.
    """
    logits = logits.float()
    if valid is None:
        valid = torch.ones_like(targets, dtype=torch.bool)
    words = torch.arange(logits.shape[-1], device=logits.device)
    positive = words == targets.unsqueeze(-1)  # (B, N, V)
    cross_entropy = F.binary_cross_entropy_with_logits(
        logits, positive.to(logits.dtype), reduction="none"
    )
    probability = logits.sigmoid()
    error = torch.where(positive, 1 - probability, probability)
    weight = torch.where(positive, alpha, 1 - alpha)
    loss = (weight * error**gamma * cross_entropy).sum(dim=-1)  # (B, N)
    loss = torch.where(valid, loss, 0.0)
    if reduction == "per_region":
        return loss.sum() / valid.sum().clamp(min=1)
    counts = valid.sum(dim=1)  # (B,)
    return (loss.sum(dim=1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
