"""Train the mini CLIP on captions of whole pictures alone: none says where in a picture a thing is.

Stage 1 sees portraits at 64 px, which are cheap. Stage 2 sees portraits at 64, 96 and 128 px, so
that the same model knows crops of any size, and scenes at CLIP's own 192 px, where a toy covers
about as many patches. A caption names one of the toys that a picture shows, in one of CLIP's 81
templates, or lists all of them. All categories occur, the novel ones too: as with real CLIPs,
novelty is the head's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regionspot.mini.architecture import (
    CLIP_IMAGE_SIZE,
    CONTEXT_LENGTH,
    PATCH_SIZE,
    build_mini_clip,
    position_table,
)
from regionspot.mini.pools import PicturePool, clip_portraits, clip_scenes
from regionspot.mini.shipped import load_mini_clip
from regionspot.mini.stepper import Schedule, Stepper, autocast
from regionspot.mini.world import CATEGORIES, article
from regionspot.modeling.clip import CLIP, IMAGE_MEAN, IMAGE_STD, TEMPLATES, encode_tokens, tokenize

PHRASES = [category.name for category in CATEGORIES]
MEAN = torch.tensor(IMAGE_MEAN).view(3, 1, 1)
STD = torch.tensor(IMAGE_STD).view(3, 1, 1)
PORTRAIT_SIDES = (64, 96, 128)


@dataclass(frozen=True)
class ClipRecipe:
    portraits: int = 40_000
    scenes: int = 40_000
    small_steps: int = 600
    small_batch: int = 256
    small_lr: float = 1e-3
    steps: int = 2100
    portrait_batch: int = 48
    scene_batch: int = 48
    lr: float = 8e-4
    weight_decay: float = 0.05
    seed: int = 0


class CompactTokenizer:
    """CLIP's own tokenizer with the few ids that the mini world uses renumbered from 0, in the same
    order.

    A text tower with 49 408 embedding rows would spend its optimiser on rows that never occur.
    Order is kept, so the end-of-text token still has the largest id, where CLIP pools.
    """

    def __init__(self) -> None:
        texts = [template.format(phrase) for template in TEMPLATES for phrase in PHRASES]
        texts += [_with_articles(text) for text in texts] + [
            _list(range(len(PHRASES))[i : i + 3]) for i in range(400)
        ]
        self.ids = np.unique(tokenize(texts, CONTEXT_LENGTH).numpy())  # 0, the padding, among them
        self._row = np.full(self.ids.max() + 1, 0)
        self._row[self.ids] = np.arange(len(self.ids))

    def __call__(self, texts: list[str]) -> Tensor:
        """(n, T) int64 rows of the compact embedding, cut to the longest text."""
        tokens = tokenize(texts, CONTEXT_LENGTH).numpy()
        return torch.from_numpy(self._row[tokens[:, : int((tokens != 0).sum(1).max())]])


def train(
    directory: Path, recipe: ClipRecipe, checkpoint: Path | None = None, start: Path | None = None
) -> tuple[CLIP, torch.Tensor]:
    """Train on pools under `directory`.

    Args:
        checkpoint: goes on from it, and from the one of stage 1 beside it, if they are there.
        start: a directory with the weights to begin stage 2 with; None begins with stage 1 and
            random ones.

    Returns:
        The model with the compact vocabulary, and the token ids (K,) that its K embedding rows
        stand for.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = CompactTokenizer()
    clip = build_mini_clip(vocab_size=len(tokenizer.ids))
    if start is not None:
        load_mini_clip(clip, start, torch.from_numpy(tokenizer.ids))
    portraits = clip_portraits(directory, recipe.portraits, 1)
    # At these lengths the CPU's flash attention is slow: its backward pass alone is 43 % of a step.
    with sdpa_kernel(SDPBackend.MATH):
        first = None if checkpoint is None else checkpoint.with_stem(f"{checkpoint.stem}-small")
        if start is None and (checkpoint is None or not checkpoint.exists()):
            _train_small(clip, tokenizer, portraits, recipe, first)
        _train_full(
            clip, tokenizer, portraits, clip_scenes(directory, recipe.scenes, 2), recipe, checkpoint
        )
    return clip.eval(), torch.from_numpy(tokenizer.ids)


def _train_small(
    clip: CLIP,
    tokenizer: CompactTokenizer,
    pool: PicturePool,
    recipe: ClipRecipe,
    checkpoint: Path | None,
) -> None:
    schedule = Schedule(recipe.small_lr, recipe.small_steps)
    stepper = Stepper(clip, schedule, recipe.weight_decay, "clip, portraits at 64 px", checkpoint)
    while not stepper.done:
        rng = np.random.default_rng([recipe.seed, 1, stepper.step])
        images, shown = _drawn(pool, recipe.small_batch, rng)
        with autocast(images.device):
            image_features = _image_features(clip, images, PORTRAIT_SIDES[0])
            stepper(_naming_loss(clip, tokenizer, image_features, shown, rng))


