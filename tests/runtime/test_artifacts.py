"""A directory of artefacts: what its manifest says, what is refused, and what opens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regionspot.errors import ArtifactError, InputError
from regionspot.mini.architecture import CLIP_IMAGE_SIZE
from regionspot.runtime.artifacts import MANIFEST, TOKENIZER, GraphEntry, Manifest, _checksum
from regionspot.runtime.engine_file import file_sha256
from regionspot.runtime.graph_spec import Range
from regionspot.runtime.opening import choose_artifacts, open_pipeline, open_runner
from regionspot.runtime.pipeline import CPU_PROMPT_CHUNK, GPU_PROMPT_CHUNK, NATIVE_PROMPT_CHUNK

HEAD = ("region_head", "onnx", "fp32")
HEAD_FILE = "onnx/fp32/region_head.onnx"


@pytest.fixture
def copied(mini_artifacts: Path, tmp_path: Path) -> Path:
    """Artefacts to damage."""
    return Path(shutil.copytree(mini_artifacts, tmp_path / "artifacts"))


def edit(
    directory: Path, change: Callable[[dict[str, Any]], object], recompute: bool = True
) -> None:
    """Change a manifest as a careful person would, its checksum included, or as a careless one."""
    path = directory / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    if recompute:
        content["checksum"] = _checksum(content)
    path.write_text(json.dumps(content))


def forge_hash(directory: Path, name: str) -> None:
    """Put the SHA-256 that a file has now in place of the one it had."""

    def change(content: dict[str, Any]) -> None:
        for entry in content["graphs"]:
            if name in entry["files"]:
                entry["files"][name] = entry["sha256"] = file_sha256(directory / name)

    edit(directory, change)


def entry_of(directory: Path, key: tuple[str, str, str] = HEAD) -> tuple[Manifest, GraphEntry]:
    manifest = Manifest.load(directory)
    return manifest, manifest.find(*key)


def test_manifest_says_what_others_read(mini_artifacts: Path) -> None:
    content = json.loads((mini_artifacts / MANIFEST).read_text())
    keys = {"name", "file", "sha256", "format", "precision", "max_abs_diff", "cosine", "passed"}
    kinds = [entry["format"] for entry in content["graphs"]]
    assert sorted(kinds) == ["native", *["onnx"] * 6]
    for entry in content["graphs"]:
        assert keys <= set(entry)
        assert entry["passed"] is True and entry["precision"] == "fp32"
        assert entry["max_abs_diff"] < 1e-3 and entry["cosine"] > 0.999999
        assert file_sha256(mini_artifacts / entry["file"]) == entry["sha256"]
        assert {"inputs", "outputs", "ranges", "tolerance", "versions", "weights"} <= set(entry)
    assert content["model"]["name"] == "regionspot_mini"
    assert content["preprocessing"]["padding"] == "zero, after normalisation"
    assert {"git_commit", "source", "tolerances", "checksum"} <= set(content)
    (row,) = content["end_to_end"]
    assert row["passed"] is True and row["top1_agreement"] == 1.0 and row["images"] == 2
    assert str(mini_artifacts) not in json.dumps(content)


def test_written_and_read_again_it_is_the_same(mini_artifacts: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(mini_artifacts)
    replace(manifest, directory=tmp_path).save()
    assert replace(Manifest.load(tmp_path), directory=mini_artifacts) == manifest


def test_entries_are_put_in_replaced_and_taken_out(mini_artifacts: Path) -> None:
    manifest, entry = entry_of(mini_artifacts)
    changed = manifest.with_entry(replace(entry, passed=False))
    assert len(changed.graphs) == len(manifest.graphs) and changed.find(*HEAD).passed is False
    half = manifest.with_entry(replace(entry, precision="fp16"))
    assert half.precisions("onnx") == ["fp32", "fp16"]
    assert half.without((HEAD[0], "onnx", "fp16")) == manifest


def test_a_model_out_of_artefacts(mini_artifacts: Path) -> None:
    with open_pipeline(mini_artifacts) as pipeline:
        assert (pipeline.name, pipeline.runtime, pipeline.precision) == (
            "regionspot_mini",
            "onnxruntime",
            "fp32",
        )
        encoded = pipeline.encode_clip(np.zeros((1, CLIP_IMAGE_SIZE, CLIP_IMAGE_SIZE, 3), np.uint8))
        assert (
            encoded.shape == (1, pipeline.info.num_patch_tokens, 192) and np.isfinite(encoded).all()
        )
        assert pipeline.fingerprint("region_head") == entry_of(mini_artifacts)[1].sha256


def test_class_names_are_encoded_by_what_travels_with_the_artefacts(copied: Path) -> None:
    manifest = Manifest.load(copied)
    assert len(manifest.templates) == 81 and all(
        "{}" in template for template in manifest.templates
    )
    edit(copied, lambda content: content.update(templates=["a drawing of a {}"]))
    with open_pipeline(copied) as pipeline:
        assert pipeline.text_encoder.templates == ("a drawing of a {}",)
        assert pipeline.text_encoder.tokenizer(["a toy"], 8)[0, 0] == 49406
    path = copied / TOKENIZER
    path.write_bytes(path.read_bytes().replace(b"toy", b"tow", 1))
    with (
        open_pipeline(copied) as pipeline,
        pytest.raises(ArtifactError, match=r"tokenizer\.json is not the file that was"),
    ):
        _ = pipeline.text_encoder
    path.unlink()
    with (
        open_pipeline(copied) as pipeline,
        pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read"),
    ):
        _ = pipeline.text_encoder


def test_masks_as_prompts_need_their_graph(mini_artifacts: Path) -> None:
    with (
        open_pipeline(mini_artifacts) as pipeline,
        pytest.raises(ArtifactError, match=r"--graphs sam_mask_prompt --onnx"),
    ):
        pipeline.check_mask_prompts()


def test_no_artefacts_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no artefacts.*regionspot-export --out"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1, 2]", "no manifest that this release can read"),
        ('{"format": "regionspot-artifacts-0"}', "no manifest that this release can read"),
        ('{"format": "regionspot-artifacts-2", "graphs": []}', "does not match its checksum"),
    ],
)
def test_no_manifest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Manifest.load(tmp_path)


def test_a_changed_manifest(copied: Path) -> None:
    edit(
        copied,
        lambda content: content["graphs"][0].update(passed=True, cosine=0.5),
        recompute=False,
    )
    with pytest.raises(ArtifactError, match=r"changed after it was written"):
        Manifest.load(copied)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resize", "OpenCV area"),
        ("layout", "NCHW"),
        ("channels", "BGR"),
        ("padding", "zero, before normalisation"),
    ],
)
def test_another_preprocessing(copied: Path, field: str, value: str) -> None:
    edit(copied, lambda content: content["preprocessing"].update({field: value}))
    with pytest.raises(ArtifactError, match=f"another preprocessing.*{field}: '{value}'"):
        Manifest.load(copied)


@pytest.mark.parametrize("key", ["preprocessing", "model", "graphs", "tolerances"])
def test_a_manifest_with_something_missing(copied: Path, key: str) -> None:
    edit(copied, lambda content: content.pop(key))
    with pytest.raises(ArtifactError, match=f"damaged or of another release.*{key}"):
        Manifest.load(copied)


def test_tensors_of_another_release(copied: Path) -> None:
    edit(copied, lambda content: content["graphs"][0]["outputs"][0].update(name="features"))
    with pytest.raises(ArtifactError, match="other tensors than this release's"):
        Manifest.load(copied)


def test_tensors_in_fp16_are_a_gpus(copied: Path) -> None:
    """Between graphs for GPUs: for a CPU they would be another release's."""
    graph = "sam_token_decoder_image"
    manifest = Manifest.load(copied)
    entry = manifest.find(graph, "onnx", "fp32")
    halved = replace(entry, precision="fp16", spec=entry.spec.with_half_tensors())
    of_gpu = replace(halved, format="onnx-gpu")
    manifest.with_entry(of_gpu).save()
    found = Manifest.load(copied).find(graph, "onnx-gpu", "fp16").spec
    assert found.half_tensors == ("image_embeddings", "image_projections")
    manifest.with_entry(halved).save()
    with pytest.raises(ArtifactError, match="other tensors than this release's"):
        Manifest.load(copied)


