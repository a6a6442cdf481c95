"""Boxes, points, masks and run lengths in strange forms, through `Prompts`,
`RegionPredictor.predict` and `masks`.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from regionspot import RegionPredictor, create_model
from regionspot.errors import RegionSpotError
from regionspot.masks import Rle, decode_rle, encode_rle, mask_to_box, rle_area
from regionspot.structures import PADDING, Prompts, RegionPredictions, Vocabulary
from tests.fuzz.target import attempt, check, fail
from tests.fuzz.trees import NUMBERS, Note, mutate_values

WIDTH, HEIGHT = 50, 40
COORDINATES = (0.0, 1, 10, 39.5, 40, 50, 25, -5, 60, 1e-9, 49.999)
STRANGE_WORDS: tuple[Any, ...] = (
    None,
    5,
    2.5,
    True,
    b"cat",
    [],
    "",
    " ",
    {0: "cat"},
    ["cat", None],
    [["cat"]],
    object(),
)
WHOLE_PREDICTIONS = 0.15
"""The share of cases that goes through the whole model."""


class PromptSets:
    """The target."""

    def __init__(self, directory: Path) -> None:
        self._picture = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        self._predictor = RegionPredictor(
            create_model("regionspot_mini"), directory / "cache"
        ).set_image(self._picture)
        self._encoded = self._predictor.encode(self._picture)
        size = self._predictor.pipeline.info.embed_dim
        rows = np.random.default_rng(1).normal(size=(7, size)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self._words = Vocabulary(tuple("abcdefg"), rows)

    def run(self, rng: random.Random, note: Note) -> bool:
        if rng.random() < 0.15:
            return _run_lengths(rng, note)
        kind = rng.choice(("boxes", "boxes", "points", "masks"))
        clean = _clean(kind, rng)
        values = {
            name: _in_another_form(_mutated(value, rng, note), rng, note)
            for name, value in clean.items()
        }
        note(f"given: {_described(values)}")
        if rng.random() < WHOLE_PREDICTIONS:
            return self._predict(values, rng, note)
        return _validated(kind, values) is not None

    def _predict(self, values: dict[str, Any], rng: random.Random, note: Note) -> bool:
        """The answer to strange prompts is that to the same numbers given plainly."""
        options: dict[str, Any] = {
            "top_k": rng.choice((*NUMBERS, "2", None, True))
            if rng.random() < 0.15
            else rng.choice((1, 5, 100)),
            "mask_chunk": rng.choice((2.0, -1, 10**30, "4", None))
            if rng.random() < 0.1
            else rng.choice((1, 16)),
            "multimask": rng.random() < 0.3,
            "return_masks": rng.random() < 0.7,
        }
        note(f"options {options}")
        image = rng.choice((None, self._encoded, self._picture, Image.fromarray(self._picture)))
        words = rng.choice(STRANGE_WORDS) if rng.random() < 0.15 else self._words
        note(f"image {type(image).__name__}, words {words!r:.80}")
        kind = next(iter(values))
        again = copy.copy(values)  # numbers from an iterator are there once
        prediction = attempt(
            lambda: self._predictor.predict(image, vocabulary=words, **values, **options)
        )
        if isinstance(prediction, RegionSpotError):
            return False
        check(words is self._words, f"{words!r} were taken for words")
        prompts = _validated(kind, again)
        check(prompts is not None, "predict takes what Prompts refuses")
        assert prompts is not None
        _check_prediction(prediction, len(prompts) * (3 if options["multimask"] else 1), options)
        # of no clicks, labels mean nothing
        numbers = again if len(prompts) else {kind: again[kind]}
        plain = self._predictor.predict(vocabulary=self._words, **_plain(numbers), **options)
        _check_same(prediction, plain)
        return True


def _clean(kind: str, rng: random.Random) -> dict[str, Any]:
    """Arguments of `predict` that are mostly right, as nested lists."""
    n = rng.choice((0, 1, 1, 2, 3, 20))
    if kind == "boxes":
        return {"boxes": [_box(rng) for _ in range(n)]}
    if kind == "masks":
        masks = [
            [[int(rng.random() < 0.3) for _ in range(WIDTH)] for _ in range(HEIGHT)]
            for _ in range(min(n, 2))
        ]
        return {"masks": masks}
    clicks = rng.choice((0, 0, 1, 3))

    def each(make: Callable[[], Any]) -> list[Any]:
        return [[make() for _ in range(clicks)] if clicks else make() for _ in range(n)]

    points = {"points": each(lambda: [rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)])}
    return points | ({"point_labels": each(lambda: rng.randrange(2))} if rng.random() < 0.6 else {})


def _box(rng: random.Random) -> list[float]:
    if rng.random() < 0.05:
        return [rng.choice(COORDINATES) for _ in range(4)]
    (x0, x1) = sorted(rng.uniform(0, WIDTH) for _ in "xx")
    (y0, y1) = sorted(rng.uniform(0, HEIGHT) for _ in "yy")
    return [x0, y0, x1 + 0.1, y1 + 0.1]


def _mutated(value: Any, rng: random.Random, note: Note) -> Any:
    return mutate_values(value, rng, note, rng.choice((1, 1, 2))) if rng.random() < 0.5 else value


def _in_another_form(value: Any, rng: random.Random, note: Note) -> Any:
    """The same numbers as another kind of object, where they fit into one."""
    import torch

    dtype = rng.choice(
        (
            "float64",
            "float32",
            "float16",
            "int64",
            "uint8",
            "bool",
            "complex64",
            "datetime64[s]",
            ">f4",
        )
    )
    forms: tuple[Callable[[], Any], ...] = (
        *[lambda: value] * 3,
        lambda: _tuples(value),
        lambda: np.array(value, dtype),
        lambda: np.array(value, rng.choice(("O", "U", "S"))),
        lambda: np.asfortranarray(np.array(value, dtype)),
        lambda: np.ma.masked_array(np.array(value, np.float64), np.array(value, np.float64) > 45),
        lambda: torch.tensor(
            value, dtype=rng.choice((torch.float32, torch.bfloat16, torch.float64, torch.int64))
        ),
        lambda: torch.tensor(value, dtype=torch.float32, requires_grad=True),
        lambda: [np.array(row) for row in value],
        lambda: [torch.tensor(row) for row in value],
        lambda: iter(value),
        lambda: dict(enumerate(value)),
        lambda: _each(value, str),
        lambda: _each(value, lambda number: str(number).encode()),
        lambda: _each(value, Decimal),
        lambda: _each(value, Fraction),
        lambda: _each(value, np.float32),
        lambda: json.dumps(value),
        lambda: np.array(value, np.float64)[None],
        lambda: np.array(value, np.float64).ravel(),
    )
    index = rng.randrange(len(forms))
    note(f"form {index} ({dtype})")
    try:
        return forms[index]()
    except Exception:  # it does not fit
        return value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [_each(item, change) for item in value] if isinstance(value, list) else change(value)


def _described(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={type(value).__name__} {value!r:.200}" for name, value in values.items()
    )


def _validated(kind: str, values: dict[str, Any]) -> Prompts | None:
    """The prompts as they are used, checked against a plain reading; None where they are
    refused.
    """
    built = attempt(lambda: _build(kind, values).validated(HEIGHT, WIDTH))
    if isinstance(built, RegionSpotError):
        return None
    check(
        built.points.dtype == np.float32 and bool(np.isfinite(built.points).all()),
        f"points {built.points}",
    )
    check(
        built.labels.dtype == np.int32 and built.labels.shape == built.points.shape[:2],
        "labels of another shape",
    )
    used = built.points[built.labels != PADDING]
    check(
        bool(((used >= 0) & (used <= [WIDTH, HEIGHT])).all()), f"points outside the image: {used}"
    )
    regions = _expected({kind: values[kind]})[kind]
    check(len(built) == len(regions), f"{len(built)} regions of {len(regions)} {kind}")
    if not len(built):
        return built
    expected = _expected(values)
    if kind == "boxes":
        limited = np.clip(
            expected["boxes"].reshape(-1, 2, 2).astype(np.float32), 0, [WIDTH, HEIGHT]
        )
        check(
            np.array_equal(built.points, limited),
            f"boxes {expected['boxes']} are read as {built.points}",
        )
    elif kind == "points":
        clicks = expected["points"].reshape(len(built), -1, 2).astype(np.float32)
        check(
            np.array_equal(built.points[:, :-1], clicks),
            f"points {clicks} are read as {built.points}",
        )
        labels = expected.get("point_labels", np.ones(clicks.shape[:2])).reshape(clicks.shape[:2])
        check(
            np.array_equal(built.labels[:, :-1], labels),
            f"labels {labels} are read as {built.labels}",
        )
    else:
        check(built.mask_inputs is not None, "no masks")
        check(
            np.array_equal(np.asarray(built.mask_inputs), expected["masks"] != 0),
            "masks are read as others",
        )
    return built


def _build(kind: str, values: dict[str, Any]) -> Prompts:
    if kind == "boxes":
        return Prompts.from_boxes(values["boxes"])
    if kind == "points":
        return Prompts.from_points(values["points"], values.get("point_labels"))
    return Prompts.from_masks(values["masks"])


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    expected = _expected(values)
    return {
        name: array.astype(bool) if name == "masks" else array for name, array in expected.items()
    }


def _expected(values: dict[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """The numbers, each read by itself."""
    return {
        name: np.array(_numbers(value, name), np.float64)
        for name, value in values.items()
        if value is not None
    }


def _numbers(value: Any, what: str) -> Any:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        fail(f"{what} with masked values were accepted: what is masked is no value")
    if hasattr(value, "tolist"):
        check(value.dtype != "datetime64[s]" or value.size == 0, f"{what} of dates were accepted")
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_numbers(item, what) for item in value]
    if isinstance(value, Iterator | dict):
        fail(f"{what} as a {type(value).__name__} were accepted")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        fail(f"{value!r:.80} of {what} was taken for a number")


def _check_prediction(prediction: RegionPredictions, n: int, options: dict[str, Any]) -> None:
    check(len(prediction) == n, f"{len(prediction)} regions instead of {n}")
    k = prediction.top_scores.shape[1]
    check(k == min(options["top_k"], 7), f"{k} classes for top_k {options['top_k']}")
    scores = prediction.top_scores
    check(
        bool(np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()),
        f"scores {scores}",
    )
    check(bool((np.diff(scores, axis=1) <= 0).all()), "scores are not in order")
    check(
        all(len(set(row)) == k for row in prediction.top_class_ids.tolist()),
        "a class is named twice for a region",
    )
    check(
        np.array_equal(prediction.class_ids, prediction.top_class_ids[:, 0]),
        "the best class is not the first",
    )
    boxes = prediction.boxes
    check(bool(np.isfinite(boxes).all()), f"boxes {boxes}")
    check(
        bool(((boxes >= 0) & (boxes <= [WIDTH, HEIGHT] * 2)).all()),
        f"boxes outside the image: {boxes}",
    )
    check(
        (prediction.masks is not None) == bool(options["return_masks"]),
        "masks without being asked for, or none",
    )
    for rle in prediction.masks or ():
        check(decode_rle(rle).shape == (HEIGHT, WIDTH), f"a mask of the size {rle['size']}")
    json.dumps(prediction.to_json("x.jpg"), allow_nan=False)
    json.dumps(prediction.to_coco(1, range(7)), allow_nan=False)


def _check_same(one: RegionPredictions, other: RegionPredictions) -> None:
    for name in ("boxes", "scores", "class_ids", "top_class_ids", "top_scores", "iou_predictions"):
        check(
            np.array_equal(getattr(one, name), getattr(other, name)),
            f"{name} differ from those of plain numbers",
        )
    check(one.masks == other.masks, "masks differ from those of plain numbers")


def _run_lengths(rng: random.Random, note: Note) -> bool:
    """A mask's run lengths, damaged: what is decoded has the stated size and area, and is encoded
    the same.
    """
    shape = rng.choice(((5, 7), (HEIGHT, WIDTH), (1, 1), (1, 300), (0, 4)))
    mask = np.random.default_rng(rng.getrandbits(32)).random(shape) < rng.choice((0.01, 0.5, 1.0))
    rle: Any = dict(encode_rle(mask))
    check(np.array_equal(decode_rle(rle), mask), "a mask is not what was encoded")
    change = rng.randrange(5)
    if change == 0:
        rle = mutate_values(rle, rng, note)
    elif change == 1:
        text = list(rle["counts"])
        for _ in range(rng.choice((1, 1, 3))):
            text[rng.randrange(len(text) + 1) :][:1] = [
                chr(rng.choice((rng.randrange(33, 120), 0, 48, 0xFF, 0x2028)))
            ]
            text.insert(rng.randrange(len(text) + 1), chr(rng.randrange(48, 112)))
        rle["counts"] = "".join(text)
    elif change == 2:
        rle["counts"] = rle["counts"][: rng.randrange(len(rle["counts"]) + 1)]
    elif change == 3:
        rle["size"] = rng.choice(
            (rle["size"][::-1], [2**16, 2**16], [2**31, 2**31], [2**40, 1], [-1, -1], [1.5, 2])
        )
    else:
        rle["counts"] = rng.choice(
            (rle["counts"].encode(), rle["counts"] + "\n", "0" * rng.randrange(50), [3, 4])
        )
    note(f"run lengths {rle!r:.300}")
    decoded, area = attempt(lambda: decode_rle(rle)), attempt(lambda: rle_area(rle))
    if isinstance(decoded, RegionSpotError) or isinstance(area, RegionSpotError):
        check(
            isinstance(decoded, RegionSpotError), f"a mask is decoded and its area refused: {area}"
        )
        return False
    check(
        decoded.dtype == bool and list(decoded.shape) == list(rle["size"]),
        f"a mask of the shape {decoded.shape}",
    )
    check(
        type(area) is int and area == int(decoded.sum()),
        f"an area of {area} of {int(decoded.sum())} pixels",
    )
    _check_encoded_again(decoded, rle)
    return True


def _check_encoded_again(decoded: npt.NDArray[np.bool_], rle: Rle) -> None:
    again = encode_rle(decoded)
    check(np.array_equal(decode_rle(again), decoded), "a mask changes when it is encoded again")
    box = mask_to_box(decoded)
    check(
        all(map(math.isfinite, box.tolist())) and bool(decoded.any()) == bool(box.any()),
        f"a box {box}",
    )
