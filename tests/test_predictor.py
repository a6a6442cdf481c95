"""Encode once, ask many; the regions of one call see each other; wrong questions get clear answers.

The model is regionspot_mini's architecture with random weights: genuine segment_anything and
open_clip models.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from regionspot.errors import ArtifactError, InputError
from regionspot.masks import decode_rle, mask_to_box
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.predictor import RegionPredictor
from regionspot.structures import FloatArray, Prompts, RegionPredictions, Vocabulary

WORDS = ("red toy", "dog", "blue cup", "tree", "car", "house")
BOXES = np.array([[10, 5, 90, 60], [30, 20, 150, 95], [100, 40, 140, 80]], np.float32)
HEIGHT, WIDTH = 100, 160


@pytest.fixture(scope="module")
def model() -> RegionSpot:
    return create_model("regionspot_mini", random_weights=0)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (10, 16, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((10, 10, 1), np.uint8))


@pytest.fixture(scope="module")
def predictor(
    model: RegionSpot, photo: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> RegionPredictor:
    return RegionPredictor(model, tmp_path_factory.mktemp("vocabulary")).set_image(photo)


def ious(found: RegionPredictions) -> FloatArray:
    assert found.iou_predictions is not None
    return found.iou_predictions


class Calls:
    """How often a module ran."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        self.handle = module.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


@pytest.fixture
def image_calls(model: RegionSpot) -> Iterator[list[Calls]]:
    calls = [Calls(model.sam.sam.image_encoder.patch_embed), Calls(model.clip.clip.visual.conv1)]
    yield calls
    for call in calls:
        call.handle.remove()


class TestNothing:
    @pytest.mark.parametrize(
        "prompts", [{"boxes": []}, {"points": np.zeros((0, 2))}, {"boxes": [], "masks": []}]
    )
    @pytest.mark.parametrize("multimask", [False, True])
    def test_no_region(
        self, predictor: RegionPredictor, prompts: dict[str, Any], multimask: bool
    ) -> None:
        assert (
            len(
                predictor.predict(
                    **prompts, vocabulary=WORDS, multimask=multimask, return_masks=False
                )
            )
            == 0
        )
        found = predictor.predict(**prompts, vocabulary=WORDS, multimask=multimask)
        assert len(found) == 0
        assert found.boxes.shape == (0, 4)
        assert found.top_scores.shape == (0, 5)
        assert found.masks == ()
        assert found.to_json("a.png")["regions"] == []

    def test_before_set_image(self, model: RegionSpot) -> None:
        with pytest.raises(
            InputError, match=r"no image is set for this thread: call predict\(image"
        ):
            RegionPredictor(model).predict(boxes=BOXES, vocabulary=WORDS)


class TestEncodeOnce:
    def test_many_questions(
        self, predictor: RegionPredictor, photo: np.ndarray, image_calls: list[Calls]
    ) -> None:
        predictor.set_image(photo)
        assert [call.count for call in image_calls] == [1, 1]
        predictor.predict(boxes=BOXES, vocabulary=WORDS)
        predictor.predict(points=[[20, 20]], vocabulary=WORDS)
        predictor.predict(boxes=BOXES, vocabulary="something new, something else")
        assert [call.count for call in image_calls] == [1, 1]

    def test_words_are_encoded_once(self, predictor: RegionPredictor, model: RegionSpot) -> None:
        predictor.predict(boxes=BOXES, vocabulary=["a word", "another word"])
        calls = Calls(model.clip.clip.transformer)
        predictor.predict(boxes=BOXES, vocabulary=("a word", "another word"))
        assert calls.count == 0
        predictor.predict(boxes=BOXES, vocabulary=["a word", "a third word"])
        assert calls.count == 1
        calls.handle.remove()

    def test_a_vocabulary_with_embeddings(
        self, predictor: RegionPredictor, model: RegionSpot
    ) -> None:
        embeddings = np.eye(2, model.clip.embed_dim, dtype=np.float32)
        found = predictor.predict(boxes=BOXES, vocabulary=Vocabulary(("x", "y"), embeddings))
        assert found.class_names == ("x", "y")
        with pytest.raises(
            InputError, match=r"embeddings have 2 numbers each, this model needs 128"
        ):
            predictor.predict(
                boxes=BOXES, vocabulary=Vocabulary(("x", "y"), np.eye(2, dtype=np.float32))
            )

    def test_a_bad_picture_leaves_the_last_one(self, predictor: RegionPredictor) -> None:
        before = predictor.predict(boxes=BOXES, vocabulary=WORDS)
        with pytest.raises(InputError):
            predictor.set_image(b"not a picture")
        np.testing.assert_array_equal(
            predictor.predict(boxes=BOXES, vocabulary=WORDS).scores, before.scores
        )


