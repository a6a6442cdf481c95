"""Class names to text embeddings: the prompt templates, the cache on disk, and the ways to name a vocabulary."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from regionspot.errors import ArtifactError, InputError
from regionspot.files import cache_root, write_atomically
from regionspot.structures import FloatArray, Vocabulary, check_class_names

TEMPLATES: tuple[str, ...]
"""CLIP's 80 ImageNet templates and the bare "{}." (loads open_clip when first used)."""

PRESET_VOCABULARIES = ("mini", "coco", "imagenet")
_CUT_SUFFIXES = ("-other", "-merged", "-stuff")
_DIGEST_BYTES = 16


def __getattr__(name: str) -> Any:
    if name != "TEMPLATES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return default_templates()


def default_templates() -> tuple[str, ...]:
    """`TEMPLATES`."""
    from regionspot.modeling.clip import IMAGENET_TEMPLATES

    return (*IMAGENET_TEMPLATES, "{}.")


def clean_name(name: str) -> str:
    """A class name as it goes into the templates: without COCO's `-other`, `-merged` and `-stuff`.

    >>> clean_name("wall-other-merged")
    'wall'
    """
    while name.endswith(_CUT_SUFFIXES):
        name = name.rpartition("-")[0]
    return name


class TextEncoder(Protocol):
    """A text tower: `ClipBackbone`, or `regionspot.runtime.text_encoder.GraphTextEncoder` of an exported one."""

    @property
    def embed_dim(self) -> int:
        """E, length of an embedding."""
        ...

    def fingerprint(self) -> str:
        """A text that changes with anything that embeddings depend on."""
        ...

    def encode_text(self, texts: list[str]) -> Any:
        """Un-normalised embeddings (n, E) of n texts, an array or a tensor without gradients on any device."""
        ...


class EmbeddingStore(Protocol):
    """Keeps embeddings (E,) of words; see `EmbeddingDirectory` and `EmbeddingMemory`."""

    def read(self, word: str) -> FloatArray | None:
        """What was written for a word; None where nothing was, or where it is lost or damaged."""
        ...

    def write(self, word: str, embedding: FloatArray) -> None: ...


class EmbeddingDirectory:
    """Embeddings as files, each with its checksum. A directory that cannot be written keeps nothing.

    Args:
        directory: of all text towers.
        key: tells what the embeddings depend on, besides the word.
        embed_dim: E.
    """

    def __init__(self, directory: Path, key: str, embed_dim: int) -> None:
        self._directory, self._key, self._bytes = directory / key, key, 4 * embed_dim

    def read(self, word: str) -> FloatArray | None:
        try:
            content = self._path(word).read_bytes()
        except OSError:
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if len(payload) != self._bytes or digest != self._digest(word, payload):
            return None
        return np.frombuffer(payload, "<f4").astype(np.float32)

    def write(self, word: str, embedding: FloatArray) -> None:
        payload = embedding.astype("<f4").tobytes()
        try:
            write_atomically(self._path(word), self._digest(word, payload) + payload)
        except ArtifactError:
            return

    def _path(self, word: str) -> Path:
        return self._directory / f"{xxhash.xxh3_128_hexdigest(word.encode())}.bin"

    def _digest(self, word: str, payload: bytes) -> bytes:
        return xxhash.xxh3_128_digest(f"{self._key} {word} ".encode() + payload)


