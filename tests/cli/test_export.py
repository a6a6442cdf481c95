"""`regionspot-export` from the command line's side: what is made, what is kept, what fails and how
it says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from regionspot.cli.main import main
from regionspot.errors import ArtifactError
from regionspot.runtime.artifacts import MANIFEST, Manifest
from regionspot.runtime.formats import Format
from regionspot.runtime.opening import open_runner
from regionspot.runtime.tolerance import Tolerance

SMALL = "sam_token_decoder_image"
PAIR = f"clip_image_encoder,{SMALL}"
Captured = pytest.CaptureFixture[str]


def export(out: Path, *arguments: str) -> int:
    return main(["export", "--out", str(out), "--parity-images", "1", *arguments])


def read(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    graphs = json.loads((out / MANIFEST).read_text())["graphs"]
    return {(entry["name"], entry["format"], entry["precision"]): entry for entry in graphs}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small graphs in single and half precision."""
    out = tmp_path_factory.mktemp("pair")
    assert export(out, "--graphs", PAIR, "--precision", "fp32,fp16") == 0
    return out


def test_files_and_manifest(pair: Path) -> None:
    entries = read(pair)
    assert set(entries) == {
        (name, "onnx", kind) for name in PAIR.split(",") for kind in ("fp32", "fp16")
    }
    for (name, _, precision), entry in entries.items():
        assert entry["file"] == f"onnx/{precision}/{name}.onnx" and (pair / entry["file"]).is_file()
        assert entry["passed"] is True and entry["build_s"] > 0
    half, single = (entries[SMALL, "onnx", kind]["size_bytes"] for kind in ("fp16", "fp32"))
    assert half < 0.6 * single


def test_resuming_keeps_what_is_good_and_makes_the_rest(pair: Path, capsys: Captured) -> None:
    kept = pair / "onnx" / "fp32" / f"{SMALL}.onnx"
    before = kept.stat().st_mtime_ns
    lost = pair / "onnx" / "fp16" / f"{SMALL}.onnx"
    lost.unlink()
    assert export(pair, "--graphs", PAIR, "--precision", "fp32,fp16", "--resume") == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.endswith("making")] == [
        f"[4/4] {SMALL} onnx fp16: making"
    ]
    assert lost.is_file() and kept.stat().st_mtime_ns == before
    assert printed.count("passed") == 2 * 4  # a line of progress and one of the table for each


def test_resuming_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from regionspot.export.build import _Build

    make = _Build._make

    def killed(self: Any, step: Any) -> None:
        if step.precision == "fp16":
            raise KeyboardInterrupt
        make(self, step)

    arguments = ("--graphs", SMALL, "--precision", "fp32,fp16")
    with monkeypatch.context() as patch:
        patch.setattr(_Build, "_make", killed)
        assert export(tmp_path, *arguments) == 130
    assert set(read(tmp_path)) == {(SMALL, "onnx", "fp32")}
    capsys.readouterr()
    assert export(tmp_path, *arguments, "--resume") == 0
    printed = capsys.readouterr().out
    assert f"{SMALL} onnx fp16: making" in printed and f"{SMALL} onnx fp32: making" not in printed
    assert len(read(tmp_path)) == 2


def test_other_ranges_are_another_artefact(tmp_path: Path, capsys: Captured) -> None:
    assert export(tmp_path, "--graphs", SMALL) == 0
    assert export(tmp_path, "--graphs", SMALL, "--batch", "1:2:4", "--resume") == 0
    assert capsys.readouterr().out.count("making") == 2
    assert read(tmp_path)[SMALL, "onnx", "fp32"]["ranges"] == {"batch": [1, 2, 4]}


def test_a_breach_is_an_exit_status_and_a_file_that_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(Format, "tolerance", lambda *_: Tolerance("none at all", max_relative=0.0))
    assert export(tmp_path, "--graphs", SMALL, "--precision", "fp16") == 1
    printed = capsys.readouterr().out
    assert f"FAILED {SMALL} (onnx, fp16): image_projections: max|Δ|" in printed
    entry = read(tmp_path)[SMALL, "onnx", "fp16"]
    assert entry["passed"] is False and entry["tolerance"] == "none at all"
    assert entry["max_abs_diff"] > 0 and (tmp_path / entry["file"]).is_file()
    manifest = Manifest.load(tmp_path)
    with pytest.raises(ArtifactError, match="failed its parity check"):
        open_runner(manifest, manifest.find(SMALL, "onnx", "fp16"))


def test_what_cannot_be_made_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel\nand a long story")

    monkeypatch.setattr("regionspot.export.precision.write_half", broken)
    assert export(tmp_path, "--graphs", PAIR, "--precision", "fp16") == 1
    entries = read(tmp_path)
    assert [entry["passed"] for entry in entries.values()] == [True, False, True, False]
    failed = entries[SMALL, "onnx", "fp16"]
    assert failed["file"] is failed["sha256"] is failed["cosine"] is None
    assert failed["reason"] == "making it failed: RuntimeError: no kernel"
    assert "no kernel" in capsys.readouterr().out


