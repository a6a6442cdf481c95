"""`python -m regionspot.benchmarks.mini`, small: heads of two seeds beside every baseline, on both splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regionspot.benchmarks.mini import BOX_EMBEDDING, BoxEmbedding, main
from regionspot.evaluation.methods import METHODS
from regionspot.mini.shipped import load_mini_backbones


def test_figures_of_every_method_and_their_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mini.json"
    counts = ["--train", "12", "--val", "6", "--crowds", "1", "--steps", "2", "--seeds", "3,4"]
    assert main(["--out", str(tmp_path / "run"), "--json", str(path), *counts]) == 0
    report = json.loads(path.read_text())
    assert set(report["splits"]) == {"val", "crowds"}
    for methods in report["splits"].values():
        assert set(methods) == {*METHODS, BOX_EMBEDDING}
        for name, entry in methods.items():
            assert entry["seeds"] == (2 if name in ("head", "constant_token", "head_and_crops") else 1)
            assert (entry["deviation"] is None) == (entry["seeds"] == 1)
            assert {"top1_base", "top1_novel_pairs", "top1_novel_words", "AP", "one_label_AP"} <= set(entry["mean"])
        assert methods["clip_crops"]["protocol"]["tuned_on"]["images"] <= 12
        assert methods["head"]["protocol"]["proposals"] == "ground-truth boxes"
    assert {"train_images": 12, "seeds": [3, 4], "steps": 2}.items() <= report["conditions"].items()
    assert f"| {BOX_EMBEDDING} |" in capsys.readouterr().out


def test_a_box_embedding_tells_boxes_apart_and_reads_no_picture() -> None:
    sam, _ = load_mini_backbones()
    box = BoxEmbedding(sam.sam)
    pictures = torch.randint(0, 255, (2, 3, 256, 256), dtype=torch.uint8)
    embeddings = box.encode_image(pictures, torch.full((2, 2), 256))
    corners = torch.tensor([[[0.0, 0.0], [100.0, 50.0]], [[0.0, 0.0], [100.0, 51.0]]])  # (N, 2, 2)
    found = box.mask_tokens(embeddings, corners.expand(2, -1, -1, -1), torch.tensor([2, 3]).expand(2, 2, 2))
    assert found.tokens.shape == (2, 2, 1, sam.token_dim)
    assert torch.equal(found.tokens[0], found.tokens[1])
    assert (found.tokens[0, 0] - found.tokens[0, 1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="boxes alone"):
        box.mask_tokens(embeddings, corners.expand(2, -1, -1, -1), torch.tensor([2, 3]).expand(2, 2, 2), multimask=True)
