"""The few types that everything here speaks: prompts in, a vocabulary beside them, predictions out.

All coordinates are pixels of the original image, x to the right and y down, the origin at the
top-left corner of the top-left pixel. Boxes are xyxy: `(x0, y0, x1, y1)` with `x0 < x1` and `y0 <
y1`.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.arrays import as_array, as_numbers, as_whole_numbers, checked_count, whole_number
from regionspot.errors import InputError, plain_text, shown
from regionspot.masks import Rle, checked_rle, mask_to_box

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
UInt8Array = npt.NDArray[np.uint8]

FOREGROUND, BACKGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, PADDING = 1, 0, 2, 3, -1
POINT_LABELS = (FOREGROUND, BACKGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, PADDING)
UNIT_LENGTH_TOLERANCE = 1e-3
_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")  # Unicode's categories of control characters and spaces


@dataclass(frozen=True, eq=False)
class Prompts:
    """N regions of one image, each asked for by P labelled points.

    Args:
        points: (N, P, 2) xy in original-image pixels.
        labels: (N, P) in SAM's ONNX convention: 1 foreground, 0 background, 2 and 3 the top-left
            and bottom-right corner of a box, -1 padding (its coordinates mean nothing).
        mask_inputs: (N, H, W) at the original image's size, a mask for each region as SAM's dense
            prompt, or None.

    `validated_for` is the height and width of the image that `validated` has checked them against,
    None before that.

    Lists and arrays of other types are converted.

    Raises:
        InputError: shapes that do not belong together, no numbers, an unknown label, half a box, a
            region without any point.
    """

    points: FloatArray
    labels: IntArray
    mask_inputs: BoolArray | None = None
    validated_for: tuple[int, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _set(
            self,
            points=as_numbers(self.points, "points"),
            labels=as_whole_numbers(self.labels, "point labels"),
        )
        if self.mask_inputs is not None:
            _set(self, mask_inputs=_as_masks(self.mask_inputs))
        n, p = self.points.shape[:2] if self.points.ndim == 3 else (-1, -1)
        if p < 1 or self.points.shape != (n, p, 2) or self.labels.shape != (n, p):
            raise InputError(
                f"prompts need points (N, P, 2) and labels (N, P), got {self.points.shape} and "
                f"{self.labels.shape}; build them with Prompts.from_boxes, from_points or "
                "from_masks"
            )
        if not np.isin(self.labels, POINT_LABELS).all():
            unknown = sorted(set(self.labels.ravel().tolist()) - set(POINT_LABELS))
            raise InputError(
                f"unknown point labels {unknown}: use 1 for foreground and 0 for background"
            )
        corners = np.stack(
            [(self.labels == corner).sum(1) for corner in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)]
        )  # (2, N)
        if (corners[0] != corners[1]).any() or (corners > 1).any():
            raise InputError(
                "a box is exactly one point labelled 2 and one labelled 3: build it with from_boxes"
            )
        if (self.labels == PADDING).all(1).any():
            empty = int((self.labels == PADDING).all(1).argmax())
            raise InputError(f"region {empty} has no point, only padding: give each at least one")
        masks = self.mask_inputs
        if masks is not None and (masks.ndim != 3 or len(masks) != n):
            raise InputError(
                f"mask_inputs must have shape ({n}, H, W), one for each region, got {masks.shape}"
            )

    @classmethod
    def empty(cls) -> Prompts:
        """No region, with the two points for each that boxes have."""
        return cls(np.zeros((0, 2, 2), np.float32), np.zeros((0, 2), np.int32))

    @classmethod
    def from_boxes(cls, boxes: npt.ArrayLike) -> Prompts:
        """One region for each box: (N, 4) xyxy."""
        array = as_numbers(boxes, "boxes")
        if array.ndim and len(array) == 0:
            return cls.empty()
        if array.ndim != 2 or array.shape[1] != 4:
            raise InputError(
                f"boxes must have shape (N, 4), x0, y0, x1, y1 for each, got {array.shape}"
                + ("; wrap a single box in a list" if array.shape == (4,) else "")
            )
        labels = np.tile(np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32), (len(array), 1))
        return cls(array.reshape(-1, 2, 2), labels)

    @classmethod
    def from_points(cls, points: npt.ArrayLike, labels: npt.ArrayLike | None = None) -> Prompts:
        """One region for each row: (N, 2), a click each, or (N, K, 2), K clicks each; labels (N,)
        or (N, K).

        Labels are 1 (foreground, the default) or 0 (background). SAM's padding point is appended,
        as SAM's own predictor does for every prompt without a box: P = K + 1.
        """
        array = as_numbers(points, "points")
        if array.ndim and len(array) == 0:
            return cls.empty()
        if array.ndim not in (2, 3) or array.shape[-1] != 2 or array.size == 0:
            raise InputError(
                "points must have shape (N, 2) or (N, K, 2), x, y for each click, got "
                f"{array.shape}"
                + ("; wrap a single point in a list" if array.shape == (2,) else "")
            )
        clicks = array.reshape(len(array), -1, 2)  # (N, K, 2)
        click_labels = _click_labels(labels, array.shape[:-1]).reshape(clicks.shape[:2])  # (N, K)
        return cls(
            np.pad(clicks, ((0, 0), (0, 1), (0, 0))),  # (N, K + 1, 2)
            np.pad(click_labels, ((0, 0), (0, 1)), constant_values=PADDING),
        )

    @classmethod
    def from_masks(cls, masks: npt.ArrayLike) -> Prompts:
        """One region for each mask: (N, H, W) at the original image's size; its box, and the mask
        as dense prompt.

        Masks are bool, or whole numbers of two values: 0, and 1 or 255.
        """
        array = as_array(masks, "masks")
        if array.ndim and len(array) == 0:
            return cls.empty()
        if array.ndim != 3:
            raise InputError(
                f"masks must have shape (N, H, W), got {array.shape}"
                + ("; wrap a single mask in a list" if array.ndim == 2 else "")
            )
        array = _as_masks(array)
        for index, mask in enumerate(array):
            if not mask.any():
                raise InputError(
                    f"mask {index} is empty: it covers no pixel, so it names no region; leave it "
                    "out"
                )
        boxes = cls.from_boxes(np.stack([mask_to_box(mask) for mask in array]))
        return cls(boxes.points, boxes.labels, array)

    @classmethod
    def concatenate(cls, prompts: Sequence[Prompts]) -> Prompts:
        """All regions in order. Every part needs the same P: padding a prompt further would change
        SAM's answer.
        """
        prompts = list(prompts)
        if not all(isinstance(prompt, Prompts) for prompt in prompts):
            raise InputError(
                "only Prompts can be joined: build them with from_boxes, from_points or from_masks"
            )
        parts = [part for part in prompts if len(part)]
        if not parts:
            return cls.empty()
        widths = sorted({part.points.shape[1] for part in parts})
        if len(widths) > 1:
            raise InputError(
                f"cannot join prompts of {widths} points each: keep them apart, one Prompts for "
                "each kind"
            )
        masks = [part.mask_inputs for part in parts if part.mask_inputs is not None]
        if masks and (len(masks) < len(parts) or len({mask.shape[1:] for mask in masks}) > 1):
            raise InputError(
                "cannot join prompts with mask inputs to ones without, or with masks of another "
                "size"
            )
        return cls(
            np.concatenate([part.points for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate(masks) if masks else None,
        )

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, regions: slice) -> Prompts:
        if not isinstance(regions, slice):
            raise InputError(
                f"prompts are cut by slices: take prompts[{shown(regions)}:...] with both ends"
            )
        masks = None if self.mask_inputs is None else self.mask_inputs[regions]
        return Prompts(self.points[regions], self.labels[regions], masks)

    @property
    def boxes(self) -> FloatArray:
        """(N, 4) xyxy: a region's box, or the bounding box of its foreground points (its area may
        be zero).
        """
        corner = (self.labels == BOX_TOP_LEFT) | (self.labels == BOX_BOTTOM_RIGHT)  # (N, P)
        used = np.where(corner.any(1, keepdims=True), corner, self.labels == FOREGROUND)
        used = np.where(used.any(1, keepdims=True), used, self.labels != PADDING)[
            ..., None
        ]  # (N, P, 1)
        low = np.where(used, self.points, np.inf).min(1, initial=np.inf)  # (N, 2)
        high = np.where(used, self.points, -np.inf).max(1, initial=-np.inf)
        return np.concatenate([low, high], axis=1).astype(np.float32)

    def validated(self, height: int, width: int) -> Prompts:
        """These prompts checked against an image of height x width pixels; a box partly outside is
        clipped to it.

        Prompts that were validated for an image of this size are returned as they are.

        Raises:
            InputError: NaN or infinite coordinates, an inverted or empty box, a box wholly outside
                the image, a click outside it, a mask of another size; the message names the
                region's index and its value.
        """
        if self.validated_for == (height, width):
            return self
        size = np.array([width, height], np.float32)
        image = (
            f"the image is {width} x {height} pixels (width x height); prompts are in its pixels, "
            "origin top left"
        )
        self.check_finite()
        has_box = (self.labels == BOX_TOP_LEFT).any(1)  # (N,)
        low, high = self._corner(BOX_TOP_LEFT), self._corner(BOX_BOTTOM_RIGHT)  # (N, 2) each
        self._refuse(
            has_box & ~(low < high).all(1),
            "is inverted or empty: boxes are x0, y0, x1, y1 with x0 < x1 and y0 < y1 (not x, y, "
            "width, height)",
        )
        self._refuse(
            has_box & ((low >= size) | (high <= 0)).any(1),
            f"lies wholly outside the image: {image}",
        )
        click = (self.labels == FOREGROUND) | (self.labels == BACKGROUND)
        outside = ((self.points < 0) | (self.points > size)).any(-1)
        self._refuse((click & outside).any(1), f"lies outside the image: {image}")
        masks = self.mask_inputs
        if masks is not None and masks.shape[1:] != (height, width):
            raise InputError(
                f"masks are {masks.shape[2]} x {masks.shape[1]} pixels (width x height) but the "
                f"image is {width} x {height}: give them at the image's own size"
            )
        # padding may hold anything
        inside = np.where(np.isfinite(self.points), np.clip(self.points, 0, size), 0)
        valid = Prompts(inside.astype(np.float32), self.labels, masks)
        _set(valid, validated_for=(height, width))
        return valid

    def check_finite(self) -> None:
        """Checks what can be told without the image. `validated` does too.

        Raises:
            InputError: NaN or infinite coordinates; the message names the region's index.
        """
        finite = np.isfinite(self.points).all(-1) | (self.labels == PADDING)  # (N, P)
        self._refuse(
            ~finite.all(1),
            "has a coordinate that is NaN or infinite; every coordinate must be a number",
        )

    def _corner(self, label: int) -> FloatArray:
        """(N, 2): each region's point with that label, or its first point where it has none."""
        corner: FloatArray = self.points[np.arange(len(self)), (self.labels == label).argmax(1)]
        return corner

    def _refuse(self, wrong: BoolArray, reason: str) -> None:
        if not wrong.any():
            return
        indices = np.flatnonzero(wrong)
        first = int(indices[0])
        points = self.points[first][self.labels[first] != PADDING]  # (P', 2)
        is_box = bool((self.labels[first] == BOX_TOP_LEFT).any())
        value = ", ".join(f"{_shortest(number):.9g}" for number in points.ravel())
        more = f" ({len(indices) - 1} more like it)" if len(indices) > 1 else ""
        raise InputError(f"{'box' if is_box else 'point'} {first} [{value}] {reason}{more}")


