"""`python -m regionspot.benchmarks.mini`, small: heads of two seeds beside every baseline, on both
splits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from regionspot.benchmarks.mini import (
    BOX_EMBEDDING,
    CROPS_BESIDE,
    BoxEmbedding,
    box_embeddings,
    main,
)
from regionspot.evaluation.methods import METHODS
from regionspot.mini.shipped import load_mini_backbones
from regionspot.modeling.pipelines import pipeline_from_backbones


def test_figures_of_every_method_and_their_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mini.json"
    counts = ["--train", "12", "--val", "6", "--crowds", "1", "--steps", "2", "--seeds", "3,4"]
    assert main(["--out", str(tmp_path / "run"), "--json", str(path), *counts]) == 0
    report = json.loads(path.read_text())
    assert set(report["splits"]) == {"val", "crowds"}
    for methods in report["splits"].values():
        assert set(methods) == {*METHODS, BOX_EMBEDDING}
        for name, entry in methods.items():
            assert entry["seeds"] == (
                2 if name in ("head", "constant_token", "head_and_crops") else 1
            )
            assert (entry["deviation"] is None) == (entry["seeds"] == 1)
            assert {
                "top1_base",
                "top1_novel_pairs",
                "top1_novel_words",
                "AP",
                "one_label_AP",
            } <= set(entry["mean"])
        assert methods["clip_crops"]["protocol"]["tuned_on"]["images"] <= 12
        assert methods["head"]["protocol"]["proposals"] == "ground-truth boxes"
    assert len(report["crops_at_other_settings_on_val"]) == len(CROPS_BESIDE)
    assert {"train_images": 12, "seeds": [3, 4], "steps": 2}.items() <= report["conditions"].items()
    assert f"| {BOX_EMBEDDING} |" in capsys.readouterr().out


def test_a_pipeline_of_box_embeddings_says_where_boxes_are_and_reads_no_picture() -> None:
    sam, clip = load_mini_backbones()
    pipeline = pipeline_from_backbones(BoxEmbedding(sam), clip)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 256, 256, 3), dtype=np.uint8)
    encoded = pipeline.encode_image(pictures, np.full((2, 2), 256))
    corners = np.array(
        [[[0.0, 0.0], [100.0, 50.0]], [[0.0, 0.0], [100.0, 51.0]]], np.float32
    )  # (N, 2, 2)
    points, labels = np.stack([corners, corners]), np.tile(np.array([2, 3], np.int32), (2, 2, 1))
    tokens, ious = pipeline.mask_tokens(encoded, points, labels)
    assert tokens.shape == (2, 2, 1, sam.token_dim) and (ious == 1).all()
    np.testing.assert_array_equal(tokens[0], tokens[1])
    expected = box_embeddings(torch.from_numpy(corners) / 256, sam.token_dim)
    np.testing.assert_allclose(tokens[0, :, 0], expected.numpy(), atol=1e-6)
    assert abs(tokens[0, 0] - tokens[0, 1]).max() > 0.1
    with pytest.raises(ValueError, match="single boxes alone"):
        pipeline.mask_tokens(encoded, points, labels, multimask=True)
