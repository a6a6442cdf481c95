"""`regionspot-train`: what is shown without training, one short run, and errors in one line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from regionspot.cli.main import main
from regionspot.cli.train import build_parser

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration for three pictures with a box each."""
    for index in range(3):
        Image.new("RGB", (64, 48), (80 * index, 90, 20)).save(tmp_path / f"{index}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(3)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 6, 20, 20], "area": 400}
            for i in range(3)
        ],
        "categories": [{"id": 1, "name": "block"}, {"id": 2, "name": "ball"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    settings = {
        "name": "short",
        "output_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "datasets": [{"name": "blocks", "annotations": str(tmp_path / "train.json")}],
        "steps": 4,
        "batch_size": 2,
        "model": {"preset": "regionspot_mini", "num_layers": 1, "feedforward_dim": 16},
        "features": {"cache_dir": str(tmp_path / "cache"), "workers": 1},
        "logging": {"tensorboard": False},
    }
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "short.yaml"


@pytest.fixture
def random_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    from regionspot.modeling.presets import create_backbones
    from regionspot.training import setup

    monkeypatch.setattr(
        setup, "create_backbones", lambda name, *_: create_backbones(name, random_weights=0)
    )


def test_print_config_shows_the_merged_settings(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "train",
                "--config",
                str(config),
                "steps=9",
                "--print-config",
                "optimizer.ema_decay=0.9",
            ]
        )
        == 0
    )
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["steps"], shown["optimizer"]["ema_decay"], shown["batch_size"]) == (9, 0.9, 2)
    assert shown["optimizer"]["max_grad_norm"] == 1.0


@pytest.mark.usefixtures("random_towers")
def test_dry_run_shows_the_plan_and_touches_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(config.parent.rglob("*"))
    assert main(["train", "--config", str(config), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "data set blocks: 3 images, 3 regions, 2 classes, 2.7 epochs" in shown
    assert "parameters; 4 steps of 2 images" in shown
    assert "KiB in 1 shards at" in shown and "1 to make" in shown
    assert sorted(config.parent.rglob("*")) == before


@pytest.mark.usefixtures("random_towers")
def test_train_refuse_and_resume(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(config)]) == 0
    head = config.parent / "runs" / "short" / "head.safetensors"
    shown = capsys.readouterr()
    assert (
        head.is_file()
        and "data set blocks: 3 images" in shown.out
        and "short: 4/4 steps" in shown.err
    )
    assert shown.out.endswith(f"wrote {head}\n")
    assert main(["train", "--config", str(config)]) == 2
    assert capsys.readouterr().err.startswith("error: the run ")
    assert main(["train", "--config", str(config), "--resume", "auto", "logging.every=1"]) == 0
    assert main(["train", "--config", str(config), "seed=1", "--resume", "auto"]) == 2
    assert "seed (0, now 1)" in capsys.readouterr().err


@pytest.mark.usefixtures("random_towers")
def test_features_of_earlier_states_are_deleted_on_request(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(config)]) == 0
    before = set(config.parent.glob("cache/*/*.safetensors"))
    annotations = config.parent / "train.json"
    annotations.write_text(annotations.read_text().replace("[5, 6, 20, 20]", "[5, 6, 20, 21]", 1))
    assert main(["train", "--config", str(config), "name=corrected"]) == 0
    assert "1 more files are of earlier states of this data set" in capsys.readouterr().out
    assert main(["train", "--config", str(config), "--delete-unused"]) == 0
    assert (
        capsys.readouterr().out
        == f"{before.pop()}\ndeleted 1 files that these data sets do not use\n"
    )
    assert len(list(config.parent.glob("cache/*/*.safetensors"))) == 1
    assert main(["train", "--config", str(config), "name=again"]) == 0
    assert "all there" in capsys.readouterr().out


def test_the_example_of_the_help_works_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = build_parser().epilog
    assert example is not None
    arguments = shlex.split(example.partition("regionspot-train ")[2])
    assert main(["train", *arguments, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["datasets"][0]["annotations"] == "train.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz=1"], "error: unknown key stepz; did you mean steps?"),
        (["datasets.0.annotations=none.json"], "error: cannot read the annotation file none.json"),
        (["device=abacus"], "error: the device abacus cannot be used here"),
    ],
)
def test_errors_are_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", "--config", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from regionspot.cli.train import build_parser; build_parser().format_help();"
        "sys.exit(int('torch' in sys.modules or 'numpy' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