def as_prompts(
    boxes: npt.ArrayLike | None = None,
    points: npt.ArrayLike | None = None,
    point_labels: npt.ArrayLike | None = None,
    masks: npt.ArrayLike | None = None,
) -> tuple[Prompts, ...]:
    """The regions that a caller gives as arrays: one `Prompts` for each kind that is not None, in
    this order.

    Args:
        boxes: (N, 4), see `Prompts.from_boxes`.
        points: (N, 2) or (N, K, 2), see `Prompts.from_points`.
        point_labels: (N,) or (N, K), the labels of `points`.
        masks: (N, H, W), see `Prompts.from_masks`.

    Raises:
        InputError: all are None, labels without points, or what the functions above refuse.
    """
    if boxes is None and points is None and masks is None:
        raise InputError("no region was asked for: give boxes or points (an empty list is fine)")
    if point_labels is not None and points is None:
        raise InputError("point_labels were given without points: give both, or neither")
    prompts = []
    if boxes is not None:
        prompts.append(Prompts.from_boxes(boxes))
    if points is not None:
        prompts.append(Prompts.from_points(points, point_labels))
    if masks is not None:
        prompts.append(Prompts.from_masks(masks))
    return tuple(prompts)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """V class names and their text embeddings, (V, E) with rows of unit length.

    Lists and arrays of other types are converted.

    Raises:
        InputError: bad names (see `as_class_names`), embeddings of another shape or not of unit
            length.
    """

    names: tuple[str, ...]
    embeddings: FloatArray

    def __post_init__(self) -> None:
        _set(
            self,
            names=as_class_names(self.names),
            embeddings=as_numbers(self.embeddings, "embeddings"),
        )
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.names):
            raise InputError(
                f"a vocabulary of {len(self.names)} names needs embeddings ({len(self.names)}, E), "
                f"got {self.embeddings.shape}"
            )
        lengths = np.linalg.norm(self.embeddings.astype(np.float64), axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_LENGTH_TOLERANCE))
        if len(wrong):
            name, length = self.names[wrong[0]], lengths[wrong[0]]
            raise InputError(
                f"the embedding of {name!r} has length {length:.4g}, not 1: normalise the rows"
            )

    def __len__(self) -> int:
        return len(self.names)


