"""Class names to text embeddings: the prompt templates, the cache on disk, and the ways to name a
vocabulary.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xxhash

from regionspot.errors import ArtifactError, InputError, first_few, shown
from regionspot.files import cache_root
from regionspot.progress import Progress
from regionspot.structures import FloatArray, Vocabulary, as_class_names
from regionspot.synonyms import describe_groups, same_meaning
from regionspot.vocabulary_files import is_vocabulary_file, names_in_file, text_lines

__all__ = [  # with what this module passes on
    "EmbeddingDirectory",
    "EmbeddingMemory",
    "SameMeaningError",
    "VocabularyEncoder",
    "VocabularyWarning",
    "clean_coco_name",
    "default_cache_dir",
    "parse_vocabulary",
    "same_meaning",
]

PRESET_VOCABULARIES = ("mini", "coco", "imagenet")
_CUT_SUFFIXES = ("-other", "-merged", "-stuff")
_DIGEST_BYTES = 16
PROGRESS_FROM = 300
"""From this many words on, which take a minute or more, `VocabularyEncoder.encode` shows how far it
is.
"""

OnSameMeaning = Literal["warn", "error", "ignore"]


class VocabularyWarning(UserWarning):
    """Class names that a text encoder cannot tell apart, has not seen in training, or does not read
    to their end.
    """


class SameMeaningError(InputError):
    """Class names that a text encoder cannot tell apart, where that is an error."""


def clean_coco_name(name: str) -> str:
    """A class name of COCO's "stuff" without its `-other`, `-merged` and `-stuff`, which are no
    part of the word.

    >>> clean_coco_name("wall-other-merged")
    'wall'
    """
    while name.endswith(_CUT_SUFFIXES) and name.rpartition("-")[0].strip():
        name = name.rpartition("-")[0]
    return name


class TextEncoder(Protocol):
    """A text tower: `ClipBackbone`, or `regionspot.runtime.text_encoder.GraphTextEncoder` of an
    exported one.
    """

    @property
    def embed_dim(self) -> int:
        """E, length of an embedding."""
        ...

    @property
    def context_length(self) -> int:
        """Most tokens of a text, start and end token among them; longer texts are cut."""
        ...

    @property
    def tokenizer(self) -> Callable[..., Any]:
        """Texts and any context length to tokens (n, context length), zero after the end token."""
        ...

    @property
    def templates(self) -> tuple[str, ...]:
        """The texts of a class name, with `{}` for the name."""
        ...

    def fingerprint(self) -> str:
        """A text that changes with anything that embeddings depend on."""
        ...

    def known_tokens(self) -> tuple[int, ...] | None:
        """The tokens that the text tower has seen in training; None stands for all."""
        ...

    def encode_text(self, texts: list[str]) -> Any:
        """Un-normalised embeddings (n, E) of n texts, an array or a tensor without gradients on any
        device.
        """
        ...


class EmbeddingStore(Protocol):
    """Keeps embeddings (E,) of words; see `EmbeddingDirectory` and `EmbeddingMemory`."""

    def read(self, word: str) -> FloatArray | None:
        """What was written for a word; None where nothing was, or where it is lost or damaged."""
        ...

    def write(self, word: str, embedding: FloatArray) -> None: ...


class EmbeddingDirectory:
    """Embeddings as files, each with its checksum. A directory that cannot be written keeps
    nothing.

    Files are not flushed to the disk one by one: what a crash damages fails its checksum, and is
    made again.

    Args:
        directory: of all text towers.
        key: tells what the embeddings depend on, besides the word.
        embed_dim: E.
    """

    def __init__(self, directory: Path, key: str, embed_dim: int) -> None:
        self._directory, self._key, self._bytes = directory / key, key, 4 * embed_dim

    @classmethod
    def of(
        cls, text_encoder: TextEncoder, templates: Sequence[str], directory: Path
    ) -> EmbeddingDirectory:
        """For a text tower, by whose weights, tokenizer and templates it is found."""
        content = json.dumps([text_encoder.fingerprint(), tuple(templates)])
        key = xxhash.xxh3_128_hexdigest(content.encode())
        return cls(directory, key, text_encoder.embed_dim)

    def read(self, word: str) -> FloatArray | None:
        try:
            content = self._path(word).read_bytes()
        except OSError:
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if len(payload) != self._bytes or digest != self._digest(word, payload):
            return None
        embedding = np.frombuffer(payload, "<f4").astype(np.float32)
        return embedding if np.isfinite(embedding).all() else None

    def write(self, word: str, embedding: FloatArray) -> None:
        path, payload = self._path(word), embedding.astype("<f4").tobytes()
        aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(self._digest(word, payload) + payload)
            os.replace(aside, path)
        except OSError:
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def remove(self, word: str) -> None:
        with suppress(OSError):
            self._path(word).unlink(missing_ok=True)

    def prune(self, capacity: int) -> None:
        """Removes the words that were written first, until there are no more than `capacity`."""
        found = []
        for path in self._directory.glob("*.bin"):
            with suppress(OSError):
                found.append((path.stat().st_mtime, path))
        for _, path in sorted(found)[: max(len(found) - capacity, 0)]:
            with suppress(OSError):
                path.unlink()

    def _path(self, word: str) -> Path:
        return self._directory / f"{xxhash.xxh3_128_hexdigest(word.encode())}.bin"

    def _digest(self, word: str, payload: bytes) -> bytes:
        return xxhash.xxh3_128_digest(f"{self._key} {word} ".encode() + payload)


class EmbeddingMemory:
    """The `capacity` embeddings that were asked for last, for a server: strangers' words must not
    fill its memory or its disk.

    Args:
        directory: where they are kept beyond the end of this process, and looked for; it holds at
            most 2 `capacity`.
    """

    def __init__(self, capacity: int, directory: EmbeddingDirectory | None = None) -> None:
        self._capacity, self._kept = capacity, OrderedDict[str, FloatArray]()
        self._directory = directory
        self._lock = threading.Lock()
        if directory is not None:
            directory.prune(capacity)

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, word: str) -> bool:
        return word in self._kept

    def read(self, word: str) -> FloatArray | None:
        with self._lock:
            if word in self._kept:
                self._kept.move_to_end(word)
                return self._kept[word]
        found = None if self._directory is None else self._directory.read(word)
        if found is not None:
            self._keep(word, found)
        return found

    def write(self, word: str, embedding: FloatArray) -> None:
        if self._directory is not None:
            self._directory.write(word, embedding)
        self._keep(word, embedding)

    def _keep(self, word: str, embedding: FloatArray) -> None:
        forgotten = []
        with self._lock:
            self._kept[word] = embedding
            while len(self._kept) > self._capacity:
                forgotten.append(self._kept.popitem(last=False)[0])
        if self._directory is not None:
            for one in forgotten:
                self._directory.remove(one)


class VocabularyEncoder:
    """Embeds class names with CLIP's text tower, each name once and then from a store.

    A name's embedding is the mean of its un-normalised embeddings in all templates, normalised.
    Names are encoded one by one, so that to the last bit no embedding depends on the company it is
    in, and kept one by one, so that a new word costs one word. On disk an entry is found by the
    text tower's weights, the tokenizer, the templates and the name; a damaged one is made again.

    Args:
        text_encoder: with its weights loaded by now.
        cache_dir: None stands for $REGIONSPOT_CACHE, or ~/.cache/regionspot, and there the folder
            "vocabulary".
        templates: with `{}` for the name; None stands for the text encoder's own.
        store: in place of a directory.
        clean_coco_suffixes: leave out COCO's `-other`, `-merged` and `-stuff` (see
            `clean_coco_name`). Ask for it only where the class names are COCO's, and then in
            training, evaluation and prediction alike.

    Raises:
        InputError: no template, or one without `{}`.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        cache_dir: str | Path | None = None,
        templates: Sequence[str] | None = None,
        store: EmbeddingStore | None = None,
        clean_coco_suffixes: bool = False,
    ) -> None:
        self.text_encoder = text_encoder
        self._known_tokens = text_encoder.known_tokens()
        self.clean_coco_suffixes = clean_coco_suffixes
        self.templates: tuple[str, ...] = _checked_templates(
            text_encoder.templates if templates is None else templates
        )
        if store is None:
            directory = Path(cache_dir) if cache_dir is not None else default_cache_dir()
            store = EmbeddingDirectory.of(text_encoder, self.templates, directory)
        self.store = store

    def encode(
        self,
        names: Iterable[str],
        *,
        same_meaning: OnSameMeaning = "warn",
        progress: bool | None = None,
    ) -> Vocabulary:
        """The vocabulary of `names`, in their order.

        A store that cannot be written costs time later, not the result.

        Args:
            same_meaning: what to do about names that the text encoder cannot tell apart (see
                `regionspot.synonyms.same_meaning`), whose classes would share every score: a
                `VocabularyWarning`, an InputError, or nothing. Names with words that it has not
                seen in training, and names that it does not read to their end, are a
                `VocabularyWarning` unless this is "ignore".
            progress: show on standard error how far it is; None does so from PROGRESS_FROM new
                words on.

        Raises:
            InputError: bad names, see `as_class_names`; or, but for "ignore", names that are cut to
                the same beginning.
            ArtifactError: the text encoder answers with NaN. Nothing is stored of that word.
        """
        names = as_class_names(names)
        words = [self.word(name) for name in names]
        stored = {word: self.store.read(word) for word in words}
        embeddings = {word: kept for word, kept in stored.items() if kept is not None}
        new = [word for word in stored if word not in embeddings]
        embeddings |= self._encode_words(
            new, len(new) >= PROGRESS_FROM if progress is None else progress
        )
        vocabulary = Vocabulary(names, np.stack([embeddings[word] for word in words]))
        if same_meaning != "ignore":
            self._check_meanings(vocabulary, same_meaning == "error")
        return vocabulary

    def word(self, name: str) -> str:
        """What goes into the templates for a class name, and what its embedding is kept by."""
        return clean_coco_name(name) if self.clean_coco_suffixes else name

    def _encode_words(self, words: Sequence[str], progress: bool) -> dict[str, FloatArray]:
        if not progress:
            return {word: self._encode_word(word) for word in words}
        embeddings = {}
        with Progress("encoding class names", len(words), "names") as line:
            for count, word in enumerate(words, 1):
                embeddings[word] = self._encode_word(word)
                line.update(count)
        return embeddings

    def _encode_word(self, word: str) -> FloatArray:
        """The embedding (E,), which is also put into the store."""
        embeddings = self.text_encoder.encode_text(
            [template.replace("{}", word) for template in self.templates]
        )
        on_cpu = (
            embeddings if isinstance(embeddings, np.ndarray) else embeddings.cpu().double().numpy()
        )
        mean = on_cpu.mean(axis=0, dtype=np.float64)  # (templates, E) to (E,)
        length = np.linalg.norm(mean)
        if not (np.isfinite(length) and length > 0):
            raise ArtifactError(
                f"the text encoder has no finite embedding of {shown(word)}: its weights are "
                "damaged, or half precision overflowed"
            )
        embedding: FloatArray = (mean / length).astype(np.float32)
        self.store.write(word, embedding)
        return embedding

    def _check_meanings(self, vocabulary: Vocabulary, refuse: bool) -> None:
        """Warn of names with the same meaning and of names that are cut, or refuse them."""
        cut = self._cut_names(vocabulary.names)
        groups = same_meaning(vocabulary)
        for group in groups:
            ends = [name for name in group if name in cut]
            if len(ends) > 1:
                raise InputError(
                    f"this text encoder reads {self.text_encoder.context_length} tokens, and "
                    f"{shown(ends[0])} and {shown(ends[1])} are the same that far: shorten them to "
                    "what tells them apart"
                )
        if unknown := self._unknown_names(vocabulary.names):
            few = first_few(map(shown, unknown))
            _warn(
                f"this text encoder has not seen in training all words of {few}: scores of such "
                "names mean nothing"
            )
        if groups and refuse:
            raise SameMeaningError(
                "class names look the same to this text encoder: "
                f"{describe_groups(vocabulary, groups)}. No training can tell them apart: rename "
                "them, or merge their classes"
            )
        if groups:
            _warn(
                f"{describe_groups(vocabulary, groups)} look the same to this text encoder; their "
                "scores are shared"
            )
        if cut:
            few = first_few(map(shown, cut))
            _warn(
                f"this text encoder reads {self.text_encoder.context_length} tokens and cuts the "
                f"end of {few}"
            )

    def _unknown_names(self, names: Sequence[str]) -> list[str]:
        """Names with a token that the text encoder has not seen in training."""
        if self._known_tokens is None:
            return []
        tokens = self._tokens([self.word(name) for name in names])
        strange = (~np.isin(tokens, self._known_tokens) & (tokens != 0)).any(axis=1)
        return [name for name, is_strange in zip(names, strange, strict=True) if is_strange]

    def _cut_names(self, names: Sequence[str]) -> list[str]:
        """Names that the text encoder does not read to their end in the longest template."""
        longest = max(len(template.encode()) for template in self.templates)
        room = self.text_encoder.context_length - 2 - longest  # a token is one byte or more
        # in lower case, some letters take more bytes
        long = [name for name in names if 2 * len(name.encode()) > room]
        if not long:
            return []
        counts = (
            self._tokens([template.replace("{}", "x") for template in self.templates]) != 0
        ).sum(axis=1)
        template = self.templates[int(counts.argmax())]
        tokens = self._tokens([template.replace("{}", self.word(name)) for name in long])
        return [name for name, is_cut in zip(long, tokens[:, -1] != 0, strict=True) if is_cut]

    def _tokens(self, texts: list[str]) -> np.ndarray:
        """(n, context length + 1): the last is zero where a text is not cut."""
        return np.asarray(self.text_encoder.tokenizer(texts, self.text_encoder.context_length + 1))


