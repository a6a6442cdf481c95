"""The shared-image decoder against `segment_anything`'s own: any prompts, both precisions, tokens
and masks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from regionspot.mini.shipped import load_mini_backbones
from regionspot.modeling import token_decoder_algebra as algebra
from regionspot.modeling.sam import build_sam
from regionspot.modeling.token_decoder import PADDING_LABEL, ImageContext, TokenDecoder
from regionspot.runtime.graph_spec import NUM_PROJECTIONS, NUM_STATISTICS
from tests.modeling.conftest import roughen, seeded

TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def vit_b() -> Sam:
    with seeded(3):
        sam = build_sam("vit_b")
        roughen(sam.mask_decoder)
        roughen(sam.prompt_encoder)
    return sam.requires_grad_(False)


@pytest.fixture(scope="module")
def mini() -> Sam:
    return load_mini_backbones()[0].sam


@torch.no_grad()
def segment_anything_reference(
    sam: Sam, image_embedding: Tensor, points: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`segment_anything`'s own transformer and mask prediction, prompt by prompt, for one image (C,
    h, w).

    Its prompt encoder computes positions in float32 alone, so they are embedded here, point by
    point, as its `_embed_points` and `_embed_boxes` do.

    Returns:
        Tokens (N, 4, C), predicted IoUs (N, 4) and low-resolution masks (N, 4, 4h, 4w), of all mask
        tokens.
    """
    encoder, decoder = sam.prompt_encoder, sam.mask_decoder
    side, (h, w) = sam.image_encoder.img_size, encoder.image_embedding_size
    dtype = image_embedding.dtype
    rows, columns = torch.meshgrid(
        torch.arange(h, dtype=dtype), torch.arange(w, dtype=dtype), indexing="ij"
    )
    cells = torch.stack([(columns + 0.5) / w, (rows + 0.5) / h], dim=-1)
    positions = encoder.pe_layer._pe_encoding(cells).permute(2, 0, 1)[None]  # (1, C, h, w)
    dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, h, w)
    seen: list[Tensor] = []
    hook = decoder.transformer.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    found = []
    for of_prompt, kinds in zip(points, labels.tolist(), strict=True):
        sparse = [
            encoder.not_a_point_embed.weight[0]
            if kind == PADDING_LABEL
            else encoder.pe_layer._pe_encoding((xy + 0.5) / side)
            + encoder.point_embeddings[kind].weight[0]
            for xy, kind in zip(of_prompt, kinds, strict=True)
        ]
        found.append(
            decoder.predict_masks(
                image_embedding[None], positions, torch.stack(sparse)[None], dense
            )
        )
    hook.remove()
    masks, ious = (torch.cat(parts) for parts in zip(*found, strict=True))
    return torch.cat(seen)[:, 1:5], ious, masks


