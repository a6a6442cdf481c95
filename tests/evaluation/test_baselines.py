"""CLIP by itself on regions: what it is shown of each, and the choice of its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation import tuning
from regionspot.evaluation.baselines import (
    MEAN_COLOUR,
    CropSetting,
    PoolingSetting,
    cell_weights,
    crop_embedder,
    mask_weights,
    pooling_embedder,
    square_crop,
)
from regionspot.evaluation.batches import BatchEncoder, RegionBatch, load_image
from regionspot.evaluation.evaluator import evaluate
from regionspot.evaluation.methods import METHODS, candidates, clip_crops
from regionspot.evaluation.proposals import ground_truth_proposals
from regionspot.evaluation.tuning import first_with_objects, tuned_methods
from regionspot.masks import decode_rle
from regionspot.mini.architecture import position_table
from regionspot.mini.dataset import build_dataset
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.structures import Vocabulary
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
    images = [
        load_image(dataset, record, boxes[record.id], *sizes) for record in dataset.images[:2]
    ]
    return BatchEncoder(pipeline_from_model(model), masks=True).encode(images)


def embedding_of(model: RegionSpot, picture: np.ndarray) -> torch.Tensor:
    """CLIP's of a picture (H, W, 3), resized to its input."""
    resized = ClipTransform(model.clip.image_size).apply_image(np.ascontiguousarray(picture))
    with torch.inference_mode():
        return model.clip.pool(
            model.clip.encode_image(torch.from_numpy(resized).permute(2, 0, 1)[None])
        )[0]


def test_a_square_crop_keeps_the_aspect_ratio_at_the_border_too() -> None:
    picture = np.random.default_rng(0).integers(1, 255, (40, 60, 3), dtype=np.uint8)
    inside = square_crop(picture, np.array([20.0, 10, 30, 30]), 1.0)
    np.testing.assert_array_equal(inside, picture[10:30, 15:35])
    # from -15 to 25 and from -10 to 30
    corner = square_crop(picture, np.array([0.0, 0, 10, 20]), 2.0)
    assert corner.shape == (40, 40, 3)
    np.testing.assert_array_equal(corner[10:, 15:], picture[:30, :25])
    assert (corner[:10] == MEAN_COLOUR).all() and (corner[:, :15] == MEAN_COLOUR).all()
    wide = square_crop(picture, np.array([0.0, 10, 60, 12]), 1.0)
    assert wide.shape == (60, 60, 3)
    np.testing.assert_array_equal(wide[19:59], picture)  # about the row 11


def test_a_squeezed_crop_is_clipped_to_the_picture(model: RegionSpot, batch: RegionBatch) -> None:
    image = batch.images[0]
    width = image.picture.shape[1]
    outside = replace(
        image, boxes=np.array([[-1000.0, 10, 50, 60], [width - 20, 0, width + 900, 30]])
    )
    two = replace(batch, images=[outside], valid=np.ones((1, 2), bool))
    with torch.inference_mode():
        found = crop_embedder(model, CropSetting(1.0))(two)[0]
        shaped = crop_embedder(model, CropSetting(1.0, "square"))(two)[0]
    torch.testing.assert_close(
        found[0], embedding_of(model, image.picture[10:60, :50]), rtol=1e-4, atol=1e-4
    )
    # what is inside is a square
    torch.testing.assert_close(shaped[0], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found[1], embedding_of(model, image.picture[:30, -20:]), rtol=1e-4, atol=1e-4
    )


def test_a_masked_background_shows_the_region_alone(model: RegionSpot, batch: RegionBatch) -> None:
    assert batch.masks is not None
    image = batch.images[1]
    x0, y0, x1, y1 = image.boxes[0].astype(int)
    mask = decode_rle(batch.masks[1][0])
    assert mask.any() and not mask.all()
    masked = np.where(mask[..., None], image.picture, MEAN_COLOUR)
    with torch.inference_mode():
        embed = crop_embedder(model, CropSetting(1.0, background="masked"))
        found = embed(batch)[1, 0]
    torch.testing.assert_close(
        found, embedding_of(model, masked[y0:y1, x0:x1]), rtol=1e-4, atol=1e-4
    )


