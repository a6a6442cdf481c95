"""Small but genuine `segment_anything` and `open_clip` models of random weights, made without
global state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

from regionspot.modeling.torchvision_shim import import_safely

import_safely()

from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg  # noqa: E402
from segment_anything.modeling import (  # noqa: E402
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def roughen(module: nn.Module) -> nn.Module:
    """Move every parameter off its initial value, so that no zero bias or table hides a missing
    term.
    """
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture
def tiny_sam() -> Sam:
    """64 px, patches of 8: an 8 x 8 embedding of 32 channels, windows of 3 with padding, masks 32 x
    32.
    """
    with seeded(1):
        sam = Sam(
            image_encoder=ImageEncoderViT(
                img_size=64,
                patch_size=8,
                embed_dim=48,
                depth=2,
                num_heads=4,
                out_chans=32,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=3,
                global_attn_indexes=(1,),
            ),
            prompt_encoder=PromptEncoder(
                embed_dim=32,
                image_embedding_size=(8, 8),
                input_image_size=(64, 64),
                mask_in_chans=8,
            ),
            mask_decoder=MaskDecoder(
                transformer_dim=32,
                transformer=TwoWayTransformer(depth=2, embedding_dim=32, num_heads=4, mlp_dim=64),
                iou_head_hidden_dim=32,
            ),
        )
        roughen(sam)
    return sam


@pytest.fixture
def tiny_clip() -> CLIP:
    """32 px, patches of 8: 17 tokens of 48 channels, embeddings of 24, texts of up to 77 tokens,
    QuickGELU.
    """
    with seeded(2):
        clip = CLIP(
            embed_dim=24,
            vision_cfg=CLIPVisionCfg(
                layers=2, width=48, head_width=16, patch_size=8, image_size=32
            ),
            text_cfg=CLIPTextCfg(width=32, heads=2, layers=2),
            quick_gelu=True,
        )
        roughen(clip)
    return clip


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