def as_class_names(names: Iterable[str], ids: Sequence[object] | None = None) -> tuple[str, ...]:
    """Class names as a checked tuple of text.

    Args:
        names: a list, a tuple, an array, or anything else that gives one name after the other.
        ids: what messages call the names by, such as the ids of their categories; None stands for
            0, 1, ...

    Raises:
        InputError: one text in place of a list, names that are not text (bytes, numbers, None,
            lists), no name, a blank or repeated one, text that is not valid Unicode.
    """
    if isinstance(names, (str, bytes)):
        raise InputError(f"the vocabulary must be a list of names, got one text: [{shown(names)}]")
    if isinstance(names, Mapping):
        raise InputError(
            "the vocabulary must be a list of names, got a dictionary: give list(names.values())"
        )
    listed = _listed(names, "the vocabulary")
    check_class_names(listed, ids)
    return tuple(map(str, listed))  # without NumPy's own type of text


def check_class_names(names: Sequence[str], ids: Sequence[object] | None = None) -> None:
    """Raises InputError for an empty vocabulary and names that `as_class_names` refuses; `ids` as
    there.
    """
    if not names:
        raise InputError("the vocabulary is empty: name at least one class")
    called = range(len(names)) if ids is None else ids
    places: dict[str, list[object]] = {}
    for name, place in zip(names, called, strict=True):
        _check_class_name(name, place)
        places.setdefault(name, []).append(place)
    repeated = {name: where for name, where in places.items() if len(where) > 1}
    if repeated:
        listed = ", ".join(map(shown, list(repeated)[:10])) + (
            ", ..." if len(repeated) > 10 else ""
        )
        name, where = next(iter(repeated.items()))
        numbers = ", ".join(map(shown, where[:5])) + (", ..." if len(where) > 5 else "")
        kind = "names" if ids is None else "the ids"
        raise InputError(
            f"the vocabulary names {listed} more than once: give each class once ({shown(name)} is "
            f"{kind} {numbers})"
        )


