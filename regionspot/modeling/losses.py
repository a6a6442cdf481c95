"""Region logits and the focal loss they are trained with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_OFFSET = 1e-7


def region_logits(region_embeddings: Tensor, text_embeddings: Tensor, logit_scale: float | Tensor) -> Tensor:
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
    logits: Tensor, targets: Tensor, valid: Tensor | None = None, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss of each (region, word) as a yes-or-no question (arXiv 1708.02002), reduced as the authors do.

    The sum over all words and all valid regions, divided by the number of valid regions of the whole batch: the mean
    over regions, but the sum over words. For one image of N regions that is the authors' "mean over N, summed over
    classes, / N, x N". A batch without any valid region gives 0.

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
    cross_entropy = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    probability = logits.sigmoid()
    error = torch.where(positive, 1 - probability, probability)
    weight = torch.where(positive, alpha, 1 - alpha)
    loss = (weight * error**gamma * cross_entropy).sum(dim=-1)  # (B, N)
    return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)
