"""Lists of words, files of them and single names through `parse_vocabulary` and
`VocabularyEncoder`.
"""

from __future__ import annotations

import codecs
import copy
import json
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from regionspot.errors import RegionSpotError
from regionspot.modeling.presets import MINI, create_model
from regionspot.structures import Vocabulary
from regionspot.vocabulary import (
    PRESET_VOCABULARIES,
    EmbeddingMemory,
    VocabularyEncoder,
    parse_vocabulary,
)
from tests.fuzz.documents import annotation_file
from tests.fuzz.reference import check_text, id_meaning
from tests.fuzz.target import attempt, check, fail, write
from tests.fuzz.trees import (
    TEXTS,
    Note,
    Tree,
    encode,
    for_yaml,
    mutate_bytes,
    mutate_values,
    respell,
    strange_value,
)

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
TYPED_WORDS = tuple(word for word in WORDS if "," not in word)
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-32-le")
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
)
TEMPLATES = ("a photo of a {}.", "{}.")
"""Two in place of all 81, which would cost a second for each word."""

SAME_COSINE = 0.999
ROUNDING = 1e-5


class Vocabularies:
    """The target."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._text_encoder = create_model(MINI).clip
        self._encoder = self._new_encoder()

    def run(self, rng: random.Random, note: Note) -> bool:
        cases = (
            self._lines,
            self._annotation_file,
            self._list_file,
            self._typed,
            self._names,
            self._names,
        )
        return rng.choice(cases)(rng, note)

    def _lines(self, rng: random.Random, note: Note) -> bool:
        """A text file is its lines; one in another encoding than it says is refused."""
        content = (
            rng.choice(("\n", "\r\n", "\r", "\n\n"))
            .join(_words(rng))
            .encode(rng.choice(ENCODINGS), "replace")
        )
        if rng.random() < 0.4:
            content = mutate_bytes(content, rng)
        note(f"a text file {content[:300]!r}")
        path = write(
            self._directory,
            rng.choice(("words.txt", "words.TXT", "words.names", "classes")),
            content,
        )
        names = attempt(lambda: parse_vocabulary(str(path)))
        if isinstance(names, RegionSpotError):
            return False
        text = content.decode(
            next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
        )
        check("\0" not in text, "a file in another encoding was taken for UTF-8")
        if path.suffix.lower() == ".txt" or text.lstrip()[:1] not in ("{", "["):
            check(
                names == tuple(line.strip() for line in text.splitlines() if line.strip()),
                f"read as {names!r:.200}",
            )
        return self._encode(names, rng, note)

    def _annotation_file(self, rng: random.Random, note: Note) -> bool:
        """An annotation file is its categories, in the order of their ids."""
        tree = annotation_file(rng)
        how = rng.choice(("whole", "respelt", "values", "values", "values", "text"))
        note(how)
        if how == "respelt":
            tree["categories"] = respell(tree["categories"], rng)
        elif how == "values":
            tree["categories"] = mutate_values(tree["categories"], rng, note, rng.choice((1, 2)))
        path = write(
            self._directory, "words.json", content := encode(tree, rng, note, how == "text")
        )
        names = attempt(lambda: parse_vocabulary(str(path)))
        if isinstance(names, RegionSpotError):
            return False
        categories = json.loads(content)["categories"]
        by_id = {id_meaning(entry["id"]): entry["name"] for entry in categories}
        check(
            len(by_id) == len(categories) == len(names),
            f"{len(names)} names of {len(categories)} categories",
        )
        _check_order(names, by_id)
        return self._encode(names, rng, note)

    def _list_file(self, rng: random.Random, note: Note) -> bool:
        """A list of names in JSON, and YOLO's data.yaml with a list or with names by class
        index.
        """
        words = _words(rng)
        tree: Tree = rng.choice((words, {"names": words}, {"names": dict(enumerate(words))}))
        if rng.random() < 0.6:
            tree = mutate_values(tree, rng, note, rng.choice((1, 2)))
        if rng.random() < 0.5:
            name, content = "words.json", encode(tree, rng, note, rng.random() < 0.2)
        else:
            name, content = "data.yaml", yaml.safe_dump(for_yaml(tree), allow_unicode=True).encode()
            content = mutate_bytes(content, rng) if rng.random() < 0.3 else content
        note(f"{name}: {content[:300]!r}")
        path = write(self._directory, name, content)
        names = attempt(lambda: parse_vocabulary(str(path)))
        if isinstance(names, RegionSpotError):
            return False
        read = json.loads(content) if name.endswith("json") else yaml.safe_load(content)
        read = read["names"] if isinstance(read, dict) and "names" in read else read
        if isinstance(read, list):
            check(len(read) == len(names), f"{len(names)} names of {len(read)}")
            for found, given in zip(names, read, strict=True):
                check_text(found, given.strip() if isinstance(given, str) else given, "a name")
        elif "categories" not in read:
            check(len(read) == len(names), f"{len(names)} names of {len(read)}")
            _check_order(names, read)
        return self._encode(names, rng, note)

    def _typed(self, rng: random.Random, note: Note) -> bool:
        right = rng.random() < 0.5
        words = rng.sample(TYPED_WORDS, rng.choice((1, 2, 5))) if right else _words(rng)
        spec: Any = rng.choice((",", " , ", ", ") if right else (",,", "\n")).join(words)
        if not right and rng.random() < 0.4:
            spec = strange_value(rng)
        note(f"the text {spec!r:.300}")
        names = attempt(lambda: parse_vocabulary(spec))
        if isinstance(names, RegionSpotError):
            check(not right, f"{spec!r} is refused: {names}")
            return False
        check(isinstance(spec, str), f"{spec!r:.100} was taken for a text")
        if spec.strip() not in PRESET_VOCABULARIES:
            parts = tuple(part.strip() for part in re.split(r"[,\n]", spec))
            check(tuple(filter(None, parts)) == names, f"read as {names!r:.200}")
        return self._encode(names, rng, note)

    def _names(self, rng: random.Random, note: Note) -> bool:
        names: Any = _words(rng)
        if rng.random() < 0.5:
            names = mutate_values(names, rng, note)
        elif rng.random() < 0.4:
            forms: tuple[Callable[[list[str]], Any], ...] = (
                tuple,
                np.array,
                iter,
                dict.fromkeys,
                lambda words: dict(enumerate(words)),
                lambda words: [word.encode("utf-8", "surrogatepass") for word in words],
                lambda words: np.array(words, object),
            )
            names = rng.choice(forms)(names)
        return self._encode(names, rng, note)

    def _encode(self, names: Any, rng: random.Random, note: Note) -> bool:
        """Embeddings of unit length, one for each name; names that mean the same are told, or
        refused where wanted.
        """
        note(f"the names {names!r:.300}")
        given = (
            list(copy.copy(names) if hasattr(names, "__next__") else names)
            if hasattr(names, "__iter__")
            else []
        )
        strict = rng.random() < 0.3
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            vocabulary = attempt(
                lambda: self._encoder.encode(names, same_meaning="error" if strict else "warn")
            )
        if isinstance(vocabulary, RegionSpotError):
            return False
        if isinstance(names, (str, bytes, dict)):
            fail(f"a {type(names).__name__} was taken for a list of names")
        _check_vocabulary(vocabulary, given)
        twins = _largest_cosine(vocabulary)
        check(
            twins < SAME_COSINE + ROUNDING or (bool(told) and not strict),
            f"a cosine of {twins} is not told",
        )
        if rng.random() < 0.1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = self._new_encoder().encode(vocabulary.names[::-1])
            check(
                np.array_equal(again.embeddings[::-1], vocabulary.embeddings),
                "an embedding depends on the others",
            )
        return True

    def _new_encoder(self) -> VocabularyEncoder:
        return VocabularyEncoder(
            self._text_encoder, templates=TEMPLATES, store=EmbeddingMemory(1000)
        )


def _check_order(names: tuple[str, ...], name_of: dict[Any, Any]) -> None:
    """Names stand in the order of their ids where these are numbers; of other ids none is lost."""
    for id_, name in name_of.items():
        check(isinstance(name, str), f"the name of {id_!r:.80}, {name!r:.80}, was taken for a text")
    ids = [*name_of]
    if all(isinstance(id_meaning(id_), int) for id_ in ids):
        ids.sort(key=id_meaning)
        check(
            names == tuple(name_of[id_].strip() for id_ in ids),
            f"{name_of!r:.200} are read as {names!r:.200}",
        )
    check(
        sorted(names) == sorted(name.strip() for name in name_of.values()),
        f"{name_of!r:.200} became {names!r:.200}",
    )


def _check_vocabulary(vocabulary: Vocabulary, given: list[Any]) -> None:
    check(all(isinstance(name, str) for name in given), f"{given!r:.200} were taken for names")
    check(
        list(vocabulary.names) == given,
        f"the names {given!r:.200} became {vocabulary.names!r:.200}",
    )
    check(
        all(type(name) is str and name.strip() for name in vocabulary.names),
        f"the names {vocabulary.names!r:.200}",
    )
    check(len(set(given)) == len(given), f"{given!r:.200} repeat a name")
    check(
        vocabulary.embeddings.shape[0] == len(given),
        f"{vocabulary.embeddings.shape} for {len(given)} names",
    )
    lengths = np.linalg.norm(vocabulary.embeddings.astype(np.float64), axis=1)
    check(bool((np.abs(lengths - 1) < 1e-3).all()), f"embeddings of the lengths {lengths}")
    json.dumps(vocabulary.names, ensure_ascii=False).encode()


def _largest_cosine(vocabulary: Vocabulary) -> float:
    cosines = vocabulary.embeddings.astype(np.float64) @ vocabulary.embeddings.T.astype(np.float64)
    np.fill_diagonal(cosines, -1)
    return float(cosines.max())


def _words(rng: random.Random) -> list[str]:
    words = rng.sample(WORDS, rng.choice((0, 1, 2, 5)))
    if rng.random() < 0.4:
        words.append(rng.choice(TEXTS))
    if rng.random() < 0.1:
        words.append(" ".join(rng.choice(WORDS) for _ in range(100)))
    if rng.random() < 0.1:
        ranges = ((32, 0xD800), (0xE000, 0x110000))
        words.append("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(4)))
    return words
