"""A question about one image and its answer, as every part of serving passes them on, and as
tensors.

Client, gateway and server share these types. Each knows its own form in the tensors of
`regionspot.serving.contract`. Free of Triton and of PyTorch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from regionspot.errors import InputError, shown
from regionspot.runtime.runner import Array
from regionspot.serving.contract import (
    ANY_TOP_K,
    DEFAULT_TOP_K,
    INPUTS,
    OUTPUTS,
    STAGES,
    Limits,
    RequestError,
    ServingError,
    check_tensors,
    coded,
    to_utf8,
)
from regionspot.structures import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    PADDING,
    Prompts,
    RegionPredictions,
    Rle,
    as_prompts,
)

NO_REGIONS: Mapping[str, Array] = {
    "boxes": np.zeros((1, 0, 4), np.float32),
    "points": np.zeros((1, 0, 1, 2), np.float32),
    "point_labels": np.zeros((1, 0, 1), np.int32),
}
"""What a request says of regions where there are none."""


def handle_of(image: bytes) -> str:
    """SHA-256 of an encoded image, by which a server knows it: nobody can make another image of the
    same handle.
    """
    return hashlib.sha256(image).hexdigest()


@dataclass(frozen=True)
class RemoteImage:
    """An image that a server has cached. Pass it instead of the image, which then need not be sent
    or encoded again.

    Args:
        handle: the server's identifier of it.
        height: of the upright image, in pixels; 0 where only the handle is known.
        width: of the upright image, in pixels; 0 where only the handle is known.
        encoded: the image file's bytes, sent again if the server no longer has it; None if they are
            not available.
    """

    handle: str
    height: int = 0
    width: int = 0
    encoded: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked about one image.

    Args:
        image: the bytes of an image file, or an image that the server has cached.
        vocabulary: the name of a registered vocabulary, or class names.
        prompts: the regions, as `as_prompts` makes them of boxes and points.
        top_k: number of best classes to return; None leaves it to the server.
        return_masks: also return each region's mask.

    Raises:
        RequestError: VOCABULARY_UNKNOWN or VOCABULARY_INVALID, text that UTF-8 cannot hold or a
            word that is no text; REQUEST_INVALID, a `top_k` of ANY_TOP_K.
    """

    image: bytes | RemoteImage
    vocabulary: str | tuple[str, ...]
    prompts: tuple[Prompts, ...]
    top_k: int | None = None
    return_masks: bool = False

    def __post_init__(self) -> None:
        if self.top_k == ANY_TOP_K:
            raise RequestError("REQUEST_INVALID", f"top_k must be 1 or more, not {ANY_TOP_K}")
        if isinstance(self.vocabulary, str):
            with coded("VOCABULARY_UNKNOWN"):
                to_utf8(self.vocabulary, "the vocabulary's name")
        else:
            with coded("VOCABULARY_INVALID"):
                _encoded_words(self.vocabulary)

    @property
    def num_regions(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def wanted_top_k(self) -> int:
        """Number of best classes, also where it was left to the server."""
        return DEFAULT_TOP_K if self.top_k is None else self.top_k

    def check(self, limits: Limits) -> None:
        """Checks all that can be told without the image and the model: the server's limits, an
        empty vocabulary, coordinates that are no numbers.

        Raises:
            RequestError: with the code that says why not.
        """
        if self.num_regions > limits.max_regions:
            raise RequestError(
                "TOO_MANY_REGIONS",
                f"{self.num_regions} regions are more than {limits.max_regions}: ask about fewer "
                "at a time",
            )
        if self.top_k is not None and not 1 <= self.top_k <= limits.max_top_k:
            raise RequestError(
                "REQUEST_INVALID",
                f"top_k must be from 1 to {limits.max_top_k}, not {shown(self.top_k)}",
            )
        if isinstance(self.image, bytes) and len(self.image) > limits.max_image_bytes:
            raise RequestError(
                "IMAGE_TOO_LARGE",
                f"the image file has {len(self.image)} bytes, at most {limits.max_image_bytes}: "
                "scale it down",
            )
        if not isinstance(self.vocabulary, str):
            check_words(self.vocabulary, limits)
        with coded("REGION_INVALID"):
            for part in self.prompts:
                part.check_finite()

    def to_tensors(self) -> dict[str, Array]:
        """The inputs of the contract, (1, ...) each. All of them, empty where there is nothing to
        say: Triton puts only requests together that have the same inputs.

        Raises:
            RequestError: the image's handle is no Unicode text, or regions are neither boxes nor
                points.
        """
        with coded():
            regions = tensors_of_regions(self.prompts)
            handle = None
            if isinstance(self.image, RemoteImage):
                handle = _row([to_utf8(self.image.handle, "the image's handle")])
        image = _row([self.image]) if isinstance(self.image, bytes) else None
        named = words = None
        if isinstance(self.vocabulary, str):
            named = _row([self.vocabulary.encode()])
        else:
            words = _row(_encoded_words(self.vocabulary))
        return {
            **_either("image", image, "image_handle", handle),
            **NO_REGIONS,
            **regions,
            **_either("vocabulary", named, "words", words),
            "top_k": np.array([[ANY_TOP_K if self.top_k is None else self.top_k]], np.int32),
            "return_masks": np.array([[self.return_masks]]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> list[Question]:
        """The B questions of one request.

        Args:
            tensors: inputs of the contract by name, (B, ...) each; what was left out is absent.

        Raises:
            RequestError: tensors that do not match the contract or each other, or text that is not
                UTF-8.
        """
        with coded():
            batch = check_tensors(tensors, INPUTS)
            if batch == 0:
                raise InputError(
                    "the request is empty: send image or image_handle, boxes, and words"
                )
        rows = [{name: array[row] for name, array in tensors.items()} for row in range(batch)]
        questions = [cls._from_row(row) for row in rows]
        options = {(question.top_k, question.return_masks) for question in questions}
        names = {
            question.vocabulary for question in questions if isinstance(question.vocabulary, str)
        }
        if len(options) > 1 or len(names) > 1:
            raise RequestError(
                "REQUEST_INVALID",
                "the pictures of one request need the same top_k, return_masks and vocabulary: "
                "send them one by one",
            )
        return questions

    @classmethod
    def _from_row(cls, given: Mapping[str, Array]) -> Question:
        given = _without_empty(given)
        with coded():
            prompts = as_prompts(given.get("boxes"), given.get("points"), given.get("point_labels"))
        return cls(
            _image_of(given),
            _vocabulary_of(given),
            prompts,
            top_k=_top_k_of(given),
            return_masks=bool(given["return_masks"][0]) if "return_masks" in given else False,
        )


class OtherWordsError(ServingError):
    """A server's answer names other classes than those that its class ids were to be read by."""

    def __init__(self) -> None:
        super().__init__(
            "INTERNAL", "the server's answer and its description name different classes: ask again"
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """A server's response.

    Args:
        cached: the image was cached, so both image encoders were skipped.
        model_version: of the model that answered, see `OUTPUTS`.
        stage_seconds: of each of `regionspot.serving.contract.STAGES`; empty where they are not
            known, as behind a gateway.
    """

    predictions: RegionPredictions
    image: RemoteImage
    cached: bool
    model_version: str = ""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Array]:
        """The outputs of the contract, (1, ...) each."""
        found = self.predictions
        ious = found.iou_predictions
        outputs = {
            "class_ids": found.class_ids.astype(np.int32),
            "class_names": _class_names(found, found.class_ids),
            "scores": found.scores,
            "top_class_ids": found.top_class_ids.astype(np.int32),
            "top_class_names": _class_names(found, found.top_class_ids),
            "top_scores": found.top_scores,
            "boxes": found.boxes,
            "iou_predictions": np.zeros(len(found), np.float32) if ious is None else ious,
            "masks": _objects([mask["counts"].encode("ascii") for mask in found.masks or ()]),
            "image_size": np.array([found.image_height, found.image_width], np.int32),
            "image_handle": _objects([self.image.handle.encode("ascii")]),
            "cached": np.array([self.cached]),
            "model_version": _objects([self.model_version.encode("ascii")]),
            "stage_seconds": np.array(
                [self.stage_seconds.get(name, 0) for name in STAGES], np.float32
            ),
        }
        return {name: array[None] for name, array in outputs.items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Array], class_names: Sequence[str] | None, return_masks: bool
    ) -> Answer:
        """The answer to a request of one image.

        Args:
            tensors: outputs of the contract by name, (1, ...) each. Others, of a later release, are
                passed over.
            class_names: of the question's vocabulary, which the answer names in part only; None if
                they are not known.
            return_masks: whether the question asked for masks.

        Raises:
            OtherWordsError: `class_names` are not those that the server answered from, as far as
                its answer shows.
            ServingError: INTERNAL, the tensors are no such answer.
        """
        known = [field.name for field in OUTPUTS]
        try:
            given = {name: tensors[name] for name in known if name in tensors}
            if check_tensors(given, OUTPUTS, complete=True) != 1:
                raise InputError("it is not about one image")
            found = {name: array[0] for name, array in given.items()}
            if class_names is None or not _is_named_by(found, class_names):
                raise OtherWordsError
            return cls._from_row(found, class_names, return_masks)
        except ValueError as error:  # InputError and UnicodeDecodeError are such
            raise ServingError(
                "INTERNAL", f"the server's answer cannot be used: {error}"
            ) from error

    @classmethod
    def _from_row(
        cls, found: Mapping[str, Array], class_names: Sequence[str], return_masks: bool
    ) -> Answer:
        height, width = (int(side) for side in found["image_size"])
        masks = None
        if return_masks:
            masks = tuple(
                Rle(size=[height, width], counts=counts.decode("ascii"))
                for counts in found["masks"]
            )
        predictions = RegionPredictions(
            image_height=height,
            image_width=width,
            boxes=found["boxes"],
            class_names=tuple(class_names),
            scores=found["scores"],
            class_ids=found["class_ids"],
            top_class_ids=found["top_class_ids"],
            top_scores=found["top_scores"],
            masks=masks,
            iou_predictions=found["iou_predictions"],
        )
        image = RemoteImage(found["image_handle"][0].decode("ascii"), height, width)
        version = found["model_version"][0].decode("ascii")
        stage_seconds = dict(zip(STAGES, found["stage_seconds"].tolist(), strict=True))
        return cls(predictions, image, bool(found["cached"][0]), version, stage_seconds)


def _either(
    name: str, value: Array | None, other: str, other_value: Array | None
) -> dict[str, Array]:
    """The one of two tensors that is there, and the other one empty. One that is empty itself goes
    alone: it is what was meant.
    """
    if value is None:
        assert other_value is not None
        return _either(other, other_value, name, None)
    if _is_empty(name, value[0]):
        return {name: value}
    return {name: value, other: _row([] if other == "words" else [b""])}


def _without_empty(given: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of one image that say something. Of two of which one is wanted, and that are both
    empty, the first is left.
    """
    kept = dict(given)
    for first, second in (("image", "image_handle"), ("words", "vocabulary")):
        for name, other in ((second, first), (first, second)):
            if name in kept and other in kept and _is_empty(name, kept[name]):
                del kept[name]
    if "boxes" in kept and "points" in kept and not len(kept["points"]):
        del kept["points"]
        if "point_labels" in kept and not len(kept["point_labels"]):
            del kept["point_labels"]
    return kept


def _is_empty(name: str, array: Array) -> bool:
    """Whether it has no word, or is a text of no bytes."""
    return array.size == 0 if name == "words" else not array[0]


def _top_k_of(given: Mapping[str, Array]) -> int | None:
    asked = int(given["top_k"][0]) if "top_k" in given else ANY_TOP_K
    return None if asked == ANY_TOP_K else asked


def _image_of(given: Mapping[str, Array]) -> bytes | RemoteImage:
    if ("image" in given) == ("image_handle" in given):
        raise RequestError("REQUEST_INVALID", "send either image or image_handle")
    if "image_handle" in given:
        return RemoteImage(_text(given["image_handle"][0], "image_handle"))
    image: bytes = given["image"][0]
    return image


def _vocabulary_of(given: Mapping[str, Array]) -> str | tuple[str, ...]:
    if ("vocabulary" in given) == ("words" in given):
        raise RequestError(
            "REQUEST_INVALID", "send either words, or vocabulary with the name of a registered one"
        )
    if "vocabulary" in given:
        return _text(given["vocabulary"][0], "vocabulary")
    return tuple(_text(word, "words", "VOCABULARY_INVALID") for word in given["words"])


def check_words(words: Sequence[str], limits: Limits) -> None:
    """Checks what can be told of free words without a text encoder.

    Raises:
        RequestError: there are none, too many, or one that is too long.
    """
    if not words:
        raise RequestError("VOCABULARY_INVALID", "the vocabulary is empty: name at least one class")
    if len(words) > limits.max_words:
        raise RequestError(
            "TOO_MANY_WORDS", f"{len(words)} words are more than {limits.max_words}: send fewer"
        )
    for index, word in enumerate(words):
        if len(word) > limits.max_word_length:
            raise RequestError(
                "VOCABULARY_INVALID",
                f"word {index} is longer than {limits.max_word_length} characters: shorten it",
            )


def _encoded_words(words: Sequence[str]) -> list[bytes]:
    return [to_utf8(word, f"word {index}") for index, word in enumerate(words)]


def tensors_of_regions(prompts: Sequence[Prompts]) -> dict[str, Array]:
    """The inverse of `as_prompts`: `boxes`, and `points` with their labels, as far as there are
    any; see NO_REGIONS.
    """
    tensors: dict[str, Array] = {}
    for part in prompts:
        if not len(part):
            continue
        more = _tensors_of_part(part)
        if "points" in tensors or "boxes" in tensors.keys() & more.keys():
            raise InputError(
                "a server takes boxes first, then points: give at most one Prompts of each kind"
            )
        tensors |= more
    return tensors


def _tensors_of_part(prompts: Prompts) -> dict[str, Array]:
    """The inverse of `Prompts.from_boxes` and `Prompts.from_points`."""
    points, labels = prompts.points, prompts.labels
    clicks = labels[:, :-1]  # from_points puts a point of padding behind them
    if prompts.mask_inputs is None:
        if labels.shape[1] == 2 and (labels == (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)).all():
            return {"boxes": points.reshape(1, -1, 4)}
        if np.isin(clicks, (FOREGROUND, BACKGROUND)).all() and (labels[:, -1] == PADDING).all():
            return {"points": points[None, :, :-1], "point_labels": clicks[None]}
    raise InputError(
        "a server takes regions as boxes or points: build the prompts with from_boxes or "
        "from_points"
    )


def _is_named_by(found: Mapping[str, Array], names: Sequence[str]) -> bool:
    """Whether the K best classes of each region bear these names. Raises InputError where names are
    missing.
    """
    if found["top_class_ids"].shape != found["top_class_names"].shape:
        raise InputError("it does not have a name for each of top_class_ids")
    pairs = zip(found["top_class_ids"].flat, found["top_class_names"].flat, strict=True)
    return all(0 <= index < len(names) and names[index] == name.decode() for index, name in pairs)


def _class_names(
    found: RegionPredictions, class_ids: npt.NDArray[np.integer]
) -> npt.NDArray[np.object_]:
    """Of the shape of `class_ids`, UTF-8."""
    return _objects([found.class_names[index].encode() for index in class_ids.flat]).reshape(
        class_ids.shape
    )


def _text(value: bytes, name: str, code: str = "REQUEST_INVALID") -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(code, f"{name} must be UTF-8 text") from error


def _row(values: list[bytes]) -> npt.NDArray[np.object_]:
    """(1, n)"""
    return _objects(values)[None]


def _objects(values: list[bytes]) -> npt.NDArray[np.object_]:
    """(n,) of Triton's BYTES."""
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array
