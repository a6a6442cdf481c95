"""Train the mini SAM on scenes with masks: boxes, points and mask prompts, as "Segment Anything"
(arXiv 2304.02643).

Focal and dice loss at 20 : 1 and a squared error on the predicted IoU. Mask token 0 answers every
prompt; of tokens 1 to 3 the best one learns from each prompt, so that a point may mean the part or
the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from regionspot.mini.architecture import SAM_IMAGE_SIZE, build_mini_sam
from regionspot.mini.pools import ScenePool, sam_scenes
from regionspot.mini.shipped import load_mini_sam
from regionspot.mini.stepper import Schedule, Stepper, autocast
from regionspot.modeling.sam import Sam, normalise


@dataclass(frozen=True)
class SamRecipe:
    scenes: int = 8_000
    steps: int = 1000
    batch: int = 16
    prompts: int = 4
    lr: float = 4e-4
    weight_decay: float = 0.05
    mask_prompt_share: float = 0.15
    seed: int = 0


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one kind for B images.

    Attributes:
        points: (B, N, 2, 2) xy in SAM-frame pixels; of a point prompt the second is padding.
        labels: (B, N, 2) as in SAM's ONNX export.
        targets: (B, N, 64, 64) float, 1 inside.
    """

    points: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor
    is_point: bool


def train(
    directory: Path, recipe: SamRecipe, checkpoint: Path | None = None, start: Path | None = None
) -> Sam:
    """Train on the pool of scenes under `directory`.

    Args:
        checkpoint: goes on from it if it is there.
        start: a directory with the weights to begin with; None begins with random ones.
    """
    torch.manual_seed(recipe.seed)
    sam = build_mini_sam()
    if start is not None:
        load_mini_sam(sam, start)
    pool = sam_scenes(directory, recipe.scenes, 2)
    stepper = Stepper(
        sam, Schedule(recipe.lr, recipe.steps), recipe.weight_decay, "sam", checkpoint
    )
    while not stepper.done:
        rng = np.random.default_rng([recipe.seed, stepper.step])
        images, sizes, prompts = _sample_batch(pool, recipe, rng)
        with_mask = rng.random() < recipe.mask_prompt_share
        with autocast(images.device):
            embeddings = sam.image_encoder(normalise(sam, images, sizes))  # (B, C, h, w)
            logits, iou_predictions = predict_masks(sam, embeddings.float(), prompts, with_mask)
        loss, iou = mask_loss(
            logits.float(), iou_predictions.float(), prompts.targets.flatten(0, 1)
        )
        stepper(
            loss, f"({'point' if prompts.is_point else 'box'} IoU token 0 {iou[:, 0].mean():.3f})"
        )
    return sam.eval()


def predict_masks(
    sam: Sam, embeddings: torch.Tensor, prompts: PromptBatch, with_mask: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """All four mask tokens' logits (B * N, 4, 64, 64) and predicted IoUs (B * N, 4)."""
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    count = prompts.points.shape[1]
    points, labels = (
        prompts.points.flatten(0, 1),
        prompts.labels.flatten(0, 1),
    )  # (B * N, 2, 2), (B * N, 2)
    masks = (prompts.targets.flatten(0, 1)[:, None] - 0.5) * 20 if with_mask else None
    if prompts.is_point:
        sparse, dense = encoder(points=(points[:, :1], labels[:, :1]), boxes=None, masks=masks)
    else:
        sparse, dense = encoder(points=None, boxes=points.flatten(1), masks=masks)
    queries = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])  # (5, C)
    tokens = torch.cat([queries.expand(len(points), -1, -1), sparse], dim=1)  # (B * N, 7, C)
    source = embeddings.repeat_interleave(count, 0) + dense  # (B * N, C, h, w)
    hidden, source = decoder.transformer(
        source, encoder.get_dense_pe().expand(len(points), -1, -1, -1), tokens
    )
    source = source.transpose(1, 2).unflatten(2, embeddings.shape[-2:])  # (B * N, C, h, w)
    upscaled = decoder.output_upscaling(source)  # (B * N, C / 8, 4h, 4w)
    hyper = torch.stack(
        [mlp(hidden[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
    )
    return torch.einsum("ntc,nchw->nthw", hyper, upscaled), decoder.iou_prediction_head(
        hidden[:, 0]
    )


def mask_loss(
    logits: torch.Tensor, iou_predictions: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss and the true IoU of every token's mask (n, 4), for logits (n, 4, h, w),
    targets (n, h, w).
    """
    truth = targets[:, None].expand_as(logits)
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    agreement = probability * truth + (1 - probability) * (1 - truth)
    focal = ((1 - agreement) ** 2 * cross_entropy).mean((2, 3))  # (n, 4)
    overlap = (probability * truth).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((2, 3)) + truth.sum((2, 3)) + 1)  # (n, 4)
    loss = 20 * focal + dice
    best = loss[:, 1:].min(dim=1).values
    with torch.no_grad():
        predicted, actual = logits > 0, truth > 0.5
        union = (predicted | actual).sum((2, 3)).clamp(min=1)
        iou = (predicted & actual).sum((2, 3)) / union  # (n, 4)
    return (loss[:, 0] + best).mean() + F.mse_loss(iou_predictions, iou), iou


def _sample_batch(
    pool: ScenePool, recipe: SamRecipe, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, PromptBatch]:
    # sorted: they lie on disk
    rows = np.sort(rng.choice(len(pool.toys), recipe.batch, replace=False))
    images = torch.from_numpy(pool.images[rows]).permute(0, 3, 1, 2).float()
    sizes = torch.from_numpy(pool.sizes[rows].astype(np.int64))
    is_point = bool(rng.random() < 0.4)
    points = np.zeros((recipe.batch, recipe.prompts, 2, 2), np.float32)
    targets = np.zeros((recipe.batch, recipe.prompts, *pool.masks.shape[-2:]), np.float32)
    for b, row in enumerate(rows):
        toys = int(pool.toys[row])
        for n, slot in enumerate(rng.choice(toys, recipe.prompts, replace=toys < recipe.prompts)):
            mask = pool.masks[row, slot]
            targets[b, n] = mask >= 128
            points[b, n] = (
                _point_prompt(mask, rng) if is_point else _box_prompt(pool.boxes[row, slot], rng)
            )
    labels = torch.tensor([1, -1] if is_point else [2, 3]).expand(recipe.batch, recipe.prompts, 2)
    return (
        images,
        sizes,
        PromptBatch(torch.from_numpy(points), labels, torch.from_numpy(targets), is_point),
    )


def _point_prompt(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    inside = np.argwhere(mask >= 128)
    if not len(inside):
        inside = np.argwhere(mask == mask.max())
    y, x = inside[rng.integers(len(inside))] * 4 + rng.uniform(0.5, 3.5, 2)
    return np.array([[x, y], [0, 0]], np.float32)


def _box_prompt(box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The box with a tenth of its size as noise, as SAM trains: (2, 2) corners."""
    size = np.tile(box[2:] - box[:2], 2)
    noisy = box + np.clip(rng.normal(0, 0.06, 4), -0.12, 0.12) * size * (rng.random() < 0.7)
    return np.clip(noisy, 0, SAM_IMAGE_SIZE).reshape(2, 2).astype(np.float32)
