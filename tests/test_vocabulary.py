"""Class names to embeddings: the template ensemble, the cache on disk, and the ways to name a
vocabulary.
"""

from __future__ import annotations

import threading
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regionspot import vocabulary
from regionspot.errors import ArtifactError, InputError
from regionspot.modeling.clip import ClipBackbone, build_clip
from regionspot.structures import FloatArray
from regionspot.vocabulary import (
    EmbeddingDirectory,
    EmbeddingMemory,
    VocabularyEncoder,
    VocabularyWarning,
    clean_coco_name,
    default_cache_dir,
    parse_vocabulary,
)

# after regionspot.modeling.clip, which makes it importable everywhere
import open_clip  # isort: skip

NAMES = ("cat", "coffee cup", "wall-other-merged")


def make_clip(seed: int) -> ClipBackbone:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vision = open_clip.CLIPVisionCfg(
            layers=1, width=32, head_width=16, patch_size=8, image_size=16
        )
        return ClipBackbone(
            open_clip.CLIP(24, vision, open_clip.CLIPTextCfg(width=32, heads=2, layers=1))
        )


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


def test_embedding_is_the_mean_of_unnormalised_templates(
    clip: ClipBackbone, tmp_path: Path
) -> None:
    encoded = VocabularyEncoder(clip, tmp_path).encode(NAMES)
    assert encoded.names == NAMES
    assert encoded.embeddings.shape == (3, 24) and encoded.embeddings.dtype == np.float32
    templates = [*open_clip.OPENAI_IMAGENET_TEMPLATES, lambda name: f"{name}."]
    assert len(templates) == len(clip.templates) == 81
    for word, embedding in zip(NAMES, encoded.embeddings, strict=True):
        texts = open_clip.tokenize([template(word) for template in templates])
        mean = clip.clip.encode_text(texts).mean(dim=0)
        np.testing.assert_allclose(embedding, (mean / mean.norm()).numpy(), atol=1e-6)


def test_a_words_embedding_does_not_depend_on_its_company(
    clip: ClipBackbone, tmp_path: Path
) -> None:
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


