"""CLIP by itself on regions: what it is shown of each, and the choice of its settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.baselines import (
    CropSetting,
    PoolingSetting,
    cell_weights,
    crop_embedder,
    crop_settings,
    mask_weights,
    pooling_embedder,
)
from regionspot.evaluation.batches import BatchEncoder, RegionBatch, load_image
from regionspot.evaluation.methods import METHODS, clip_crops
from regionspot.evaluation.proposals import ground_truth_proposals
from regionspot.evaluation.settings import methods_at_their_best
from regionspot.masks import decode_rle
from regionspot.mini.dataset import build_dataset
from regionspot.modeling.clip import IMAGE_MEAN
from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.transforms import ClipTransform, resize_image
from regionspot.vocabulary import VocabularyEncoder


@pytest.fixture(scope="module")
def model() -> RegionSpot:
    return create_model("regionspot_mini")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return CocoDataset.load(build_dataset(tmp_path_factory.mktemp("mini"), 1, 6, seed=5)[1])


@pytest.fixture(scope="module")
def batch(model: RegionSpot, dataset: CocoDataset) -> RegionBatch:
    boxes = ground_truth_proposals(dataset).boxes
    sizes = model.sam.image_size, model.clip.image_size
    images = [load_image(dataset, record, boxes[record.id], *sizes) for record in dataset.images[:2]]
    return BatchEncoder(pipeline_from_model(model), masks=True).encode(images)


def embedding_of(model: RegionSpot, picture: np.ndarray) -> torch.Tensor:
    """CLIP's of a picture (H, W, 3), resized to its input."""
    resized = ClipTransform(model.clip.image_size).apply_image(np.ascontiguousarray(picture))
    with torch.inference_mode():
        return model.clip.pool(model.clip.encode_image(torch.from_numpy(resized).permute(2, 0, 1)[None]))[0]


def test_a_square_crop_keeps_the_aspect_ratio(model: RegionSpot, batch: RegionBatch) -> None:
    image = batch.images[0]
    x0, y0, x1, y1 = image.boxes[0]
    half, (cx, cy) = max(x1 - x0, y1 - y0) / 2, ((x0 + x1) / 2, (y0 + y1) / 2)
    low, high = np.floor([cx - half, cy - half]), np.ceil([cx + half, cy + half])
    (left, top), (right, bottom) = np.maximum(low, 0).astype(int), high.astype(int)
    with torch.inference_mode():
        found = crop_embedder(model, CropSetting(1.0, "square"))(model, batch)[0, 0]
    torch.testing.assert_close(found, embedding_of(model, image.picture[top:bottom, left:right]), rtol=1e-4, atol=1e-4)


def test_a_masked_background_shows_the_region_alone(model: RegionSpot, batch: RegionBatch) -> None:
    assert batch.masks is not None
    image = batch.images[1]
    x0, y0, x1, y1 = image.boxes[0].astype(int)
    mask = decode_rle(batch.masks[1][0])
    assert mask.any() and not mask.all()
    masked = np.where(mask[..., None], image.picture, np.round(np.array(IMAGE_MEAN) * 255).astype(np.uint8))
    with torch.inference_mode():
        embed = crop_embedder(model, CropSetting(1.0, background="masked"))
        found = embed(model, batch)[1, 0]
    torch.testing.assert_close(found, embedding_of(model, masked[y0:y1, x0:x1]), rtol=1e-4, atol=1e-4)