def _check_class_name(name: object, place: object) -> None:
    if not isinstance(name, str):
        hint = "decode it" if isinstance(name, bytes) else "name each class by text"
        raise InputError(
            f"name {place} of the vocabulary is {shown(name)}, a {type(name).__name__}: {hint}"
        )
    if all(unicodedata.category(letter) in _INVISIBLE for letter in name):
        raise InputError(f"name {place} of the vocabulary is blank: leave it out")
    if plain_text(name) != name:
        raise InputError(
            f"name {place} of the vocabulary, {shown(name)}, is not valid Unicode: write it anew"
        )


@dataclass(frozen=True, eq=False)
class RegionPredictions:
    """Predicted classes, scores and masks of the N regions of one image, over a vocabulary of V
    classes.

    Args:
        image_height: of the original image, in pixels.
        image_width: of the original image, in pixels.
        boxes: (N, 4) xyxy in original-image pixels.
        class_names: the V class names that class ids index.
        scores: (N,) probability of the best class (softmax over the vocabulary).
        class_ids: (N,) the best class.
        top_class_ids: (N, K) the K best classes, best first.
        top_scores: (N, K) their probabilities.
        masks: N masks at the original image's size, or None if none were requested.
        iou_predictions: (N,) SAM's estimate of the IoU of each mask, or None.

    Lists and arrays of other types are converted.

    Raises:
        InputError: lengths that do not match, NaN or infinite numbers, an inverted box, a class id
            out of range, a mask of another size than the image.
    """

    image_height: int
    image_width: int
    boxes: FloatArray
    class_names: tuple[str, ...]
    scores: FloatArray
    class_ids: npt.NDArray[np.integer]
    top_class_ids: npt.NDArray[np.integer]
    top_scores: FloatArray
    masks: tuple[Rle, ...] | None = None
    iou_predictions: FloatArray | None = None

    def __post_init__(self) -> None:
        self._convert()
        n = len(self.boxes) if self.boxes.ndim else 0
        lengths = {
            name: len(value)
            for name in (
                "scores",
                "class_ids",
                "top_class_ids",
                "top_scores",
                "masks",
                "iou_predictions",
            )
            if (value := getattr(self, name)) is not None
        }
        wrong = {name: length for name, length in lengths.items() if length != n}
        if wrong or self.boxes.shape != (n, 4):
            raise InputError(
                f"predictions of {self.boxes.shape} boxes need every field as long, got {wrong}"
            )
        self._check_values()

    def _convert(self) -> None:
        _set(
            self,
            image_height=checked_count(self.image_height, "image_height"),
            image_width=checked_count(self.image_width, "image_width"),
            class_names=tuple(_listed(self.class_names, "class_names")),
        )
        for name in ("boxes", "scores", "top_scores", "iou_predictions"):
            if getattr(self, name) is not None:
                _set(self, **{name: as_numbers(getattr(self, name), name)})
        for name in ("class_ids", "top_class_ids"):
            ids = as_array(getattr(self, name), name)
            _set(self, **{name: ids if ids.dtype.kind in "iu" else as_whole_numbers(ids, name)})
        if self.masks is not None:
            _set(self, masks=tuple(map(checked_rle, _listed(self.masks, "masks"))))

    def _check_values(self) -> None:
        if self.top_class_ids.ndim != 2 or self.top_class_ids.shape != self.top_scores.shape:
            raise InputError(
                f"top_class_ids and top_scores must be (N, K), got {self.top_scores.shape}"
            )
        for name in ("boxes", "scores", "top_scores", "iou_predictions"):
            values = getattr(self, name)
            if values is not None and not np.isfinite(values).all():
                raise InputError(
                    f"predictions hold {name} that are NaN or infinite: the model or its input is "
                    "damaged"
                )
        if (self.boxes[:, :2] > self.boxes[:, 2:]).any():
            raise InputError(
                "predictions hold a box that is inverted: boxes are x0, y0, x1, y1 with x0 <= x1, "
                "y0 <= y1"
            )
        for ids in (self.class_ids, self.top_class_ids):
            if ids.size and not 0 <= ids.min() <= ids.max() < len(self.class_names):
                raise InputError(
                    f"class ids must be 0 to {len(self.class_names) - 1}, indices of class_names"
                )
        size = [self.image_height, self.image_width]
        if any(mask["size"] != size for mask in self.masks or ()):
            raise InputError(
                f"masks must be {size[1]} x {size[0]} pixels (width x height), as the image"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def to_json(self, file_name: str) -> dict[str, Any]:
        r"""The image and its regions as plain JSON values; `mask` and `iou` are null where there
        are none.

        What UTF-8 cannot hold of the file's name is escaped, as `\xe9`.

        Raises:
            InputError: `file_name` is not text or a path.
        """
        if not isinstance(file_name, (str, os.PathLike)):
            raise InputError(f"file_name must be text, got {shown(file_name)}")
        file_name = plain_text(os.fsdecode(file_name))
        image = {"file_name": file_name, "width": self.image_width, "height": self.image_height}
        return {"image": image, "regions": [self._region(index) for index in range(len(self))]}

    def to_coco(
        self, image_id: int | str, category_ids: Sequence[int | str]
    ) -> list[dict[str, Any]]:
        """COCO results as plain JSON values, one for each region's best class.

        Args:
            image_id: a whole number of any type, or text.
            category_ids: (V,) the ids of `class_names` in order, each as `image_id`.

        Raises:
            InputError: another number of ids than of classes, or an id that is neither a whole
                number nor text.
        """
        image_id = _plain_id(image_id, "image_id")
        ids = _listed(category_ids, "category_ids")
        if len(ids) != len(self.class_names):
            raise InputError(
                f"{len(ids)} category ids for {len(self.class_names)} classes: give one for each"
            )
        results: list[dict[str, Any]] = []
        for index, (x0, y0, x1, y1) in enumerate(self.boxes.astype(np.float64).tolist()):
            result = {
                "image_id": image_id,
                "category_id": _plain_id(ids[int(self.class_ids[index])], "a category id"),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(self.scores[index]),
            }
            results.append(
                result if self.masks is None else result | {"segmentation": self.masks[index]}
            )
        return results

    def _region(self, index: int) -> dict[str, Any]:
        top = zip(self.top_class_ids[index], self.top_scores[index], strict=True)
        ious = self.iou_predictions
        return {
            "box": [_shortest(value) for value in self.boxes[index]],
            "class": self.class_names[int(self.class_ids[index])],
            "score": _shortest(self.scores[index]),
            "top": [[self.class_names[int(class_id)], _shortest(score)] for class_id, score in top],
            "mask": None if self.masks is None else self.masks[index],
            "iou": None if ious is None else _shortest(ious[index]),
        }


def _shortest(value: np.floating[Any]) -> float:
    """The float that prints with the fewest digits and still reads back as the same float32."""
    return float(str(np.float32(value)))


def _set(record: object, **values: object) -> None:
    """Fill fields of a frozen dataclass, from its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


def _listed(values: Any, what: str) -> list[Any]:
    try:
        return list(values)
    except TypeError as error:
        raise InputError(f"{what} must be a list, got {shown(values)}") from error


def _plain_id(value: object, name: str) -> int | str:
    if isinstance(value, str):
        return plain_text(str(value))
    number = whole_number(value)
    if number is None:
        raise InputError(f"{name} must be a whole number or text, got {shown(value)}")
    return number


def _as_masks(masks: object) -> BoolArray:
    """Masks (N, H, W), or of another shape, as bool; whole numbers must be two values, one of them
    0.
    """
    array = as_array(masks, "masks")
    if array.dtype.kind not in "bui":
        raise InputError(
            f"masks must be bool or 0 and 1, got {array.dtype}; threshold them first (masks > 0)"
        )
    if array.dtype.kind != "b" and array.size and not ((array == 0) | (array == array.max())).all():
        values = ", ".join(map(str, np.unique(array)[:5]))
        raise InputError(
            f"masks must be bool or 0 and 1, got the values {values}, ...; threshold them (masks > "
            "127)"
        )
    return array.astype(bool)


def _click_labels(labels: npt.ArrayLike | None, shape: tuple[int, ...]) -> IntArray:
    if labels is None:
        return np.full(shape, FOREGROUND, np.int32)
    array = as_numbers(labels, "point labels", booleans=True)
    if array.shape != shape:
        raise InputError(
            f"point labels must have shape {shape}, one for each click, got {array.shape}"
        )
    if not np.isin(array, (FOREGROUND, BACKGROUND)).all():
        raise InputError(
            "point labels must be 1 (foreground) or 0 (background), got "
            f"{np.unique(array).tolist()}"
        )
    return array.astype(np.int32)
