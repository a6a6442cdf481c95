"""One question about one picture, from bytes and pixels to names: what the public model does, without Triton."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from regionspot.errors import ArtifactError, InputError
from regionspot.predictor import EncodedPicture, RegionPredictor
from regionspot.runtime.runner import Array
from regionspot.serving.backends.image_cache import ImageCache, handle_of
from regionspot.serving.contract import DEFAULT_TOP_K, Limits, RequestError, ServingError, base64_hint, to_utf8
from regionspot.structures import Prompts, RegionPredictions, Vocabulary
from regionspot.transforms import UInt8Array, read_image
from regionspot.vocabulary import EmbeddingMemory, VocabularyEncoder

FORMATS = ("JPEG", "PNG", "WEBP")
"""What is opened for strangers: of Pillow's decoders the ones that everybody uses."""


@dataclass(frozen=True, eq=False)
class Question:
    """The inputs of `regionspot.serving.contract`, for one picture."""

    image: bytes | None = None
    image_handle: str | None = None
    boxes: Array | None = None
    points: Array | None = None
    point_labels: Array | None = None
    vocabulary: str | None = None
    words: tuple[str, ...] | None = None
    top_k: int | None = None
    return_masks: bool = False


@dataclass
class Counts:
    """What happened so far, for the server's metrics."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, amount: float = 1.0) -> None:
        self.values[name] = self.values.get(name, 0.0) + amount

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds that the block takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"{stage}_seconds", time.perf_counter() - began)


class SharedState:
    """What several recognizers of one server know together.

    Args:
        vocabularies: the registered ones.
        encoder: of free words, over an `EmbeddingMemory`; None where the server has no text encoder.
        draws_masks: whether it has the graph that draws them.
    """

    def __init__(
        self,
        limits: Limits,
        vocabularies: Mapping[str, Vocabulary],
        encoder: VocabularyEncoder | None,
        draws_masks: bool = True,
    ) -> None:
        self.limits, self.vocabularies, self._encoder = limits, vocabularies, encoder
        self.draws_masks = draws_masks
        self.images = ImageCache(limits.image_cache_mb << 20)
        self._lock = threading.Lock()
        self._last: tuple[tuple[str, ...], Vocabulary] | None = None

    def encode(self, words: tuple[str, ...], counts: Counts) -> Vocabulary:
        """Free words, each from memory where it was met before.

        Raises:
            RequestError: words that cannot be used, or too many new ones.
        """
        if self._encoder is None:
            raise RequestError("VOCABULARY_INVALID", f"this server encodes no words: name {self.registered()}")
        last = self._last
        if last is not None and last[0] == words:
            return last[1]
        with self._lock:
            memory = self._encoder.store
            assert isinstance(memory, EmbeddingMemory)
            new = len({word for word in map(self._encoder.word, words) if word not in memory})
            if new > self.limits.max_new_words:
                raise RequestError(
                    "TOO_MANY_WORDS",
                    f"{new} of the words are new to the server, which learns at most {self.limits.max_new_words} in a "
                    "request: send them in parts first, or have them registered (regionspot-serve init --vocabulary)",
                )
            counts.add("words_encoded", new)
            found = self._encoder.encode(words, same_meaning="ignore")
        self._last = words, found
        return found

    def registered(self) -> str:
        """For messages."""
        if not self.vocabularies:
            return "none: no vocabulary is registered, send the words themselves"
        return f"one of {', '.join(sorted(self.vocabularies))}"


class Recognizer:
    """Answers one question after another. Not safe for several threads at once; several may share their state."""

    def __init__(self, predictor: RegionPredictor, shared: SharedState) -> None:
        self._predictor, self._shared, self._limits = predictor, shared, shared.limits

    def answer(
        self, question: Question, counts: Counts, cancelled: Callable[[], bool] = lambda: False
    ) -> dict[str, Array]:
        """The outputs of `regionspot.serving.contract`, without the pictures' axis in front.

        Args:
            cancelled: asked between the stages: nobody waits for the answer any more.

        Raises:
            ServingError: with the code that says why not.
        """

        def go_on() -> None:
            if cancelled():
                raise ServingError("TIMEOUT", "the request was cancelled")

        with _coded():
            self._check(question)
            go_on()
            with counts.timed("vocabulary"):
                vocabulary = self._vocabulary(question, counts)
            go_on()
            picture, handle, cached = self._picture(question, counts)
            go_on()
            self._check_regions(question, picture)
            with counts.timed("regions"):
                found = self._predictor.set_image(picture).predict(
                    vocabulary=vocabulary,
                    boxes=question.boxes,
                    points=question.points,
                    point_labels=question.point_labels,
                    top_k=self._top_k(question),
                    return_masks=question.return_masks,
                )
            counts.add("regions", len(found))
            return _outputs(found, handle, cached)

    def _check(self, question: Question) -> None:
        if (question.image is None) == (question.image_handle is None):
            raise RequestError("REQUEST_INVALID", "send either image or image_handle")
        if (question.vocabulary is None) == (question.words is None):
            raise RequestError("REQUEST_INVALID", "send either words, or vocabulary with the name of a registered one")
        if question.boxes is None and question.points is None:
            raise RequestError("REQUEST_INVALID", "no region was asked for: send boxes or points (none at all is fine)")
        if question.point_labels is not None and question.points is None:
            raise RequestError("REQUEST_INVALID", "point_labels were sent without points: send both, or neither")
        count = sum(len(regions) for regions in (question.boxes, question.points) if regions is not None)
        if count > self._limits.max_regions:
            raise RequestError(
                "TOO_MANY_REGIONS",
                f"{count} regions are more than {self._limits.max_regions}: ask about fewer at a time",
            )
        if question.return_masks and not self._shared.draws_masks:
            raise RequestError("REQUEST_INVALID", "this server draws no masks: leave out return_masks")
        if not 1 <= self._top_k(question) <= self._limits.max_top_k:
            raise RequestError(
                "REQUEST_INVALID", f"top_k must be from 1 to {self._limits.max_top_k}, not {question.top_k}"
            )

    def _top_k(self, question: Question) -> int:
        return min(DEFAULT_TOP_K, self._limits.max_top_k) if question.top_k is None else question.top_k

    def _vocabulary(self, question: Question, counts: Counts) -> Vocabulary:
        if question.vocabulary is not None:
            found = self._shared.vocabularies.get(question.vocabulary)
            if found is None:
                raise RequestError(
                    "VOCABULARY_UNKNOWN",
                    f"no vocabulary {question.vocabulary[:64]!r} is registered: name {self._shared.registered()}",
                )
            return found
        words = question.words or ()
        if len(words) > self._limits.max_words:
            raise RequestError(
                "TOO_MANY_WORDS", f"{len(words)} words are more than {self._limits.max_words}: send fewer"
            )
        if any(len(word) > self._limits.max_word_length for word in words):
            raise RequestError("VOCABULARY_INVALID", f"a word is longer than {self._limits.max_word_length} characters")
        with _coded("VOCABULARY_INVALID"):
            for index, word in enumerate(words):
                to_utf8(word, f"word {index}")
            return self._shared.encode(words, counts)

    def _picture(self, question: Question, counts: Counts) -> tuple[EncodedPicture, str, bool]:
        """The encoded picture, its handle, and whether it was known."""
        limits, images = self._limits, self._shared.images
        if question.image is not None and len(question.image) > limits.max_image_bytes:
            raise RequestError(
                "IMAGE_TOO_LARGE",
                f"the picture's file has {len(question.image)} bytes, at most {limits.max_image_bytes}: scale it down",
            )
        handle = question.image_handle if question.image is None else handle_of(question.image)
        assert handle is not None
        known = images.get(handle)
        counts.add("image_cache_hits" if known is not None else "image_cache_misses")
        if known is not None:
            return known, handle, True
        if question.image is None:
            raise RequestError(
                "IMAGE_UNKNOWN", "the server keeps no picture of this handle (any more): send the picture"
            )
        with counts.timed("decode"), _coded("IMAGE_INVALID"):
            pixels = _pixels(question.image, limits.max_image_pixels)
        with counts.timed("encoders"):
            picture = self._predictor.encode(pixels)
        images.put(handle, picture)
        return picture, handle, False

    def _check_regions(self, question: Question, picture: EncodedPicture) -> None:
        """Before any work on them, and with the code that tells them from the rest."""
        with _coded("REGION_INVALID"):
            if question.boxes is not None:
                Prompts.from_boxes(question.boxes).validated(picture.height, picture.width)
            if question.points is not None:
                Prompts.from_points(question.points, question.point_labels).validated(picture.height, picture.width)


def _pixels(image: bytes, max_pixels: int) -> UInt8Array:
    """(H, W, 3) uint8 RGB. Raises InputError for bytes that are no picture."""
    try:
        return read_image(image, max_pixels, formats=FORMATS)
    except InputError as error:
        raise InputError(f"{error}{base64_hint(image)}") from error


@contextmanager
def _coded(code: str = "REQUEST_INVALID") -> Iterator[None]:
    """Gives errors of the block a code. What is no fault of the caller's says no more than that."""
    try:
        yield
    except ServingError:
        raise
    except InputError as error:
        too_large = code == "IMAGE_INVALID" and "is too large" in str(error)
        raise RequestError("IMAGE_TOO_LARGE" if too_large else code, str(error)) from error
    except (ArtifactError, MemoryError) as error:
        raise ServingError("INTERNAL", "the model failed; the server's log says why") from error


