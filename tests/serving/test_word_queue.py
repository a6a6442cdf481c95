"""New words are learnt beside the requests about images, each request's in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from regionspot.predictor import RegionPredictor
from regionspot.serving.backends.budget import Budget
from regionspot.serving.backends.word_queue import WordQueue
from regionspot.serving.contract import ServingError
from regionspot.structures import FloatArray
from regionspot.vocabulary import EmbeddingMemory, VocabularyEncoder


class Diary(EmbeddingMemory):
    """A memory that knows in which order words were learnt, each not sooner than `pause_s`."""

    def __init__(self, pause_s: float = 0.02) -> None:
        super().__init__(1000)
        self.learnt: list[str] = []
        self.pause_s = pause_s

    def write(self, word: str, embedding: FloatArray) -> None:
        time.sleep(self.pause_s)
        super().write(word, embedding)
        self.learnt.append(word)


@pytest.fixture
def diary() -> Diary:
    return Diary()


@pytest.fixture
def queue(predictor: RegionPredictor, diary: Diary) -> Iterator[WordQueue]:
    made = WordQueue(VocabularyEncoder(predictor.pipeline.text_encoder, store=diary))
    yield made
    made.close()


def many(count: int, name: str = "word") -> list[str]:
    return [f"{name} {index}" for index in range(count)]


def test_as_the_encoder_says(queue: WordQueue, encoder: VocabularyEncoder) -> None:
    words = ("green toy", "red toy")
    found = queue.learn(words, 60, Budget(60))
    assert list(found) == list(words)
    assert np.array_equal(np.stack(list(found.values())), encoder.encode(words).embeddings)


def test_one_new_word_does_not_wait_for_a_hundred(queue: WordQueue, diary: Diary) -> None:
    hundred = threading.Thread(target=lambda: queue.learn(many(100), 60, Budget(60)))
    hundred.start()
    while not diary.learnt:
        time.sleep(0.001)
    before = len(diary.learnt)
    queue.learn(["one more"], 60, Budget(60))
    assert diary.learnt.index("one more") <= before + 2
    assert hundred.is_alive()
    hundred.join()
    assert len(diary.learnt) == 101


def test_the_same_word_of_two_requests_is_learnt_once(queue: WordQueue, diary: Diary) -> None:
    threads = [
        threading.Thread(target=lambda: queue.learn(many(10), 60, Budget(60))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(diary.learnt) == sorted(many(10))


def test_what_was_learnt_in_time_is_kept(queue: WordQueue, diary: Diary) -> None:
    diary.pause_s = 0.1
    asked = 0
    while True:  # as clients do: they ask again while the server says that it is overloaded
        asked += 1
        try:
            found = queue.learn(many(12), 0.5, Budget(60))
        except ServingError as error:
            assert error.code == "OVERLOADED" and "of 12 new words were learnt" in str(error)
        else:
            break
    assert list(found) == many(12)
    assert len(diary.learnt) == 12 and 1 < asked < 12


def test_words_that_nobody_waits_for_are_dropped(queue: WordQueue, diary: Diary) -> None:
    with pytest.raises(ServingError, match="was cancelled"):
        queue.learn(many(1000), 60, Budget(60, lambda: len(diary.learnt) > 3))
    queue.learn(["the next"], 60, Budget(60))
    assert len(diary.learnt) < 100 and diary.learnt[-1] == "the next"


def test_an_encoder_that_fails(predictor: RegionPredictor) -> None:
    class Full(EmbeddingMemory):
        def write(self, word: str, embedding: FloatArray) -> None:
            if word == "two":
                raise MemoryError
            super().write(word, embedding)

    queue = WordQueue(VocabularyEncoder(predictor.pipeline.text_encoder, store=Full(9)))
    with pytest.raises(MemoryError):
        queue.learn(["one", "two", "three"], 60, Budget(60))
    assert list(queue.learn(["one", "three"], 60, Budget(60))) == ["one", "three"]
    queue.close()
