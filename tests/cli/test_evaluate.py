"""`regionspot-eval` from the command line's side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regionspot.cli import main as command_line
from regionspot.cli.evaluate import COLUMNS, build_parser, format_table


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures with two objects; regionspot_mini with random weights; an empty cache of
    vocabularies.
    """
    from regionspot.modeling import presets

    create_model = presets.create_model
    monkeypatch.setattr(
        presets,
        "create_model",
        lambda name, **options: create_model(name, **options | {"random_weights": 0}),
    )
    monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "ab":
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(pictures / f"{name}.png")
    image = {
        "width": 40,
        "height": 30,
        "neg_category_ids": [1, 2],
        "not_exhaustive_category_ids": [],
    }
    mask = [[5, 5, 15, 5, 15, 15, 5, 15]]
    content = {
        "images": [
            image | {"id": i, "file_name": f"{name}.png"} for i, name in enumerate("ab", start=1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "coffee cup", "novel": True}],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": i,
                "bbox": [5, 5, 10, 10],
                "area": 100,
                "segmentation": mask,
            }
            for i in (1, 2)
        ],
    }
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    return path


def run(data: Path, *arguments: str) -> int:
    return command_line.main(
        ["eval", "--data", str(data), "--images", str(data.parent / "pictures"), *arguments]
    )