def _checked_templates(templates: Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str):
        raise InputError(f"templates must be a list of texts, got one text: [{shown(templates)}]")
    wrong = [
        template for template in templates if not isinstance(template, str) or "{}" not in template
    ]
    if wrong or not templates:
        raise InputError(
            f"each template must be text with {{}} for the name, got {shown(wrong or templates)}"
        )
    return tuple(templates)


def _warn(message: str) -> None:
    warnings.warn(message, VocabularyWarning, stacklevel=4)  # at the caller of `encode`


def default_cache_dir() -> Path:
    """Where vocabularies are cached unless told otherwise."""
    return cache_root() / "vocabulary"


def parse_vocabulary(spec: str) -> tuple[str, ...]:
    """Class names from what a user types.

    Args:
        spec: a preset ("mini", "coco" or "imagenet"); a file of whatever name that is there (see
            `regionspot.vocabulary_files`); or names with commas, or ends of lines, between them.

    Raises:
        InputError: no name, a blank or repeated one, or a file that is missing or cannot be used.
    """
    if not isinstance(spec, str):
        raise InputError(
            "a vocabulary is text: a preset, a file, or names with commas between them, not "
            f"{shown(spec)}"
        )
    spec = spec.strip()
    if spec in PRESET_VOCABULARIES:
        return _preset_names(spec)
    if is_vocabulary_file(spec):
        return names_in_file(spec)
    try:
        return as_class_names(_typed_names(spec))
    except InputError as error:
        raise InputError(f"vocabulary {shown(spec)}: {error}") from error


def _typed_names(spec: str) -> list[str]:
    lines = text_lines(spec)
    if len(lines) > 1:
        lines = [line.rstrip(", ") for line in lines]
    return [name.strip() for line in lines for name in line.split(",")]


def _preset_names(preset: str) -> tuple[str, ...]:
    if preset == "coco":
        return names_in_file(Path(__file__).parent / "vocabularies" / "coco.txt")
    if preset == "mini":
        from regionspot.mini.world import CATEGORIES

        return tuple(category.name for category in CATEGORIES)
    from regionspot.modeling.clip import IMAGENET_CLASS_NAMES

    # two of the 1000 names stand for two classes each
    return tuple(dict.fromkeys(IMAGENET_CLASS_NAMES))
