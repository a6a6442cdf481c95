"""One question about one picture, from bytes and pixels to names: what the public model does,
without Triton.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from regionspot.errors import ArtifactError, InputError, shown
from regionspot.predictor import EncodedPicture, RegionPredictor
from regionspot.serving.backends.budget import Budget, never
from regionspot.serving.backends.image_cache import ImageCache
from regionspot.serving.backends.image_decoder import ImageDecoder
from regionspot.serving.backends.instances import Instances
from regionspot.serving.backends.word_queue import WordQueue
from regionspot.serving.contract import (
    DEFAULT_TOP_K,
    STAGES,
    Limits,
    RequestError,
    ServingError,
    coded,
)
from regionspot.serving.messages import Answer, Question, RemoteImage, handle_of
from regionspot.serving.picture import check_picture
from regionspot.structures import Prompts, Vocabulary, as_class_names
from regionspot.transforms import EncoderInputs
from regionspot.vocabulary import EmbeddingMemory, VocabularyEncoder

RECENT_VOCABULARIES = 16
"""Lists of words whose embeddings are kept together, ready to be used again."""


class Counts:
    """What happened so far, for the server's metrics. Safe for several threads at once."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1.0) -> None:
        with self._lock:
            self.values[name] = self.values.get(name, 0.0) + amount

    def merge(self, other: Counts) -> None:
        """Adds all that another has counted, which is finished."""
        for name, amount in other.values.items():
            self.add(name, amount)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds that the block takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"{stage}_seconds", time.perf_counter() - began)


class SharedState:
    """What all requests of one server share: its limits, vocabularies, and what it remembers.

    Args:
        vocabularies: the registered ones.
        encoder: of free words, over an `EmbeddingMemory`; None where the server has no text
            encoder.
        draws_masks: whether it has the graph that draws them.
        model_version: see `regionspot.serving.contract.OUTPUTS`.
    """

    def __init__(
        self,
        limits: Limits,
        vocabularies: Mapping[str, Vocabulary],
        encoder: VocabularyEncoder | None,
        draws_masks: bool = True,
        model_version: str = "",
    ) -> None:
        self.limits, self.vocabularies = limits, vocabularies
        self.draws_masks, self.model_version = draws_masks, model_version
        self.images = ImageCache(limits.image_cache_mb << 20)
        self._words = None if encoder is None else WordQueue(encoder)
        self._memory = None if encoder is None else encoder.store
        self._recent: OrderedDict[tuple[str, ...], Vocabulary] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, words: tuple[str, ...], counts: Counts, budget: Budget) -> Vocabulary:
        """Free words, each from memory where it was met before.

        Raises:
            RequestError: words that cannot be used, or too many new ones.
            ServingError: see `WordQueue.learn`.
        """
        if self._words is None:
            raise RequestError(
                "VOCABULARY_INVALID", f"this server encodes no words: name {self.registered()}"
            )
        with self._lock:
            if words in self._recent:
                self._recent.move_to_end(words)
                return self._recent[words]
        names = as_class_names(words)
        _check_differ(names)
        assert isinstance(self._memory, EmbeddingMemory)
        known = {name: self._memory.read(name) for name in names}
        new = [name for name, embedding in known.items() if embedding is None]
        if len(new) > self.limits.max_new_words:
            raise RequestError(
                "TOO_MANY_WORDS",
                f"{len(new)} of the words are new to the server, which learns at most "
                f"{self.limits.max_new_words} in a request: send them in parts first, or have "
                "them registered (regionspot-serve init --vocabulary)",
            )
        if new:
            counts.add("words_encoded", len(new))
            known |= self._words.learn(new, self.limits.max_words_seconds, budget)
        rows = [embedding for embedding in known.values() if embedding is not None]
        found = Vocabulary(names, np.stack(rows))
        with self._lock:
            self._recent[words] = found
            if len(self._recent) > RECENT_VOCABULARIES:
                self._recent.popitem(last=False)
        return found

    def registered(self) -> str:
        """For messages."""
        if not self.vocabularies:
            return "none: no vocabulary is registered, send the words themselves"
        return f"one of {', '.join(sorted(self.vocabularies))}"

    def close(self) -> None:
        if self._words is not None:
            self._words.close()