def test_table_and_files(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics_file = tmp_path / "out" / "metrics.json"
    detections_file = tmp_path / "out" / "detections.json"
    methods = "head,clip_crops,roi_pooling,constant_token"
    arguments = [
        "--methods",
        methods,
        "--iou-type",
        "both",
        "--device",
        "cpu",
        "--json",
        str(metrics_file),
    ]
    assert run(data, *arguments, "--detections", str(detections_file)) == 0
    output = capsys.readouterr().out
    assert "regionspot_mini by torch in fp32 on 2 images, 2 regions: ground-truth boxes" in output
    assert "LVIS rules; score = softmax over 2 classes; the 900 best" in output
    assert "300 per image judged" in output
    for word in ("boxes", "masks", "AP_novel", *methods.split(",")):
        assert word in output
    metrics = json.loads(metrics_file.read_text())
    assert list(metrics) == methods.split(",")
    assert set(COLUMNS) < set(metrics["head"]) and set(COLUMNS) == set(metrics["head"]["segm"])
    detections = json.loads((tmp_path / "out" / "detections.head.json").read_text())
    assert len(detections) == 4  # 2 regions x 2 classes
    assert detections[0]["bbox"] == [5, 5, 10, 10] and detections[0]["segmentation"]["size"] == [
        30,
        40,
    ]


def test_one_method_and_a_detectors_boxes_by_coco_rules(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{"image_id": 2, "bbox": [5, 5, 10, 10], "score": 0.5}]))
    detections_file = tmp_path / "detections.json"
    arguments = ["--proposals", str(boxes), "--rules", "coco", "--detections", str(detections_file)]
    assert run(data, *arguments) == 0
    output = capsys.readouterr().out
    assert "1 regions: detector boxes of boxes.json" in output
    assert "COCO rules; score = softmax over 2 classes × detector score" in output
    assert {detection["image_id"] for detection in json.loads(detections_file.read_text())} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "head,guess"], "unknown methods ['guess']"),
        (["--proposals", "absent.json"], "cannot read the proposals absent.json"),
        (
            ["--images", "nowhere"],
            "2 of 2 images are not under nowhere: a.png, b.png. There is no such folder",
        ),
        (["--skip-unreadable", "-1"], "--skip-unreadable must be 0 or more, not -1"),
        (
            ["--json", "x.json", "--detections", "./x.json"],
            "--json and --detections of head would both write",
        ),
        (
            ["--detections", "-", "--methods", "head,constant_token"],
            "standard output takes the detections of one method",
        ),
        (["--device", "cuda:77"], "the device cuda:77 cannot be used here"),
        (["--device", "abacus"], "the device abacus cannot be used here"),
        (["--batch-size", "0"], "batch_size must be 1 or more"),
    ],
)
def test_errors_are_one_line(
    data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    ("lacking", "arguments", "message"),
    [
        ("neg_category_ids", [], "image 1 has no neg_category_ids"),
        ("segmentation", ["--iou-type", "both"], "annotation 1 has no segmentation"),
    ],
)
def test_annotations_are_checked_before_the_model_is_loaded(
    data: Path,
    lacking: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("regionspot.cli.evaluate.load_recognizer", lambda _: pytest.fail("loaded"))
    content = json.loads(data.read_text())
    for entry in (*content["images"], *content["annotations"]):
        entry.pop(lacking, None)
    data.write_text(json.dumps(content))
    assert run(data, *arguments) == 2
    assert message in capsys.readouterr().err


def test_inputs_are_not_overwritten(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = data.read_bytes()
    link = tmp_path / "link.json"
    link.symlink_to(data)
    for option in ("--json", "--detections"):
        assert run(data, option, str(link)) == 2
        assert f"{link} would overwrite --data" in capsys.readouterr().err
    boxes = tmp_path / "boxes.head.json"
    boxes.write_text("[]")
    arguments = ["--proposals", str(boxes), "--methods", "head,constant_token"]
    assert run(data, *arguments, "--detections", str(tmp_path / "boxes.json")) == 2
    assert "would overwrite --proposals" in capsys.readouterr().err
    assert data.read_bytes() == before and boxes.read_text() == "[]"


@pytest.fixture
def training(data: Path, tmp_path: Path) -> Path:
    """As the data, with two pictures of its own in another folder."""
    pictures = tmp_path / "other"
    pictures.mkdir()
    content = json.loads(data.read_text())
    for image in content["images"]:
        image["file_name"] = f"training-{image['file_name']}"
        Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save(pictures / image["file_name"])
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    return path


class TestTuning:
    def test_the_table_and_the_figures_say_where_settings_were_chosen(
        self, data: Path, training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out.json"
        tuned = [
            "--tune-on",
            str(training),
            "--tune-images",
            str(tmp_path / "other"),
            "--tune-count",
            "1",
        ]
        assert run(data, "--methods", "head,roi_pooling", *tuned, "--json", str(out)) == 0
        assert (
            "(the best of 4 settings on the annotated boxes of 1 images of train.json)"
            in capsys.readouterr().out
        )
        metrics = json.loads(out.read_text())
        assert metrics["head"]["protocol"]["tuned_on"] is None
        tuned_on = metrics["roi_pooling"]["protocol"]["tuned_on"]
        assert (tuned_on["data"], tuned_on["images"], tuned_on["regions"]) == ("train.json", 1, 1)
        assert {"top1", "top1_base", "top1_novel"} < set(metrics["head"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--tune-on", "DATA"], "--tune-on and --data are one file"),
            (
                ["--tune-on", "COPY", "--tune-images", "PICTURES"],
                "2 pictures of --tune-on are also in --data ('a.png')",
            ),
            (
                ["--tune-on", "TRAINING", "--methods", "head"],
                "--tune-on is for baselines: leave it out, or add",
            ),
            (
                ["--tune-on", "TRAINING", "--tune-count", "0"],
                "--tune-count must be 1 or more, not 0",
            ),
            (["--tune-images", "PICTURES"], "--tune-images is of --tune-on"),
            (["--tune-on", "TRAINING", "--json", "TRAINING"], "would overwrite --tune-on"),
        ],
    )
    def test_what_would_be_unfair_or_for_nothing_is_refused(
        self,
        data: Path,
        training: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        copy = tmp_path / "copy.json"
        copy.write_bytes(data.read_bytes())
        places = {
            "DATA": data,
            "COPY": copy,
            "TRAINING": training,
            "PICTURES": tmp_path / "pictures",
        }
        before = training.read_bytes()
        words = [str(places.get(word, word)) for word in arguments]
        assert run(data, "--methods", "head,roi_pooling", *words) == 2
        assert message in capsys.readouterr().err
        assert training.read_bytes() == before


def test_files_are_written_though_nobody_reads_the_table(data: Path, tmp_path: Path) -> None:
    metrics_file, detections_file = tmp_path / "metrics.json", tmp_path / "detections.json"
    command = [
        sys.executable,
        "-m",
        "regionspot.cli.main",
        "eval",
        "--data",
        str(data),
        "--device",
        "cpu",
    ]
    command += ["--images", str(data.parent / "pictures"), "--random-weights", "0"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command += ["--json", str(metrics_file), "--detections", str(detections_file)]
        found = subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert "Traceback" not in found.stderr
    assert json.loads(metrics_file.read_text())["head"]["protocol"]["regions"] == 2
    assert len(json.loads(detections_file.read_text())) == 4


def test_figures_to_standard_output(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--json", "-") == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["head"]["protocol"]["images"] == 2
    assert "LVIS rules; score" in captured.err


def test_bad_pictures_are_named_or_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = data.parent / "pictures" / "a.png"
    picture.write_bytes(picture.read_bytes()[:45])
    detections_file = tmp_path / "detections.json"
    assert run(data) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("error: ")
        and str(picture) in error
        and error.endswith("--skip-unreadable 1")
    )
    assert run(data, "--skip-unreadable", "1", "--detections", str(detections_file)) == 0
    output = capsys.readouterr().out
    assert (
        "on 1 images, 1 regions" in output and "1 pictures left out with their objects:" in output
    )
    assert str(picture) in output
    assert {detection["image_id"] for detection in json.loads(detections_file.read_text())} == {2}
    picture.unlink()
    assert run(data) == 2
    assert "1 of 2 images are not under" in capsys.readouterr().err
    assert run(data, "--skip-unreadable", "1") == 0
    assert "1 pictures left out" in capsys.readouterr().out


def test_names_that_are_not_utf_8(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = tmp_path / os.fsdecode(b"caf\xe9.json")
    try:
        boxes.write_text(json.dumps([{"image_id": 2, "bbox": [5, 5, 10, 10], "score": 0.5}]))
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    metrics_file = tmp_path / "metrics.json"
    assert run(data, "--proposals", str(boxes), "--json", str(metrics_file)) == 0
    assert "detector boxes of caf\\udce9.json" in capsys.readouterr().out
    assert "caf" in json.loads(metrics_file.read_text())["head"]["protocol"]["proposals"]


def test_shared_names_and_masks_without_pixels_are_said(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(data.read_text())
    content["categories"][1]["name"] = "cat"
    content["annotations"][0]["segmentation"] = [[60, 5, 70, 5, 70, 15]]  # beside the picture
    # fractions of it
    content["annotations"][1]["segmentation"] = [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9]]
    data.write_text(json.dumps(content))
    assert run(data, "--iou-type", "segm") == 0
    output = capsys.readouterr().out
    assert "1 categories have the name of another: each gets the score of their one word" in output
    assert "1 annotated masks cover no pixel of their picture" in output
    assert "1 annotated masks do not touch their own boxes" in output
    assert "softmax over 1 classes" in output


def test_a_bad_mask_is_found_before_the_model_is_loaded(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regionspot.cli.evaluate.load_recognizer", lambda _: pytest.fail("loaded"))
    content = json.loads(data.read_text())
    content["annotations"][0]["segmentation"] = {"size": [40, 30], "counts": "PX4"}
    data.write_text(json.dumps(content))
    assert run(data, "--iou-type", "both") == 2
    error = capsys.readouterr().err
    assert (
        "1 of 2 annotations have no usable mask: annotation 1: segmentation: its size [40, 30] is "
        "not the" in error
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from regionspot.cli.evaluate import build_parser; "
        "build_parser().format_help();print(sorted({'torch', 'numpy', 'hotcoco'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
    assert "--proposals" in build_parser().format_help()


def test_a_missing_evaluator_is_named() -> None:
    code = (
        "import sys; sys.modules['hotcoco'] = None; from regionspot.cli.main import main; "
        "main(['eval', '--data', 'x'])"
    )
    error = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stderr
    assert error == "error: evaluation needs hotcoco: pip install 'regionspot[eval]'\n"


def test_a_group_without_classes_is_a_dash() -> None:
    protocol: dict[str, Any] = {
        "model": "m",
        "runtime": "torch",
        "precision": "fp32",
        "images": 1,
        "regions": 2,
    }
    protocol |= {"proposals": "p", "rules": "coco", "scores": "s", "pairs_per_image": 900}
    protocol |= {"detections_judged": "d", "boxes_dropped": 3}
    protocol |= {"images_skipped": ["a.png is damaged"], "shared_names": 4}
    protocol |= {"masks_without_pixels": 0, "masks_beside_boxes": 0, "method": "the head"}
    figures: dict[str, Any] = dict.fromkeys(COLUMNS, 12.345) | {"APr": None}
    table = format_table(
        {"head": figures | {"one_label": figures | {"AP": 2.0}, "protocol": protocol}}
    )
    rows = [line.split() for line in table.splitlines() if line.startswith("head ")]
    assert rows == [
        ["head", *["12.3"] * 6, "–", *["12.3"] * 4],
        ["head", "2.0", *["12.3"] * 5, "–", *["12.3"] * 4],
    ]
    # the regions are no annotated boxes
    assert "head: the head" in table and "named right" not in table
    for remark in (
        "3 proposals left out",
        "1 pictures left out",
        "a.png is damaged",
        "4 categories have the name",
    ):
        assert remark in table
