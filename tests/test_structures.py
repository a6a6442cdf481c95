"""Prompts refuse what cannot be meant and say how to mend it; predictions become JSON and COCO results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest

from regionspot.errors import InputError
from regionspot.masks import decode_rle, encode_rle
from regionspot.structures import Prompts, RegionPredictions, Vocabulary, check_class_names

HEIGHT, WIDTH = 40, 60
ROW_MASK = np.zeros((HEIGHT, WIDTH), bool)
ROW_MASK[10:20, 5:30] = True


class TestBuilding:
    @pytest.mark.parametrize(
        "prompts",
        [
            Prompts.empty(),
            Prompts.from_boxes([]),
            Prompts.from_boxes(np.zeros((0, 4))),
            Prompts.from_points([]),
            Prompts.from_points(np.zeros((0, 3, 2)), np.zeros((0, 3))),
            Prompts.from_masks(np.zeros((0, HEIGHT, WIDTH), bool)),
            Prompts.concatenate([]),
            Prompts.concatenate([Prompts.empty(), Prompts.empty()]),
        ],
    )
    def test_empty(self, prompts: Prompts) -> None:
        assert len(prompts) == 0
        assert len(prompts.validated(HEIGHT, WIDTH)) == 0
        assert prompts.boxes.shape == (0, 4)
        assert prompts.points.shape == (0, 2, 2)

    def test_boxes_are_two_points_labelled_two_and_three(self) -> None:
        prompts = Prompts.from_boxes([[1.0, 2, 3, 4], [5, 6, 7.5, 8]])
        np.testing.assert_array_equal(prompts.points, [[[1, 2], [3, 4]], [[5, 6], [7.5, 8]]])
        np.testing.assert_array_equal(prompts.labels, [[2, 3], [2, 3]])
        np.testing.assert_array_equal(prompts.boxes, [[1, 2, 3, 4], [5, 6, 7.5, 8]])
        assert prompts.points.dtype == np.float32
        assert prompts.labels.dtype == np.int32

    def test_points_get_one_padding_point(self) -> None:
        single = Prompts.from_points([[3, 4], [5, 6]])
        np.testing.assert_array_equal(single.points, [[[3, 4], [0, 0]], [[5, 6], [0, 0]]])
        np.testing.assert_array_equal(single.labels, [[1, -1], [1, -1]])
        np.testing.assert_array_equal(single.boxes, [[3, 4, 3, 4], [5, 6, 5, 6]])
        several = Prompts.from_points([[[30, 4], [5, 6], [50, 30]]], [[1, 1, 0]])
        np.testing.assert_array_equal(several.labels, [[1, 1, 0, -1]])
        np.testing.assert_array_equal(several.boxes, [[5, 4, 30, 6]])  # background clicks are not part of the region
        np.testing.assert_array_equal(Prompts.from_points([[7, 8]], [0]).boxes, [[7, 8, 7, 8]])

    def test_masks_bring_their_box(self) -> None:
        prompts = Prompts.from_masks([ROW_MASK, ROW_MASK.T.copy().T])
        np.testing.assert_array_equal(prompts.boxes, [[5, 10, 30, 20]] * 2)
        assert prompts.mask_inputs is not None
        np.testing.assert_array_equal(prompts.mask_inputs, [ROW_MASK, ROW_MASK])

    def test_concatenate_keeps_order(self) -> None:
        boxes, point = Prompts.from_boxes([[1, 2, 3, 4]]), Prompts.from_points([[9, 9]])
        joined = Prompts.concatenate([point, Prompts.empty(), boxes])
        np.testing.assert_array_equal(joined.boxes, [[9, 9, 9, 9], [1, 2, 3, 4]])
        masks = Prompts.from_masks([ROW_MASK])
        joined = Prompts.concatenate([masks, masks])
        assert joined.mask_inputs is not None
        assert len(joined.mask_inputs) == 2

    def test_slices(self) -> None:
        prompts = Prompts.from_masks([ROW_MASK, ROW_MASK, ROW_MASK])
        assert len(prompts[3:]) == 0
        tail = prompts[1:]
        assert tail.mask_inputs is not None
        assert len(tail) == len(tail.mask_inputs) == 2
        np.testing.assert_array_equal(prompts[1:2].boxes, prompts.boxes[1:2])

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: Prompts.from_boxes([1, 2, 3, 4]), r"shape \(N, 4\).*got \(4,\); wrap a single box in a list"),
            (lambda: Prompts.from_boxes([[1, 2, 3]]), r"shape \(N, 4\).*got \(1, 3\)"),
            (lambda: Prompts.from_boxes(5), r"shape \(N, 4\).*got \(\)"),
            (lambda: Prompts.from_boxes([[1, 2, 3, 4], [1, 2]]), "boxes must be a rectangular array of numbers"),
            (lambda: Prompts.from_boxes([["a", "2", "3", "4"]]), "boxes must be a rectangular array of numbers.*'a'"),
            (lambda: Prompts.from_points([1, 2]), "wrap a single point in a list"),
            (lambda: Prompts.from_points([[1, 2, 3]]), r"shape \(N, 2\) or \(N, K, 2\).*got \(1, 3\)"),
            (lambda: Prompts.from_points([[1, 2]], [1, 0]), r"shape \(1,\), one for each click, got \(2,\)"),
            (lambda: Prompts.from_points([[1, 2]], [3]), r"1 \(foreground\) or 0 \(background\), got \[3.0\]"),
            (lambda: Prompts.from_masks(ROW_MASK), "wrap a single mask in a list"),
            (lambda: Prompts.from_masks([ROW_MASK, ROW_MASK & False]), "mask 1 is empty"),
            (lambda: Prompts.from_masks([ROW_MASK * 0.5]), "threshold them first"),
            (lambda: Prompts(np.zeros((1, 2, 3), np.float32), np.zeros((1, 2), np.int32)), r"points \(N, P, 2\)"),
            (lambda: Prompts(np.zeros((1, 2, 2), np.float32), np.full((1, 2), 7, np.int32)), r"labels \[7\]"),
            (lambda: Prompts(np.zeros((1, 2, 2), np.float32), np.full((1, 2), 2, np.int32)), "from_boxes"),
            (
                lambda: Prompts.concatenate([Prompts.from_boxes([[1, 2, 3, 4]]), Prompts.from_points([[[1, 2]] * 4])]),
                r"prompts of \[2, 5\] points each",
            ),
            (
                lambda: Prompts.concatenate([Prompts.from_boxes([[1, 2, 3, 4]]), Prompts.from_masks([ROW_MASK])]),
                "with mask inputs to ones without",
            ),
        ],
    )
    def test_refuses(self, build: Callable[[], object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            build()


class TestValidated:
    def test_clips_a_box_that_is_partly_outside(self) -> None:
        prompts = Prompts.from_boxes([[-5, -6, 30, 20], [10, 10, 1000, 1000], [0, 0, WIDTH, HEIGHT]])
        expected = [[0, 0, 30, 20], [10, 10, WIDTH, HEIGHT], [0, 0, WIDTH, HEIGHT]]
        np.testing.assert_array_equal(prompts.validated(HEIGHT, WIDTH).boxes, expected)
        np.testing.assert_array_equal(prompts.boxes[0], [-5, -6, 30, 20])  # the original stays as it was

    def test_keeps_points_on_the_border_and_padding_anywhere(self) -> None:
        prompts = Prompts.from_points([[0, 0], [WIDTH, HEIGHT]])
        np.testing.assert_array_equal(prompts.validated(HEIGHT, WIDTH).points, prompts.points)

    @pytest.mark.parametrize(
        ("boxes", "message"),
        [
            ([[0, 0, 9, 9], [1, float("nan"), 5, 6]], r"box 1 \[1, nan, 5, 6\] has a coordinate that is NaN"),
            ([[0, 0, float("inf"), 9]], r"box 0 \[0, 0, inf, 9\] has a coordinate that is NaN or infinite"),
            ([[0, 0, 1e300, 9]], r"box 0 \[0, 0, inf, 9\]"),
            ([[30, 1, 10, 9]], r"box 0 \[30, 1, 10, 9\] is inverted or empty.*x0 < x1 and y0 < y1 \(not x, y, width"),
            ([[1, 2, 3, 4], [5.25, 9, 7, 9]], r"box 1 \[5.25, 9, 7, 9\] is inverted or empty"),
            ([[60, 0, 70, 9]], r"box 0 \[60, 0, 70, 9\] lies wholly outside.*image is 60 x 40 pixels"),
            ([[-9, 0, 0, 9], [0, -9, 5, -1]], r"box 0 \[-9, 0, 0, 9\] lies wholly outside.*\(1 more like it\)"),
        ],
    )
    def test_names_the_wrong_box(self, boxes: list[list[float]], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Prompts.from_boxes(boxes).validated(HEIGHT, WIDTH)

    @pytest.mark.parametrize(
        ("points", "message"),
        [
            ([[1, 1], [float("nan"), 2]], r"point 1 \[nan, 2\] has a coordinate that is NaN"),
            ([[61, 2]], r"point 0 \[61, 2\] lies outside the image"),
            ([[[1, 1], [2, -1]]], r"point 0 \[1, 1, 2, -1\] lies outside the image"),
        ],
    )
    def test_names_the_wrong_point(self, points: list[list[float]], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Prompts.from_points(points).validated(HEIGHT, WIDTH)

    def test_refuses_masks_of_another_size(self) -> None:
        with pytest.raises(InputError, match=r"masks are 60 x 40 pixels .* but the image is 40 x 60"):
            Prompts.from_masks([ROW_MASK]).validated(WIDTH, HEIGHT)


class TestVocabulary:
    def test_holds_names_and_unit_rows(self) -> None:
        vocabulary = Vocabulary(("cat", "dog"), np.eye(2, 3, dtype=np.float32))
        assert len(vocabulary) == 2

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ((), "the vocabulary is empty: name at least one class"),
            (("cat", "  "), "name 1 of the vocabulary is blank"),
            (("cat", "dog", "cat", "dog", "cow"), "names 'cat', 'dog' more than once"),
        ],
    )
    def test_refuses_names(self, names: tuple[str, ...], message: str) -> None:
        with pytest.raises(InputError, match=message):
            check_class_names(names)
        with pytest.raises(InputError, match=message):
            Vocabulary(names, np.eye(max(len(names), 1), dtype=np.float32)[: len(names)])

    @pytest.mark.parametrize(
        ("embeddings", "message"),
        [
            (np.eye(3, dtype=np.float32), r"needs embeddings \(2, E\), got \(3, 3\)"),
            (np.diag([1, 2]).astype(np.float32), "embedding of 'dog' has length 2, not 1"),
            (np.diag([np.nan, 1]).astype(np.float32), "embedding of 'cat' has length nan"),
        ],
    )
    def test_refuses_embeddings(self, embeddings: np.ndarray, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Vocabulary(("cat", "dog"), embeddings)


def predictions(n: int, masks: bool = True) -> RegionPredictions:
    top_scores = np.tile(np.array([0.7, 0.2], np.float32), (n, 1))
    return RegionPredictions(
        image_height=HEIGHT,
        image_width=WIDTH,
        boxes=np.tile(np.array([5, 10.1, 30, 20], np.float32), (n, 1)),
        class_names=("cat", "dog", "cow"),
        scores=top_scores[:, 0],
        class_ids=np.full(n, 2),
        top_class_ids=np.tile([2, 0], (n, 1)),
        top_scores=top_scores,
        masks=(encode_rle(ROW_MASK),) * n if masks else None,
        iou_predictions=np.full(n, 0.9, np.float32) if masks else None,
    )


class TestRegionPredictions:
    @pytest.mark.parametrize("masks", [True, False])
    def test_empty(self, masks: bool) -> None:
        empty = predictions(0, masks)
        assert len(empty) == 0
        assert empty.to_coco(3, [1, 2, 3]) == []
        assert empty.to_json("a.png") == {
            "image": {"file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            "regions": [],
        }

    def test_json(self) -> None:
        document = json.loads(json.dumps(predictions(2).to_json("a.png")))
        region = document["regions"][1]
        assert list(region) == ["box", "class", "score", "top", "mask", "iou"]
        assert region["box"] == [5.0, 10.1, 30.0, 20.0]  # the short decimal, not 10.100000381
        assert (region["class"], region["score"], region["iou"]) == ("cow", 0.7, 0.9)
        assert region["top"] == [["cow", 0.7], ["cat", 0.2]]
        np.testing.assert_array_equal(decode_rle(region["mask"]), ROW_MASK)

    def test_json_without_masks(self) -> None:
        region = json.loads(json.dumps(predictions(1, masks=False).to_json("a.png")))["regions"][0]
        assert region["mask"] is None
        assert region["iou"] is None

    def test_coco(self) -> None:
        (result,) = predictions(1).to_coco(image_id=17, category_ids=[10, 20, 30])
        assert (result["image_id"], result["category_id"]) == (17, 30)
        assert result["bbox"] == pytest.approx([5, 10.1, 25, 9.9])
        assert result["segmentation"]["size"] == [HEIGHT, WIDTH]
        assert "segmentation" not in predictions(1, masks=False).to_coco(17, [10, 20, 30])[0]
        with pytest.raises(InputError, match=re.escape("2 category ids for 3 classes")):
            predictions(1).to_coco(17, [10, 20])

    def test_refuses_fields_of_another_length(self) -> None:
        whole = predictions(2)
        with pytest.raises(InputError, match="scores"):
            RegionPredictions(
                **{**{name: getattr(whole, name) for name in whole.__dataclass_fields__}, "scores": whole.scores[:1]}
            )
