"""Questions and answers as a gateway's JSON and back: what the gateway itself reads and writes."""

from __future__ import annotations

import io
import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from regionspot.errors import InputError
from regionspot.serving.contract import DEFAULT_TOP_K, Limits, RequestError, ServingError
from regionspot.serving.gateway.form import Form, question_of
from regionspot.serving.gateway_messages import QuestionForm, answer_from_json
from regionspot.serving.messages import Answer, OtherWordsError, Question, RemoteImage
from regionspot.structures import Prompts, as_prompts
from tests.serving.test_messages import WORDS, answers, one_answer, prompts_equal, regions

WORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "PNG")
    return file.getvalue()


PNG = png()
QUESTIONS = st.builds(
    Question,
    image=st.just(PNG) | st.just(RemoteImage("00ff")),
    vocabulary=WORD | st.lists(WORD, min_size=1, max_size=4).map(tuple),
    prompts=regions(),
    top_k=st.none() | st.integers(1, Limits().max_top_k),
    return_masks=st.booleans(),
)


def is_finite(prompts: tuple[Prompts, ...]) -> bool:
    return all(np.isfinite(part.points).all() for part in prompts)


@given(QUESTIONS)
def test_a_gateway_reads_the_question_that_was_asked(question: Question) -> None:
    if not is_finite(question.prompts):
        with pytest.raises(RequestError) as refused:
            QuestionForm.of(question)
        assert refused.value.code == "REGION_INVALID"
        return
    form = QuestionForm.of(question)
    read = question_of(Form(form.request.decode(), form.image, "image"), Limits())
    assert (read.image, read.vocabulary) == (question.image, question.vocabulary)
    assert (read.top_k, read.return_masks) == (question.wanted_top_k, question.return_masks)
    assert prompts_equal(read.prompts, question.prompts)


def test_what_json_cannot_carry() -> None:
    for image, prompts, message in (
        (RemoteImage("\ud800"), as_prompts([[1, 2, 3, 4]]), "surrogate"),
        (PNG, as_prompts(masks=[np.ones((40, 60), bool)]), "as boxes or points"),
    ):
        with pytest.raises(InputError, match=message):
            QuestionForm.of(Question(image, WORDS, prompts))


def content_of(answer: Answer) -> Any:
    """What a gateway writes, and one that is older or newer may."""
    content = answer.predictions.to_json("image.png")
    content |= {"image_handle": answer.image.handle, "cached": answer.cached, "request_id": "r"}
    return json.loads(json.dumps(content))


def question_about(answer: Answer) -> Question:
    found = answer.predictions
    boxes = [[0, 0, 1, 1]] * len(found)
    top_k = found.top_class_ids.shape[1]
    return Question(PNG, WORDS, as_prompts(boxes), top_k, found.masks is not None)


@given(answers())
def test_an_answer_is_the_gateway_s_to_the_bit(answer: Answer) -> None:
    """Smallest floats and negative zeros included."""
    read = answer_from_json(content_of(answer), question_about(answer), WORDS)
    assert (read.image, read.cached) == (answer.image, answer.cached)
    for field in fields(read.predictions):
        one = getattr(read.predictions, field.name)
        other = getattr(answer.predictions, field.name)
        if isinstance(other, np.ndarray):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert one.tobytes() == other.tobytes()
        else:
            assert one == other


@pytest.mark.parametrize("value", [-0.0, 1e-45, 3.4028235e38, 0.1, 1 / 3, 16777217.0])
def test_every_float32_comes_back(value: float) -> None:
    number = np.float32(value)
    boxes = np.array([[-abs(number), -abs(number), abs(number), number or 1]], np.float32)
    answer = one_answer()
    answer = replace(answer, predictions=replace(answer.predictions, boxes=boxes))
    content = content_of(answer)
    content["regions"][0]["iou"] = 0.5
    read = answer_from_json(content, question_about(answer), WORDS)
    assert read.predictions.boxes.tobytes() == boxes.tobytes()


def test_without_a_region_as_many_classes_as_the_server_says() -> None:
    none: dict[str, Any] = {"regions": [], "image": {"width": 6, "height": 4}}
    none |= {"image_handle": "00ff", "cached": False}
    for top_k, wanted in ((2, 2), (9, len(WORDS)), (None, min(DEFAULT_TOP_K, len(WORDS)))):
        question = Question(PNG, WORDS, (Prompts.empty(),), top_k)
        read = answer_from_json(none, question, WORDS)
        assert read.predictions.top_scores.shape == (0, wanted)
        assert read.predictions.boxes.shape == (0, 4)


@pytest.mark.parametrize("names", [None, (), ("cat",), ("dog", "bird")])
def test_refuses_to_be_read_by_other_words(names: tuple[str, ...] | None) -> None:
    answer = one_answer()
    with pytest.raises(OtherWordsError):
        answer_from_json(content_of(answer), question_about(answer), names)


@pytest.mark.parametrize(
    "change",
    [
        {"regions": []},
        {"regions": [7]},
        {"regions": None},
        {"regions": [{"box": [0, 0, 1]}]},
        {"image": None},
        {"image": {"width": "wide", "height": 4}},
        {"image_handle": None},
        {"cached": ...},
    ],
)
def test_refuses_what_is_no_answer(change: dict[str, Any]) -> None:
    answer = one_answer()
    content = content_of(answer)
    content["regions"][0]["iou"] = 0.5
    assert answer_from_json(content, question_about(answer), WORDS)
    content |= change
    content = {name: value for name, value in content.items() if value is not ...}
    with pytest.raises(ServingError, match="answer cannot be used") as refused:
        answer_from_json(content, question_about(answer), WORDS)
    assert refused.value.code == "INTERNAL" and not isinstance(refused.value, InputError)