def _outputs(found: RegionPredictions, handle: str, cached: bool) -> dict[str, Array]:
    masks = found.masks or ()
    ious = found.iou_predictions
    return {
        "class_ids": found.class_ids.astype(np.int32),
        "class_names": _names(found, found.class_ids),
        "scores": found.scores.astype(np.float32),
        "top_class_ids": found.top_class_ids.astype(np.int32),
        "top_class_names": _names(found, found.top_class_ids),
        "top_scores": found.top_scores.astype(np.float32),
        "boxes": found.boxes.astype(np.float32),
        "iou_predictions": np.zeros(len(found), np.float32) if ious is None else ious.astype(np.float32),
        "masks": _objects([mask["counts"].encode("ascii") for mask in masks]),
        "image_size": np.array([found.image_height, found.image_width], np.int32),
        "image_handle": _objects([handle.encode("ascii")]),
        "cached": np.array([cached]),
    }


def _names(found: RegionPredictions, class_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.object_]:
    """Of the shape of `class_ids`, UTF-8."""
    return _objects([found.class_names[index].encode() for index in class_ids.flat]).reshape(class_ids.shape)


def _objects(values: list[bytes]) -> npt.NDArray[np.object_]:
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array


def read_vocabulary(path: Path) -> Vocabulary:
    """What `regionspot.serving.repository.write_vocabulary` wrote.

    Raises:
        ArtifactError: it is damaged or missing.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            names = tuple(str(name) for name in content["names"].tolist())
            return Vocabulary(names, np.asarray(content["embeddings"], np.float32))
    except Exception as error:  # a damaged archive raises almost anything
        raise ArtifactError(f"{path} is no vocabulary ({error}): run `regionspot-serve init` again") from error