def test_another_size_shares_all_but_the_position_embedding(
    model: RegionSpot, batch: RegionBatch
) -> None:
    size = model.clip.image_size // 2
    smaller, grid = model.clip.at_size(size), size // model.clip.patch_size
    assert (smaller.image_size, smaller.num_tokens) == (size, grid**2 + 1)
    own = {id(parameter) for parameter in smaller.parameters()} - {
        id(parameter) for parameter in model.parameters()
    }
    assert own == {id(smaller.clip.visual.positional_embedding)}
    assert model.clip.num_tokens == (model.clip.image_size // model.clip.patch_size) ** 2 + 1
    with torch.inference_mode():
        found = crop_embedder(model, CropSetting(1.0, size=size))(batch)[0, 0]
        x0, y0, x1, y1 = batch.images[0].boxes[0].astype(int)
        crop = resize_image(np.ascontiguousarray(batch.images[0].picture[y0:y1, x0:x1]), size, size)
        expected = smaller.pool(
            smaller.encode_image(torch.from_numpy(crop).permute(2, 0, 1)[None])
        )[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="patches of 16 px: 100 px is no multiple"):
        model.clip.at_size(100)


def test_positions_of_another_size_are_the_formulas_or_interpolated(model: RegionSpot) -> None:
    size, grid = model.clip.image_size // 2, model.clip.image_size // 2 // model.clip.patch_size
    by_formula = model.clip.at_size(size).clip.visual.positional_embedding
    torch.testing.assert_close(by_formula.data, position_table(grid))
    learnt = ClipBackbone(model.clip.clip)
    torch.testing.assert_close(
        learnt.at_size(model.clip.image_size).clip.visual.positional_embedding,
        model.clip.clip.visual.positional_embedding,
        rtol=0,
        atol=1e-5,
    )
    interpolated = learnt.at_size(size).clip.visual.positional_embedding
    assert interpolated.shape == by_formula.shape and not torch.allclose(
        interpolated, by_formula, atol=1e-2
    )
    # the class token's
    torch.testing.assert_close(interpolated[0], by_formula[0], rtol=0, atol=1e-3)


def test_patches_without_mixing_see_nothing_of_the_others_in_the_last_layer(
    model: RegionSpot,
) -> None:
    """The formula written out: x + out(value(ln_1(x))), then the MLP."""
    images = torch.randint(
        0, 256, (2, 3, model.clip.image_size, model.clip.image_size), dtype=torch.uint8
    )
    visual = model.clip.clip.visual
    with torch.inference_mode():
        found = model.clip.encode_patches_without_mixing(images)
        x = visual._embeds((images.float() - model.clip.image_mean) / model.clip.image_std)
        *before, last = visual.transformer.resblocks
        for layer in before:
            x = layer(x)
        width = model.clip.width
        values = (
            last.ln_1(x) @ last.attn.in_proj_weight[2 * width :].T
            + last.attn.in_proj_bias[2 * width :]
        )
        x = x + last.attn.out_proj(values)
        expected = (x + last.mlp(last.ln_2(x)))[:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_cell_weights() -> None:
    boxes = np.array([[0, 0, 20, 10], [0, 0, 10, 10], [1, 1, 2, 2], [14, 4.9, 16, 5.1]], float)
    expected = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0, 0.5, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_allclose(cell_weights(boxes, height=10, width=20, grid=2), expected)
    assert cell_weights(np.zeros((0, 4)), 10, 20, 2).shape == (0, 4)
    # between the centres of one axis, across those of the other
    thin = np.array([[7, 0, 9, 10], [0, 6, 20, 7]], float)
    np.testing.assert_allclose(
        cell_weights(thin, height=10, width=20, grid=2), [[0.5, 0, 0.5, 0], [0, 0, 0.5, 0.5]]
    )


def test_mask_weights() -> None:
    mask = np.zeros((10, 20), bool)
    mask[:5, :15] = True
    np.testing.assert_allclose(mask_weights(mask, 2), [2 / 3, 1 / 3, 0, 0], atol=1e-6)


def test_pooling_over_masks_weighs_patches_by_their_cover(
    model: RegionSpot, batch: RegionBatch
) -> None:
    assert batch.masks is not None and batch.patch_tokens is not None
    grid = model.clip.image_size // model.clip.patch_size
    weights = torch.from_numpy(mask_weights(decode_rle(batch.masks[0][1]), grid))
    patches = torch.from_numpy(batch.patch_tokens[0, 1:])
    with torch.inference_mode():
        found = pooling_embedder(model, PoolingSetting("masks"))(batch)[0, 1]
        expected = model.clip.pool((weights @ patches).expand(1, 2, -1))[0]
        projected = pooling_embedder(model, PoolingSetting("masks", order="projected first"))(
            batch
        )[0, 1]
        one_by_one = model.clip.pool(patches[:, None])  # (L - 1, E)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    units = one_by_one / one_by_one.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(projected, weights @ units, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return CocoDataset.load(build_dataset(tmp_path_factory.mktemp("mini"), 1, 60, seed=6)[1])


@pytest.fixture(scope="module")
def vocabulary(model: RegionSpot, many: CocoDataset) -> Vocabulary:
    size = len(many.class_names), model.clip.embed_dim
    return Vocabulary(many.class_names, np.full(size, size[1] ** -0.5, np.float32))


class TestTuning:
    """The choice itself, with what each setting names right told beforehand."""

    @pytest.fixture
    def told(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
        """By description, in how many of the pictures a setting is right; nothing of others."""
        shares: dict[str, float] = {}

        def scored(
            _: Any,
            __: Any,
            dataset: CocoDataset,
            vocabulary: Vocabulary,
            *rest: Any,
            progress: bool,
        ) -> Iterator[Any]:
            _, methods, _ = rest
            rows = np.eye(len(vocabulary))
            for image in dataset.images:
                batch = SimpleNamespace(images=[SimpleNamespace(record=image)])
                truth = [
                    dataset.category_index[a.category_id]
                    for a in dataset.annotations_by_image[image.id]
                ]
                for name in methods:
                    is_right = (37 * int(image.id)) % 100 < 100 * shares.get(name, 0.0)
                    guesses = (
                        truth if is_right else [(index + 1) % len(vocabulary) for index in truth]
                    )
                    yield batch, name, rows[[guesses]]

        monkeypatch.setattr(tuning, "scored_batches", scored)
        return shares

    @pytest.mark.parametrize("name", ["clip_crops", "roi_pooling", "mask_pooling"])
    def test_the_best_of_all_settings_is_taken(
        self,
        model: RegionSpot,
        many: CocoDataset,
        vocabulary: Vocabulary,
        told: dict[str, float],
        name: str,
    ) -> None:
        for best in candidates(model.clip)[name]:
            told.clear()
            told.update({best.description: 0.9, "another": 1.0})
            chosen = tuned_methods(model, many, vocabulary, [name, "head"], progress=False)
            assert (
                chosen[name].description == best.description and chosen["head"] is METHODS["head"]
            )
            tuned_on = chosen[name].tuned_on
            assert tuned_on is not None
            assert (tuned_on["data"], tuned_on["images"]) == ("val.json", 60)
            assert tuned_on["regions"] == many.num_annotations
            assert tuned_on["settings"] == len(candidates(model.clip)[name])
            assert 80 < tuned_on["top1"] < 100 and list(tuned_on["second"].values()) == [0.0]

    def test_the_ensemble_has_the_crops_that_are_best_alone(
        self, model: RegionSpot, many: CocoDataset, vocabulary: Vocabulary, told: dict[str, float]
    ) -> None:
        best = clip_crops(CropSetting(2.5, "square", None, "masked"))
        told[best.description] = 0.9
        chosen = tuned_methods(
            model, first_with_objects(many, 20), vocabulary, ["head_and_crops"], progress=False
        )
        assert list(chosen) == ["head_and_crops"]
        assert best.description in chosen["head_and_crops"].description
        assert (chosen["head_and_crops"].tuned_on or {})["images"] == 20

    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_few_pictures_are_enough(
        self,
        model: RegionSpot,
        many: CocoDataset,
        vocabulary: Vocabulary,
        told: dict[str, float],
        count: int,
    ) -> None:
        best = candidates(model.clip)["roi_pooling"][2]
        told[best.description] = 1.0
        chosen = tuned_methods(
            model, first_with_objects(many, count), vocabulary, ["roi_pooling"], progress=False
        )
        assert chosen["roi_pooling"].description == best.description
        assert (chosen["roi_pooling"].tuned_on or {})["images"] == count

    def test_pictures_without_objects_are_refused(
        self, model: RegionSpot, many: CocoDataset, vocabulary: Vocabulary
    ) -> None:
        empty = replace(many, annotations_by_image={record.id: () for record in many.images})
        with pytest.raises(InputError, match="has no annotated box"):
            tuned_methods(model, empty, vocabulary, progress=False)


def test_tuning_runs_for_real(model: RegionSpot, dataset: CocoDataset) -> None:
    vocabulary = VocabularyEncoder(model.clip).encode(dataset.class_names)
    chosen = tuned_methods(model, dataset, vocabulary, ["roi_pooling"], progress=False)[
        "roi_pooling"
    ]
    proposals = ground_truth_proposals(dataset)
    figures = {
        method.description: evaluate(model, dataset, vocabulary, proposals, method, progress=False)[
            0
        ]["top1"]
        for method in candidates(model.clip)["roi_pooling"]
    }
    assert chosen.tuned_on is not None
    assert chosen.tuned_on["top1"] == pytest.approx(figures[chosen.description], abs=0.06)
