"""SAM's image encoder with less work gives what segment_anything's own does."""

from __future__ import annotations

import pytest
import torch

from regionspot.modeling import image_encoder
from regionspot.modeling.image_encoder import encode_image
from regionspot.modeling.sam import compose_sam


@pytest.fixture(autouse=True, params=[1, 1 << 30], ids=["large", "small"])
def how_large_layers_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_encoder, "LARGE", request.param)


@pytest.mark.parametrize("fuse_from", [None, 0])
@pytest.mark.parametrize(
    ("image_size", "window"), [(128, 3), (128, 4), (96, 14)], ids=["padded", "whole", "larger"]
)
def test_equals_segment_anything(fuse_from: int | None, image_size: int, window: int) -> None:
    torch.manual_seed(0)
    sam = compose_sam(
        image_size=image_size,
        width=32,
        depth=3,
        num_heads=4,
        global_attention=(1,),
        window_size=window,
        token_dim=16,
        decoder_mlp_dim=32,
        iou_head_dim=16,
    ).double()
    # relative positions and biases are zero at first, and would hide an error
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pixels = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    with torch.inference_mode():
        expected = sam.image_encoder(pixels)
        found = encode_image(sam.image_encoder, pixels, fuse_from)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fuse_from", [None, 0])
def test_without_relative_and_absolute_positions(fuse_from: int | None) -> None:
    torch.manual_seed(0)
    sam = compose_sam(
        image_size=64,
        width=16,
        depth=2,
        num_heads=2,
        global_attention=(1,),
        window_size=3,
        token_dim=16,
        decoder_mlp_dim=16,
        iou_head_dim=8,
    ).double()
    encoder = sam.image_encoder
    encoder.pos_embed = None
    for block in encoder.blocks:
        block.attn.use_rel_pos = False
        block.attn.qkv.bias = None
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(
            encode_image(encoder, pixels, fuse_from), encoder(pixels), rtol=1e-10, atol=1e-10
        )