class TestAnswers:
    def test_shapes_and_order(self, predictor: RegionPredictor) -> None:
        found = predictor.predict(boxes=BOXES, vocabulary=WORDS, top_k=3)
        assert (found.image_height, found.image_width) == (HEIGHT, WIDTH)
        np.testing.assert_array_equal(found.boxes, BOXES)
        assert found.top_scores.shape == (3, 3)
        assert (np.diff(found.top_scores, axis=1) <= 0).all()
        np.testing.assert_array_equal(found.top_scores[:, 0], found.scores)
        np.testing.assert_array_equal(found.top_class_ids[:, 0], found.class_ids)
        everything = predictor.predict(boxes=BOXES, vocabulary=WORDS, top_k=99)
        np.testing.assert_allclose(everything.top_scores.sum(1), 1, rtol=1e-5)

    def test_equals_the_model_called_by_hand(
        self, predictor: RegionPredictor, model: RegionSpot
    ) -> None:
        image, words = predictor._image, predictor._encode_vocabulary(WORDS)
        assert image is not None
        points = torch.from_numpy(BOXES.reshape(1, 3, 2, 2)) * (256 / WIDTH)
        with torch.inference_mode():
            embeddings = torch.from_numpy(image.encoded.parts[0].tensors[0])
            tokens = model.sam.mask_tokens(embeddings, points, torch.tensor([[[2, 3]] * 3])).tokens
            patch_tokens = torch.from_numpy(image.patch_tokens)
            logits = model.classify(
                tokens[:, :, 0], patch_tokens, torch.from_numpy(words.embeddings)
            )
        expected = logits[0].softmax(-1).max(-1).values
        found = predictor.predict(boxes=BOXES, vocabulary=WORDS)
        np.testing.assert_allclose(found.scores, expected, atol=1e-5)

    def test_regions_see_each_other_in_any_order(self, predictor: RegionPredictor) -> None:
        order = [2, 0, 1]
        found = predictor.predict(boxes=BOXES, vocabulary=WORDS, top_k=6)
        shuffled = predictor.predict(boxes=BOXES[order], vocabulary=WORDS, top_k=6)
        np.testing.assert_allclose(shuffled.top_scores, found.top_scores[order], atol=1e-5)
        np.testing.assert_array_equal(shuffled.class_ids, found.class_ids[order])
        alone = predictor.predict(boxes=BOXES[:1], vocabulary=WORDS, top_k=6)
        assert np.abs(alone.top_scores - found.top_scores[:1]).max() > 1e-4

    def test_chunks_change_nothing(self, predictor: RegionPredictor) -> None:
        whole = predictor.predict(boxes=BOXES, vocabulary=WORDS)
        chunked = predictor.predict(boxes=BOXES, vocabulary=WORDS, mask_chunk=1)
        tokens_only = predictor.predict(boxes=BOXES, vocabulary=WORDS, return_masks=False)
        assert tokens_only.masks is None
        for other in (chunked, tokens_only):
            np.testing.assert_allclose(other.top_scores, whole.top_scores, atol=1e-5)
            np.testing.assert_allclose(ious(other), ious(whole), atol=1e-5)

    def test_only_drawing_is_chunked(
        self, predictor: RegionPredictor, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stages: list[str] = []

        @contextmanager
        def observer(stage: str) -> Iterator[None]:
            yield
            stages.append(stage)

        monkeypatch.setattr(predictor.pipeline, "observer", observer)
        predictor.predict(boxes=BOXES, vocabulary=WORDS, return_masks=False, mask_chunk=1)
        assert stages == ["sam_token_decoder_prompts", "region_head"]
        stages.clear()
        predictor.predict(boxes=BOXES, vocabulary=WORDS, mask_chunk=1)
        assert stages == ["sam_mask_decoder", "encode_masks"] * len(BOXES) + ["region_head"]
        stages.clear()
        predictor.encode(photo)
        assert stages == [
            "preprocess",
            "sam_image_encoder",
            "sam_token_decoder_image",
            "clip_image_encoder",
        ]

    def test_dropout_is_off_and_the_mode_put_back(
        self, predictor: RegionPredictor, model: RegionSpot
    ) -> None:
        first = predictor.predict(boxes=BOXES, vocabulary=WORDS)
        assert not model.head.training
        model.train()
        second = predictor.predict(boxes=BOXES, vocabulary=WORDS)
        assert model.head.training
        model.head.eval()
        np.testing.assert_array_equal(first.scores, second.scores)

    def test_nan_is_not_passed_on(self, predictor: RegionPredictor, model: RegionSpot) -> None:
        bias = model.head.projector.bias
        saved = bias.detach().clone()
        with torch.no_grad():
            bias.fill_(float("nan"))
        try:
            with pytest.raises(ArtifactError, match="NaN"):
                predictor.predict(boxes=BOXES, vocabulary=WORDS)
        finally:
            with torch.no_grad():
                bias.copy_(saved)


class TestPrompts:
    def test_boxes_points_and_masks_together(self, predictor: RegionPredictor) -> None:
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[20:60, 30:90] = True
        found = predictor.predict(
            boxes=BOXES,
            points=[[[20, 20], [40, 40], [150, 90]]],
            point_labels=[[1, 1, 0]],
            masks=[mask],
            vocabulary=WORDS,
        )
        assert len(found) == 5
        np.testing.assert_array_equal(found.boxes[:3], BOXES)
        np.testing.assert_array_equal(found.boxes[4], [30, 20, 90, 60])

    def test_a_mask_prompt_says_more_than_its_box(self, predictor: RegionPredictor) -> None:
        box, mask = [[30, 20, 90, 60]], np.zeros((1, HEIGHT, WIDTH), bool)
        mask[0, 20:60, 30:90] = True
        mask[0, 22:58, 34:86] = False  # a ring
        by_box = predictor.predict(boxes=box, vocabulary=WORDS, return_masks=False)
        by_mask = predictor.predict(masks=mask, vocabulary=WORDS, return_masks=False)
        assert np.abs(ious(by_box) - ious(by_mask)).max() > 1e-5

    def test_a_point_takes_the_box_of_its_mask(self, predictor: RegionPredictor) -> None:
        found = predictor.predict(points=[[80, 50], [5, 5]], vocabulary=WORDS)
        assert found.masks is not None
        for box, rle, point in zip(found.boxes, found.masks, [[80, 50], [5, 5]], strict=True):
            mask = decode_rle(rle)
            np.testing.assert_array_equal(box, mask_to_box(mask) if mask.any() else point * 2)
        bare = predictor.predict(points=[[80, 50]], vocabulary=WORDS, return_masks=False)
        np.testing.assert_array_equal(bare.boxes, [[80, 50, 80, 50]])

    def test_masks_have_the_size_of_the_original(self, predictor: RegionPredictor) -> None:
        found = predictor.predict(boxes=BOXES, vocabulary=WORDS)
        assert found.masks is not None
        assert [rle["size"] for rle in found.masks] == [[HEIGHT, WIDTH]] * 3
        assert decode_rle(found.masks[0]).shape == (HEIGHT, WIDTH)

    def test_three_readings_of_each_prompt(self, predictor: RegionPredictor) -> None:
        found = predictor.predict(boxes=BOXES, vocabulary=WORDS, multimask=True, top_k=6)
        assert len(found) == 9
        np.testing.assert_array_equal(found.boxes, np.repeat(BOXES, 3, axis=0))
        assert found.masks is not None
        assert len(found.masks) == len(ious(found)) == 9
        shuffled = predictor.predict(boxes=BOXES[::-1], vocabulary=WORDS, multimask=True, top_k=6)
        by_prompt = found.top_scores.reshape(3, 3, 6)  # prompt, reading, class
        np.testing.assert_allclose(shuffled.top_scores.reshape(3, 3, 6), by_prompt[::-1], atol=1e-5)

    @pytest.mark.parametrize("validated", [False, True])
    def test_prompts_are_answered_as_the_arrays_they_are_made_of(
        self, predictor: RegionPredictor, validated: bool
    ) -> None:
        points = [[[20, 20], [40, 40], [150, 90]]]
        labels = [[1, 1, 0]]
        parts = [Prompts.from_boxes(BOXES), Prompts.from_points(points, labels)]
        if validated:
            parts = [part.validated(HEIGHT, WIDTH) for part in parts]
        found = predictor.predict(prompts=parts, vocabulary=WORDS)
        expected = predictor.predict(
            boxes=BOXES, points=points, point_labels=labels, vocabulary=WORDS
        )
        np.testing.assert_array_equal(found.top_scores, expected.top_scores)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        assert found.masks == expected.masks
        alone = predictor.predict(prompts=parts[0], vocabulary=WORDS)
        np.testing.assert_array_equal(
            alone.scores, predictor.predict(boxes=BOXES, vocabulary=WORDS).scores
        )

    def test_prompts_are_answered_in_the_order_given(self, predictor: RegionPredictor) -> None:
        parts = [Prompts.from_points([[80, 50]]), Prompts.empty(), Prompts.from_boxes(BOXES[:1])]
        found = predictor.predict(prompts=parts, vocabulary=WORDS, return_masks=False)
        np.testing.assert_array_equal(found.boxes, [[80, 50, 80, 50], BOXES[0]])
        assert len(predictor.predict(prompts=[], vocabulary=WORDS)) == 0

    def test_prompts_validated_for_another_image_are_checked_again(
        self, predictor: RegionPredictor
    ) -> None:
        elsewhere = Prompts.from_boxes([[200, 0, 300, 9]]).validated(1000, 1000)
        with pytest.raises(InputError, match="image is 160 x 100 pixels"):
            predictor.predict(prompts=elsewhere, vocabulary=WORDS)

    @pytest.mark.parametrize(
        ("question", "message"),
        [
            ({}, "no region was asked for"),
            (
                {"prompts": Prompts.from_boxes(BOXES), "boxes": BOXES},
                "given as prompts and as arrays",
            ),
            ({"prompts": Prompts.empty(), "point_labels": [1]}, "given as prompts and as arrays"),
            ({"prompts": BOXES}, "prompts must be Prompts or a list of them"),
            (
                {"prompts": Prompts.from_boxes([[10, 5, 9, 60]])},
                r"box 0 \[10, 5, 9, 60\] is inverted",
            ),
            ({"point_labels": [1], "boxes": BOXES}, "point_labels were given without points"),
            ({"boxes": [[10, 5, 9, 60]]}, r"box 0 \[10, 5, 9, 60\] is inverted"),
            ({"boxes": [[0, 0, 9, float("nan")]]}, r"box 0 \[0, 0, 9, nan\]"),
            ({"boxes": [[200, 0, 300, 9]]}, "image is 160 x 100 pixels"),
            ({"points": [[10, 101]]}, "point 0"),
            ({"masks": np.ones((1, 5, 5), bool)}, "masks are 5 x 5 pixels"),
            ({"boxes": BOXES, "vocabulary": []}, "vocabulary is empty"),
            ({"boxes": BOXES, "vocabulary": "cat,dog,cat"}, "'cat'"),
            ({"boxes": BOXES, "top_k": 0}, "top_k"),
        ],
    )
    def test_refuses(
        self, predictor: RegionPredictor, question: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            predictor.predict(**{"vocabulary": WORDS, **question})


class TestPictures:
    def test_grey_is_three_equal_channels(
        self, predictor: RegionPredictor, photo: np.ndarray
    ) -> None:
        grey = photo[..., 0]
        by_mode = predictor.set_image(Image.fromarray(grey)).predict(boxes=BOXES, vocabulary=WORDS)
        by_array = predictor.set_image(np.dstack([grey] * 3)).predict(boxes=BOXES, vocabulary=WORDS)
        np.testing.assert_array_equal(by_mode.scores, by_array.scores)
        predictor.set_image(photo)

    def test_boxes_are_in_the_upright_frame(
        self, predictor: RegionPredictor, photo: np.ndarray, tmp_path: Path
    ) -> None:
        expected = predictor.set_image(photo).predict(boxes=BOXES, vocabulary=WORDS)
        exif = Image.Exif()
        exif[0x0112] = 6
        lying = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(np.rot90(photo))).save(lying, "PNG", exif=exif)
        (tmp_path / "lying.png").write_bytes(lying.getvalue())
        found = predictor.set_image(tmp_path / "lying.png").predict(boxes=BOXES, vocabulary=WORDS)
        assert (found.image_height, found.image_width) == (HEIGHT, WIDTH)
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert found.masks == expected.masks