class Recognizer:
    """Answers questions. Safe for several threads at once: of what a question takes, reading the
    image and learning words go on beside the model, which `instances` limits.
    """

    def __init__(self, instances: Instances, decoder: ImageDecoder, shared: SharedState) -> None:
        self._instances, self._decoder = instances, decoder
        self._shared, self._limits = shared, shared.limits

    def answer(
        self,
        question: Question,
        counts: Counts,
        cancelled: Callable[[], bool] = never,
        encoded: Callable[[], None] = lambda: None,
    ) -> Answer:
        """The answer to a question.

        Args:
            counts: of this question alone.
            cancelled: asked between the stages: nobody waits for the answer any more.
            encoded: called when the image is encoded, or was before.

        Raises:
            ServingError: with the code that says why not.
        """
        budget = Budget(self._limits.max_request_seconds, cancelled)
        with _without_details(), coded():
            self._check(question)
            with counts.timed("vocabulary"):
                vocabulary = self._vocabulary(question, counts, budget)
            image, handle, cached = self._image(question, counts, budget)
            prompts = _prompts_on(question, image.height, image.width)
            with self._lent(budget, counts) as predictor:
                if isinstance(image, EncoderInputs):
                    with counts.timed("encoders"):
                        image = self._encoded(predictor, image)
                    self._shared.images.put(handle, image)
                encoded()
                with counts.timed("regions"):
                    found = predictor.predict(
                        image,
                        vocabulary=vocabulary,
                        prompts=prompts,
                        top_k=self._top_k(question),
                        return_masks=question.return_masks,
                    )
            counts.add("regions", len(found))
            told = RemoteImage(handle, image.height, image.width)
            stages = {name: counts.values.get(f"{name}_seconds", 0.0) for name in STAGES}
            return Answer(found, told, cached, self._shared.model_version, stages)

    @contextmanager
    def _lent(self, budget: Budget, counts: Counts) -> Iterator[RegionPredictor]:
        """A predictor that looks at the budget before each graph that it runs, and each chunk of
        masks that it draws.
        """

        @contextmanager
        def stage(_: str) -> Iterator[None]:
            budget.check()
            yield

        with ExitStack() as lent:
            with counts.timed("instance"):
                predictor = lent.enter_context(self._instances.lend(budget))
            pipeline = predictor.pipeline
            lent.callback(setattr, pipeline, "observer", pipeline.observer)
            pipeline.observer = stage
            yield predictor

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

    def _vocabulary(self, question: Question, counts: Counts, budget: Budget) -> Vocabulary:
        if not isinstance(question.vocabulary, str):
            with coded("VOCABULARY_INVALID"):
                return self._shared.encode(question.vocabulary, counts, budget)
        found = self._shared.vocabularies.get(question.vocabulary)
        if found is None:
            raise RequestError(
                "VOCABULARY_UNKNOWN",
                f"no vocabulary {question.vocabulary[:64]!r} is registered: name "
                f"{self._shared.registered()}",
            )
        return found

    def _image(
        self, question: Question, counts: Counts, budget: Budget
    ) -> tuple[EncodedPicture | EncoderInputs, str, bool]:
        """The encoded image or, if it is new, its pixels; its handle, and whether it was known."""
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
        _check_regions_early(question, check_picture(image, self._limits))
        with counts.timed("decode"):
            return self._decoder.decode(image, budget), handle, False

    def _encoded(self, predictor: RegionPredictor, image: EncoderInputs) -> EncodedPicture:
        """An image through both encoders; once more without the kept ones, if that fails for want
        of memory.
        """
        try:
            return predictor.encode(image)
        except ArtifactError:
            if not self._shared.images.clear():
                raise
        return predictor.encode(image)


def _check_regions_early(question: Question, size: tuple[int, int]) -> None:
    """Refuses regions that lie outside of an image however it is turned, before it is decoded.

    Args:
        size: (width, height) as stored: EXIF may turn it upright.
    """
    width, height = size
    try:
        _prompts_on(question, height, width)
    except RequestError as error:
        with suppress(RequestError):
            _prompts_on(question, width, height)
            return
        raise error


def _prompts_on(question: Question, height: int, width: int) -> list[Prompts]:
    """The regions of a question, checked for an image of this size. Raises RequestError."""
    with coded("REGION_INVALID"):
        return [part.validated(height, width) for part in question.prompts]


def _check_differ(words: Sequence[str]) -> None:
    """Raises InputError for words that are the same to CLIP's tokenizer, which takes no notice of
    capitals and of spaces around a word: their classes would share every score. Without the
    tokenizer itself, which takes long for words by the thousand.
    """
    first: dict[str, str] = {}
    for word in words:
        other = first.setdefault(" ".join(word.lower().split()), word)
        if other != word:
            raise InputError(
                f"{shown(other)} and {shown(word)} are the same to the text encoder, which reads "
                "lower case: send one of them"
            )


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
