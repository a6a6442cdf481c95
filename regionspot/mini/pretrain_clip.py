"""Train the mini CLIP: single toys first, then whole scenes with captions of the picture and of its regions.

Stage 1 pairs 64 px portraits with a caption. Stage 2, in two cycles of the learning rate, pairs 128 px scenes with a
caption that lists their toys, and the patches under a toy with that toy's phrase; region captions name base categories
only, so novel ones are known to CLIP from captions of whole pictures alone, which is what "novel" means for real CLIPs
too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from regionspot.mini.architecture import CONTEXT_LENGTH, PATCH_SIZE, build_mini_clip, position_table
from regionspot.mini.pools import portrait_pool, scene_pool
from regionspot.mini.world import CATEGORIES
from regionspot.modeling.clip import CLIP, IMAGE_MEAN, IMAGE_STD, TEMPLATES, encode_tokens, tokenize

PHRASES = [category.name for category in CATEGORIES]
IS_BASE = np.array([not category.novel for category in CATEGORIES])
MEAN = torch.tensor(IMAGE_MEAN).view(3, 1, 1)
STD = torch.tensor(IMAGE_STD).view(3, 1, 1)

_Log = Callable[[str], None]


@dataclass(frozen=True)
class ClipRecipe:
    portraits: int = 60_000
    scenes: int = 40_000
    portrait_steps: int = 1500
    portrait_batch: int = 256
    scene_steps: int = 2200
    second_scene_steps: int = 1200
    scene_batch: int = 64
    portrait_lr: float = 1e-3
    scene_lr: float = 8e-4
    second_scene_lr: float = 5e-4
    weight_decay: float = 0.05
    region_loss_weight: float = 1.0
    seed: int = 0


class CompactTokenizer:
    """CLIP's own tokenizer with the few ids that the mini world uses renumbered from 0, in the same order.

    A text tower with 49 408 embedding rows would spend its optimiser on rows that never occur. Order is kept, so the
    end-of-text token still has the largest id, where CLIP pools.
    """

    def __init__(self) -> None:
        texts = [template.format(phrase) for template in TEMPLATES for phrase in PHRASES]
        texts += [f"{a} and {b}, {c}" for a, b, c in zip(PHRASES, PHRASES[1:], PHRASES[2:], strict=False)]
        self.ids = np.unique(tokenize(texts, CONTEXT_LENGTH).numpy())  # 0, the padding, among them
        self._row = np.full(self.ids.max() + 1, 0)
        self._row[self.ids] = np.arange(len(self.ids))

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """(n, T) int64 rows of the compact embedding, cut to the longest text."""
        tokens = tokenize(texts, CONTEXT_LENGTH).numpy()
        return torch.from_numpy(self._row[tokens[:, : int((tokens != 0).sum(1).max())]])


def train(directory: Path, recipe: ClipRecipe, log: _Log = print) -> tuple[CLIP, torch.Tensor]:
    """Train on pools under `directory`.

    Returns:
        The model with the compact vocabulary, and the token ids (K,) that its K embedding rows stand for.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = CompactTokenizer()
    clip = build_mini_clip(vocab_size=len(tokenizer.ids))
    # At these lengths the CPU's flash attention is slow: its backward pass alone is 43 % of a step.
    with sdpa_kernel(SDPBackend.MATH):
        _train_portraits(clip, tokenizer, directory, recipe, np.random.default_rng(recipe.seed), log)
        cycles = (recipe.scene_steps, recipe.scene_lr), (recipe.second_scene_steps, recipe.second_scene_lr)
        for number, (steps, lr) in enumerate(cycles, start=1):
            rng = np.random.default_rng(recipe.seed + number)
            _train_scenes(clip, tokenizer, directory, replace(recipe, scene_steps=steps, scene_lr=lr), rng, log)
    return clip.eval(), torch.from_numpy(tokenizer.ids)


