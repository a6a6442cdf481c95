"""`regionspot demo`, small: everything that `make demo` does and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from regionspot.cli.main import main
from regionspot.evaluation.baselines import crop_settings
from regionspot.evaluation.methods import clip_crops
from regionspot.modeling.checkpoint import load_head

SMALL = ("--train", "24", "--val", "8", "--steps", "3")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo #1"  # YAML would cut this name short
    assert main(["demo", "--out", str(out), *SMALL]) == 0
    return out


def test_metrics_are_of_the_head_and_the_ways_beside_it(demo: Path) -> None:
    metrics = json.loads((demo / "metrics.json").read_text())
    for method in (
        "head",
        "shipped_head",
        "clip_crops",
        "mask_pooling",
        "roi_pooling",
        "constant_token",
    ):
        assert {"AP", "AP50", "AP75", "APr", "APc", "APf", "AP_base", "AP_novel"} <= set(
            metrics[method]
        )
        assert 0 <= metrics[method]["top1"] <= 100 and {"top1_base", "top1_novel"} <= set(
            metrics[method]
        )
        assert metrics[method]["protocol"]["proposals"] == "ground-truth boxes"
    assert (metrics["train_images"], metrics["val_images"]) == (24, 8)
    assert (
        metrics["regions"] == sum(map(len, _annotations(demo).values()))
        and metrics["train_seconds"] > 0
    )


def test_crops_are_at_the_setting_that_it_names(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = json.loads((demo / "metrics.json").read_text())
    setting = metrics["clip_crops_setting"]
    assert setting in {clip_crops(each).description for each in crop_settings(192, 16)}
    assert metrics["clip_crops"]["protocol"]["method"] == setting
    assert main(["demo", "--out", str(demo), *SMALL]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith(setting))
    assert row.removeprefix(setting).split()[0] == f"{metrics['clip_crops']['top1']:.1f}"


def test_it_leaves_a_head_logs_and_overlays(demo: Path) -> None:
    assert load_head(demo / "train" / "head.safetensors").token_dim == 128
    assert (demo / "train" / "metrics.jsonl").read_text().count("\n") >= 1
    overlays = sorted(path.name for path in (demo / "overlays").glob("0*.png"))
    assert len(overlays) == 6
    sheet = Image.open(demo / "overlays" / "sheet.png")
    assert sheet.width > 3 * 768 and len(sheet.getcolors(maxcolors=1 << 24) or ()) > 1000


def test_a_second_time_it_trains_nothing_again(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (demo / "train" / "head.safetensors").read_bytes()
    assert main(["demo", "--out", str(demo), *SMALL]) == 0
    assert (demo / "train" / "head.safetensors").read_bytes() == before
    assert "What to try next" in capsys.readouterr().out


def test_other_arguments_are_refused_before_anything_is_lost(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (demo / "data" / "train.json").read_bytes()
    assert main(["demo", "--out", str(demo), *SMALL, "--seed", "5"]) == 2
    error = capsys.readouterr().err
    assert "seed (0, now 5)" in error and "choose another --out" in error
    assert (demo / "data" / "train.json").read_bytes() == before


def _annotations(demo: Path) -> dict[int, list[object]]:
    grouped: dict[int, list[object]] = {}
    for annotation in json.loads((demo / "data" / "val.json").read_text())["annotations"]:
        grouped.setdefault(annotation["image_id"], []).append(annotation)
    return grouped