def random_prompts(
    kind: str, count: int, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Points (N, P, 2) and labels (N, P): boxes, points, or prompts of all kinds with padding at
    the end.
    """
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
    clicks = torch.rand(count, 3, 2, generator=generator)
    foreground = torch.randint(0, 2, (count, 3), generator=generator)
    box = torch.tensor([[2, 3]]).expand(count, 2)
    if kind == "boxes":
        return corners * side, box
    if kind == "points":
        return clicks[:, :1] * side, foreground[:, :1]
    points, labels = (
        torch.cat([clicks, corners], dim=1),
        torch.cat([foreground, box], dim=1),
    )  # (N, 5, ...)
    labels = labels.clone()
    # 0: two clicks and a box; 1: one click; 2: a box; 3: nothing but padding; 4: everything
    for row in range(count):
        hidden = ([0], [1, 2, 3, 4], [0, 1, 2], [0, 1, 2, 3, 4], [])[row % 5]
        labels[row, hidden] = PADDING_LABEL
    return points * side, labels


def decode(
    decoder: TokenDecoder, images: Tensor, prompts: tuple[Tensor, Tensor], *token_ids: int
) -> Any:
    with torch.inference_mode():
        return decoder.masks(
            images, decoder.image_part(images), *prompts, torch.tensor(token_ids, dtype=torch.int32)
        )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["boxes", "points", "mixed"])
@pytest.mark.parametrize("size", ["vit_b", "mini"])
def test_equals_segment_anything(
    size: str,
    kind: str,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
    generator: torch.Generator,
) -> None:
    sam = request.getfixturevalue(size)
    try:
        sam.to(dtype)
        decoder = TokenDecoder(sam)
        count = 5 if size == "vit_b" else 10
        images = torch.randn(
            2, decoder.no_mask.shape[0], *decoder.embedding_size, generator=generator
        ).to(dtype)
        points, labels = (
            torch.stack(pair)
            for pair in zip(
                *(random_prompts(kind, count, decoder.image_size, generator) for _ in range(2)),
                strict=True,
            )
        )
        points = points.to(dtype)
        masks, found = decode(decoder, images, (points, labels), 0, 1, 2, 3)
        for image in range(2):
            tokens, ious, low_res_masks = segment_anything_reference(
                sam, images[image], points[image], labels[image]
            )
            assert_close(found.tokens[image], tokens)
            assert_close(found.iou_predictions[image], ious)
            assert_close(masks[image], low_res_masks)
    finally:
        sam.float()


@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("size", ["vit_b", "mini"])
def test_any_number_of_prompts(
    size: str, count: int, request: pytest.FixtureRequest, generator: torch.Generator
) -> None:
    """All of mini's are compared; at ViT-B a few of the 300, since its reference takes a second for
    ten.
    """
    sam = request.getfixturevalue(size)
    decoder = TokenDecoder(sam)
    images = torch.randn(1, decoder.no_mask.shape[0], *decoder.embedding_size, generator=generator)
    points, labels = random_prompts("mixed", count, decoder.image_size, generator)
    with torch.inference_mode():
        context = decoder.image_part(images)
        found = decoder.prompt_part(context, points[None], labels[None], torch.tensor([0]))
    some = (
        range(count)
        if size == "mini"
        else sorted({0, count // 2, count - 3, count - 2, count - 1} & set(range(count)))
    )
    tokens, ious, _ = segment_anything_reference(
        sam, images[0], points[list(some)], labels[list(some)]
    )
    assert found.tokens.shape == (1, count, 1, decoder.no_mask.shape[0])
    assert_close(found.tokens[0, list(some)], tokens[:, :1])
    assert_close(found.iou_predictions[0, list(some)], ious[:, :1])


def test_no_prompt(mini: Sam, generator: torch.Generator) -> None:
    decoder = TokenDecoder(mini)
    images = torch.randn(2, 128, 16, 16, generator=generator)
    masks, found = decode(
        decoder, images, (torch.zeros(2, 0, 2, 2), torch.zeros(2, 0, 2, dtype=torch.int32)), 0
    )
    assert found.tokens.shape == (2, 0, 1, 128)
    assert masks.shape == (2, 0, 1, 64, 64)


def test_chosen_tokens_are_those_of_all(mini: Sam, generator: torch.Generator) -> None:
    decoder = TokenDecoder(mini)
    images = torch.randn(1, 128, 16, 16, generator=generator)
    prompts = tuple(part[None] for part in random_prompts("mixed", 6, 256, generator))
    all_masks, every = decode(decoder, images, prompts, 0, 1, 2, 3)  # type: ignore[arg-type]
    masks, chosen = decode(decoder, images, prompts, 3, 1)  # type: ignore[arg-type]
    assert_close(chosen.tokens, every.tokens[:, :, [3, 1]])
    assert_close(chosen.iou_predictions, every.iou_predictions[:, :, [3, 1]])
    assert_close(masks, all_masks[:, :, [3, 1]])


def test_tokens_do_not_depend_on_the_iou(mini: Sam, generator: torch.Generator) -> None:
    decoder = TokenDecoder(mini)
    points, labels = (part[None] for part in random_prompts("mixed", 6, 256, generator))
    with torch.inference_mode():
        context = decoder.image_part(torch.randn(1, 128, 16, 16, generator=generator))
        with_iou = decoder.prompt_part(context, points, labels, torch.tensor([0, 2]))
        without = decoder.prompt_part(
            context, points, labels, torch.tensor([0, 2]), predict_iou=False
        )
    assert_close(without.tokens, with_iou.tokens)
    assert without.iou_predictions.shape == (1, 6, 0)


def test_image_part_has_the_specified_rows(mini: Sam, generator: torch.Generator) -> None:
    with torch.inference_mode():
        context = TokenDecoder(mini).image_part(torch.randn(2, 128, 16, 16, generator=generator))
    assert isinstance(context, ImageContext)
    assert context.projections.shape == (2, NUM_PROJECTIONS, 64, 256)
    assert context.statistics.shape == (2, NUM_STATISTICS, 256)


def test_only_the_image_part_looks_at_the_image(mini: Sam, generator: torch.Generator) -> None:
    """What is cached for an image gives the same answers, whichever questions were asked before."""
    decoder = TokenDecoder(mini)
    images = torch.randn(1, 128, 16, 16, generator=generator)
    points, labels = random_prompts("mixed", 9, 256, generator)
    ids = torch.tensor([0])
    with torch.inference_mode():
        context = decoder.image_part(images)
        before = context.projections.clone(), context.statistics.clone()
        together = decoder.prompt_part(context, points[None], labels[None], ids).tokens
        alone = [
            decoder.prompt_part(
                context, points[None, row : row + 1], labels[None, row : row + 1], ids
            ).tokens
            for row in range(9)
        ]
    assert_close(torch.cat(alone, dim=1), together)
    assert torch.equal(context.projections, before[0]) and torch.equal(
        context.statistics, before[1]
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_products_of_all_prompts_at_once_are_those_of_each(
    batch: int, generator: torch.Generator
) -> None:
    """GPUs and compiled code take the former, CPUs the latter."""
    vectors = torch.randn(batch, 3, 4, 7, 8, generator=generator)
    image = torch.randn(batch, 4, 8, 10, generator=generator)
    shared = torch.randn(1, 4, 8, 10, generator=generator)
    assert_close(
        algebra.by_head_at_once(vectors, image),
        algebra.by_head(vectors, image),
    )
    onto = torch.randn(batch, 3, 28, 10, generator=generator)
    expected = algebra.by_head(vectors, shared, onto=onto.clone())
    assert_close(onto + algebra.by_head_at_once(vectors, shared), expected)
    weights = torch.randn(batch, 3, 28, 10, generator=generator)
    at_once = algebra.sum_by_head_at_once(weights.unflatten(2, (4, 7)), image)
    assert_close(at_once, algebra.sum_by_head(weights, image))
