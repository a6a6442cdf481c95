"""The public model's work without Triton: the predictor's answers, a code for each error, caches
with bounds.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regionspot.errors import ArtifactError, InputError
from regionspot.predictor import EncodedPicture, RegionPredictor
from regionspot.runtime.runner import Array
from regionspot.serving.backends.budget import Budget
from regionspot.serving.backends.image_cache import ImageCache
from regionspot.serving.backends.image_decoder import DecoderSettings, ImageDecoder
from regionspot.serving.backends.instances import Instances
from regionspot.serving.backends.recognizer import Counts, Recognizer, SharedState
from regionspot.serving.client import make_question
from regionspot.serving.contract import INPUTS, OUTPUTS, Limits, ServingError
from regionspot.serving.messages import Question, handle_of
from regionspot.structures import as_prompts
from regionspot.transforms import EncoderInputs
from regionspot.vocabulary import EmbeddingMemory, VocabularyEncoder

WORDS = ("plain green toy", "red toy with blue stripes", "white toy with a pink border")


def state_of(predictor: RegionPredictor, encoder: VocabularyEncoder, limits: Limits) -> SharedState:
    memory = EmbeddingMemory(limits.max_cached_words)
    free = VocabularyEncoder(predictor.pipeline.text_encoder, store=memory)
    return SharedState(limits, {"toys": encoder.encode(WORDS)}, free)


@pytest.fixture(scope="module")
def shared(predictor: RegionPredictor, encoder: VocabularyEncoder) -> SharedState:
    limits = Limits(
        max_regions=50,
        max_words=40,
        max_new_words=5,
        max_image_bytes=200_000,
        max_image_pixels=90_000,
    )
    return state_of(predictor, encoder, limits)


@pytest.fixture(scope="module")
def decoder(predictor: RegionPredictor) -> Iterator[ImageDecoder]:
    info = predictor.pipeline.info
    settings = DecoderSettings(info.sam_image_size, info.clip_image_size, 90_000, 10.0)
    with ImageDecoder(settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def recognizer(
    predictor: RegionPredictor, decoder: ImageDecoder, shared: SharedState
) -> Recognizer:
    return Recognizer(Instances([predictor]), decoder, shared)


FIELDS = {field.name: field for field in INPUTS}


def to_tensor(name: str, value: Any) -> Array:
    """An input of a request of one image, as any client of Triton would send it."""
    field = FIELDS[name]
    values = [value] if field.dims == (1,) else value
    if field.dtype != "bytes":
        return np.asarray(values, field.dtype)[None]
    tensor = np.empty((1, len(values)), np.object_)
    tensor[0, :] = [item.encode() if isinstance(item, str) else item for item in values]
    return tensor


def ask(recognizer: Recognizer, counts: Counts | None = None, **inputs: Any) -> dict[str, Array]:
    """The outputs for one image, without its axis in front; by tensors both ways."""
    (question,) = Question.from_tensors(
        {name: to_tensor(name, value) for name, value in inputs.items()}
    )
    answer = recognizer.answer(question, counts or Counts())
    return {name: array[0] for name, array in answer.to_tensors().items()}


def png(width: int, height: int, value: int = 120) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (width, height), (value, 30, 60)).save(encoded, "PNG")
    return encoded.getvalue()


IMAGE, BOX = png(60, 40), [[1.0, 1.0, 30.0, 30.0]]


def test_answers_are_the_predictors(
    recognizer: Recognizer,
    predictor: RegionPredictor,
    encoder: VocabularyEncoder,
    picture: Path,
    boxes: list[list[float]],
) -> None:
    expected = predictor.set_image(picture).predict(
        boxes=boxes, points=[[60, 70]], vocabulary=encoder.encode(WORDS)
    )
    points = [[[60.0, 70.0]]]
    image = picture.read_bytes()
    for given in ({"vocabulary": "toys"}, {"words": WORDS}):
        found = ask(recognizer, image=image, boxes=boxes, points=points, return_masks=True, **given)
        assert set(found) == {field.name for field in OUTPUTS}
        assert np.array_equal(found["class_ids"], expected.class_ids)
        assert [name.decode() for name in found["class_names"]] == [
            WORDS[index] for index in expected.class_ids
        ]
        assert np.array_equal(found["top_class_ids"], expected.top_class_ids)
        assert found["top_class_names"].shape == found["top_scores"].shape == (len(expected), 3)
        np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-5)
        assert np.array_equal(found["boxes"], expected.boxes) and expected.masks is not None
        assert [counts.decode() for counts in found["masks"]] == [
            mask["counts"] for mask in expected.masks
        ]
        assert found["image_size"].tolist() == [expected.image_height, expected.image_width]
        assert found["image_handle"][0].decode() == handle_of(image)


def test_regions_are_refused_before_an_image_is_decoded(recognizer: Recognizer) -> None:
    counts = Counts()
    with pytest.raises(ServingError, match="60 x 40 pixels"):
        ask(recognizer, counts, image=png(60, 40), boxes=[[61, 61, 90, 90]], vocabulary="toys")
    assert "decode_seconds" not in counts.values
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40), (9, 90, 9)).save(turned, "JPEG", exif=exif)
    found = ask(recognizer, image=turned.getvalue(), boxes=[[1, 45, 30, 59]], vocabulary="toys")
    assert found["image_size"].tolist() == [60, 40]
    with pytest.raises(ServingError, match="40 x 60 pixels"):
        ask(recognizer, image=turned.getvalue(), boxes=[[45, 1, 59, 30]], vocabulary="toys")


def test_a_known_picture_skips_the_encoders(recognizer: Recognizer) -> None:
    first, second = Counts(), Counts()
    image = png(100, 80, 7)
    told = ask(recognizer, first, image=image, boxes=[[1, 1, 50, 50]], vocabulary="toys")
    again = ask(
        recognizer,
        second,
        image_handle=told["image_handle"][0].decode(),
        boxes=[[1, 1, 50, 50]],
        vocabulary="toys",
    )
    assert (told["cached"][0], again["cached"][0]) == (False, True)
    assert first.values["image_cache_misses"] == second.values["image_cache_hits"] == 1
    assert "encoders_seconds" in first.values and "encoders_seconds" not in second.values
    for name in ("scores", "class_ids", "boxes", "image_size"):
        assert np.array_equal(told[name], again[name]), name


@pytest.mark.parametrize("kind", ["boxes", "points"])
def test_no_region_at_all(recognizer: Recognizer, kind: str) -> None:
    nothing: dict[str, Any] = {kind: np.zeros((0, 4) if kind == "boxes" else (0, 1, 2), np.float32)}
    found = ask(recognizer, image=png(40, 40), vocabulary="toys", return_masks=True, **nothing)
    shapes = {name: array.shape for name, array in found.items()}
    assert shapes["scores"] == shapes["masks"] == (0,) and shapes["boxes"] == (0, 4)
    assert shapes["top_scores"] == shapes["top_class_names"] == (0, 3)


REFUSED = {
    "both pictures": (
        {"image": IMAGE, "image_handle": "0", "boxes": BOX, "vocabulary": "toys"},
        "REQUEST_INVALID",
        "either image",
    ),
    "no picture": (
        {"boxes": BOX, "vocabulary": "toys"},
        "REQUEST_INVALID",
        "either image or image_handle",
    ),
    "no words": ({"image": IMAGE, "boxes": BOX}, "REQUEST_INVALID", "either words, or vocabulary"),
    "no regions": (
        {"image": IMAGE, "vocabulary": "toys"},
        "REQUEST_INVALID",
        "no region was asked for",
    ),
    "labels alone": (
        {
            "image": IMAGE,
            "boxes": BOX,
            "point_labels": np.ones((1, 1), np.int32),
            "vocabulary": "toys",
        },
        "REQUEST_INVALID",
        "without points",
    ),
    "top_k": (
        {"image": IMAGE, "boxes": BOX, "vocabulary": "toys", "top_k": 0},
        "REQUEST_INVALID",
        "top_k must be from 1",
    ),
    "not a picture": (
        {"image": b"GIF89a", "boxes": BOX, "vocabulary": "toys"},
        "IMAGE_INVALID",
        "no JPEG, PNG or WebP",
    ),
    "truncated": (
        {"image": IMAGE[:60], "boxes": BOX, "vocabulary": "toys"},
        "IMAGE_INVALID",
        "the image",
    ),
    "pixels": (
        {"image": png(400, 300), "boxes": BOX, "vocabulary": "toys"},
        "IMAGE_TOO_LARGE",
        "400 x 300 pixels",
    ),
    "bytes": (
        {"image": bytes(200_001), "boxes": BOX, "vocabulary": "toys"},
        "IMAGE_TOO_LARGE",
        "200001 bytes, at most",
    ),
    "handle": (
        {"image_handle": "00ff", "boxes": BOX, "vocabulary": "toys"},
        "IMAGE_UNKNOWN",
        "send the picture",
    ),
    "nan": (
        {"image": IMAGE, "boxes": [[0, np.nan, 9, 9]], "vocabulary": "toys"},
        "REGION_INVALID",
        "box 0 .* NaN",
    ),
    "inverted": (
        {"image": IMAGE, "boxes": [[9, 9, 1, 1]], "vocabulary": "toys"},
        "REGION_INVALID",
        "inverted",
    ),
    "outside": (
        {"image": IMAGE, "boxes": [[70, 1, 80, 9]], "vocabulary": "toys"},
        "REGION_INVALID",
        "60 x 40 pixels",
    ),
    "click": (
        {"image": IMAGE, "points": [[[70, 1]]], "vocabulary": "toys"},
        "REGION_INVALID",
        "point 0",
    ),
    "many": (
        {"image": IMAGE, "boxes": BOX * 51, "vocabulary": "toys"},
        "TOO_MANY_REGIONS",
        "51 regions are more than 50",
    ),
    "name": (
        {"image": IMAGE, "boxes": BOX, "vocabulary": "birds"},
        "VOCABULARY_UNKNOWN",
        "name one of toys",
    ),
    "none": ({"image": IMAGE, "boxes": BOX, "words": ()}, "VOCABULARY_INVALID", "is empty"),
    "blank": (
        {"image": IMAGE, "boxes": BOX, "words": ("cat", " ")},
        "VOCABULARY_INVALID",
        "is blank",
    ),
    "twice": (
        {"image": IMAGE, "boxes": BOX, "words": ("cat", "cat")},
        "VOCABULARY_INVALID",
        "more than once",
    ),
    "long": (
        {"image": IMAGE, "boxes": BOX, "words": ("c" * 257, "cat")},
        "VOCABULARY_INVALID",
        "longer than 256",
    ),
    "words": (
        {"image": IMAGE, "boxes": BOX, "words": tuple(map(str, range(41)))},
        "TOO_MANY_WORDS",
        "41 words are more",
    ),
    "new": (
        {"image": IMAGE, "boxes": BOX, "words": tuple(map(str, range(6)))},
        "TOO_MANY_WORDS",
        "6 of the words are new",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_code(case: str, recognizer: Recognizer) -> None:
    inputs, code, message = REFUSED[case]
    with pytest.raises(ServingError, match=message) as caught:
        ask(recognizer, **inputs)  # type: ignore[arg-type]
    assert caught.value.code == code and "/" not in str(caught.value)


def test_a_model_that_fails_says_nothing_of_itself(
    recognizer: Recognizer, predictor: RegionPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> None:
        raise MemoryError("cannot allocate /srv/model")

    monkeypatch.setattr(predictor.pipeline, "classify_readings", nothing)
    with pytest.raises(ServingError) as caught:
        ask(recognizer, image=IMAGE, boxes=BOX, vocabulary="toys")
    assert (caught.value.code, str(caught.value)) == (
        "INTERNAL",
        "the model failed; the server's log says why",
    )


def test_a_question_that_nobody_waits_for_is_dropped(recognizer: Recognizer) -> None:
    counts = Counts()
    question = Question(png(50, 51), "toys", as_prompts(BOX))
    with pytest.raises(ServingError, match="was cancelled"):
        recognizer.answer(question, counts, lambda: "encoders_seconds" in counts.values)
    assert "encoders_seconds" in counts.values and "regions" not in counts.values


def test_words_are_learnt_once(predictor: RegionPredictor, encoder: VocabularyEncoder) -> None:
    shared = state_of(predictor, encoder, Limits(max_new_words=2, max_cached_words=3))
    counts, budget = Counts(), Budget(60)

    def learnt(*words: str) -> float:
        shared.encode(words, counts, budget)
        return counts.values["words_encoded"]

    assert learnt("one", "two") == 2
    assert learnt("two", "one", "three") == 3
    assert learnt("three", "four") == 4  # pushes out "two", which was asked for before "one"
    assert learnt("one") == 4
    assert learnt("two") == 5


def test_a_server_without_a_text_encoder(
    predictor: RegionPredictor, decoder: ImageDecoder, encoder: VocabularyEncoder
) -> None:
    instances = Instances([predictor])
    state = SharedState(Limits(), {"toys": encoder.encode(WORDS)}, None)
    bare = Recognizer(instances, decoder, state)
    with pytest.raises(ServingError, match="encodes no words: name one of toys"):
        ask(bare, image=IMAGE, boxes=BOX, words=("cat", "dog"))
    blank = SharedState(
        Limits(max_top_k=2), {"toys": encoder.encode(WORDS)}, None, draws_masks=False
    )
    maskless = Recognizer(instances, decoder, blank)
    with pytest.raises(ServingError, match="draws no masks") as caught:
        ask(maskless, image=IMAGE, boxes=BOX, vocabulary="toys", return_masks=True)
    assert caught.value.code == "REQUEST_INVALID"
    found = ask(maskless, image=IMAGE, boxes=BOX, vocabulary="toys")
    assert found["top_scores"].shape == (1, 2)  # the default is no more than the server's most
    assert len(ask(bare, image=IMAGE, boxes=BOX, vocabulary="toys")["scores"]) == 1


def test_the_image_cache_is_bounded(predictor: RegionPredictor) -> None:
    pictures = [predictor.encode(png(30, 20 + index)) for index in range(3)]
    size = pictures[0].nbytes
    assert size > 500_000
    cache = ImageCache(2 * size)
    for name, encoded in zip("abc", pictures, strict=True):
        cache.put(name, encoded)
        cache.put(name, encoded)  # twice is once
        if name == "b":
            assert cache.get("a") is pictures[0]  # so that b is the oldest
    assert (len(cache), cache.size_bytes, cache.evictions) == (2, 2 * size, 1)
    assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None
    small = ImageCache(size - 1)
    small.put("a", pictures[0])
    assert len(small) == 0 and small.size_bytes == 0


class ShortOfMemory:
    """A predictor that fails to encode while the cache holds more than it may."""

    def __init__(self, predictor: RegionPredictor, cache: ImageCache, most: int) -> None:
        self.predictor, self.cache, self.most = predictor, cache, most

    def encode(self, image: EncoderInputs) -> EncodedPicture:
        if len(self.cache) > self.most:
            raise ArtifactError("CUDA out of memory")
        return self.predictor.encode(image)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.predictor, name)


def test_kept_pictures_make_room_where_memory_is_short(
    predictor: RegionPredictor, decoder: ImageDecoder, encoder: VocabularyEncoder
) -> None:
    shared = state_of(predictor, encoder, Limits())

    def ask_about(most: int, color: int) -> None:
        short: Any = ShortOfMemory(predictor, shared.images, most)
        ask(
            Recognizer(Instances([short]), decoder, shared),
            image=png(40, 30, color),
            boxes=[[1, 1, 20, 20]],
            vocabulary="toys",
        )

    for color in range(3):
        ask_about(most=9, color=color)
    assert len(shared.images) == 3
    ask_about(most=2, color=9)
    assert len(shared.images) == 1 and shared.images.evictions == 3
    with pytest.raises(ServingError):  # memory is short without any
        ask_about(most=-1, color=10)


def test_base64_text(recognizer: Recognizer) -> None:
    with pytest.raises(ServingError, match="it is base64 text: decode it") as refused:
        ask(recognizer, image=base64.b64encode(IMAGE), vocabulary="toys", boxes=BOX)
    assert refused.value.code == "IMAGE_INVALID"


def test_the_client_refuses_what_cannot_be_sent() -> None:
    unusable: list[Any] = [("cat", "\ud800"), ("cat", 7)]
    for words in unusable:
        with pytest.raises(InputError, match="word 1 "):
            make_question(IMAGE, BOX, words)
    with pytest.raises(InputError, match="the vocabulary's name"):
        make_question(IMAGE, BOX, "\ud800")
    with pytest.raises(InputError, match="it is base64 text"):
        make_question(base64.b64encode(IMAGE), BOX, "toys")
    for regions, message in (
        ({}, "no region was asked for"),
        ({"boxes": [1, 2, 3, 4]}, "wrap a single box in a list"),
        ({"points": [[1, 1]], "point_labels": [2]}, "point labels must be 1"),
    ):
        given: dict[str, Any] = regions
        with pytest.raises(InputError, match=message):
            make_question(IMAGE, vocabulary="toys", **given)
