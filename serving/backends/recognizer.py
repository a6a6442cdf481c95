"""One question about one picture, from bytes and pixels to names: what the public model does,
without Triton.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from regionspot.errors import ArtifactError, InputError
from regionspot.images import read_image
from regionspot.predictor import EncodedPicture, RegionPredictor
from regionspot.serving.backends.image_cache import ImageCache, handle_of
from regionspot.serving.contract import (
    DEFAULT_TOP_K,
    Limits,
    RequestError,
    ServingError,
    base64_hint,
    coded,
)
from regionspot.serving.messages import Answer, Question, RemoteImage
from regionspot.structures import UInt8Array, Vocabulary
from regionspot.vocabulary import EmbeddingMemory, VocabularyEncoder

FORMATS = ("JPEG", "PNG", "WEBP")
"""What is opened for strangers: of Pillow's decoders the ones that everybody uses."""


class Counts:
    """What happened so far, for the server's metrics. Safe for several threads at once."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1.0) -> None:
        with self._lock:
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
        encoder: of free words, over an `EmbeddingMemory`; None where the server has no text
            encoder.
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
            raise RequestError(
                "VOCABULARY_INVALID", f"this server encodes no words: name {self.registered()}"
            )
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
                    f"{new} of the words are new to the server, which learns at most "
                    f"{self.limits.max_new_words} in a request: send them in parts first, or have "
                    "them registered (regionspot-serve init --vocabulary)",
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
    """Answers one question after another. Not safe for several threads at once; several may share
    their state.
    """

    def __init__(self, predictor: RegionPredictor, shared: SharedState) -> None:
        self._predictor, self._shared, self._limits = predictor, shared, shared.limits

    def answer(
        self,
        question: Question,
        counts: Counts,
        cancelled: Callable[[], bool] = lambda: False,
        encoded: Callable[[], None] = lambda: None,
    ) -> Answer:
        """The answer to a question.

        Args:
            cancelled: asked between the stages: nobody waits for the answer any more.
            encoded: called when the picture is encoded, or was before.

        Raises:
            ServingError: with the code that says why not.
        """

        def go_on() -> None:
            if cancelled():
                raise ServingError("TIMEOUT", "the request was cancelled")

        with _without_details(), coded():
            self._check(question)
            go_on()
            with counts.timed("vocabulary"):
                vocabulary = self._vocabulary(question, counts)
            go_on()
            picture, handle, cached = self._picture(question, counts)
            encoded()
            go_on()
            with coded("REGION_INVALID"):
                prompts = [
                    part.validated(picture.height, picture.width) for part in question.prompts
                ]
            with counts.timed("regions"):
                found = self._predictor.set_image(picture).predict(
                    vocabulary=vocabulary,
                    prompts=prompts,
                    top_k=self._top_k(question),
                    return_masks=question.return_masks,
                )
            counts.add("regions", len(found))
            return Answer(found, RemoteImage(handle, picture.height, picture.width), cached)

    def _check(self, question: Question) -> None:
        question.check(self._limits)
        if question.return_masks and not self._shared.draws_masks:
            raise RequestError(
                "REQUEST_INVALID", "this server draws no masks: leave out return_masks"
            )

    def _top_k(self, question: Question) -> int:
        return (
            min(DEFAULT_TOP_K, self._limits.max_top_k) if question.top_k is None else question.top_k
        )

    def _vocabulary(self, question: Question, counts: Counts) -> Vocabulary:
        if not isinstance(question.vocabulary, str):
            with coded("VOCABULARY_INVALID"):
                return self._shared.encode(question.vocabulary, counts)
        found = self._shared.vocabularies.get(question.vocabulary)
        if found is None:
            raise RequestError(
                "VOCABULARY_UNKNOWN",
                f"no vocabulary {question.vocabulary[:64]!r} is registered: name "
                f"{self._shared.registered()}",
            )
        return found

    def _picture(self, question: Question, counts: Counts) -> tuple[EncodedPicture, str, bool]:
        """The encoded picture, its handle, and whether it was known."""
        image, images = question.image, self._shared.images
        handle = handle_of(image) if isinstance(image, bytes) else image.handle
        known = images.get(handle)
        counts.add("image_cache_hits" if known is not None else "image_cache_misses")
        if known is not None:
            return known, handle, True
        if not isinstance(image, bytes):
            raise RequestError(
                "IMAGE_UNKNOWN",
                "the server keeps no picture of this handle (any more): send the picture",
            )
        with counts.timed("decode"):
            pixels = _pixels(image, self._limits.max_image_pixels)
        with counts.timed("encoders"):
            picture = self._encoded(pixels)
        images.put(handle, picture)
        return picture, handle, False

    def _encoded(self, pixels: UInt8Array) -> EncodedPicture:
        """A picture through both encoders; once more without the kept ones, if that fails for want
        of memory.
        """
        try:
            return self._predictor.encode(pixels)
        except ArtifactError:
            if not self._shared.images.clear():
                raise
        return self._predictor.encode(pixels)


def _pixels(image: bytes, max_pixels: int) -> UInt8Array:
    """(H, W, 3) uint8 RGB. Raises RequestError, IMAGE_INVALID or IMAGE_TOO_LARGE."""
    try:
        return read_image(image, max_pixels, formats=FORMATS)
    except InputError as error:
        code = "IMAGE_TOO_LARGE" if "is too large" in str(error) else "IMAGE_INVALID"
        raise RequestError(code, f"{error}{base64_hint(image)}") from error


@contextmanager
def _without_details() -> Iterator[None]:
    """Says no more of a failure that is not the caller's fault than that there was one."""
    try:
        yield
    except (ArtifactError, MemoryError) as error:
        raise ServingError("INTERNAL", "the model failed; the server's log says why") from error


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
        raise ArtifactError(
            f"{path} is no vocabulary ({error}): run `regionspot-serve init` again"
        ) from error
