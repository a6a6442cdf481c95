"""Class names to embeddings: the template ensemble, the cache on disk, and the ways to name a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from regionspot import vocabulary
from regionspot.errors import InputError
from regionspot.modeling.clip import ClipBackbone, build_clip
from regionspot.vocabulary import EmbeddingMemory, VocabularyEncoder, clean_name, default_cache_dir, parse_vocabulary

import open_clip  # isort: skip  (after regionspot.modeling.clip, which makes it importable everywhere)

NAMES = ("cat", "coffee cup", "wall-other-merged")


def make_clip(seed: int) -> ClipBackbone:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
        return ClipBackbone(open_clip.CLIP(24, vision, open_clip.CLIPTextCfg(width=32, heads=2, layers=1)))


@pytest.fixture
def clip() -> ClipBackbone:
    return make_clip(0)


def count_texts(clip: ClipBackbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    original = clip.encode_text

    def counted(texts: list[str]) -> torch.Tensor:
        counts.append(len(texts))
        return original(texts)

    monkeypatch.setattr(clip, "encode_text", counted)
    return counts


def test_embedding_is_the_mean_of_unnormalised_templates(clip: ClipBackbone, tmp_path: Path) -> None:
    encoded = VocabularyEncoder(clip, tmp_path).encode(NAMES)
    assert encoded.names == NAMES
    assert encoded.embeddings.shape == (3, 24) and encoded.embeddings.dtype == np.float32
    templates = [*open_clip.OPENAI_IMAGENET_TEMPLATES, lambda name: f"{name}."]
    assert len(templates) == len(vocabulary.TEMPLATES) == 81
    for word, embedding in zip(("cat", "coffee cup", "wall"), encoded.embeddings, strict=True):
        texts = open_clip.tokenize([template(word) for template in templates])
        mean = clip.clip.encode_text(texts).mean(dim=0)
        np.testing.assert_allclose(embedding, (mean / mean.norm()).numpy(), atol=1e-6)


def test_a_words_embedding_does_not_depend_on_its_company(clip: ClipBackbone, tmp_path: Path) -> None:
    names = ("cat", "a rather long name of a thing that is hardly ever seen", "dog", "coffee cup")
    together = VocabularyEncoder(clip, tmp_path / "together").encode(names).embeddings
    for index, name in enumerate(names):
        alone = VocabularyEncoder(clip, tmp_path / f"{index}").encode([name]).embeddings
        assert np.array_equal(alone[0], together[index])


def test_double_precision_is_asked_of_the_cpu_alone(
    clip: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnDeviceWithoutDoubles:
        def cpu(self) -> torch.Tensor:
            return torch.ones(81, 24)

    monkeypatch.setattr(clip, "encode_text", lambda _: OnDeviceWithoutDoubles())
    assert VocabularyEncoder(clip, tmp_path).encode(["cat"]).embeddings.shape == (1, 24)


def test_second_time_comes_from_the_cache(clip: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = VocabularyEncoder(clip, tmp_path).encode(NAMES)
    monkeypatch.setattr(clip, "encode_text", lambda _: pytest.fail("the encoder ran"))
    second = VocabularyEncoder(clip, tmp_path).encode(NAMES[::-1])
    assert np.array_equal(second.embeddings, first.embeddings[::-1])


def test_one_new_word_costs_one_word(clip: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VocabularyEncoder(clip, tmp_path).encode(NAMES)
    counts = count_texts(clip, monkeypatch)
    VocabularyEncoder(clip, tmp_path).encode((*NAMES, "dog"))
    assert sum(counts) == 81


def test_names_that_clean_to_one_word_are_encoded_once(
    clip: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_texts(clip, monkeypatch)
    encoded = VocabularyEncoder(clip, tmp_path).encode(("rock", "rock-merged"))
    assert sum(counts) == 81
    assert np.array_equal(encoded.embeddings[0], encoded.embeddings[1])


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "swapped"])
def test_damaged_entries_are_made_again(
    clip: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first = VocabularyEncoder(clip, tmp_path).encode(NAMES)
    entries = sorted(tmp_path.rglob("*.bin"))
    assert len(entries) == 3
    content = entries[1].read_bytes()
    flipped = content[:40] + bytes([content[40] ^ 1]) + content[41:]
    broken = {"flipped": flipped, "cut": content[:-4], "empty": b"", "swapped": entries[0].read_bytes()}[damage]
    entries[1].write_bytes(broken)
    counts = count_texts(clip, monkeypatch)
    second = VocabularyEncoder(clip, tmp_path).encode(NAMES)
    assert sum(counts) == 81
    np.testing.assert_allclose(second.embeddings, first.embeddings, atol=1e-6)
    assert entries[1].read_bytes() != broken


def test_other_weights_templates_and_tokenizers_have_other_entries(clip: ClipBackbone, tmp_path: Path) -> None:
    def lower_tokenizer(texts: list[str], context_length: int) -> torch.Tensor:
        return open_clip.tokenize([text.replace(".", "") for text in texts], context_length)

    VocabularyEncoder(clip, tmp_path).encode(["cat"])
    VocabularyEncoder(make_clip(1), tmp_path).encode(["cat"])
    VocabularyEncoder(clip, tmp_path, templates=["a {}."]).encode(["cat"])
    VocabularyEncoder(ClipBackbone(clip.clip, lower_tokenizer), tmp_path).encode(["cat"])
    assert len(list(tmp_path.rglob("*.bin"))) == 4


def test_cache_that_cannot_be_written_costs_only_time(clip: ClipBackbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    encoded = VocabularyEncoder(clip, tmp_path / "file").encode(["cat"])
    assert len(encoded) == 1


@pytest.mark.parametrize(
    ("names", "message"), [((), "empty"), (("cat", " "), "blank"), (("cat", "dog", "cat"), "'cat' more than once")]
)
def test_wrong_names(clip: ClipBackbone, tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VocabularyEncoder(clip, tmp_path).encode(names)


def test_braces_in_names_are_taken_as_they_are(clip: ClipBackbone, tmp_path: Path) -> None:
    assert VocabularyEncoder(clip, tmp_path).encode(["{0}", "{cat}"]).embeddings.shape == (2, 24)


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("cat", "cat"),
        ("wall-other", "wall"),
        ("tree-merged", "tree"),
        ("furniture-stuff", "furniture"),
        ("wall-other-merged", "wall"),
        ("window-blind", "window-blind"),
        ("other", "other"),
    ],
)
def test_clean_name(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGIONSPOT_CACHE", "somewhere")
    assert default_cache_dir() == Path("somewhere/vocabulary")
    monkeypatch.delenv("REGIONSPOT_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "regionspot" / "vocabulary"


def test_words() -> None:
    assert parse_vocabulary("cat, dog,coffee cup ") == ("cat", "dog", "coffee cup")
    assert parse_vocabulary("cat") == ("cat",)


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffcat\r\n\r\n  café au lait, hot \n".encode())
    assert parse_vocabulary(str(path)) == ("cat", "café au lait, hot")


def test_annotation_file(tmp_path: Path) -> None:
    path = tmp_path / "lvis.json"
    categories = [{"id": 3, "name": "zebra", "frequency": "r"}, {"id": 1, "name": "cat", "synonyms": ["kitty"]}]
    path.write_text(json.dumps({"images": [], "categories": categories}))
    assert parse_vocabulary(str(path)) == ("cat", "zebra")


@pytest.mark.parametrize(("preset", "count", "member"), [("coco", 80, "hair drier"), ("imagenet", 998, "tench")])
def test_presets(preset: str, count: int, member: str) -> None:
    names = parse_vocabulary(preset)
    assert len(names) == len(set(names)) == count
    assert member in names


def test_mini_preset() -> None:
    assert "plain purple toy" in parse_vocabulary("mini")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "vocabulary '': the vocabulary is empty"),
        (" ", "empty"),
        ("cat,,dog", "name 1 of the vocabulary is blank"),
        ("cat,dog,cat", "'cat' more than once"),
        ("absent.txt", "absent.txt cannot be read"),
        ("absent.json", "absent.json cannot be read"),
    ],
)
def test_wrong_vocabularies(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_vocabulary(spec)


@pytest.mark.parametrize("content", ["[]", "{}", '{"categories": [{"id": 1}]}', '{"categories": ', "null"])
def test_other_json_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(InputError, match="not an annotation file in COCO or LVIS format"):
        parse_vocabulary(str(path))


def test_empty_and_binary_text_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match="empty"):
        parse_vocabulary(str(tmp_path / "empty.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="cannot be read"):
        parse_vocabulary(str(tmp_path / "binary.txt"))


def test_big_clip_is_not_needed_for_its_size() -> None:
    with torch.device("meta"):
        assert build_clip("ViT-L-14").vocab_size == 49408


def test_a_memory_keeps_the_words_that_were_asked_for_last(clip: ClipBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = EmbeddingMemory(2)
    encoder = VocabularyEncoder(clip, templates=["{}."], store=memory)
    first = encoder.encode(["cat", "dog"])
    counts = count_texts(clip, monkeypatch)
    assert np.array_equal(encoder.encode(["dog", "cat"]).embeddings, first.embeddings[::-1]) and counts == []
    encoder.encode(["bird"])  # pushes out the dog, which was asked for before the cat
    assert len(memory) == 2 and "cat" in memory and "dog" not in memory and counts == [1]