def _train_full(
    clip: CLIP,
    tokenizer: CompactTokenizer,
    portraits: PicturePool,
    scenes: PicturePool,
    recipe: ClipRecipe,
    checkpoint: Path | None,
) -> None:
    schedule = Schedule(recipe.lr, recipe.steps)
    stepper = Stepper(clip, schedule, recipe.weight_decay, "clip", checkpoint)
    while not stepper.done:
        rng = np.random.default_rng([recipe.seed, 2, stepper.step])
        of_portraits = _drawn(portraits, recipe.portrait_batch, rng)
        of_scenes = _drawn(scenes, recipe.scene_batch, rng)
        with autocast(of_scenes[0].device):
            from_portraits = _image_features(clip, of_portraits[0], int(rng.choice(PORTRAIT_SIDES)))
            from_scenes = _image_features(clip, of_scenes[0], CLIP_IMAGE_SIZE)
            shown = torch.cat([of_scenes[1], of_portraits[1]])
            naming = _naming_loss(
                clip, tokenizer, torch.cat([from_scenes, from_portraits]), shown, rng
            )
            listing = _listing_loss(clip, tokenizer, from_scenes, of_scenes[1], rng)
        stepper(naming + listing, f"(one named {naming:.3f}, all listed {listing:.3f})")


def _drawn(pool: PicturePool, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, S, S) normalised, half of them mirrored, and what they show (count,
    categories) bool.
    """
    rows = np.sort(rng.choice(len(pool.images), count, replace=False))  # sorted: they lie on disk
    images = torch.from_numpy(pool.images[rows]).permute(0, 3, 1, 2).float() / 255
    images = torch.where(
        torch.from_numpy(rng.random(count) < 0.5)[:, None, None, None], images.flip(3), images
    )
    shown = np.zeros((count, len(CATEGORIES) + 1), bool)  # the last column takes what is none, -1
    shown[np.arange(count)[:, None], pool.categories[rows]] = True
    return (images - MEAN) / STD, torch.from_numpy(shown[:, :-1])


def _image_features(clip: CLIP, images: Tensor, side: int) -> Tensor:
    """(B, E) unit features of the images at `side` pixels."""
    if images.shape[-1] != side:
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    own = clip.visual.positional_embedding.data
    clip.visual.positional_embedding.data = position_table(side // PATCH_SIZE)
    try:
        return F.normalize(clip.visual(images).float(), dim=-1)
    finally:
        clip.visual.positional_embedding.data = own


def _naming_loss(
    clip: CLIP, tokenizer: CompactTokenizer, images: Tensor, shown: Tensor, rng: np.random.Generator
) -> Tensor:
    """Each picture's caption names one toy that it shows. Pictures that show what a caption names
    are its positives.

    Args:
        images: (B, E) unit features.
        shown: (B, categories) bool.
    """
    named = np.unique([rng.choice(np.flatnonzero(row)) for row in shown.numpy()])  # (M,)
    texts = _text_features(clip, tokenizer, [_caption(category, rng) for category in named])
    return contrastive_loss(images, texts, shown[:, named], clip.logit_scale.exp())


def _listing_loss(
    clip: CLIP, tokenizer: CompactTokenizer, images: Tensor, shown: Tensor, rng: np.random.Generator
) -> Tensor:
    """Each picture's caption lists what it shows, in any order."""
    texts = _text_features(
        clip, tokenizer, [_list(rng.permutation(np.flatnonzero(row))) for row in shown.numpy()]
    )
    # pictures of the same one toy have the same caption
    same = (shown[:, None] == shown[None]).all(-1)
    return contrastive_loss(images, texts, same, clip.logit_scale.exp())


def contrastive_loss(images: Tensor, texts: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss with any number of positives: each competes with the negatives alone,
    not with the others.

    Args:
        images: (n, E) unit features.
        texts: (m, E) unit features.
        positive: (n, m) bool: the text describes the picture. One or more in each row and column.
    """
    logits = scale * images @ texts.T  # (n, m)
    negative = logits.masked_fill(positive, torch.finfo(logits.dtype).min)
    # -log of p / (p + all negatives)
    rows = F.softplus(negative.logsumexp(1, keepdim=True) - logits)
    columns = F.softplus(negative.logsumexp(0, keepdim=True) - logits)
    mask = positive.float()
    return ((rows * mask).sum(1) / mask.sum(1)).mean() / 2 + (
        (columns * mask).sum(0) / mask.sum(0)
    ).mean() / 2


def _text_features(clip: CLIP, tokenizer: CompactTokenizer, texts: list[str]) -> Tensor:
    return F.normalize(encode_tokens(clip, tokenizer(texts)).float(), dim=-1)


def _caption(category: int, rng: np.random.Generator) -> str:
    """One toy in one of CLIP's 81 templates, half of the time with its article mended: "a photo of
    an orange toy.".
    """
    text = TEMPLATES[rng.integers(len(TEMPLATES))].format(PHRASES[category])
    return _with_articles(text) if rng.random() < 0.5 else text


def _with_articles(text: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _list(categories: Sequence[int] | np.ndarray) -> str:
    """Up to five toys: more do not fit into the text tower."""
    phrases = [f"{article(PHRASES[c])} {PHRASES[c]}" for c in categories[:5]]
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]