def test_other_weights_drop_what_was_made_of_the_old(tmp_path: Path, capsys: Captured) -> None:
    assert export(tmp_path, "--graphs", SMALL, "--precision", "fp32,fp16") == 0
    assert export(tmp_path, "--graphs", SMALL, "--random-weights", "3", "--resume") == 0
    assert f"{SMALL} (onnx, fp16) is of other weights and is dropped" in capsys.readouterr().out
    assert set(read(tmp_path)) == {(SMALL, "onnx", "fp32")}
    assert json.loads((tmp_path / MANIFEST).read_text())["source"] == {"random_weights": 3}
    # the seed is taken from the manifest
    assert main(["parity", "torch", str(tmp_path), "--images", "1"]) == 0


def test_dry_run_loads_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        "export",
        "--model",
        "regionspot_bl",
        "--out",
        str(out),
        "--dry-run",
        "--trt",
        "--precision",
        "fp16",
    ]
    code = (
        "import sys; from regionspot.cli.main import main\n"
        f"status = main({command})\n"
        "print(status, {'onnx', 'onnxruntime', 'openvino'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[-1] == "0 set()"
    assert (
        sum("tensorrt/fp16/" in line for line in lines) == 8 and "24 artefacts, about" in run.stdout
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--graphs", "heads"], "there is no graph heads"),
        (["--precision", "fp4"], "'fp4' is not one or more of fp32"),
        (["--precision", "fp8"], "ask for --onnx-gpu, --trt, --trt-rtx alone"),
        (["--batch", "1:2"], "'1:2' is not min:opt:max"),
        (["--regions", "4:2:8"], "a range is min:opt:max"),
        (["--compute-capability", "ada"], "is no list of numbers such as 89,120"),
        (["--version-compatible", "--trt-rtx"], "are for TensorRT's engines: add --trt"),
        (["--hardware-compatible"], "are for TensorRT's engines: add --trt"),
        (["--parity-images", "0"], "parity needs one picture or more"),
        (["--calibration", "nowhere.json"], "nowhere.json"),
        (["--model", "regionspot_bb"], "regionspot_bb needs weights"),
        (["--model", "regionspot_xx"], "there is no model 'regionspot_xx'"),
    ],
)
def test_errors_are_one_line_and_come_first(
    tmp_path: Path, arguments: list[str], message: str, capsys: Captured
) -> None:
    assert main(["export", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "version", "hardware"),
    [
        ([], False, None),
        (["--version-compatible", "--hardware-compatible"], True, "ampere_plus"),
        (["--hardware-compatible", "same_compute_capability"], False, "same_compute_capability"),
    ],
)
def test_options_of_engines(arguments: list[str], version: bool, hardware: str | None) -> None:
    from regionspot.cli import export as command

    parsed = command.build_parser().parse_args(["--out", "here", "--trt", *arguments])
    options = command._engine_options(parsed)
    assert (options.version_compatible, options.hardware_compatibility) == (version, hardware)


def test_ranges_of_photographs_are_not_taken_from_drawings_unasked(
    tmp_path: Path, capsys: Captured
) -> None:
    """Real weights of a full-size model: the error comes before they are looked for."""
    arguments = ["--out", str(tmp_path / "out"), "--model", "regionspot_bb", "--onnx"]
    weights = ["--sam-weights", "sam.pth", "--clip-weights", "clip.pt", "--weights", "head.pth"]
    for precision in ("fp32,int8", "int8"):
        assert main(["export", *arguments, *weights, "--precision", precision]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: int8 of regionspot_bb needs images")
        assert "--calibration DIR" in error and "--calibration mini" in error
    for allowed in (["--precision", "int8", "--calibration", "mini"], ["--precision", "fp16"]):
        assert main(["export", *arguments, *weights, *allowed]) == 2
        assert "needs images" not in capsys.readouterr().err  # but that there are no such weights


def test_the_report_says_what_it_was_calibrated_and_compared_on(
    tmp_path: Path, capsys: Captured
) -> None:
    arguments = ("--graphs", SMALL, "--precision", "int8", "--calibration", "mini")
    assert export(tmp_path, *arguments) == 0
    printed = capsys.readouterr().out
    assert "comparing on 1 of 33 scenes of the mini world" in printed
    assert "calibrating int8 on 32 of 33 scenes of the mini world" in printed


def test_artefacts_of_another_model(
    pair: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regionspot.modeling import presets

    create_model = presets.create_model

    def renamed(*arguments: Any, **named: Any) -> Any:
        model = create_model(*arguments, **named)
        model.name = "regionspot_other"
        return model

    monkeypatch.setattr(presets, "create_model", renamed)
    assert export(pair, "--graphs", SMALL) == 2
    assert (
        "holds artefacts of regionspot_mini, and this model is regionspot_other"
        in capsys.readouterr().err
    )


def test_a_missing_library_is_named_with_its_extra() -> None:
    code = (
        "import sys; from regionspot.cli.main import main; import regionspot.export.plan as plan\n"
        "find = plan.find_spec; plan.find_spec = lambda name: None if name == 'openvino' else "
        "find(name)\n"
        "sys.exit(main(['export', '--out', 'nowhere', '--openvino']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert (
        run.stderr
        == "error: openvino artefacts need openvino: pip install 'regionspot[export,openvino]'\n"
    )