def test_second_time_comes_from_the_cache(
    clip: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = VocabularyEncoder(clip, tmp_path).encode(NAMES)
    monkeypatch.setattr(clip, "encode_text", lambda _: pytest.fail("the encoder ran"))
    second = VocabularyEncoder(clip, tmp_path).encode(NAMES[::-1])
    assert np.array_equal(second.embeddings, first.embeddings[::-1])


def test_one_new_word_costs_one_word(
    clip: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    VocabularyEncoder(clip, tmp_path).encode(NAMES)
    counts = count_texts(clip, monkeypatch)
    VocabularyEncoder(clip, tmp_path).encode((*NAMES, "dog"))
    assert sum(counts) == 81


def test_names_that_clean_to_one_word_are_encoded_once(
    clip: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_texts(clip, monkeypatch)
    encoder = VocabularyEncoder(clip, tmp_path, clean_coco_suffixes=True)
    encoded = encoder.encode(("rock", "rock-merged"), same_meaning="ignore")
    assert sum(counts) == 81 and encoder.word("rock-merged") == "rock"
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
    broken = {
        "flipped": flipped,
        "cut": content[:-4],
        "empty": b"",
        "swapped": entries[0].read_bytes(),
    }[damage]
    entries[1].write_bytes(broken)
    counts = count_texts(clip, monkeypatch)
    second = VocabularyEncoder(clip, tmp_path).encode(NAMES)
    assert sum(counts) == 81
    np.testing.assert_allclose(second.embeddings, first.embeddings, atol=1e-6)
    assert entries[1].read_bytes() != broken


def test_other_weights_templates_and_tokenizers_have_other_entries(
    clip: ClipBackbone, tmp_path: Path
) -> None:
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


def test_strangers_words_stay_as_they_are(clip: ClipBackbone, tmp_path: Path) -> None:
    plain = VocabularyEncoder(clip, tmp_path)
    names = ("wall", "wall-other", "wall-stuff")
    encoded = plain.encode(names, same_meaning="ignore").embeddings
    assert len({embedding.tobytes() for embedding in encoded}) == 3
    cleaned = VocabularyEncoder(clip, tmp_path, clean_coco_suffixes=True).encode(
        names, same_meaning="ignore"
    )
    # also where the store knows both words
    np.testing.assert_array_equal(cleaned.embeddings, encoded[[0, 0, 0]])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "empty"),
        (("cat", " "), "blank"),
        (("cat", "dog", "cat"), "'cat' more than once"),
        ("cat", "got one text"),
        ((b"cat",), "decode it"),
        ({0: "cat"}, "a dictionary"),
        ((0, 1), "name each class by text"),
        (("cat", None), "is None"),
        ((("cat",),), "a tuple"),
        (("\ud800",), "not valid Unicode"),
        (None, "must be a list"),
    ],
)
def test_wrong_names(clip: ClipBackbone, tmp_path: Path, names: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VocabularyEncoder(clip, tmp_path).encode(names)


@pytest.mark.parametrize("templates", ["a {}.", [], ["a photo"], [None]])
def test_wrong_templates(clip: ClipBackbone, tmp_path: Path, templates: Any) -> None:
    with pytest.raises(InputError, match="template"):
        VocabularyEncoder(clip, tmp_path, templates)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_what_is_no_embedding_is_never_stored(
    clip: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encoder = VocabularyEncoder(clip, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            clip, "encode_text", lambda texts: np.full((len(texts), 24), value, np.float32)
        )
        with pytest.raises(
            ArtifactError, match=r"no finite embedding of 'cat': its weights are damaged"
        ):
            encoder.encode(["cat"])
    assert not list(tmp_path.rglob("*.*"))
    encoder.store.write("cat", np.full(24, value, np.float32))  # as earlier versions did
    if not np.isfinite(value):
        assert encoder.store.read("cat") is None
        assert np.isfinite(encoder.encode(["cat"]).embeddings).all()


class TestSameMeaning:
    NAMES = ("cat", "red toy", "dog", "Red  Toy", "caf\u00e9", "cafe\u0301")

    def test_is_a_warning_that_names_them(self, clip: ClipBackbone, tmp_path: Path) -> None:
        with pytest.warns(VocabularyWarning) as told:
            VocabularyEncoder(clip, tmp_path).encode(self.NAMES)
        assert [str(warning.message) for warning in told] == [
            "'red toy' and 'Red  Toy' (cosine 1.0000); 'caf\u00e9' and 'cafe\u0301' (cosine "
            "1.0000) look the same to this text encoder; their scores are shared"
        ]
        assert told[0].filename == __file__

    def test_or_an_error_or_nothing(self, clip: ClipBackbone, tmp_path: Path) -> None:
        encoder = VocabularyEncoder(clip, tmp_path)
        with pytest.raises(
            InputError, match=r"'red toy' and 'Red  Toy' .* rename them, or merge their classes"
        ):
            encoder.encode(self.NAMES, same_meaning="error")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder.encode(self.NAMES, same_meaning="ignore")
            encoder.encode(("cat", "red toy"), same_meaning="error")

    def test_suffixes_that_are_cleaned_away(self, clip: ClipBackbone, tmp_path: Path) -> None:
        encoder = VocabularyEncoder(clip, tmp_path, clean_coco_suffixes=True)
        with pytest.raises(InputError, match="'wall-other' and 'wall-stuff'"):
            encoder.encode(["wall-other", "wall-stuff"], same_meaning="error")

    def test_names_that_are_cut(self, clip: ClipBackbone, tmp_path: Path) -> None:
        encoder = VocabularyEncoder(clip, tmp_path)
        with pytest.warns(
            VocabularyWarning, match=r"reads 77 tokens and cuts the end of 'very very.*thing'$"
        ):
            encoder.encode(["very " * 80 + "long thing", "cat", "very " * 30 + "long thing"])
        with pytest.raises(
            InputError,
            match=r"reads 77 tokens, and 'very very.*are the same that far: shorten them",
        ):
            encoder.encode(["very " * 80 + "long thing", "very " * 80 + "short thing"])


class TestUnknownWords:
    """A text tower of few words, as regionspot_mini's, has embeddings of zeros for the tokens of
    all others.
    """

    @pytest.fixture
    def of_few_words(self, clip: ClipBackbone) -> ClipBackbone:
        copy = deepcopy(clip)
        known = copy.tokenizer(["a cat and a dog"]).unique()
        with torch.no_grad():
            rows = copy.clip.token_embedding.weight[known].clone()
            copy.clip.token_embedding.weight.zero_()
            copy.clip.token_embedding.weight[known] = rows
        return copy

    def test_are_named(self, of_few_words: ClipBackbone, tmp_path: Path) -> None:
        message = r"has not seen in training all words of 'a zebra', 'Zebra crossing': scores"
        with pytest.warns(VocabularyWarning, match=message):
            VocabularyEncoder(of_few_words, tmp_path).encode(["cat", "a zebra", "Zebra crossing"])

    def test_a_tower_of_all_words_knows_all(
        self, clip: ClipBackbone, of_few_words: ClipBackbone, tmp_path: Path
    ) -> None:
        assert clip.known_tokens() is None
        assert len(of_few_words.known_tokens() or ()) == len(
            of_few_words.tokenizer(["a cat and a dog"]).unique()
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            VocabularyEncoder(clip, tmp_path / "all").encode(["cat", "zebra"])
            VocabularyEncoder(of_few_words, tmp_path / "few").encode(["a cat", "dog and cat"])
            VocabularyEncoder(of_few_words, tmp_path / "few").encode(
                ["cat", "zebra"], same_meaning="ignore"
            )


def test_progress_of_many_new_words(
    clip: ClipBackbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(vocabulary, "PROGRESS_FROM", 3)
    encoder = VocabularyEncoder(clip, tmp_path, templates=["{}."])
    encoder.encode(["cat", "dog"])
    encoder.encode(["cat", "bird", "cow", "owl"], progress=False)
    assert capsys.readouterr().err == ""
    encoder.encode(["cat", "pig", "hen", "ape"])
    assert "encoding class names: 3/3 names" in capsys.readouterr().err
    encoder.encode(["cat", "pig", "hen", "ape"])
    assert capsys.readouterr().err == ""


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
        ("-other", "-other"),
        (" -stuff-merged", " -stuff"),
    ],
)
def test_clean_coco_name(name: str, cleaned: str) -> None:
    assert clean_coco_name(name) == cleaned


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGIONSPOT_CACHE", "somewhere")
    assert default_cache_dir() == Path("somewhere/vocabulary")
    monkeypatch.delenv("REGIONSPOT_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "regionspot" / "vocabulary"


def test_words() -> None:
    assert parse_vocabulary("cat, dog,coffee cup ") == ("cat", "dog", "coffee cup")
    assert parse_vocabulary("cat") == ("cat",)
    assert parse_vocabulary("cat, dog\n\nwall/ceiling,\nbird") == (
        "cat",
        "dog",
        "wall/ceiling",
        "bird",
    )
    assert parse_vocabulary("and/or, " + "x" * 5000) == ("and/or", "x" * 5000)


def test_a_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classes").write_text("cat\ncoffee cup, hot\n")
    (tmp_path / "cat").mkdir()
    assert parse_vocabulary(f" {tmp_path / 'classes'} ") == ("cat", "coffee cup, hot")
    monkeypatch.chdir(tmp_path)
    assert parse_vocabulary("classes") == ("cat", "coffee cup, hot")
    assert parse_vocabulary("cat") == ("cat",)  # a folder lists no names


@pytest.mark.parametrize(
    ("preset", "count", "member"), [("coco", 80, "hair drier"), ("imagenet", 998, "tench")]
)
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
        ("absent.NAMES", "absent.NAMES cannot be read: No such file"),
        ("/absent/classes", "/absent/classes cannot be read: No such file"),
        ("cat,\ud800", "not valid Unicode"),
        (None, "a vocabulary is text"),
        (("cat", "dog"), "a vocabulary is text"),
    ],
)
def test_wrong_vocabularies(spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_vocabulary(spec)


def test_big_clip_is_not_needed_for_its_size() -> None:
    with torch.device("meta"):
        assert build_clip("ViT-L-14").vocab_size == 49408


def test_a_memory_keeps_the_words_that_were_asked_for_last(
    clip: ClipBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = EmbeddingMemory(2)
    encoder = VocabularyEncoder(clip, templates=["{}."], store=memory)
    first = encoder.encode(["cat", "dog"])
    counts = count_texts(clip, monkeypatch)
    assert (
        np.array_equal(encoder.encode(["dog", "cat"]).embeddings, first.embeddings[::-1])
        and counts == []
    )
    encoder.encode(["bird"])  # pushes out the dog, which was asked for before the cat
    assert len(memory) == 2 and "cat" in memory and "dog" not in memory and counts == [1]


def test_a_memory_for_several_threads() -> None:
    memory, failures = EmbeddingMemory(2), []

    def use(own: int) -> None:
        try:
            for index in range(3000):
                word = str((index + own) % 4)
                memory.write(word, np.full(2, float(word), np.float32))
                kept = memory.read(str(index % 4))
                assert kept is None or kept[0] == index % 4
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(own,)) for own in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(memory) == 2


def test_a_memory_with_a_directory_remembers_and_stays_bounded(tmp_path: Path) -> None:
    def embedding(word: str) -> FloatArray:
        return np.array([len(word), ord(word[-1])], np.float32)

    def opened() -> EmbeddingMemory:
        return EmbeddingMemory(3, EmbeddingDirectory(tmp_path, "key", 2))

    memory = opened()
    words = [f"word {index}" for index in range(6)]
    for word in words:
        memory.write(word, embedding(word))
    assert len(memory) == len(list(tmp_path.rglob("*.bin"))) == 3
    assert memory.read("word 0") is None
    again = opened()
    for word in words[3:]:
        np.testing.assert_array_equal(again.read(word), embedding(word))
    for index in range(3):
        again.write(f"new {index}", embedding("new"))
    assert len(again) == len(list(tmp_path.rglob("*.bin"))) == 3
    for start in range(4):
        one = opened()
        for index in range(5):
            one.write(f"{start} {index}", embedding("x"))
        assert len(list(tmp_path.rglob("*.bin"))) <= 6


def test_a_directory_for_several_writers(tmp_path: Path) -> None:
    store = EmbeddingDirectory(tmp_path, "key", 2)
    threads = [
        threading.Thread(target=store.write, args=("cat", np.array([1, 2], np.float32)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(store.read("cat"), [1, 2])
    assert len(list((tmp_path / "key").iterdir())) == 1
