"""CLIP's text tower as an exported graph, behind a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from regionspot.runtime.graph_spec import ModelInfo
from regionspot.structures import FloatArray, IntArray

TextTokenizer = Callable[[Sequence[str], int], IntArray]
"""Texts and the context length to (n, context length) tokens, zero after the end token, which is
the largest.
"""


class TextInput(NamedTuple):
    """What makes tokens of class names.

    Attributes:
        tokenizer: of OpenAI's byte-pair encoding: `regionspot.runtime.tokenizer.ClipTokenizer`, or
            open_clip's where PyTorch is.
        templates: the texts of a class name, with `{}` for the name.
    """

    tokenizer: TextTokenizer
    templates: tuple[str, ...]


class TextPipeline(Protocol):
    """What a text encoder needs of a `regionspot.runtime.pipeline.RegionPipeline`, which describes
    these.
    """

    @property
    def info(self) -> ModelInfo: ...

    @property
    def runtime(self) -> str: ...

    @property
    def fingerprint(self) -> Callable[[str], str]: ...

    def encode_tokens(self, tokens: IntArray) -> FloatArray: ...


class GraphTextEncoder:
    """A `regionspot.vocabulary.TextEncoder` over the graph `clip_text_encoder`.

    Args:
        pipeline: of a model with OpenAI's byte-pair encoding and a causal text tower, as all
            presets have.
    """

    def __init__(self, pipeline: TextPipeline, text_input: TextInput) -> None:
        self._pipeline = pipeline
        self.tokenizer, self.templates = text_input

    @property
    def embed_dim(self) -> int:
        return self._pipeline.info.embed_dim

    @property
    def context_length(self) -> int:
        return self._pipeline.info.context_length

    def known_tokens(self) -> tuple[int, ...] | None:
        """The tokens that the text tower has seen in training; None stands for all."""
        return self._pipeline.info.known_tokens

    def fingerprint(self) -> str:
        """Of the text tower and of the artefact that stands for it: no cache gives int8's words to
        single precision.
        """
        pipeline = self._pipeline
        if pipeline.runtime == "torch":
            return pipeline.info.text_fingerprint
        return (
            f"{pipeline.info.text_fingerprint} {pipeline.runtime} "
            f"{pipeline.fingerprint('clip_text_encoder')}"
        )

    def encode_text(self, texts: list[str]) -> FloatArray:
        """Un-normalised embeddings (n, E) of n texts. Padding behind the last end token is
        cut off.
        """
        if not texts:
            return np.zeros((0, self.embed_dim), np.float32)
        tokens = self.tokenizer(texts, self.context_length)  # (n, context length)
        length = int(tokens.argmax(axis=1).max()) + 1
        return self._pipeline.encode_tokens(tokens[:, :length].astype(np.int32))