def test_a_graph_of_another_release(copied: Path) -> None:
    edit(copied, lambda content: content["graphs"][0].update(name="oracle"))
    with pytest.raises(ArtifactError, match="this release has no graph 'oracle'"):
        Manifest.load(copied)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.onnx", "..\\outside.onnx"])
def test_a_file_outside_the_directory(copied: Path, name: str) -> None:
    edit(copied, lambda content: content["graphs"][0].update(file=name, files={name: "0" * 64}))
    manifest = Manifest.load(copied)
    with pytest.raises(ArtifactError, match="outside its directory"):
        manifest.verify(manifest.graphs[0])


def test_one_weight_changed(copied: Path) -> None:
    path = copied / HEAD_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="its SHA-256 differs"):
        open_runner(*entry_of(copied))


def test_a_truncated_file(copied: Path) -> None:
    path = copied / HEAD_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="its SHA-256 differs"):
        open_runner(*entry_of(copied))
    forge_hash(copied, HEAD_FILE)
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load"):
        open_runner(*entry_of(copied))


def test_a_missing_companion(copied: Path) -> None:
    companion = f"{HEAD_FILE}.data"

    def add(content: dict[str, Any]) -> None:
        entry = next(one for one in content["graphs"] if one["name"] == "region_head")
        entry["files"][companion] = "0" * 64

    edit(copied, add)
    with pytest.raises(ArtifactError, match=r"not whole: .*region_head\.onnx\.data is missing"):
        open_runner(*entry_of(copied))


