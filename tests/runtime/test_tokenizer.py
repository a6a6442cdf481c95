"""The tokenizer without PyTorch against open_clip's own."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from regionspot.errors import ArtifactError, InputError
from regionspot.modeling.clip import IMAGENET_CLASS_NAMES, TEMPLATES, tokenize
from regionspot.runtime.tokenizer import END, START, ClipTokenizer, tokenizer_json
from regionspot.vocabulary import parse_vocabulary

ODD = [
    *(
        "",
        "  ",
        "a\tb\n c",
        "x" * 500,
        "word " * 100,
        "it's he'll DON'T I'd",
        "'''s",
        "I'M",
        "__init__",
        "a_b-c/d\\e",
    ),
    *(
        f"{END} a",
        f"{START.upper()}b{END}",
        "a<b>c",
        "123 4567",
        "&amp;amp; &lt;",
        "\x00 nul",
        "...---!!!",
    ),
    *(
        "naïve café",
        "Ünïcödé ÇA",
        "½ ⅓ Ⅷ",
        "ﬁne ﬂ",
        "İstanbul ß ẞ",
        "schön",
        "e\u0301",
        "\u200bzero",
        "\u00a0nbsp\u2003em",
    ),
    *("日本語 の 犬", "👩‍👩‍👧 dog", "اللغة العربية", "हिन्दी", "ไทย"),
]


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(tokenizer_json())


def test_odd_texts(tokenizer: ClipTokenizer) -> None:
    for text in ODD:
        for length in (77, 7):
            expected = tokenize([text], context_length=length).numpy()
            assert np.array_equal(tokenizer([text], length), expected), text


def test_class_names_in_all_templates(tokenizer: ClipTokenizer) -> None:
    names = [
        *IMAGENET_CLASS_NAMES[::20],
        *parse_vocabulary("coco"),
        *parse_vocabulary("mini")[::10],
    ]
    texts = [template.format(name) for name in names for template in TEMPLATES]
    found = tokenizer(texts, 77)
    assert found.dtype == np.int32 and np.array_equal(
        found, tokenize(texts, context_length=77).numpy()
    )


def test_no_texts(tokenizer: ClipTokenizer) -> None:
    assert tokenizer([], 77).shape == (0, 77)


def test_damage_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="tokenizer's file is damaged"):
        ClipTokenizer("{}")
    cut = tmp_path / "merges.gz"
    cut.write_bytes(gzip.compress(b"version\ni n\nt h\n"))
    with pytest.raises(ArtifactError, match="does not hold OpenAI CLIP's 48894 merges"):
        tokenizer_json(cut)
    with pytest.raises(ArtifactError, match="cannot be read"):
        tokenizer_json(tmp_path / "none.gz")
    content = bytearray(gzip.compress(b"version\ni n\nt h\n" * 1000))
    content[20] ^= 0xFF
    cut.write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read"):
        tokenizer_json(cut)
    foreign = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(ArtifactError, match="of another tokenizer"):
        ClipTokenizer(foreign.to_str())


@pytest.mark.parametrize("texts", ["cat", [b"cat"], [1], [None], ["\ud800"], [["cat"]]])
def test_what_is_no_list_of_texts(tokenizer: ClipTokenizer, texts: Any) -> None:
    with pytest.raises(InputError, match="a list of valid Unicode texts"):
        tokenizer(texts, 77)


@pytest.mark.parametrize("length", [1, 0, -1, 7.5, "77", None])
def test_what_is_no_length(tokenizer: ClipTokenizer, length: Any) -> None:
    with pytest.raises(InputError, match="context_length must be a whole number, 2 or more"):
        tokenizer(["cat"], length)
