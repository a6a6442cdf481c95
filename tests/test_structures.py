"""Prompts refuse what cannot be meant and say how to mend it; predictions become JSON and COCO
results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regionspot.errors import InputError
from regionspot.masks import decode_rle, encode_rle
from regionspot.structures import (
    Prompts,
    RegionPredictions,
    Vocabulary,
    as_class_names,
    as_prompts,
    check_class_names,
)

HEIGHT, WIDTH = 40, 60
ROW_MASK = np.zeros((HEIGHT, WIDTH), bool)
ROW_MASK[10:20, 5:30] = True


def any_of(value: Any) -> Any:
    """A value of a type that the annotations do not allow."""
    return value


EDGE = np.zeros((HEIGHT, WIDTH), np.uint8)
EDGE[0] = 7


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
        # background clicks are not part of the region
        np.testing.assert_array_equal(several.boxes, [[5, 4, 30, 6]])
        np.testing.assert_array_equal(Prompts.from_points([[7, 8]], [0]).boxes, [[7, 8, 7, 8]])

    @pytest.mark.parametrize(
        "convert", [list, np.array, torch.tensor, lambda rows: np.array(rows, object)]
    )
    def test_lists_arrays_and_tensors(self, convert: Callable[[Any], Any]) -> None:
        prompts = Prompts(convert([[[1, 2], [3, 4]]]), convert([[2, 3]]))
        np.testing.assert_array_equal(prompts.boxes, [[1, 2, 3, 4]])
        assert (prompts.points.dtype, prompts.labels.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(
            Prompts.from_boxes(convert([[1, 2, 3, 4]])).boxes, [[1, 2, 3, 4]]
        )
        np.testing.assert_array_equal(
            Prompts.from_points(convert([[1, 2]]), convert([True])).boxes, [[1, 2, 1, 2]]
        )

    @pytest.mark.parametrize("value", [True, 1, 255])
    def test_masks_of_two_values(self, value: int) -> None:
        prompts = Prompts.from_masks([ROW_MASK * value])
        assert prompts.mask_inputs is not None and prompts.mask_inputs.dtype == np.bool_
        np.testing.assert_array_equal(prompts.mask_inputs[0], ROW_MASK)

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
            (
                lambda: Prompts.from_boxes([1, 2, 3, 4]),
                r"shape \(N, 4\).*got \(4,\); wrap a single box in a list",
            ),
            (lambda: Prompts.from_boxes([[1, 2, 3]]), r"shape \(N, 4\).*got \(1, 3\)"),
            (lambda: Prompts.from_boxes(5), r"shape \(N, 4\).*got \(\)"),
            (
                lambda: Prompts.from_boxes([[1, 2, 3, 4], [1, 2]]),
                "boxes must be a rectangular array of numbers",
            ),
            (
                lambda: Prompts.from_boxes([["a", "2", "3", "4"]]),
                "boxes must be a rectangular array of numbers.*'a'",
            ),
            (lambda: Prompts.from_points([1, 2]), "wrap a single point in a list"),
            (
                lambda: Prompts.from_points([[1, 2, 3]]),
                r"shape \(N, 2\) or \(N, K, 2\).*got \(1, 3\)",
            ),
            (
                lambda: Prompts.from_points([[1, 2]], [1, 0]),
                r"shape \(1,\), one for each click, got \(2,\)",
            ),
            (lambda: Prompts.from_boxes([["1", "2", "3", "4"]]), "boxes must be .* not of text"),
            (
                lambda: Prompts.from_points(np.zeros((1, 0, 2))),
                r"shape \(N, 2\) or \(N, K, 2\).*got \(1, 0, 2\)",
            ),
            (lambda: Prompts.from_points([[1, 2]], ["1"]), "point labels must be .* not of text"),
            (lambda: Prompts.from_points([[1, 2]], [0.5]), r"got \[0.5\]"),
            (
                lambda: Prompts.from_masks([ROW_MASK, ROW_MASK.T]),
                "masks must be a rectangular array",
            ),
            (lambda: Prompts.from_masks(any_of([[[None]]])), "threshold them first"),
            (lambda: Prompts.from_masks([ROW_MASK * np.uint8(3) + EDGE]), r"values 0, 3, 7"),
            (lambda: Prompts(any_of([["a"]]), any_of([[1]])), "points must be .* not of text"),
            (
                lambda: Prompts(any_of([[[1, 2]]]), any_of([["1"]])),
                "point labels must be .* not of text",
            ),
            (
                lambda: Prompts(any_of([[[1, 2]]]), any_of([[1.5]])),
                "point labels must be whole numbers, got 1.5",
            ),
            (
                lambda: Prompts(any_of([[[1, 2]]]), any_of([[-1]])),
                "region 0 has no point, only padding",
            ),
            (
                lambda: Prompts(any_of([[[1, 2]]]), any_of([[1]]), any_of([[["x"]]])),
                "masks must be bool",
            ),
            (lambda: Prompts.concatenate(any_of([[1, 2, 3, 4]])), "only Prompts can be joined"),
            (lambda: Prompts.from_boxes([[1, 2, 3, 4]])[any_of(0)], "cut by slices"),
            (
                lambda: Prompts.from_points([[1, 2]], [3]),
                r"1 \(foreground\) or 0 \(background\), got \[3.0\]",
            ),
            (lambda: Prompts.from_masks(ROW_MASK), "wrap a single mask in a list"),
            (lambda: Prompts.from_masks([ROW_MASK, ROW_MASK & False]), "mask 1 is empty"),
            (lambda: Prompts.from_masks([ROW_MASK * 0.5]), "threshold them first"),
            (
                lambda: Prompts(np.zeros((1, 2, 3), np.float32), np.zeros((1, 2), np.int32)),
                r"points \(N, P, 2\)",
            ),
            (
                lambda: Prompts(np.zeros((1, 2, 2), np.float32), np.full((1, 2), 7, np.int32)),
                r"labels \[7\]",
            ),
            (
                lambda: Prompts(np.zeros((1, 2, 2), np.float32), np.full((1, 2), 2, np.int32)),
                "from_boxes",
            ),
            (
                lambda: Prompts.concatenate(
                    [Prompts.from_boxes([[1, 2, 3, 4]]), Prompts.from_points([[[1, 2]] * 4])]
                ),
                r"prompts of \[2, 5\] points each",
            ),
            (
                lambda: Prompts.concatenate(
                    [Prompts.from_boxes([[1, 2, 3, 4]]), Prompts.from_masks([ROW_MASK])]
                ),
                "with mask inputs to ones without",
            ),
        ],
    )
    def test_refuses(self, build: Callable[[], object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            build()


class TestAsPrompts:
    def test_one_for_each_kind_in_order(self) -> None:
        parts = as_prompts(
            boxes=[[1, 2, 3, 4]], points=[[5, 6]], point_labels=[0], masks=[ROW_MASK]
        )
        assert [part.labels.tolist() for part in parts] == [[[2, 3]], [[0, -1]], [[2, 3]]]
        assert parts[2].mask_inputs is not None and parts[0].mask_inputs is None

    def test_none_at_all_may_be_asked_for(self) -> None:
        assert [len(part) for part in as_prompts(boxes=[], points=[])] == [0, 0]

    def test_refuses(self) -> None:
        with pytest.raises(InputError, match="no region was asked for: give boxes or points"):
            as_prompts()
        with pytest.raises(InputError, match="point_labels were given without points"):
            as_prompts(boxes=[], point_labels=[1])


class TestValidated:
    def test_is_done_once_for_an_image_of_a_size(self) -> None:
        prompts = Prompts.from_boxes([[-5, -6, 30, 20]])
        valid = prompts.validated(HEIGHT, WIDTH)
        assert prompts.validated_for is None and valid.validated_for == (HEIGHT, WIDTH)
        assert valid.validated(HEIGHT, WIDTH) is valid
        np.testing.assert_array_equal(valid.validated(15, 20).boxes, [[0, 0, 20, 15]])
        assert valid[:1].validated_for is None  # a part is checked as any other

    def test_clips_a_box_that_is_partly_outside(self) -> None:
        prompts = Prompts.from_boxes(
            [[-5, -6, 30, 20], [10, 10, 1000, 1000], [0, 0, WIDTH, HEIGHT]]
        )
        expected = [[0, 0, 30, 20], [10, 10, WIDTH, HEIGHT], [0, 0, WIDTH, HEIGHT]]
        np.testing.assert_array_equal(prompts.validated(HEIGHT, WIDTH).boxes, expected)
        # the original stays as it was
        np.testing.assert_array_equal(prompts.boxes[0], [-5, -6, 30, 20])

    def test_keeps_points_on_the_border_and_padding_anywhere(self) -> None:
        prompts = Prompts.from_points([[0, 0], [WIDTH, HEIGHT]])
        np.testing.assert_array_equal(prompts.validated(HEIGHT, WIDTH).points, prompts.points)

    def test_padding_becomes_a_number(self) -> None:
        prompts = Prompts(any_of([[[3, 4], [float("nan"), float("inf")]]]), any_of([[1, -1]]))
        np.testing.assert_array_equal(prompts.validated(HEIGHT, WIDTH).points, [[[3, 4], [0, 0]]])

    @pytest.mark.parametrize(
        ("boxes", "message"),
        [
            (
                [[0, 0, 9, 9], [1, float("nan"), 5, 6]],
                r"box 1 \[1, nan, 5, 6\] has a coordinate that is NaN",
            ),
            (
                [[0, 0, float("inf"), 9]],
                r"box 0 \[0, 0, inf, 9\] has a coordinate that is NaN or infinite",
            ),
            ([[0, 0, 1e300, 9]], r"box 0 \[0, 0, inf, 9\]"),
            (
                [[30, 1, 10, 9]],
                r"box 0 \[30, 1, 10, 9\] is inverted or empty.*"
                r"x0 < x1 and y0 < y1 \(not x, y, width",
            ),
            ([[1, 2, 3, 4], [5.25, 9, 7, 9]], r"box 1 \[5.25, 9, 7, 9\] is inverted or empty"),
            (
                [[60, 0, 70, 9]],
                r"box 0 \[60, 0, 70, 9\] lies wholly outside.*image is 60 x 40 pixels",
            ),
            (
                [[-9, 0, 0, 9], [0, -9, 5, -1]],
                r"box 0 \[-9, 0, 0, 9\] lies wholly outside.*\(1 more like it\)",
            ),
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
        with pytest.raises(
            InputError, match=r"masks are 60 x 40 pixels .* but the image is 40 x 60"
        ):
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
            (("cat", "\u200b"), "name 1 of the vocabulary is blank"),
            (("cat", "\ud800"), r"name 1 of the vocabulary, '\\ud800', is not valid Unicode"),
            (
                ("cat", "dog", "cat", "dog", "cow"),
                r"names 'cat', 'dog' more than once.*\('cat' is names 0, 2\)",
            ),
        ],
    )
    def test_refuses_names(self, names: tuple[str, ...], message: str) -> None:
        with pytest.raises(InputError, match=message):
            check_class_names(names)
        with pytest.raises(InputError, match=message):
            Vocabulary(names, np.eye(max(len(names), 1), dtype=np.float32)[: len(names)])

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ("cat", r"a list of names, got one text: \['cat'\]"),
            (b"cat", "a list of names"),
            ({0: "cat", 1: "dog"}, r"a dictionary: give list\(names.values\(\)\)"),
            (5, "must be a list, got 5"),
            (None, "must be a list, got None"),
            (["cat", b"dog"], r"name 1 of the vocabulary is b'dog', a bytes: decode it"),
            ([0, 1], "name 0 of the vocabulary is 0, a int: name each class by text"),
            (["cat", None], "name 1 of the vocabulary is None"),
            ([["cat"], ["dog"]], r"name 0 of the vocabulary is \['cat'\], a list"),
        ],
    )
    def test_refuses_what_is_no_list_of_names(self, names: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            as_class_names(names)
        with pytest.raises(InputError, match=message):
            Vocabulary(names, np.eye(2, dtype=np.float32))

    def test_names_of_any_iterable(self) -> None:
        for names in (
            ["cat", "dog"],
            np.array(["cat", "dog"]),
            iter(["cat", "dog"]),
            {"cat": 1, "dog": 2}.keys(),
        ):
            found = as_class_names(names)
            assert found == ("cat", "dog") and all(type(name) is str for name in found)

    def test_repeated_names_are_called_by_their_ids(self) -> None:
        with pytest.raises(InputError, match=r"\('cat' is the ids 7, 9\)"):
            check_class_names(["cat", "dog", "cat"], ids=[7, 8, 9])

    @pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float16, object])
    def test_embeddings_become_single_precision(self, dtype: Any) -> None:
        for embeddings in (np.eye(2, 3).astype(dtype), np.eye(2, 3).astype(dtype).tolist()):
            vocabulary = Vocabulary(["cat", "dog"], embeddings)  # type: ignore[arg-type]
            assert vocabulary.names == ("cat", "dog") and vocabulary.embeddings.dtype == np.float32

    @pytest.mark.parametrize(
        ("embeddings", "message"),
        [
            (np.eye(3, dtype=np.float32), r"needs embeddings \(2, E\), got \(3, 3\)"),
            (np.diag([1, 2]).astype(np.float32), "embedding of 'dog' has length 2, not 1"),
            ([["1.0"], ["1.0"]], "embeddings must be .* not of text"),
            (np.eye(2) * 1j, "embeddings must be .* not of complex"),
            (None, "embeddings must be an array"),
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


def changed(whole: RegionPredictions, **fields: Any) -> RegionPredictions:
    return RegionPredictions(
        **{name: getattr(whole, name) for name in whole.__dataclass_fields__} | fields
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

    @pytest.mark.parametrize("image_id", [np.int64(7), np.uint8(7), 7.0, torch.tensor(7), 7])
    def test_coco_holds_plain_numbers(self, image_id: Any) -> None:
        for category_ids in (
            [5, 6, 7],
            np.array([5, 6, 7], np.int16),
            torch.tensor([5, 6, 7]),
            (5.0, 6.0, 7.0),
        ):
            (result,) = json.loads(json.dumps(predictions(1).to_coco(image_id, category_ids)))  # type: ignore[arg-type]
            assert (result["image_id"], result["category_id"]) == (7, 7)
            assert type(result["image_id"]) is int and type(result["category_id"]) is int

    def test_coco_keeps_ids_that_are_text_and_large_ones(self) -> None:
        (result,) = predictions(1).to_coco("00a1", [1, 2, "/m/01"])
        assert (result["image_id"], result["category_id"]) == ("00a1", "/m/01")
        assert predictions(1).to_coco(2**63 + 1, [1, 2, 3])[0]["image_id"] == 2**63 + 1

    @pytest.mark.parametrize("value", [None, 1.5, float("nan"), True, b"7", [7], object()])
    def test_coco_refuses_what_json_or_coco_cannot_hold(self, value: Any) -> None:
        with pytest.raises(InputError, match="image_id must be a whole number or text, got"):
            predictions(1).to_coco(value, [1, 2, 3])
        with pytest.raises(InputError, match="a category id must be a whole number or text, got"):
            predictions(1).to_coco(1, [1, 2, value])
        with pytest.raises(InputError, match="must be a list"):
            predictions(1).to_coco(1, None)  # type: ignore[arg-type]

    def test_json_holds_file_names_of_any_kind(self) -> None:
        names: tuple[Any, ...] = ("caf\udce9.jpg", Path("a/b.png"))
        named = [predictions(0).to_json(name)["image"]["file_name"] for name in names]
        assert named == ["caf\\xe9.jpg", "a/b.png"]
        with pytest.raises(InputError, match="file_name must be text"):
            predictions(0).to_json(7)  # type: ignore[arg-type]

    def test_sizes_and_masks_become_plain(self) -> None:
        rle = encode_rle(ROW_MASK)
        found = changed(
            predictions(1),
            image_height=np.int64(HEIGHT),
            masks=[{"size": np.array(rle["size"]), "counts": rle["counts"].encode()}],
        )
        assert json.loads(json.dumps(found.to_json("a.png"))) == predictions(1).to_json("a.png")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"boxes": [[np.inf, np.inf, -np.inf, -np.inf]]}, "boxes that are NaN or infinite"),
            ({"scores": [np.nan]}, "scores that are NaN or infinite"),
            ({"top_scores": [[np.nan, 0]]}, "top_scores that are NaN"),
            ({"iou_predictions": [np.inf]}, "iou_predictions that are NaN"),
            ({"boxes": [[9, 0, 5, 5]]}, "inverted"),
            ({"boxes": [["a", 0, 5, 5]]}, "not of text"),
            ({"boxes": 5}, r"predictions of \(\) boxes"),
            ({"class_ids": [3]}, "class ids must be 0 to 2"),
            ({"class_ids": [-1]}, "class ids must be 0 to 2"),
            ({"class_ids": [0.5]}, "class_ids must be whole numbers"),
            ({"top_class_ids": [[0]]}, r"must be \(N, K\)"),
            ({"image_height": 0}, "image_height must be a whole number"),
            (
                {"masks": [{"size": [WIDTH, HEIGHT], "counts": encode_rle(ROW_MASK.T)["counts"]}]},
                "masks must be 60 x 40",
            ),
            ({"masks": ["x"]}, "an RLE mask must be"),
        ],
    )
    def test_refuses_what_no_picture_holds(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            changed(predictions(1), **fields)

    def test_refuses_fields_of_another_length(self) -> None:
        with pytest.raises(InputError, match="scores"):
            changed(predictions(2), scores=[0.5])