def test_an_output_renamed(copied: Path) -> None:
    import onnx

    model = onnx.load(copied / HEAD_FILE)
    old = model.graph.output[0].name
    model.graph.output[0].name = "scores"
    for node in model.graph.node:
        node.output[:] = ["scores" if name == old else name for name in node.output]
    onnx.save(model, copied / HEAD_FILE)
    forge_hash(copied, HEAD_FILE)
    with pytest.raises(ArtifactError, match="output logits is missing; output scores is unknown"):
        open_runner(*entry_of(copied))


def test_another_graph_under_its_name(copied: Path) -> None:
    shutil.copyfile(copied / "onnx/fp32/clip_image_encoder.onnx", copied / HEAD_FILE)
    forge_hash(copied, HEAD_FILE)
    with pytest.raises(ArtifactError, match=r"is not the graph region_head"):
        open_runner(*entry_of(copied))


def test_what_failed_is_not_opened_unless_asked(mini_artifacts: Path) -> None:
    manifest, entry = entry_of(mini_artifacts)
    failed = replace(entry, passed=False, reason="cosine 0.5 < 0.999")
    with pytest.raises(
        ArtifactError, match=r"region_head \(onnx, fp32\).*failed its parity check.*cosine 0\.5"
    ):
        open_runner(manifest, failed)
    with open_runner(manifest, failed, allow_failed=True) as runner:
        assert runner.spec.name == "region_head"


def test_what_was_never_compared_is_opened_with_a_warning(mini_artifacts: Path) -> None:
    manifest, entry = entry_of(mini_artifacts)
    with pytest.warns(UserWarning, match="never compared with the model.*regionspot parity torch"):
        open_runner(manifest, replace(entry, passed=None, reason="no GPU")).close()


def test_what_was_not_made(mini_artifacts: Path) -> None:
    manifest, entry = entry_of(mini_artifacts)
    with pytest.raises(ArtifactError, match="was not made: the disk was full"):
        open_runner(
            manifest, replace(entry, file=None, files={}, reason="the disk was full", passed=None)
        )


def test_what_is_not_there_is_said_with_the_way_to_make_it(mini_artifacts: Path) -> None:
    manifest = Manifest.load(mini_artifacts)
    with pytest.raises(
        ArtifactError,
        match=r"it has onnx fp32\. Make it: regionspot-export .*--openvino --precision",
    ):
        manifest.find("region_head", "openvino", "int8")
    with pytest.raises(ArtifactError, match="none of that name"):
        manifest.find("sam_mask_decoder", "onnx", "fp32")


DEVICES = ("cpu", "cuda", "tensorrt:1")


