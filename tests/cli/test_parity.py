"""`regionspot parity A B` from the command line's side; it finds what no checksum can."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from regionspot.cli.main import main
from regionspot.errors import ArtifactError
from regionspot.export.precision import write_half
from regionspot.export.sides import ParityOperand
from regionspot.runtime.artifacts import MANIFEST, Manifest, _checksum
from regionspot.runtime.engine_file import file_sha256

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def copied(mini_artifacts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini_artifacts, tmp_path / "artifacts"))


def parity(*arguments: str | Path) -> int:
    return main(["parity", "--images", "1", *map(str, arguments)])


def keep_only(directory: Path, *names: str) -> None:
    """Leave other graphs out of a manifest: quicker to compare."""
    manifest = Manifest.load(directory)
    for entry in manifest.graphs:
        if entry.name not in names:
            manifest = manifest.without(entry.key)
    manifest.save()


def test_the_weights_and_their_artefacts(
    mini_artifacts: Path, tmp_path: Path, capsys: Captured
) -> None:
    figures = tmp_path / "figures.json"
    assert parity("torch", mini_artifacts, "--json", figures) == 0
    printed = capsys.readouterr().out
    assert "A: torch" in printed and f"B: {mini_artifacts} onnxruntime fp32" in printed
    content = json.loads(figures.read_text())
    assert content["passed"] is True and len(content["graphs"]) == 6
    assert {"name", "passed", "tolerance", "max_abs_diff", "cosine", "sqnr_db", "outputs"} <= set(
        content["graphs"][0]
    )
    assert content["end_to_end"]["top1_agreement"] == 1.0 and content["end_to_end"]["images"] == 1


def test_two_runtimes_of_the_same_files(copied: Path, capsys: Captured) -> None:
    keep_only(copied, "clip_image_encoder", "sam_token_decoder_image")
    assert parity(copied, f"{copied}:openvino") == 0
    printed = capsys.readouterr().out
    assert f"B: {copied} openvino fp32" in printed and printed.count("passed") == 2
    assert "end to end" not in printed


def test_one_weight_changed_with_every_checksum_forged(copied: Path, capsys: Captured) -> None:
    """What a hash cannot tell: a file that was changed, and hashed again."""
    name = "onnx/fp32/clip_image_encoder.onnx"
    model = onnx.load(copied / name)
    weight = next(one for one in model.graph.initializer if len(one.dims) == 4)  # of the patches
    values = np.array(numpy_helper.to_array(weight))
    values[0, 0, 0, 0] += 1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, copied / name)
    content: dict[str, Any] = json.loads((copied / MANIFEST).read_text())
    entry = next(one for one in content["graphs"] if one["file"] == name)
    entry["sha256"] = entry["files"][name] = file_sha256(copied / name)
    content["checksum"] = _checksum(content)
    (copied / MANIFEST).write_text(json.dumps(content))
    keep_only(copied, "clip_image_encoder", "sam_token_decoder_image")

    assert parity("torch", copied) == 1
    printed = capsys.readouterr().out
    assert "clip_image_encoder: patch_tokens: max|Δ|" in printed
    rows = {
        line.split()[0]: line.split()[-1]
        for line in printed.splitlines()
        if line.endswith(("passed", "FAILED"))
    }
    assert rows == {"clip_image_encoder": "FAILED", "sam_token_decoder_image": "passed"}


def test_a_damaged_file_is_a_row_that_failed(copied: Path, capsys: Captured) -> None:
    keep_only(copied, "clip_image_encoder", "sam_token_decoder_image")
    path = copied / "onnx/fp32/clip_image_encoder.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    assert parity("torch", copied) == 1
    printed = capsys.readouterr().out
    assert "its SHA-256 differs" in printed and printed.count("passed") == 1


def test_weights_of_another_training(copied: Path, capsys: Captured) -> None:
    keep_only(copied, "clip_image_encoder")
    assert parity("torch", copied, "--random-weights", "5") == 1
    assert "clip_image_encoder: patch_tokens: max|Δ|" in capsys.readouterr().out


@pytest.fixture
def damaged(copied: Path) -> tuple[Path, str]:
    """CLIP's image encoder in fp32, and in fp16 with one weight changed; and the name of what that
    weight's product is.
    """
    keep_only(copied, "clip_image_encoder")
    manifest = Manifest.load(copied)
    (entry,) = manifest.graphs
    path = copied / "onnx/fp16/clip_image_encoder.onnx"
    write_half(manifest.verify(entry), path, "fp16")
    model = onnx.load(path)
    weights = {one.name: one for one in model.graph.initializer}
    # one of the second block, so that much is right before it
    product = next(
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and "resblocks.1." in node.name and node.input[1] in weights
    )
    weight = weights[product.input[1]]
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)
    name = path.relative_to(copied).as_posix()
    half = replace(entry, precision="fp16", file=name, files={name: file_sha256(path)})
    manifest.with_entry(half).save()
    return copied, product.output[0]


def test_bisect_names_the_product_whose_weight_was_changed(
    damaged: tuple[Path, str], tmp_path: Path, capsys: Captured
) -> None:
    directory, tensor = damaged
    figures, half = tmp_path / "bisect.json", f"{directory}:onnxruntime:fp16"
    assert parity("torch", half, "--bisect", "--json", figures) == 1
    (graph,) = json.loads(figures.read_text())["bisect"]
    assert graph["name"] == "clip_image_encoder" and graph["tolerance"] == "half precision"
    first, drop = graph["first"][0], graph["largest_drop"]
    assert first["tensor"] == drop["tensor"] == tensor and first["op"] == "MatMul"
    assert first["sqnr_db"] < 0 and drop["drop_db"] > 60
    printed = capsys.readouterr().out
    assert f"{directory} onnxruntime fp32" in printed and tensor in printed
    assert "largest drop of the SQNR" in printed
    # a file parts from itself nowhere
    assert parity(half, half, "--bisect") == 0
    assert "no tensor breaches the tolerance" in capsys.readouterr().out


def test_bisect_says_what_to_compare_instead(mini_artifacts: Path, capsys: Captured) -> None:
    assert parity(mini_artifacts, f"{mini_artifacts}:openvino", "--bisect") == 2
    error = capsys.readouterr().err
    assert f"{mini_artifacts}:onnxruntime:fp32" in error and "openvino fuses operators" in error
    assert parity("torch", mini_artifacts, "--bisect") == 2
    assert "takes the ONNX file in fp32 for torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("torch", "torch", "both sides are torch"),
        ("torch", "nowhere", "nowhere holds no artefacts"),
        ("torch", "{}:abacus", "names no runtime after its directory"),
        ("torch", "{}:onnxruntime:int8", "nothing for onnxruntime in int8; it holds onnx fp32"),
        ("{}:tensorrt", "torch", "nothing for tensorrt; it holds onnx fp32"),
    ],
)
def test_sides_that_are_none(
    mini_artifacts: Path, a: str, b: str, message: str, capsys: Captured
) -> None:
    assert parity(a.format(mini_artifacts), b.format(mini_artifacts)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_artefacts_of_another_model(mini_artifacts: Path, capsys: Captured) -> None:
    assert parity("torch", mini_artifacts, "--model", "regionspot_bb") == 2
    assert "holds artefacts of regionspot_mini, not of regionspot_bb" in capsys.readouterr().err


def test_without_a_precision_it_takes_what_was_exported(copied: Path) -> None:
    """After `regionspot-export --trt` that is fp16 alone."""
    assert ParityOperand.parse(str(copied)).precision == "fp32"
    manifest = Manifest.load(copied)
    halves = tuple(replace(entry, precision="fp16") for entry in manifest.graphs)
    replace(manifest, graphs=halves).save()
    assert ParityOperand.parse(f"{copied}:onnxruntime").precision == "fp16"
    with pytest.raises(ArtifactError, match="--onnx --precision int8"):
        ParityOperand.parse(f"{copied}:onnxruntime:int8")
