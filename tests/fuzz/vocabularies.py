"""Lists of words, files of them and single names through `parse_vocabulary` and `VocabularyEncoder`."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.errors import RegionSpotError
from regionspot.modeling.presets import MINI, create_model
from regionspot.structures import Vocabulary
from regionspot.vocabulary import EmbeddingMemory, VocabularyEncoder, parse_vocabulary
from tests.fuzz.documents import annotation_file
from tests.fuzz.reference import check_text, exact_number
from tests.fuzz.target import attempt, check, fail, write
from tests.fuzz.trees import TEXTS, Note, encode, mutate_bytes, mutate_values, respell, strange_value

WORDS = (
    "cat",
    "dog",
    "Cat",
    "wall-other",
    "wall-stuff",
    "coffee cup",
    "café",
    "cafe\u0301",
    "鳥",
    "🐈",
    "a, b",
    "-other",
)
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-32-le")
TEMPLATES = ("a photo of a {}.", "{}.")
"""Two in place of all 81, which would cost a second for each word."""


class Vocabularies:
    """The target."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._text_encoder = create_model(MINI).clip
        self._encoder = self._new_encoder()

    def run(self, rng: random.Random, note: Note) -> bool:
        return rng.choice((self._lines, self._json, self._commas, self._names, self._names))(rng, note)

    def _lines(self, rng: random.Random, note: Note) -> bool:
        """A .txt file is its lines."""
        words = _words(rng)
        content = rng.choice(("\n", "\r\n", "\r", "\n\n")).join(words).encode(rng.choice(ENCODINGS), "replace")
        if damaged := rng.random() < 0.4:
            content = mutate_bytes(content, rng)
        note(f"a .txt file {content[:300]!r}")
        path = write(self._directory, "words.txt", content)
        names = attempt(lambda: parse_vocabulary(str(path)))
        if isinstance(names, RegionSpotError):
            return False
        text = content.decode("utf-8-sig")
        check(names == tuple(line.strip() for line in text.splitlines() if line.strip()), f"read as {names!r:.200}")
        check(damaged or "\0" not in text, "a file in another encoding was taken for UTF-8")
        return self._encode(names, rng, note)

    def _json(self, rng: random.Random, note: Note) -> bool:
        """A .json file is its categories, in the order of their ids."""
        tree = annotation_file(rng)
        how = rng.choice(("whole", "respelt", "values", "values", "values", "text"))
        note(how)
        if how == "respelt":
            tree["categories"] = respell(tree["categories"], rng)
        elif how == "values":
            tree["categories"] = mutate_values(tree["categories"], rng, note, rng.choice((1, 2)))
        path = write(self._directory, "words.json", content := encode(tree, rng, note, how == "text"))
        names = attempt(lambda: parse_vocabulary(str(path)))
        if isinstance(names, RegionSpotError):
            return False
        categories = json.loads(content)["categories"]
        by_id = {exact_number(entry["id"]): entry["name"] for entry in categories}
        check(len(by_id) == len(categories) == len(names), f"{len(names)} names of {len(categories)} categories")
        for name, id_ in zip(names, sorted(by_id), strict=True):
            check_text(name, by_id[id_], f"the name of category {id_}")
        return self._encode(names, rng, note)

    def _commas(self, rng: random.Random, note: Note) -> bool:
        words = _words(rng)
        spec: Any = rng.choice((",", " , ", ",,", ", ")).join(words)
        if rng.random() < 0.2:
            spec = strange_value(rng)
        note(f"the text {spec!r:.300}")
        names = attempt(lambda: parse_vocabulary(spec))
        if isinstance(names, RegionSpotError):
            return False
        check(isinstance(spec, str), f"{spec!r:.100} was taken for a text")
        if spec.strip() not in ("mini", "coco", "imagenet"):
            check(names == tuple(part.strip() for part in spec.strip().split(",")), f"read as {names!r:.200}")
        return self._encode(names, rng, note)

    def _names(self, rng: random.Random, note: Note) -> bool:
        names: Any = _words(rng)
        if rng.random() < 0.5:
            names = mutate_values(names, rng, note)
        if rng.random() < 0.2:
            names = rng.choice(
                (
                    tuple,
                    np.array,
                    iter,
                    set,
                    lambda n: dict(enumerate(n)),
                    lambda n: [w.encode() for w in n],
                )
            )(_words(rng))
        return self._encode(names, rng, note)

    def _encode(self, names: Any, rng: random.Random, note: Note) -> bool:
        note(f"the names {names!r:.300}")
        given = list(copy.copy(names)) if hasattr(names, "__iter__") else []
        vocabulary = attempt(lambda: self._encoder.encode(names))
        if isinstance(vocabulary, RegionSpotError):
            return False
        if isinstance(names, (str, bytes, dict)):
            fail(f"a {type(names).__name__} was taken for a list of names")
        _check_vocabulary(vocabulary, given)
        if rng.random() < 0.1:
            again = self._new_encoder().encode(vocabulary.names[::-1])
            check(np.array_equal(again.embeddings[::-1], vocabulary.embeddings), "an embedding depends on the others")
        return True

    def _new_encoder(self) -> VocabularyEncoder:
        return VocabularyEncoder(self._text_encoder, templates=TEMPLATES, store=EmbeddingMemory(1000))


def _check_vocabulary(vocabulary: Vocabulary, given: list[Any]) -> None:
    check(all(isinstance(name, str) for name in given), f"{given!r:.200} were taken for names")
    check(list(vocabulary.names) == given, f"the names {given!r:.200} became {vocabulary.names!r:.200}")
    check(vocabulary.embeddings.shape[0] == len(given), f"{vocabulary.embeddings.shape} for {len(given)} names")
    lengths = np.linalg.norm(vocabulary.embeddings.astype(np.float64), axis=1)
    check(bool((np.abs(lengths - 1) < 1e-3).all()), f"embeddings of the lengths {lengths}")
    json.dumps(vocabulary.names).encode()


def _words(rng: random.Random) -> list[str]:
    words = rng.sample(WORDS, rng.choice((0, 1, 2, 5)))
    if rng.random() < 0.4:
        words.append(rng.choice(TEXTS))
    if rng.random() < 0.1:
        words.append(" ".join(rng.choice(WORDS) for _ in range(100)))
    if rng.random() < 0.1:
        words.append(
            "".join(chr(rng.choice((rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)))) for _ in "abcd")
        )
    return words