class EmbeddingMemory:
    """The `capacity` embeddings that were asked for last, for a server: strangers' words must not fill its disk."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._kept = capacity, OrderedDict[str, FloatArray]()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, word: str) -> bool:
        return word in self._kept

    def read(self, word: str) -> FloatArray | None:
        if word in self._kept:
            self._kept.move_to_end(word)
        return self._kept.get(word)

    def write(self, word: str, embedding: FloatArray) -> None:
        self._kept[word] = embedding
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)


class VocabularyEncoder:
    """Embeds class names with CLIP's text tower, each name once and then from a store.

    A name's embedding is the mean of its un-normalised embeddings in all templates, normalised. Names are encoded one
    by one, so that to the last bit no embedding depends on the company it is in, and kept one by one, so that a new
    word costs one word. On disk an entry is found by the text tower's weights, the tokenizer, the templates and the
    name; a damaged one is made again.

    Args:
        text_encoder: with its weights loaded by now.
        cache_dir: None stands for $REGIONSPOT_CACHE, or ~/.cache/regionspot, and there the folder "vocabulary".
        templates: with `{}` for the name; None stands for `TEMPLATES`.
        store: in place of a directory.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        cache_dir: str | Path | None = None,
        templates: Sequence[str] | None = None,
        store: EmbeddingStore | None = None,
    ) -> None:
        self.text_encoder = text_encoder
        self.templates: tuple[str, ...] = tuple(templates) if templates is not None else default_templates()
        if store is None:
            key = xxhash.xxh3_128_hexdigest(json.dumps([text_encoder.fingerprint(), self.templates]).encode())
            directory = Path(cache_dir) if cache_dir is not None else default_cache_dir()
            store = EmbeddingDirectory(directory, key, text_encoder.embed_dim)
        self.store = store

    def encode(self, names: Sequence[str]) -> Vocabulary:
        """The vocabulary of `names`, in their order.

        A store that cannot be written costs time later, not the result.

        Raises:
            InputError: no name, a blank one, or one given twice.
        """
        names = tuple(names)
        check_class_names(names)
        words = [clean_name(name) for name in names]
        embeddings: dict[str, FloatArray] = {}
        for word in dict.fromkeys(words):
            kept = self.store.read(word)
            embeddings[word] = self._encode_word(word) if kept is None else kept
        return Vocabulary(names, np.stack([embeddings[word] for word in words]))

    def _encode_word(self, word: str) -> FloatArray:
        """The embedding (E,), which is also put into the store."""
        embeddings = self.text_encoder.encode_text([template.replace("{}", word) for template in self.templates])
        on_cpu = embeddings if isinstance(embeddings, np.ndarray) else embeddings.cpu().double().numpy()
        mean = on_cpu.mean(axis=0, dtype=np.float64)  # (templates, E) to (E,)
        embedding: FloatArray = (mean / np.linalg.norm(mean)).astype(np.float32)
        self.store.write(word, embedding)
        return embedding


def default_cache_dir() -> Path:
    """Where vocabularies are cached unless told otherwise."""
    return cache_root() / "vocabulary"


def parse_vocabulary(spec: str) -> tuple[str, ...]:
    """Class names from what a user types.

    Args:
        spec: a preset ("mini", "coco" or "imagenet"), a `.txt` file with a name on each line, a `.json` file in COCO or
            LVIS format, whose categories are taken in the order of their ids, or names with commas between them.

    Raises:
        InputError: no name, a blank or repeated one, or a file that is missing or not as described.
    """
    spec = spec.strip()
    if spec in PRESET_VOCABULARIES:
        names = _preset_names(spec)
    elif spec.endswith(".txt"):
        names = _lines(_read_text(Path(spec)))
    elif spec.endswith(".json"):
        names = _category_names(Path(spec))
    else:
        names = tuple(name.strip() for name in spec.split(",")) if spec else ()
    try:
        check_class_names(names)
    except InputError as error:
        raise InputError(f"vocabulary {spec!r}: {error}") from error
    return names


def _preset_names(preset: str) -> tuple[str, ...]:
    if preset == "coco":
        return _lines((Path(__file__).parent / "vocabularies" / "coco.txt").read_text(encoding="utf-8"))
    if preset == "mini":
        from regionspot.mini.world import CATEGORIES

        return tuple(category.name for category in CATEGORIES)
    from regionspot.modeling.clip import IMAGENET_CLASS_NAMES

    return tuple(dict.fromkeys(IMAGENET_CLASS_NAMES))  # two of the 1000 names stand for two classes each


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _category_names(path: Path) -> tuple[str, ...]:
    try:
        categories = json.loads(_read_text(path))["categories"]
        return tuple(str(category["name"]) for category in sorted(categories, key=lambda category: category["id"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not an annotation file in COCO or LVIS format, each category with id and name ({error!r})"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"vocabulary file {path} cannot be read: {error}") from error