def test_a_smaller_size_interpolates_the_position_embedding(model: RegionSpot, batch: RegionBatch) -> None:
    size = model.clip.image_size // 2 // model.clip.patch_size * model.clip.patch_size
    smaller = model.clip.at_size(size)
    assert (smaller.image_size, smaller.num_tokens) == (size, (size // model.clip.patch_size) ** 2 + 1)
    assert smaller.clip.transformer is model.clip.clip.transformer  # the text tower is no copy
    assert model.clip.num_tokens == (model.clip.image_size // model.clip.patch_size) ** 2 + 1
    same = model.clip.at_size(model.clip.image_size)
    torch.testing.assert_close(
        same.clip.visual.positional_embedding, model.clip.clip.visual.positional_embedding, rtol=0, atol=1e-5
    )
    with torch.inference_mode():
        found = crop_embedder(model, CropSetting(1.0, size=size))(model, batch)[0, 0]
        x0, y0, x1, y1 = batch.images[0].boxes[0].astype(int)
        crop = resize_image(np.ascontiguousarray(batch.images[0].picture[y0:y1, x0:x1]), size, size)
        expected = smaller.pool(smaller.encode_image(torch.from_numpy(crop).permute(2, 0, 1)[None]))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="patches of 16 px: 100 px is no multiple"):
        model.clip.at_size(100)


def test_patches_alone_see_nothing_of_the_others_in_the_last_layer(model: RegionSpot) -> None:
    """The formula written out: x + out(value(ln_1(x))), then the MLP."""
    images = torch.randint(0, 256, (2, 3, model.clip.image_size, model.clip.image_size), dtype=torch.uint8)
    visual = model.clip.clip.visual
    with torch.inference_mode():
        found = model.clip.encode_patches_alone(images)
        x = visual._embeds((images.float() - model.clip.image_mean) / model.clip.image_std)
        *before, last = visual.transformer.resblocks
        for layer in before:
            x = layer(x)
        width = model.clip.width
        values = last.ln_1(x) @ last.attn.in_proj_weight[2 * width :].T + last.attn.in_proj_bias[2 * width :]
        x = x + last.attn.out_proj(values)
        expected = (x + last.mlp(last.ln_2(x)))[:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_cell_weights() -> None:
    boxes = np.array([[0, 0, 20, 10], [0, 0, 10, 10], [1, 1, 2, 2], [14, 4.9, 16, 5.1]], float)
    expected = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0, 0.5, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_allclose(cell_weights(boxes, height=10, width=20, grid=2), expected)
    assert cell_weights(np.zeros((0, 4)), 10, 20, 2).shape == (0, 4)
    thin = np.array([[7, 0, 9, 10], [0, 6, 20, 7]], float)  # between the centres of one axis, across those of the other
    np.testing.assert_allclose(cell_weights(thin, height=10, width=20, grid=2), [[0.5, 0, 0.5, 0], [0, 0, 0.5, 0.5]])


def test_mask_weights() -> None:
    mask = np.zeros((10, 20), bool)
    mask[:5, :15] = True
    np.testing.assert_allclose(mask_weights(mask, 2), [2 / 3, 1 / 3, 0, 0], atol=1e-6)


def test_pooling_over_masks_weighs_patches_by_their_cover(model: RegionSpot, batch: RegionBatch) -> None:
    assert batch.masks is not None and batch.patch_tokens is not None
    grid = model.clip.image_size // model.clip.patch_size
    weights = torch.from_numpy(mask_weights(decode_rle(batch.masks[0][1]), grid))
    pooled = weights @ torch.from_numpy(batch.patch_tokens[0, 1:])
    with torch.inference_mode():
        found = pooling_embedder(PoolingSetting("masks"))(model, batch)[0, 1]
        expected = model.clip.pool(pooled.expand(1, 2, -1))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_settings_are_the_best_on_the_given_pictures(model: RegionSpot, dataset: CocoDataset) -> None:
    from regionspot.evaluation.evaluator import evaluate

    vocabulary = VocabularyEncoder(model.clip).encode(dataset.class_names)
    best = methods_at_their_best(model, dataset, vocabulary, num_images=4, progress=False)
    assert set(best) == set(METHODS)
    four = {record.id for record in dataset.images[:4]}
    proposals = ground_truth_proposals(dataset)
    objects = {i: a for i, a in dataset.annotations_by_image.items() if i in four}
    part = replace(dataset, images=dataset.images[:4], annotations_by_image=objects)
    settings = crop_settings(model.clip.image_size, model.clip.patch_size)
    figures = {
        str(setting): evaluate(model, part, vocabulary, proposals, clip_crops(setting), progress=False)[0]["top1"]
        for setting in settings[:6]
    }
    chosen = evaluate(model, part, vocabulary, proposals, best["clip_crops"], progress=False)[0]["top1"]
    assert chosen >= max(figures.values())
    assert len({str(setting) for setting in settings}) == len(settings)


def test_no_setting_is_chosen_on_pictures_without_objects(model: RegionSpot, dataset: CocoDataset) -> None:
    vocabulary = VocabularyEncoder(model.clip).encode(dataset.class_names)
    empty = replace(dataset, annotations_by_image={record.id: () for record in dataset.images})
    with pytest.raises(InputError, match="has no annotated box"):
        methods_at_their_best(model, empty, vocabulary)