@pytest.mark.parametrize(
    ("runtime", "precision", "error", "message"),
    [
        ("torch", None, InputError, "torch runs the weights themselves"),
        ("abacus", None, InputError, "no runtime 'abacus'"),
        ("onnxruntime", "fp4", InputError, "no precision 'fp4'"),
        (
            "onnxruntime",
            "fp16",
            ArtifactError,
            "nothing for onnxruntime in fp16; it holds onnx fp32",
        ),
        ("tensorrt-rtx", None, ArtifactError, "--trt-rtx"),
    ],
)
def test_choices_that_are_none(
    mini_artifacts: Path, runtime: str, precision: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        choose_artifacts(Manifest.load(mini_artifacts), runtime, precision)


def test_openvino_opens_onnx_where_there_is_no_ir(mini_artifacts: Path) -> None:
    assert choose_artifacts(Manifest.load(mini_artifacts), "openvino", None) == ("onnx", "fp32")


def test_a_format_is_preferred_where_it_has_the_whole_pipeline(mini_artifacts: Path) -> None:
    manifest, entry = entry_of(mini_artifacts)
    one_ir = manifest.with_entry(replace(entry, format="openvino"))
    assert choose_artifacts(one_ir, "openvino", None) == ("onnx", "fp32")
    of_fp16 = [replace(one, precision="fp16") for one in manifest.graphs]
    for changes in ({"passed": False}, {"file": None}):
        halves = replace(
            manifest.with_entry(replace(entry, **changes)), graphs=(*manifest.graphs, *of_fp16)
        )
        assert choose_artifacts(halves, "onnxruntime", None) == ("onnx", "fp32")
        halves = halves.with_entry(replace(entry, **changes))
        assert choose_artifacts(halves, "onnxruntime", None) == ("onnx", "fp16")
    assert (
        replace(manifest, graphs=()).with_entry(replace(entry, passed=False)).precisions("onnx")
        == []
    )


def test_a_gpu_takes_the_graphs_for_gpus_in_half_precision(mini_artifacts: Path) -> None:
    manifest = Manifest.load(mini_artifacts)
    both = [
        replace(one, format="onnx-gpu", precision=precision)
        for one in manifest.graphs
        for precision in ("fp32", "fp16")
    ]
    mixed = replace(manifest, graphs=(*manifest.graphs, *both))
    chosen = {device: choose_artifacts(mixed, "onnxruntime", None, device) for device in DEVICES}
    assert chosen == {
        "cpu": ("onnx", "fp32"),
        "cuda": ("onnx-gpu", "fp16"),
        "tensorrt:1": ("onnx-gpu", "fp16"),
    }
    assert choose_artifacts(mixed, "onnxruntime", "fp32", "cuda") == ("onnx-gpu", "fp32")
    assert choose_artifacts(manifest, "onnxruntime", None, "cuda") == ("onnx", "fp32")
    assert choose_artifacts(mixed, "onnxruntime", None, "cpu", "onnx-gpu") == ("onnx-gpu", "fp32")
    with pytest.raises(ArtifactError, match="nothing for onnxruntime"):
        choose_artifacts(manifest, "onnxruntime", None, "cpu", "onnx-gpu")


def test_what_failed_is_chosen_where_there_is_nothing_else(mini_artifacts: Path) -> None:
    """So that opening it says why, and comparing it is possible."""
    manifest = Manifest.load(mini_artifacts)
    failed = replace(manifest, graphs=tuple(replace(one, passed=False) for one in manifest.graphs))
    assert choose_artifacts(failed, "onnxruntime", None) == ("onnx", "fp32")
    not_made = replace(
        manifest, graphs=tuple(replace(one, passed=False, file=None) for one in manifest.graphs)
    )
    with pytest.raises(ArtifactError, match="nothing for onnxruntime; it holds no graph"):
        choose_artifacts(not_made, "onnxruntime", None)


def test_a_format_that_the_runtime_cannot_open(mini_artifacts: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"tensorrt cannot open region_head \(onnx, fp32\): choose onnxruntime or open",
    ):
        open_runner(*entry_of(mini_artifacts), runtime="tensorrt")


@pytest.mark.parametrize(
    ("best", "chunk"), [("cuda", GPU_PROMPT_CHUNK), ("cpu", NATIVE_PROMPT_CHUNK)]
)
def test_the_chunk_is_that_of_the_device_that_is_used(
    mini_artifacts: Path, monkeypatch: pytest.MonkeyPatch, best: str, chunk: int
) -> None:
    monkeypatch.setattr("regionspot.runtime.ort_runner.best_device", lambda: best)
    assert open_pipeline(mini_artifacts).prompt_chunk == chunk
    assert open_pipeline(mini_artifacts, device="cpu").prompt_chunk == NATIVE_PROMPT_CHUNK
    assert (
        open_pipeline(mini_artifacts, device="cpu", native=False).prompt_chunk == CPU_PROMPT_CHUNK
    )


def test_ranges_are_those_it_was_made_for(copied: Path) -> None:
    edit(copied, lambda content: content["graphs"][4]["ranges"].update(regions=[1, 4, 20]))
    manifest = Manifest.load(copied)
    assert manifest.graphs[4].spec.ranges["regions"] == Range(1, 4, 20)
    edit(copied, lambda content: content["graphs"][4]["ranges"].update(regions=[9, 4, 20]))
    with pytest.raises(ArtifactError, match="damaged or of another release"):
        Manifest.load(copied)


def test_reading_artefacts_loads_no_torch() -> None:
    code = (
        "import sys, regionspot.runtime.run_graph; print({'torch', 'onnx', 'onnxruntime'} & "
        "set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
