"""`regionspot mini`: pictures, and both trainings for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from regionspot.cli.main import main
from regionspot.mini.shipped import load_mini_backbones


def test_build_writes_both_annotation_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "mini",
                "build",
                "--out",
                str(tmp_path),
                "--train",
                "2",
                "--val",
                "1",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-2:] == [
        str(tmp_path / "train.json"),
        str(tmp_path / "val.json"),
    ]


def test_both_towers_train_and_load(tmp_path: Path) -> None:
    pool, weights = str(tmp_path / "pool"), tmp_path / "weights"
    common = ["--out", str(weights), "--pool", pool, "--threads", "1", "--set", "scenes=12"]
    sam = ["steps=2", "batch=2", "mask_prompt_share=1.0"]
    clip = [
        "portraits=8",
        "small_steps=2",
        "small_batch=4",
        "steps=2",
        "portrait_batch=4",
        "scene_batch=4",
    ]
    for tower, changes in (("sam", sam), ("clip", clip)):
        sets = [word for change in changes for word in ("--set", change)]
        assert main(["mini", "pretrain", tower, *common, *sets]) == 0
    trained_sam, trained_clip = load_mini_backbones(weights)
    shipped_sam, _ = load_mini_backbones()
    assert trained_sam.token_dim == shipped_sam.token_dim and trained_clip.num_tokens == 145
    assert not any(parameter.requires_grad for parameter in trained_clip.parameters())


@pytest.mark.parametrize("override", ["stepz=3", "steps=many", "steps"])
def test_an_impossible_override_names_the_possible_ones(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mini", "pretrain", "sam", "--out", "nowhere", "--set", override]) == 2
    error = capsys.readouterr().err
    assert repr(override) in error and "mask_prompt_share" in error
