"""The sizes of the small SAM and CLIP, built from the real classes, and how their shipped weights
are read.

Both are ordinary `segment_anything` and `open_clip` models in every respect but size, so whatever
works on them runs the code that a full-size model runs.
"""

from __future__ import annotations

import numpy as np
import torch

from regionspot.modeling.clip import CLIP, OPENAI_VOCABULARY_SIZE, compose_clip
from regionspot.modeling.sam import Sam, compose_sam

SAM_IMAGE_SIZE = 256
TOKEN_DIM = 128
CLIP_IMAGE_SIZE = 192
CLIP_WIDTH = 192
EMBED_DIM = 128
PATCH_SIZE = 16
CONTEXT_LENGTH = 48

POSITION_FREQUENCIES = np.geomspace(0.25, 2.0, 6)  # cycles a side
POSITION_AMPLITUDE = 2.0


def build_mini_sam() -> Sam:
    """A `segment_anything` Sam for 256 px images: 16 x 16 image tokens of 128 channels, windows of
    6 with padding.
    """
    return compose_sam(
        image_size=SAM_IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        width=128,
        depth=4,
        num_heads=4,
        global_attention=(1, 3),
        window_size=6,
        token_dim=TOKEN_DIM,
        decoder_mlp_dim=512,
        iou_head_dim=128,
    )


def build_mini_clip(
    vocab_size: int = OPENAI_VOCABULARY_SIZE, image_size: int = CLIP_IMAGE_SIZE
) -> CLIP:
    """An `open_clip` CLIP with QuickGELU: 192 px images in patches of 16, width 192; text width
    128.

    Its position embedding is a frozen table of sines that are large enough to find (see
    `position_table`).
    """
    clip = compose_clip(
        EMBED_DIM,
        vision={
            "layers": 4,
            "width": CLIP_WIDTH,
            "head_width": 64,
            "patch_size": PATCH_SIZE,
            "image_size": image_size,
        },
        text={
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": 128,
            "heads": 4,
            "layers": 3,
        },
        quick_gelu=True,
    )
    with torch.no_grad():
        clip.visual.positional_embedding.copy_(position_table(image_size // PATCH_SIZE))
    clip.visual.positional_embedding.requires_grad = False
    return clip


def position_table(grid: int) -> torch.Tensor:
    """Sines and cosines of x and y in the first 24 of 192 channels: (1 + grid * grid, 192), the
    class token's row 0.

    RegionSpot's head adds no positions of its own, so it finds a region's patches only if CLIP's
    tokens say where they are. OpenAI's models learn such embeddings from 400 M images; the mini
    model starts with them.
    """
    centres = (np.arange(grid) + 0.5) / grid
    waves = 2 * np.pi * centres[:, None] * POSITION_FREQUENCIES  # (grid, 6)
    axis = POSITION_AMPLITUDE * np.concatenate([np.sin(waves), np.cos(waves)], axis=1)  # (grid, 12)
    table = np.zeros((grid, grid, CLIP_WIDTH), np.float32)
    table[..., :12] = axis[None, :, :]  # x
    table[..., 12:24] = axis[:, None, :]  # y
    return torch.from_numpy(
        np.concatenate([np.zeros((1, CLIP_WIDTH), np.float32), table.reshape(-1, CLIP_WIDTH)])
    )
