"""Model repositories: what lies in them, adding a target, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regionspot.errors import ArtifactError, InputError
from regionspot.mini.world import CATEGORIES
from regionspot.runtime.artifacts import Manifest
from regionspot.runtime.graphs import served_graphs
from regionspot.runtime.opening import open_pipeline
from regionspot.serving.backends.recognizer import read_vocabulary
from regionspot.serving.contract import MODEL, Limits
from regionspot.serving.model_config import parameters_of, read_config
from regionspot.serving.repository import (
    RepositoryOptions,
    _text_runtime,
    make_repository,
    models_of,
    registered_words,
    targets_of,
    write_vocabulary,
)
from regionspot.structures import Vocabulary
from regionspot.vocabulary import VocabularyEncoder


def test_layout(repository: Path) -> None:
    assert targets_of(repository) == ["cpu"] and models_of(repository, "cpu")[0] == MODEL
    assert set(models_of(repository, "cpu")) == {MODEL, *served_graphs()}
    for name in served_graphs():
        assert (repository / name / "1" / f"{name}.onnx").is_file() and (
            repository / name / "1" / "model.py"
        ).is_file()
    assert not list(repository.glob("*/config.pbtxt"))  # a configuration for each target instead


def test_it_is_itself_a_directory_of_artefacts(repository: Path) -> None:
    manifest = Manifest.load(repository)
    assert {entry.name for entry in manifest.graphs} == set(served_graphs())
    for entry in manifest.graphs:
        manifest.verify(entry)
    with open_pipeline(repository, "onnxruntime") as pipeline:
        assert pipeline.encode_tokens(np.array([[49406, 320, 49407]], np.int32)).shape == (1, 128)


def test_registered_words_are_those_of_the_encoder(
    repository: Path, encoder: VocabularyEncoder
) -> None:
    found = read_vocabulary(repository / MODEL / "1" / "vocabularies" / "cpu" / "pets.npz")
    expected = encoder.encode(["cat", "dog"])
    assert found.names == expected.names and np.array_equal(found.embeddings, expected.embeddings)
    parameters = parameters_of(read_config(repository / MODEL / "configs" / "cpu.pbtxt"))
    vocabularies = json.loads(parameters["vocabularies"])
    assert vocabularies["pets"] == ["cat", "dog"] and len(vocabularies["mini"]) == len(CATEGORIES)
    assert Limits.from_json(json.loads(parameters["limits"])) == Limits()


def test_a_second_target_leaves_the_first_as_it_is(
    mini_artifacts_with_masks: Path, engines: Path, tmp_path: Path
) -> None:
    out = tmp_path / "repository"
    make_repository(mini_artifacts_with_masks, out, RepositoryOptions())
    before = (out / MODEL / "configs" / "cpu.pbtxt").read_bytes()
    make_repository(mini_artifacts_with_masks, out, RepositoryOptions(target="onnxruntime"))
    make_repository(engines, out, RepositoryOptions("tensorrt"))
    assert targets_of(out) == ["cpu", "tensorrt", "onnxruntime"]
    assert (out / MODEL / "configs" / "cpu.pbtxt").read_bytes() == before
    config = read_config(out / "region_head" / "configs" / "tensorrt.pbtxt")
    assert (config.backend, config.default_model_filename) == ("tensorrt", "region_head.plan")
    parameters = parameters_of(read_config(out / MODEL / "configs" / "tensorrt.pbtxt"))
    assert json.loads(parameters["run_graphs"]) == "triton"


def test_without_the_optional_graphs(mini_artifacts: Path, tmp_path: Path) -> None:
    assert "sam_mask_decoder" not in make_repository(
        mini_artifacts, tmp_path / "repository", RepositoryOptions()
    )
    bare = Path(shutil.copytree(mini_artifacts, tmp_path / "bare"))
    Manifest.load(bare).without(("clip_text_encoder", "onnx", "fp32")).save()
    with pytest.raises(
        ArtifactError, match="and no words be served: add it with regionspot-export"
    ):
        make_repository(bare, tmp_path / "other", RepositoryOptions())
    with pytest.raises(
        ArtifactError, match="has no clip_text_encoder that runs on a CPU, so no vocabulary"
    ):
        make_repository(
            bare, tmp_path / "other", RepositoryOptions(vocabularies={"pets": "cat,dog"})
        )


REFUSED = {
    "unknown target": (
        RepositoryOptions(target="gpu"),
        "there is no target 'gpu': choose one of cpu, tensorrt",
    ),
    "no engines": (RepositoryOptions(target="tensorrt"), "holds nothing for tensorrt"),
    "no precision": (RepositoryOptions(precision="int8"), "holds nothing for onnxruntime in int8"),
    "runtime of a GPU": (
        RepositoryOptions(target="onnxruntime", runtime="openvino"),
        "in Triton's own backend",
    ),
    "runtime": (
        RepositoryOptions(runtime="tensorrt"),
        "on a CPU the runtime is openvino or onnxruntime",
    ),
    "name": (
        RepositoryOptions(vocabularies={"../x": "cat,dog"}),
        "'../x' cannot be the name of a vocabulary",
    ),
    "words": (RepositoryOptions(vocabularies={"x": "cat,cat"}), "more than once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, mini_artifacts: Path, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises((InputError, ArtifactError), match=message):
        make_repository(mini_artifacts, tmp_path / "repository", options)


def test_a_folder_that_is_something_else(mini_artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="is not empty, and no model repository"):
        make_repository(mini_artifacts, tmp_path, RepositoryOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(
        ArtifactError,
        match=r"is no model repository of regionspot\. Make one: regionspot-serve init",
    ):
        targets_of(tmp_path)


def test_a_repository_of_another_model(mini_artifacts: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(mini_artifacts, tmp_path / "other"))
    manifest = Manifest.load(other)
    replace(manifest, model=replace(manifest.model, logit_scale=1.0)).save()
    out = tmp_path / "repository"
    make_repository(mini_artifacts, out, RepositoryOptions(vocabularies={}))
    with pytest.raises(InputError, match="or other weights of it: choose another --out"):
        make_repository(other, out, RepositoryOptions(vocabularies={}))


@pytest.mark.parametrize("change", ["precision", "weights"])
def test_graphs_that_would_take_each_others_place(
    change: str, mini_artifacts: Path, tmp_path: Path
) -> None:
    """Two precisions of a format have one file name in a model's folder; other weights would answer
    otherwise.
    """
    other = Path(shutil.copytree(mini_artifacts, tmp_path / "other"))
    manifest = Manifest.load(other)
    changes = {
        "precision": {"precision": "fp16"},
        "weights": {"format": "openvino", "weights": "of another head"},
    }[change]
    for entry in manifest.graphs:
        manifest = manifest.without(entry.key).with_entry(replace(entry, **changes))  # type: ignore[arg-type]
    manifest.save()
    out = tmp_path / "repository"
    make_repository(mini_artifacts, out, RepositoryOptions(vocabularies={}))
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(
        InputError,
        match=r"would put (other weights|another precision of the same format) beside it",
    ):
        make_repository(
            other, out, RepositoryOptions(vocabularies={}, precision=manifest.graphs[0].precision)
        )
    assert (out / "manifest.json").read_bytes() == before
    for entry in Manifest.load(out).graphs:
        Manifest.load(out).verify(entry)


def test_graphs_that_failed_are_not_served(mini_artifacts: Path, tmp_path: Path) -> None:
    failing = Path(shutil.copytree(mini_artifacts, tmp_path / "failing"))
    manifest = Manifest.load(failing)
    entry = manifest.find("region_head", "onnx", "fp32")
    manifest.with_entry(replace(entry, passed=False, reason="logits differ")).save()
    with pytest.raises(
        ArtifactError, match="failed its parity check, so it is not served: logits differ"
    ):
        make_repository(failing, tmp_path / "repository", RepositoryOptions())


def test_a_damaged_graph_is_not_served(mini_artifacts: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(mini_artifacts, tmp_path / "damaged"))
    path = damaged / "onnx" / "fp32" / "region_head.onnx"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        make_repository(damaged, tmp_path / "repository", RepositoryOptions())


def test_vocabularies_are_kept_until_they_are_dropped(mini_artifacts: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    steps = (
        (RepositoryOptions(), {"mini"}),
        (RepositoryOptions(vocabularies={"pets": "cat,dog"}), {"mini", "pets"}),
        (RepositoryOptions(vocabularies={"birds": "owl,tit"}), {"mini", "pets", "birds"}),
        (RepositoryOptions(drop_vocabularies=["mini", "birds"]), {"pets"}),
        (RepositoryOptions(vocabularies={"pets": "cat,hamster"}), {"pets"}),
    )
    for options, expected in steps:
        make_repository(mini_artifacts, out, options)
        words = registered_words(out, "cpu")
        files = (out / MODEL / "1" / "vocabularies" / "cpu").glob("*.npz")
        assert set(words) == {path.stem for path in files} == expected
        for path in (out / MODEL / "1" / "vocabularies" / "cpu").glob("*.npz"):
            assert read_vocabulary(path).names == words[path.stem]
    assert words == {"pets": ("cat", "hamster")}
    with pytest.raises(InputError, match="no vocabulary 'birds' to drop: the repository has pets"):
        make_repository(mini_artifacts, out, RepositoryOptions(drop_vocabularies=["birds"]))
    assert registered_words(out, "tensorrt") == {}


def test_vocabularies_on_disk(tmp_path: Path) -> None:
    vocabulary = Vocabulary(("猫", "naïve café"), np.eye(2, 5, dtype=np.float32))
    write_vocabulary(tmp_path / "v" / "x.npz", vocabulary)
    found = read_vocabulary(tmp_path / "v" / "x.npz")
    assert found.names == vocabulary.names and np.array_equal(
        found.embeddings, vocabulary.embeddings
    )
    assert [path.name for path in (tmp_path / "v").iterdir()] == ["x.npz"]
    (tmp_path / "v" / "x.npz").write_bytes(b"PK\3\4 cut short")
    with pytest.raises(ArtifactError, match="is no vocabulary"):
        read_vocabulary(tmp_path / "v" / "x.npz")


def test_words_are_registered_by_a_text_encoder_for_gpus_where_there_is_no_other(
    mini_artifacts: Path, tmp_path: Path
) -> None:
    """As `regionspot-export --trt` leaves it, which makes no ONNX file for CPUs."""
    manifest = Manifest.load(mini_artifacts)
    text = manifest.find("clip_text_encoder", "onnx", "fp32")
    moved = replace(
        manifest,
        graphs=tuple(
            replace(entry, format="onnx-gpu" if entry is text else "tensorrt")
            for entry in manifest.graphs
        ),
    )
    assert _text_runtime(moved, "fp16") == {
        "runtime": "onnxruntime",
        "precision": "fp32",
        "artefact_format": "onnx-gpu",
    }
    assert _text_runtime(moved.without(("clip_text_encoder", "onnx-gpu", "fp32")), "fp16") is None
    shutil.copytree(mini_artifacts, tmp_path / "moved")
    replace(moved, directory=tmp_path / "moved").save()
    with open_pipeline(
        tmp_path / "moved", "onnxruntime", "fp32", device="cpu", artefact_format="onnx-gpu"
    ) as pipeline:
        assert len(VocabularyEncoder(pipeline.text_encoder).encode(["cat", "dog"])) == 2
