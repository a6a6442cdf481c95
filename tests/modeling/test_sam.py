"""SAM's tokens and masks against `segment_anything`'s own modules: a hook on the real decoder's
transformer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor, nn

from regionspot.errors import ArtifactError, InputError
from regionspot.mini.shipped import load_mini_backbones
from regionspot.modeling import presets
from regionspot.modeling.presets import Preset, WeightFile, create_model
from regionspot.modeling.sam import SAMS, MaskTokens, SamBackbone, build_sam, load_sam_weights
from tests.modeling.conftest import seeded


@torch.no_grad()
def segment_anything_decoder(
    sam: Sam,
    image_embedding: Tensor,
    multimask: bool,
    points: tuple[Tensor, Tensor] | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `SamPredictor.predict_torch` runs for one image (C, h, w): tokens (N, T, C), IoU (N, T),
    low-res masks.
    """
    seen: list[Tensor] = []
    hook = sam.mask_decoder.transformer.register_forward_hook(
        lambda _m, _i, output: seen.append(output[0])
    )
    try:
        sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
        low_res_masks, iou_predictions = sam.mask_decoder(
            image_embeddings=image_embedding.unsqueeze(0),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
    finally:
        hook.remove()
    return seen[0][:, 2:5] if multimask else seen[0][:, 1:2], iou_predictions, low_res_masks


def random_points(generator: torch.Generator, *shape: int, size: float) -> Tensor:
    return torch.rand(*shape, 2, generator=generator) * size


def prompts_of_kind(
    kind: str, count: int, size: float, generator: torch.Generator
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The same prompts twice: arguments for SAM's prompt encoder, and points (N, P, 2) with labels
    (N, P) for ours.
    """
    if kind == "boxes":
        corners = random_points(generator, count, 2, size=size).sort(dim=1).values
        return {"boxes": corners.flatten(1)}, corners, torch.tensor([[2, 3]]).expand(count, 2)
    if kind == "points_and_boxes":
        points = random_points(generator, count, 1, size=size)
        corners = random_points(generator, count, 2, size=size).sort(dim=1).values
        labels = torch.ones(count, 1, dtype=torch.long)
        arguments = {"points": (points, labels), "boxes": corners.flatten(1)}
        return (
            arguments,
            torch.cat([points, corners], dim=1),
            torch.tensor([[1, 2, 3]]).expand(count, 3),
        )
    per_prompt = 1 if kind == "single_points" else 4
    points = random_points(generator, count, per_prompt, size=size)
    labels = torch.randint(0, 2, (count, per_prompt), generator=generator)
    if kind == "padded_points":
        for row in range(count):
            labels[row, 1 + row % per_prompt :] = -1
    # which SAM adds by itself
    padding = (
        torch.zeros(count, 1, 2),
        -torch.ones(count, 1, dtype=torch.long),
    )
    return (
        {"points": (points, labels)},
        torch.cat([points, padding[0]], dim=1),
        torch.cat([labels, padding[1]], dim=1),
    )


KINDS = ("boxes", "single_points", "several_points", "padded_points", "points_and_boxes")


def assert_equal_to_reference(
    sam: Sam, kind: str, multimask: bool, count: int, generator: torch.Generator
) -> None:
    backbone = SamBackbone(sam, prompt_chunk=4)
    embeddings = torch.randn(2, backbone.token_dim, *backbone.embedding_size, generator=generator)
    prompts = [prompts_of_kind(kind, count, backbone.image_size, generator) for _ in range(2)]
    points, labels = (torch.stack([prompt[i] for prompt in prompts]) for i in (1, 2))  # type: ignore[misc]
    tokens, iou_predictions = backbone.mask_tokens(embeddings, points, labels, multimask)
    assert tokens.shape == (2, count, 3 if multimask else 1, backbone.token_dim)
    for image in range(2):
        expected = segment_anything_decoder(sam, embeddings[image], multimask, **prompts[image][0])
        torch.testing.assert_close(tokens[image], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(iou_predictions[image], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_segment_anything(
    tiny_sam: Sam, kind: str, multimask: bool, generator: torch.Generator
) -> None:
    assert_equal_to_reference(tiny_sam, kind, multimask, count=7, generator=generator)


def test_tokens_equal_segment_anything_at_vit_b(generator: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sam = build_sam("vit_b")
    assert SamBackbone(sam).embedding_size == (64, 64)
    for kind in KINDS:
        assert_equal_to_reference(sam, kind, kind == "boxes", count=2, generator=generator)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_segment_anything_at_mini(
    kind: str, multimask: bool, generator: torch.Generator
) -> None:
    sam, _ = load_mini_backbones()
    assert_equal_to_reference(sam.sam, kind, multimask, count=7, generator=generator)


def test_mask_prompts_equal_segment_anything(tiny_sam: Sam, generator: torch.Generator) -> None:
    backbone = SamBackbone(tiny_sam, prompt_chunk=3)
    embeddings = torch.randn(2, 32, 8, 8, generator=generator)
    corners = random_points(generator, 2, 5, 2, size=64).sort(dim=2).values
    labels = torch.tensor([2, 3]).expand(2, 5, 2)
    mask_inputs = torch.randn(2, 5, 1, *backbone.mask_size, generator=generator)
    masks, tokens = backbone.low_res_masks(embeddings, corners, labels, True, mask_inputs)
    for image in range(2):
        expected = segment_anything_decoder(
            tiny_sam,
            embeddings[image],
            True,
            boxes=corners[image].flatten(1),
            masks=mask_inputs[image],
        )
        torch.testing.assert_close(tokens.tokens[image], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(masks[image], expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("multimask", [False, True])
def test_low_res_masks_equal_sam_forward(
    tiny_sam: Sam, multimask: bool, generator: torch.Generator
) -> None:
    backbone = SamBackbone(tiny_sam, prompt_chunk=2)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    input_sizes = torch.tensor([[64, 40], [50, 64]])
    corners = random_points(generator, 2, 3, 2, size=40).sort(dim=2).values
    records = [
        {
            "image": image[:, :height, :width].float(),
            "original_size": (height, width),
            "boxes": boxes.flatten(1),
        }
        for image, (height, width), boxes in zip(images, input_sizes.tolist(), corners, strict=True)
    ]
    expected = tiny_sam(records, multimask_output=multimask)
    embeddings = backbone.encode_image(images, input_sizes)
    masks, tokens = backbone.low_res_masks(
        embeddings, corners, torch.tensor([2, 3]).expand(2, 3, 2), multimask
    )
    for image in range(2):
        torch.testing.assert_close(
            masks[image], expected[image]["low_res_logits"], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            tokens.iou_predictions[image], expected[image]["iou_predictions"], rtol=1e-5, atol=1e-5
        )


def test_images_are_normalised_before_they_are_padded(
    tiny_sam: Sam, generator: torch.Generator
) -> None:
    backbone = SamBackbone(tiny_sam)
    # garbage as padding
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=generator, dtype=torch.uint8)
    input_sizes = torch.tensor([[64, 64], [64, 33], [17, 64]])
    embeddings = backbone.encode_image(images, input_sizes)
    assert embeddings.shape == (3, 32, 8, 8)
    for image, (height, width), embedding in zip(
        images, input_sizes.tolist(), embeddings, strict=True
    ):
        prepared = tiny_sam.preprocess(image[:, :height, :width].float())
        expected = tiny_sam.image_encoder(prepared.unsqueeze(0))[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.encode_image(images.float(), input_sizes), embeddings)


@pytest.mark.parametrize("multimask", [False, True])
def test_no_prompts(tiny_sam: Sam, multimask: bool) -> None:
    backbone = SamBackbone(tiny_sam)
    points, labels = torch.zeros(2, 0, 2, 2), torch.zeros(2, 0, 2, dtype=torch.int32)
    masks, tokens = backbone.low_res_masks(torch.zeros(2, 32, 8, 8), points, labels, multimask)
    wanted = 3 if multimask else 1
    assert isinstance(tokens, MaskTokens)
    assert tokens.tokens.shape == (2, 0, wanted, 32)
    assert tokens.iou_predictions.shape == (2, 0, wanted)
    assert masks.shape == (2, 0, wanted, 32, 32)
    assert backbone.mask_tokens(
        torch.zeros(2, 32, 8, 8), points, labels, multimask
    ).tokens.shape == (2, 0, wanted, 32)


def test_chunks_change_nothing(tiny_sam: Sam, generator: torch.Generator) -> None:
    embeddings = torch.randn(2, 32, 8, 8, generator=generator)
    points = random_points(generator, 2, 5, 2, size=64)
    labels = torch.tensor([1, -1]).expand(2, 5, 2)
    whole = SamBackbone(tiny_sam).mask_tokens(embeddings, points, labels)
    parts = SamBackbone(tiny_sam, prompt_chunk=3).mask_tokens(embeddings, points, labels)
    torch.testing.assert_close(parts.tokens, whole.tokens, rtol=1e-5, atol=1e-6)


def test_token_path_traces(tiny_sam: Sam, generator: torch.Generator) -> None:
    backbone = SamBackbone(tiny_sam)

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(
            self, embeddings: Tensor, points: Tensor, labels: Tensor
        ) -> tuple[Tensor, Tensor]:
            tokens, iou_predictions = self.backbone.mask_tokens(embeddings, points, labels)
            return tokens, iou_predictions

    arguments = (
        torch.randn(1, 32, 8, 8, generator=generator),
        random_points(generator, 1, 5, 2, size=64),
        torch.tensor([[[2, 3]] * 3 + [[1, -1]] * 2]),
    )
    program = torch.export.export(Tokens(), arguments)
    torch.testing.assert_close(
        program.module()(*arguments), Tokens()(*arguments), rtol=1e-5, atol=1e-6
    )


def test_weights_load_from_both_formats(tiny_sam: Sam, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor + 1 for name, tensor in tiny_sam.state_dict().items()}
    torch.save(weights, tmp_path / "sam.pth")
    save_file(weights, tmp_path / "sam.safetensors")
    for name in ("sam.pth", "sam.safetensors"):
        before = {key: value.clone() for key, value in tiny_sam.state_dict().items()}
        load_sam_weights(tiny_sam, tmp_path / name)
        for key, value in tiny_sam.state_dict().items():
            torch.testing.assert_close(value, weights[key])
        tiny_sam.load_state_dict(before)


def test_weights_of_another_size_are_named(tiny_sam: Sam, tmp_path: Any) -> None:
    weights = dict(tiny_sam.state_dict())
    weights["image_encoder.pos_embed"] = torch.zeros(1, 4, 4, 48)
    del weights["mask_decoder.iou_token.weight"]
    weights["stranger"] = torch.zeros(1)
    torch.save(weights, tmp_path / "sam.pth")
    with pytest.raises(
        ArtifactError,
        match=r"missing: mask_decoder\.iou_token\.weight; unexpected: stranger; of another",
    ):
        load_sam_weights(tiny_sam, tmp_path / "sam.pth")


class ConvEncoder(nn.Module):
    """An image encoder that has nothing in common with SAM's ViT."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels)


class TestAnotherImageEncoder:
    @pytest.fixture
    def sam(self, tiny_sam: Sam) -> Sam:
        with seeded(3):
            tiny_sam.image_encoder = ConvEncoder(channels=32, patch=8)
        return tiny_sam

    def test_its_embeddings_are_decoded(self, sam: Sam, generator: torch.Generator) -> None:
        backbone = SamBackbone(sam)
        images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
        sizes = torch.tensor([[64, 64], [48, 64]])
        embeddings = backbone.encode_image(images, sizes)
        pixels = (images[1:, :, :48].float() - sam.pixel_mean) / sam.pixel_std
        padded = nn.functional.pad(pixels, (0, 0, 0, 16))
        torch.testing.assert_close(
            embeddings[1:], sam.image_encoder.patches(padded), rtol=1e-5, atol=1e-5
        )
        boxes = random_points(generator, 2, 3, 2, size=64)
        labels = torch.tensor([2, 3]).expand(2, 3, 2)
        tokens = backbone.mask_tokens(embeddings, boxes, labels).tokens
        assert tokens.shape == (2, 3, 1, 32)
        expected = segment_anything_decoder(sam, embeddings[0], False, boxes=boxes[0].flatten(1))[0]
        torch.testing.assert_close(tokens[0], expected, rtol=1e-4, atol=1e-4)

    def test_it_works_in_half_precision(self, sam: Sam) -> None:
        backbone = SamBackbone(sam).bfloat16()
        assert sam.image_encoder.patches.weight.dtype == torch.bfloat16
        embeddings = backbone.encode_image(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]]))
        assert embeddings.dtype == torch.float32

    def test_embeddings_of_another_size_are_refused(self, sam: Sam) -> None:
        sam.image_encoder = ConvEncoder(channels=32, patch=16)
        with pytest.raises(
            InputError, match=r"ConvEncoder makes .*\(32, 4, 4\) of an image of 64 .* \(32, 8, 8\)"
        ):
            SamBackbone(sam).encode_image(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]]))

    def test_a_preset_takes_it_by_name(self, sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SAMS, "toy", lambda: sam)
        monkeypatch.setitem(
            presets.SAM_FILES, "toy", WeightFile("toy.pth", "https://example.org/toy.pth", "0" * 64)
        )
        monkeypatch.setitem(presets.PRESETS, "regionspot_toy", Preset("toy", "ViT-B-16"))
        with pytest.raises(
            InputError, match=r"sam_weights: toy\.pth from https://example\.org/toy\.pth"
        ):
            create_model("regionspot_toy", clip_weights="clip.pt", head_weights="head.safetensors")
        model = create_model("regionspot_toy", random_weights=0)
        assert model.sam.sam.image_encoder is sam.image_encoder and model.sam.image_size == 64


def test_unknown_size() -> None:
    with pytest.raises(InputError, match="vit_x"):
        build_sam("vit_x")
    assert {"vit_b", "vit_l", "vit_h"} <= set(sam_model_registry)


def test_weights_that_come_later_reach_the_tokens(generator: torch.Generator) -> None:
    """The decoder keeps products of weights, which must follow `load_state_dict`."""
    changed, donor = load_mini_backbones()[0], load_mini_backbones()[0]
    for parameter in donor.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    donor.token_decoder.fold()
    images = torch.randn(1, 128, 16, 16, generator=generator)
    corners = random_points(generator, 1, 3, 2, size=256)
    labels = torch.tensor([2, 3]).expand(1, 3, 2)
    wanted = donor.mask_tokens(images, corners, labels).tokens
    assert not torch.allclose(
        changed.mask_tokens(images, corners, labels).tokens, wanted, atol=1e-2
    )
    torch.nn.ModuleDict({"sam": changed}).load_state_dict(
        torch.nn.ModuleDict({"sam": donor}).state_dict()
    )
    torch.testing.assert_close(changed.mask_tokens(images, corners, labels).tokens, wanted)