def _train_portraits(
    clip: CLIP, tokenizer: CompactTokenizer, directory: Path, recipe: ClipRecipe, rng: np.random.Generator, log: _Log
) -> None:
    images, categories = portrait_pool(directory, recipe.portraits, 1, 64)
    full_table = clip.visual.positional_embedding.data
    clip.visual.positional_embedding.data = position_table(64 // PATCH_SIZE)
    step = _Stepper(clip, recipe.portrait_lr, recipe.weight_decay, recipe.portrait_steps, "portraits", log)
    for _ in range(recipe.portrait_steps):
        rows = np.sort(rng.choice(len(images), recipe.portrait_batch, replace=False))  # sorted: they lie on disk
        named, occurrences = np.unique(categories[rows], return_inverse=True)
        with torch.autocast("cpu", torch.bfloat16):
            image_features = F.normalize(clip.visual(_normalised(images[rows], rng)).float(), dim=-1)
            text_features = _text_features(clip, tokenizer, [_caption([c], rng) for c in named])
        labels, scale = torch.from_numpy(occurrences), clip.logit_scale.exp()
        step(contrastive_loss(image_features, text_features, labels, torch.arange(len(named)), scale))
    clip.visual.positional_embedding.data = full_table


def _train_scenes(
    clip: CLIP, tokenizer: CompactTokenizer, directory: Path, recipe: ClipRecipe, rng: np.random.Generator, log: _Log
) -> None:
    pool = scene_pool(directory, recipe.scenes, 2)
    step = _Stepper(clip, recipe.scene_lr, recipe.weight_decay, recipe.scene_steps, "scenes", log)
    for _ in range(recipe.scene_steps):
        rows = np.sort(rng.choice(len(pool.categories), recipe.scene_batch, replace=False))
        categories, covers = pool.categories[rows], pool.covers[rows].astype(np.float32) / 255
        images = pool.clip_images[rows]
        if rng.random() < 0.5:
            images, covers = images[:, :, ::-1], covers[..., ::-1]
        wanted = (categories >= 0) & IS_BASE[categories] & (covers.sum((2, 3)) > 0.3)
        scene, slot = np.nonzero(wanted)
        named = np.unique(categories[wanted])
        captions = [_caption([c for c in rng.permutation(row) if c >= 0], rng) for row in categories]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = patch_tokens(clip, _normalised(np.ascontiguousarray(images), None))  # (B, L, D)
            projected = clip.visual.ln_post(tokens) @ clip.visual.proj  # (B, L, E)
            image_features = F.normalize(projected[:, 0].float(), dim=-1)
            caption_features = _text_features(clip, tokenizer, captions)
            phrase_features = _text_features(clip, tokenizer, [_caption([c], rng) for c in named])
        weights = torch.from_numpy(np.ascontiguousarray(covers[scene, slot])).flatten(1)  # (R, patches)
        pooled = torch.einsum("rp,rpe->re", weights, projected[torch.from_numpy(scene), 1:].float())
        region_features = F.normalize(pooled, dim=-1)
        scale = clip.logit_scale.exp()
        same = torch.arange(len(rows))
        image_loss = contrastive_loss(image_features, caption_features, same, same, scale)
        targets = torch.from_numpy(np.searchsorted(named, categories[wanted]))
        region_loss = F.cross_entropy(scale * region_features @ phrase_features.T, targets)
        step(
            image_loss + recipe.region_loss_weight * region_loss, f"(image {image_loss:.3f}, region {region_loss:.3f})"
        )


def patch_tokens(clip: CLIP, images: torch.Tensor) -> torch.Tensor:
    """CLIP's tokens before `ln_post`, class token first: (B, L, D)."""
    return clip.visual.transformer(clip.visual._embeds(images))


def contrastive_loss(
    images: torch.Tensor,
    texts: torch.Tensor,
    image_labels: torch.Tensor,
    text_labels: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """CLIP's symmetric loss with every pair of equal labels positive: features (n, E) and (m, E), unit rows."""
    logits = scale * images @ texts.T  # (n, m)
    positive = (image_labels[:, None] == text_labels[None, :]).float()
    rows = -(F.log_softmax(logits, 1) * positive).sum(1) / positive.sum(1)
    columns = -(F.log_softmax(logits, 0) * positive).sum(0) / positive.sum(0)
    return (rows.mean() + columns.mean()) / 2


class _Stepper:
    """AdamW with warm-up and cosine decay, gradient clipping, and a line of progress every hundred steps."""

    def __init__(self, clip: CLIP, lr: float, weight_decay: float, steps: int, name: str, log: _Log) -> None:
        decayed = [p for p in clip.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in clip.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, lr, steps, pct_start=0.05, cycle_momentum=False, final_div_factor=100
        )
        self._clip, self._name, self._log, self._count, self._start = clip, name, log, 0, time.perf_counter()

    def __call__(self, loss: torch.Tensor, detail: str = "") -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._clip.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        with torch.no_grad():
            self._clip.logit_scale.clamp_(0, float(np.log(100)))
        self._count += 1
        if self._count % 100 == 0:
            seconds = time.perf_counter() - self._start
            self._log(f"{self._name} {self._count} loss {loss.item():.3f} {detail} {seconds:.0f} s")


def _text_features(clip: CLIP, tokenizer: CompactTokenizer, texts: list[str]) -> torch.Tensor:
    return F.normalize(encode_tokens(clip, tokenizer(texts)).float(), dim=-1)


def _caption(categories: Sequence[int], rng: np.random.Generator) -> str:
    """One toy in one of CLIP's 81 templates; several toys as a list of up to six."""
    phrases = [PHRASES[c] for c in categories[:6]]
    if len(phrases) == 1:
        return TEMPLATES[rng.integers(len(TEMPLATES))].format(phrases[0])
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if phrases else "an empty picture"


def _normalised(images: np.ndarray, rng: np.random.Generator | None) -> torch.Tensor:
    """(B, S, S, 3) uint8 -> normalised (B, 3, S, S); mirrored half of the time when `rng` is given."""
    batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    if rng is not None:
        batch = torch.where(torch.from_numpy(rng.random(len(batch)) < 0.5)[:, None, None, None], batch.flip(3), batch)
    return (batch - MEAN) / STD
