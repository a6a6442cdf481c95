"""OpenAI CLIP's byte-pair encoding without PyTorch, for servers: the same tokens as
`open_clip.tokenize`.
"""

from __future__ import annotations

import gzip
import html
import json
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regionspot.arrays import checked_count
from regionspot.errors import ArtifactError, InputError, plain_text, shown
from regionspot.structures import IntArray

if TYPE_CHECKING:
    from collections.abc import Sequence

START, END = "<start_of_text>", "<end_of_text>"
NUM_MERGES = 49152 - 256 - 2
"""Of the file's 262,144 merges CLIP uses the first; with 256 bytes, twice, and two special tokens
it knows 49,408.
"""

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class ClipTokenizer:
    """Called as `tokenizer(texts, context_length)`.

    Args:
        content: the JSON text of a `tokenizers.Tokenizer`, see `tokenizer_json`.

    Raises:
        ArtifactError: it is none.
    """

    def __init__(self, content: str) -> None:
        try:
            from ftfy import fix_text
            from tokenizers import Tokenizer
        except ImportError as error:
            raise InputError(
                f"this tokenizer needs ftfy and tokenizers ({error}): pip install ftfy tokenizers"
            ) from error
        self._fix_text = fix_text
        try:
            self._tokenizer: Any = Tokenizer.from_str(content)
        except Exception as error:  # its errors have no class of their own
            raise ArtifactError(
                f"the tokenizer's file is damaged ({error}): export again"
            ) from error
        self._start, self._end = (self._tokenizer.token_to_id(token) for token in (START, END))
        if self._start is None or self._end is None:
            raise ArtifactError(
                f"the tokenizer's file is of another tokenizer, without {START}: export again"
            )

    def __call__(self, texts: Sequence[str], context_length: int) -> IntArray:
        """(n, context_length) int32, zero after the end token; a text that is too long is cut
        before its end token.

        Raises:
            InputError: `texts` is not a list of valid Unicode texts, or the context has no room for
                two tokens.
        """
        context_length = checked_count(context_length, "context_length", least=2)
        if isinstance(texts, str) or not all(
            isinstance(text, str) and plain_text(text) == text for text in texts
        ):
            raise InputError(f"the texts must be a list of valid Unicode texts, got {shown(texts)}")
        tokens = np.zeros((len(texts), context_length), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            ids = self._tokenizer.encode(self._cleaned(text), add_special_tokens=False).ids[
                : context_length - 2
            ]
            row[: len(ids) + 2] = [self._start, *ids, self._end]
        return tokens

    def _cleaned(self, text: str) -> str:
        """Encoding faults mended, HTML entities resolved (twice: some are escaped twice), single
        spaces, lower case.
        """
        text = html.unescape(html.unescape(self._fix_text(text)))
        return " ".join(text.split()).strip().lower()


def tokenizer_json(merges_file: Path | None = None) -> str:
    """The tokenizer in the format of the library `tokenizers`, from the merges that open_clip
    ships.

    Raises:
        ArtifactError: open_clip is not installed, or its file of merges is another than OpenAI's.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = _read_merges(merges_file or _shipped_merges())
    # bytes that are printable
    alphabet = [*map(chr, (*range(33, 127), *range(161, 173), *range(174, 256)))]
    # stand-ins for the others, in their order
    alphabet += [chr(256 + index) for index in range(256 - len(alphabet))]
    words = [
        *alphabet,
        *(f"{letter}</w>" for letter in alphabet),
        *map("".join, merges),
        START,
        END,
    ]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = models.BPE(
        vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (START, END)]
    )
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))


def _shipped_merges() -> Path:
    """Where open_clip's file lies, without importing open_clip, which takes PyTorch."""
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactError(
            "open_clip is not installed, and brings CLIP's tokenizer: pip install open_clip_torch"
        )
    return Path(spec.submodule_search_locations[0]) / _MERGES_FILE


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"CLIP's merges cannot be read from {path} ({error}): install open_clip_torch again"
        ) from error
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]
    if len(merges) != NUM_MERGES or any(len(pair) != 2 for pair in merges):
        raise ArtifactError(
            f"{path} does not hold OpenAI CLIP's {NUM_MERGES} merges: install open_clip_torch again"
        )
    return merges  # type: ignore[return-value]
