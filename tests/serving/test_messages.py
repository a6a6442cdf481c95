"""Questions and answers as tensors and back; what does not match the contract is refused, in both
directions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from regionspot.errors import InputError
from regionspot.masks import encode_rle
from regionspot.runtime.runner import Array
from regionspot.serving.contract import (
    ANY_TOP_K,
    INPUTS,
    OUTPUTS,
    Limits,
    RequestError,
    ServingError,
)
from regionspot.serving.messages import Answer, OtherWordsError, Question, RemoteImage
from regionspot.structures import Prompts, RegionPredictions, as_prompts

WORDS = ("cat", "猫", "coffee cup")
HEIGHT, WIDTH = 4, 6
BOX = [[1.0, 2, 3, 4]]


def objects(*rows: list[bytes]) -> Array:
    """(B, n) of bytes."""
    array = np.empty((len(rows), len(rows[0])), np.object_)
    for row, values in enumerate(rows):
        array[row, :] = values
    return array


def prompts_equal(found: tuple[Prompts, ...], expected: tuple[Prompts, ...]) -> bool:
    """Without parts that hold no region, which need not cross the wire."""
    pairs = zip(
        [part for part in found if len(part)], [part for part in expected if len(part)], strict=True
    )
    return all(
        np.array_equal(one.points, other.points, equal_nan=True)
        and np.array_equal(one.labels, other.labels)
        for one, other in pairs
    )


COORDINATES = st.floats(width=32)  # NaN and infinite ones are the server's to refuse
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def regions(draw: st.DrawFn) -> tuple[Prompts, ...]:
    num_boxes, num_points, clicks = draw(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3))
    )
    boxes = draw(arrays.arrays(np.float32, (num_boxes, 4), elements=COORDINATES))
    points = draw(arrays.arrays(np.float32, (num_points, clicks, 2), elements=COORDINATES))
    labels = draw(arrays.arrays(np.int32, (num_points, clicks), elements=st.integers(0, 1)))
    kinds: list[dict[str, Any]] = [{"boxes": boxes}, {"points": points, "point_labels": labels}]
    kinds.append(kinds[0] | kinds[1])
    return as_prompts(**draw(st.sampled_from(kinds)))


QUESTIONS = st.builds(
    Question,
    image=st.binary(max_size=20) | st.builds(RemoteImage, TEXTS),
    vocabulary=TEXTS | st.lists(TEXTS, max_size=4).map(tuple),
    prompts=regions(),
    top_k=st.none() | st.integers(ANY_TOP_K + 1, 2**31 - 1),
    return_masks=st.booleans(),
)


class TestQuestion:
    @given(QUESTIONS)
    def test_crosses_the_wire(self, question: Question) -> None:
        (read,) = Question.from_tensors(question.to_tensors())
        assert replace(read, prompts=()).__dict__ == replace(question, prompts=()).__dict__
        assert (
            prompts_equal(read.prompts, question.prompts)
            and read.num_regions == question.num_regions
        )

    @given(QUESTIONS)
    def test_has_the_types_and_shapes_of_the_contract(self, question: Question) -> None:
        fields = {field.name: field for field in INPUTS}
        for name, array in question.to_tensors().items():
            field = fields[name]
            assert array.dtype == (object if field.dtype == "bytes" else field.dtype)
            assert array.shape[0] == 1 and array.ndim == len(field.dims) + 1

    def test_several_images_of_one_request(self) -> None:
        tensors = {
            "image": objects([b"x"], [b"y"]),
            "words": objects([b"cat", "猫".encode()], [b"dog", b"cup"]),
            "boxes": np.array([BOX, [[5, 6, 7, 8]]], np.float32),
        }
        first, second = Question.from_tensors(tensors)
        assert (first.image, second.image) == (b"x", b"y")
        assert (first.vocabulary, second.vocabulary) == (("cat", "猫"), ("dog", "cup"))
        assert second.prompts[0].boxes.tolist() == [[5, 6, 7, 8]]
        assert first.top_k is None and first.return_masks is False

    def test_every_input_is_there_whatever_is_asked(self) -> None:
        """Triton puts only requests together that have the same inputs."""
        asked = (
            Question(b"x", "pets", as_prompts(boxes=BOX)),
            Question(RemoteImage("00ff"), WORDS, as_prompts(points=[[1, 2]]), 3, True),
            Question(b"x", WORDS, ()),
        )
        assert all(
            set(question.to_tensors()) == {field.name for field in INPUTS} for question in asked
        )

    def test_the_tensors_of_earlier_clients_are_understood(self) -> None:
        """They send every kind of regions that the caller gave, also without any region."""
        tensors = {
            "image_handle": objects([b"00ff"]),
            "vocabulary": objects([b"pets"]),
            "boxes": np.zeros((1, 0, 4), np.float32),
            "points": np.zeros((1, 0, 1, 2), np.float32),
            "point_labels": np.zeros((1, 0, 1), np.int32),
            "top_k": np.array([[5]], np.int32),
            "return_masks": np.array([[True]]),
        }
        (question,) = Question.from_tensors(tensors)
        assert question.image == RemoteImage("00ff") and question.vocabulary == "pets"
        assert (question.num_regions, question.top_k, question.return_masks) == (0, 5, True)

    GOOD = Question(b"x", WORDS, as_prompts(boxes=BOX, points=[[1, 2]])).to_tensors()

    @pytest.mark.parametrize(
        ("change", "code", "message"),
        [
            (
                {"box": np.zeros((1, 1, 4))},
                "REQUEST_INVALID",
                "there is no tensor 'box': send image, image_handle",
            ),
            (
                {"image": None, "image_handle": None},
                "REQUEST_INVALID",
                "send either image or image_handle",
            ),
            (
                {"image_handle": objects([b"0"])},
                "REQUEST_INVALID",
                "send either image or image_handle",
            ),
            (
                {"words": None, "vocabulary": None},
                "REQUEST_INVALID",
                "send either words, or vocabulary",
            ),
            (
                {"vocabulary": objects([b"pets"])},
                "REQUEST_INVALID",
                "send either words, or vocabulary",
            ),
            (
                {"boxes": None, "points": None, "point_labels": None},
                "REQUEST_INVALID",
                "no region was asked for",
            ),
            ({"points": None}, "REQUEST_INVALID", "point_labels were given without points"),
            (
                {"boxes": np.zeros((1, 1, 4))},
                "REQUEST_INVALID",
                "boxes must be of type float32, not float64",
            ),
            (
                {"boxes": np.zeros((1, 4), np.float32)},
                "REQUEST_INVALID",
                r"boxes must have shape \(B, \?, 4\), got",
            ),
            ({"boxes": np.zeros((1, 1, 5), np.float32)}, "REQUEST_INVALID", r"got \(1, 1, 5\)"),
            (
                {"boxes": np.zeros((2, 1, 4), np.float32)},
                "REQUEST_INVALID",
                "the same number of images",
            ),
            (
                {"points": np.zeros((1, 1, 0, 2), np.float32)},
                "REQUEST_INVALID",
                "points must have shape",
            ),
            (
                {"point_labels": np.full((1, 1, 1), 2, np.int32)},
                "REQUEST_INVALID",
                "point labels must be 1",
            ),
            (
                {"point_labels": np.ones((1, 1, 2), np.int32)},
                "REQUEST_INVALID",
                "one for each click",
            ),
            (
                {"words": np.array([["cat"]], np.object_)},
                "REQUEST_INVALID",
                "words must hold bytes",
            ),
            (
                {"words": objects([b"\xff", b"cat"])},
                "VOCABULARY_INVALID",
                "words must be UTF-8 text",
            ),
            (
                {"words": None, "vocabulary": objects([b"\xff"])},
                "REQUEST_INVALID",
                "vocabulary must be UTF-8 text",
            ),
            (
                {"image": None, "image_handle": objects([b"\xff"])},
                "REQUEST_INVALID",
                "image_handle must be UTF-8",
            ),
            (
                {"top_k": np.array([[5]], np.int64)},
                "REQUEST_INVALID",
                "top_k must be of type int32",
            ),
            (
                {"return_masks": np.array([[1]], np.int32)},
                "REQUEST_INVALID",
                "return_masks must be of type bool",
            ),
        ],
    )
    def test_refuses_tensors(
        self, change: dict[str, Array | None], code: str, message: str
    ) -> None:
        tensors = {name: array for name, array in (self.GOOD | change).items() if array is not None}
        with pytest.raises(RequestError, match=message) as refused:
            Question.from_tensors(tensors)
        assert refused.value.code == code

    @pytest.mark.parametrize("tensors", [{}, {"image": np.zeros((0, 1), np.object_)}])
    def test_refuses_an_empty_request(self, tensors: dict[str, Array]) -> None:
        with pytest.raises(RequestError, match="the request is empty"):
            Question.from_tensors(tensors)

    @pytest.mark.parametrize(
        "change",
        [
            {"top_k": np.array([[1], [2]], np.int32)},
            {"return_masks": np.array([[True], [False]])},
            {"words": None, "vocabulary": objects([b"pets"], [b"mini"])},
        ],
    )
    def test_refuses_images_whose_answers_have_other_shapes(
        self, change: dict[str, Array | None]
    ) -> None:
        both = {name: np.concatenate([array, array]) for name, array in self.GOOD.items()}
        assert len(Question.from_tensors(both)) == 2
        tensors = {name: array for name, array in (both | change).items() if array is not None}
        with pytest.raises(RequestError, match="need the same top_k, return_masks and vocabulary"):
            Question.from_tensors(tensors)

    @pytest.mark.parametrize(
        "prompts",
        [
            (Prompts.from_masks(np.ones((1, 4, 4), bool)),),
            (Prompts.from_points([[1, 2]]), Prompts.from_boxes(BOX)),
            (Prompts.from_boxes(BOX), Prompts.from_boxes(BOX)),
            (Prompts(np.zeros((1, 3, 2), np.float32), np.array([[2, 3, 1]], np.int32)),),
            (Prompts(np.zeros((1, 2, 2), np.float32), np.array([[3, 2]], np.int32)),),
            (Prompts(np.zeros((1, 2, 2), np.float32), np.array([[-1, 1]], np.int32)),),
        ],
        ids=["masks", "points first", "two of a kind", "box and click", "corners", "padding first"],
    )
    def test_refuses_regions_that_the_wire_has_no_place_for(
        self, prompts: tuple[Prompts, ...]
    ) -> None:
        with pytest.raises(InputError, match="a server takes"):
            Question(b"x", "pets", prompts).to_tensors()

    def test_refuses_text_that_utf8_cannot_hold(self) -> None:
        unusable: list[tuple[Any, str]] = [
            ("\udc00", "VOCABULARY_UNKNOWN"),
            (("cat", "\udc00"), "VOCABULARY_INVALID"),
        ]
        for vocabulary, code in unusable:
            with pytest.raises(RequestError, match="is no Unicode text") as refused:
                Question(b"x", vocabulary, as_prompts([]))
            assert refused.value.code == code
        with pytest.raises(RequestError, match="the image's handle"):
            Question(RemoteImage("\udc00"), "pets", as_prompts([])).to_tensors()

    @pytest.mark.parametrize(
        ("change", "code", "message"),
        [
            (
                {"prompts": as_prompts(BOX * 3, [[1, 2]])},
                "TOO_MANY_REGIONS",
                "4 regions are more than 3",
            ),
            ({"top_k": 0}, "REQUEST_INVALID", "top_k must be from 1 to 7, not 0"),
            ({"top_k": 8}, "REQUEST_INVALID", "top_k must be from 1 to 7, not 8"),
            ({"image": bytes(11)}, "IMAGE_TOO_LARGE", "11 bytes, at most 10"),
            ({"vocabulary": ("a",) * 6}, "TOO_MANY_WORDS", "6 words are more than 5"),
            (
                {"vocabulary": ("a", "b" * 5)},
                "VOCABULARY_INVALID",
                "word 1 is longer than 4 characters",
            ),
            ({"vocabulary": ()}, "VOCABULARY_INVALID", "the vocabulary is empty"),
            (
                {"prompts": as_prompts([[1, 2, np.inf, 4]])},
                "REGION_INVALID",
                "coordinate that is NaN or infinite",
            ),
        ],
    )
    def test_limits(self, change: dict[str, Any], code: str, message: str) -> None:
        limits = Limits(
            max_regions=3, max_top_k=7, max_image_bytes=10, max_words=5, max_word_length=4
        )
        most = Question(bytes(10), ("four",) * 5, as_prompts(BOX * 2, [[1, 2]]), top_k=7)
        most.check(limits)
        replace(most, top_k=None, vocabulary="a long name").check(limits)
        with pytest.raises(RequestError, match=message) as refused:
            replace(most, **change).check(limits)
        assert refused.value.code == code


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    count, best = draw(st.integers(0, 3)), draw(st.integers(1, len(WORDS)))
    ids = draw(arrays.arrays(np.int32, (count, best), elements=st.integers(0, len(WORDS) - 1)))
    scores = draw(arrays.arrays(np.float32, (count, best), elements=st.floats(0, 1, width=32)))
    boxes = np.sort(
        draw(arrays.arrays(np.float32, (count, 2, 2), elements=st.floats(0, 9, width=32))), axis=1
    )
    drawn = draw(arrays.arrays(np.bool_, (count, HEIGHT, WIDTH)))
    predictions = RegionPredictions(
        HEIGHT,
        WIDTH,
        boxes.reshape(-1, 4),
        WORDS,
        scores[:, 0],
        ids[:, 0],
        ids,
        scores,
        tuple(encode_rle(mask) for mask in drawn) if draw(st.booleans()) else None,
        scores[:, -1],
    )
    return Answer(predictions, RemoteImage("00ff", HEIGHT, WIDTH), draw(st.booleans()))


def one_answer() -> Answer:
    ids = np.array([[1, 0]])
    scores = np.array([[0.75, 0.25]], np.float32)
    predictions = RegionPredictions(
        HEIGHT, WIDTH, np.array(BOX), WORDS, scores[:, 0], ids[:, 0], ids, scores
    )
    return Answer(predictions, RemoteImage("00ff", HEIGHT, WIDTH), True)


class TestAnswer:
    @given(answers())
    def test_crosses_the_wire(self, answer: Answer) -> None:
        sent = answer.predictions
        read = Answer.from_tensors(answer.to_tensors(), WORDS, return_masks=sent.masks is not None)
        assert (read.image, read.cached) == (answer.image, answer.cached)
        assert read.predictions.to_json("a.png") == sent.to_json("a.png")
        assert read.predictions.masks == sent.masks and read.predictions.class_names == WORDS

    @given(answers())
    def test_has_the_types_and_shapes_of_the_contract(self, answer: Answer) -> None:
        tensors = answer.to_tensors()
        assert list(tensors) == [field.name for field in OUTPUTS]
        for field in OUTPUTS:
            array = tensors[field.name]
            assert array.dtype == (object if field.dtype == "bytes" else field.dtype)
            assert array.shape[0] == 1 and array.ndim == len(field.dims) + 1

    def test_outputs_of_a_later_release_are_passed_over(self) -> None:
        tensors = one_answer().to_tensors() | {"depth": np.zeros((1, 1))}
        assert Answer.from_tensors(tensors, WORDS, return_masks=False).cached

    @pytest.mark.parametrize("names", [None, (), ("cat",), ("dog", "猫"), ("猫", "cat")])
    def test_refuses_to_be_read_by_other_words(self, names: tuple[str, ...] | None) -> None:
        with pytest.raises(OtherWordsError, match="name different classes") as refused:
            Answer.from_tensors(one_answer().to_tensors(), names, return_masks=False)
        assert refused.value.code == "INTERNAL"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scores": None, "cached": None}, "tensors are missing: scores, cached"),
            ({"scores": np.zeros((1, 1))}, "scores must be of type float32, not float64"),
            ({"boxes": np.zeros((1, 1, 5), np.float32)}, r"boxes must have shape \(B, \?, 4\)"),
            ({"scores": np.zeros((1, 2), np.float32)}, "need every field as long"),
            ({"scores": np.full((1, 1), np.nan, np.float32)}, "NaN or infinite"),
            ({"image_size": np.zeros((1, 2), np.int32)}, "image_height"),
            ({"image_handle": objects([b"\xff"])}, "ascii"),
            ({"top_class_names": np.array([[[b"\xff", b"cat"]]], np.object_)}, "utf-8"),
            ({"top_class_names": objects([b"cat"])[None]}, "a name for each of top_class_ids"),
        ],
    )
    def test_refuses_tensors(self, change: dict[str, Array | None], message: str) -> None:
        tensors = {
            name: array
            for name, array in (one_answer().to_tensors() | change).items()
            if array is not None
        }
        with pytest.raises(
            ServingError, match=rf"the server's answer cannot be used: .*{message}"
        ) as refused:
            Answer.from_tensors(tensors, WORDS, return_masks=False)
        assert refused.value.code == "INTERNAL" and not isinstance(refused.value, InputError)

    def test_refuses_an_answer_about_two_images(self) -> None:
        tensors = {
            name: np.concatenate([array, array])
            for name, array in one_answer().to_tensors().items()
        }
        with pytest.raises(ServingError, match="it is not about one image"):
            Answer.from_tensors(tensors, WORDS, return_masks=False)
