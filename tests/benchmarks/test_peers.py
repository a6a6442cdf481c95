"""`regionspot-benchmark peers`: its report, that what it compares computes the same, and what it
refuses.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regionspot.benchmarks import peers as parent
from regionspot.benchmarks.flops import count_flops, extrapolate
from regionspot.benchmarks.peer_rows import VariantResult, rows_of, summary
from regionspot.benchmarks.peer_variants import Ours
from regionspot.benchmarks.stages import Stages
from regionspot.benchmarks.synthetic import (
    SMALLEST_BOX,
    generated_picture,
    random_boxes,
    random_words,
)
from regionspot.cli.benchmark import peers
from regionspot.errors import InputError
from regionspot.images import read_image
from regionspot.masks import decode_rle
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.structures import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT
from regionspot.transforms import SamTransform

HEIGHT, WIDTH = 180, 240
STAGES = {"decode_resize", "sam_encoder", "clip_encoder", "token_decoder", "head", "other"}
ROW = {
    "way",
    "ours",
    "regions",
    "masks",
    "seconds",
    "repetitions",
    "peak_mb",
    "total_mb",
    "load_peak_mb",
    "gflop",
}
ROW |= {"speedup", "memory_ratio", "max_score_difference", "mask_difference", "stages", "note"}


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    peers.add_options(parser)
    return parser.parse_args(["--model", "regionspot_mini", *arguments])


@pytest.fixture(scope="module")
def report(mini_artifacts_with_masks: Path) -> dict[str, Any]:
    what = ["--peers", "research,onnxruntime_fp32", "--artifacts", str(mini_artifacts_with_masks)]
    how = [
        "--regions",
        "3,1",
        "--picture",
        f"{WIDTH}x{HEIGHT}",
        "--words",
        "5",
        "--repetitions",
        "1",
        "--threads",
        "1",
    ]
    return peers.run(options(*what, *how))


def test_rows(report: dict[str, Any]) -> None:
    rows = report["rows"]
    ways = [(row["way"], row["ours"], row["masks"], row["regions"]) for row in rows]
    assert ways == [
        (way, way != "research", draw, count)
        for way in ("research", "onnxruntime_fp32")
        for draw in (False, True)
        for count in (1, 3)
    ]
    for row in rows:
        assert set(row) == ROW
        assert row["seconds"] > 0 and row["repetitions"] == 1 and row["note"] == ""
        assert 0 < row["peak_mb"] < row["total_mb"] and row["load_peak_mb"] > 0
        assert set(row["stages"]) >= STAGES
        assert sum(row["stages"].values()) == pytest.approx(row["seconds"], rel=0.05)
        assert row["max_score_difference"] < 1e-5
        assert (row["mask_difference"] is not None) == row["masks"] and (
            row["mask_difference"] or 0
        ) < 1e-3
        assert (row["gflop"] is not None) == (row["way"] == "research")
    exported = [row for row in rows if row["ours"]]
    assert all(row["memory_ratio"] < 1 for row in exported), "without PyTorch in the process"


def test_summary_and_conditions(report: dict[str, Any]) -> None:
    assert report["benchmark"] == "peers"
    assert list(report["regions"]) == ["1", "3"]
    of_three = report["regions"]["3"]
    assert of_three["labels_only"]["ours_s"] == of_three["ours_s"] and set(of_three["ours_s"]) == {
        "onnxruntime_fp32"
    }
    assert of_three["labels_only"]["research_s"] == of_three["research_s"] > 0
    assert (
        set(of_three["with_masks"]["peak_mb"])
        == set(of_three["peak_mb"])
        == {"research", "onnxruntime_fp32"}
    )
    conditions = report["conditions"]
    assert {"commit", "torch", "threads", "includes", "memory", "stages", "statistic"} <= set(
        conditions
    )
    assert (
        conditions["weights"] == "the package's own"
        and f"{WIDTH}x{HEIGHT}" in conditions["picture"]
    )


@pytest.fixture(scope="module")
def model() -> RegionSpot:
    return create_model("regionspot_mini")


@pytest.fixture(scope="module")
def inputs(model: RegionSpot) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A picture's bytes, boxes and words."""
    rng = np.random.default_rng(1)
    file = io.BytesIO()
    Image.fromarray(generated_picture(HEIGHT, WIDTH, rng)).save(file, "JPEG")
    words = random_words(6, model.clip.embed_dim, rng)
    return file.getvalue(), random_boxes(11, HEIGHT, WIDTH, rng), words


def test_research_and_ours_compute_the_same(
    model: RegionSpot, inputs: tuple[bytes, np.ndarray, np.ndarray]
) -> None:
    from regionspot.benchmarks.research_pipeline import Research

    picture, boxes, words = inputs
    research, ours = Research(model, words, True), Ours(model, words, True)
    theirs, found = research(picture, boxes), ours(picture, boxes)
    assert found.scores.shape == theirs.scores.shape == (11, 6)
    np.testing.assert_allclose(found.scores, theirs.scores, atol=1e-5)
    np.testing.assert_allclose(theirs.scores.sum(1), 1, atol=1e-5)
    different = [
        int((decode_rle(a) ^ decode_rle(b)).sum())
        for a, b in zip(found.masks, theirs.masks, strict=True)
    ]
    assert len(different) == 11 and max(different) <= 5
    assert STAGES | {"masks"} == set(research.stages.seconds) == set(ours.stages.seconds)

    transform = SamTransform(model.sam.image_size)
    points = transform.apply_points(boxes.reshape(1, -1, 2, 2), HEIGHT, WIDTH)
    labels = np.full(points.shape[:3], BOX_TOP_LEFT, np.int32)
    labels[..., 1] = BOX_BOTTOM_RIGHT
    sam_image, size = transform.apply_image(read_image(picture))
    encoded = ours.predictor.pipeline.encode_image(sam_image[None], [size])
    tokens, _ = ours.predictor.pipeline.mask_tokens(encoded, points, labels)
    np.testing.assert_allclose(
        tokens[0, :, 0], research.mask_tokens(picture, boxes).numpy(), atol=1e-4
    )


def test_crops_score_like_the_evaluation_s(
    model: RegionSpot, inputs: tuple[bytes, np.ndarray, np.ndarray]
) -> None:
    from regionspot.benchmarks.research_pipeline import CROP_BATCH, ClipCrops
    from regionspot.evaluation.baselines import CropSetting
    from regionspot.transforms import crop_boxes, resize_image

    picture, boxes, words = inputs
    boxes = np.tile(boxes, (4, 1))[: CROP_BATCH + 2]
    scores = ClipCrops(model, words, False)(picture, boxes).scores
    assert scores.shape == (CROP_BATCH + 2, 6)
    side = model.clip.image_size
    last = resize_image(crop_boxes(read_image(picture), boxes, CropSetting().scale)[-1], side, side)
    alone = Image.fromarray(last)
    whole = ClipCrops(model, words, False)(
        _png(alone), np.array([[0, 0, side, side]], np.float32)
    ).scores
    np.testing.assert_allclose(scores[-1], whole[0], atol=1e-5)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_arithmetic_of_many_regions_follows_from_few(
    model: RegionSpot, inputs: tuple[bytes, np.ndarray, np.ndarray]
) -> None:
    picture, boxes, words = inputs
    ours = Ours(model, words, False)
    first = [count_flops(partial(ours, picture, boxes[:count])) for count in (1, 2, 3)]
    assert count_flops(lambda: ours(picture, boxes)) == pytest.approx(
        extrapolate(first, 11), rel=1e-4
    )


def test_arithmetic_is_counted_in_full() -> None:
    import torch
    from torch import nn

    convolution = nn.Conv2d(3, 8, 4, 4)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    patches = torch.rand(1, 5, 8)
    assert count_flops(lambda: convolution(torch.rand(1, 3, 16, 16))) == 2 * 16 * 8 * 3 * 16
    with torch.inference_mode():
        found = count_flops(lambda: attention(patches, patches, patches, need_weights=False))
    assert found == 2 * 5 * 8 * 8 * 4 + 2 * 2 * 5 * 5 * 8
    total = torch.zeros(2, 3, 4)
    assert (
        count_flops(lambda: total.baddbmm_(torch.rand(2, 3, 5), torch.rand(2, 5, 4)))
        == 2 * 2 * 3 * 5 * 4
    )


def test_stages_add_up_without_counting_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(
        "regionspot.benchmarks.stages.time.perf_counter", lambda: float(next(ticks))
    )
    stages = Stages()
    with stages.of("outer"):
        with stages.of("inner"):
            stages.switch("second")
        with stages.of("inner"):
            pass
    assert stages.seconds == {"outer": 3.0, "inner": 2.0, "second": 1.0}


def test_a_process_that_died_is_a_note(tmp_path: Path) -> None:
    died = {"note": "not measured: crashed (SIGKILL)"}
    fast = {
        "regions": 1,
        "seconds": 2.0,
        "total_mb": 100.0,
        "peak_mb": 10.0,
        "repetitions": 3,
        "stages": {"head": 2.0},
    }
    rows = rows_of(
        [
            VariantResult("clip_crops", False, [1, 300], [fast, died]),
            VariantResult("owlv2", False, [None], []),
        ],
        tmp_path,
    )
    assert [(row["seconds"], row["note"]) for row in rows[:2]] == [(2.0, ""), (None, died["note"])]
    assert rows[1]["speedup"] is None and rows[1]["stages"] == {}
    found = summary(rows, [1, 300])
    assert (
        found["1"]["labels_only"]["clip_crops_s"] == 2.0
        and found["300"]["labels_only"]["clip_crops_s"] is None
    )
    assert found["300"]["ours_s"] == {} and "owlv2_s" in found["300"]["labels_only"]
    assert "memory runs out" in parent._with_hint("crashed (SIGKILL)")
    assert parent._with_hint("crashed (SIGSEGV)") == "crashed (SIGSEGV)"


def test_what_is_not_installed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "find_spec", lambda name: None)
    found = peers.run(options("--peers", "owlv2,grounding_dino", "--regions", "2"))
    assert [row["note"] for row in found["rows"]] == [
        "not measured: pip install 'regionspot[peers]'"
    ] * 2
    assert [row["regions"] for row in found["rows"]] == [None, None]


def test_graphs_that_were_not_exported_are_a_note(mini_artifacts: Path) -> None:
    from regionspot.runtime.artifacts import Manifest

    manifest = Manifest.load(mini_artifacts)
    assert parent.artefact_ways(manifest) == ["onnxruntime_fp32"]
    assert parent._what_is_missing("onnxruntime_fp32", False, manifest) is None
    assert "sam_mask_decoder" in str(parent._what_is_missing("onnxruntime_fp32", True, manifest))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--regions", "0,1"], "--regions"),
        (["--regions", "many"], "--regions"),
        (["--words", "0"], "--words"),
        (["--repetitions", "0"], "--repetitions"),
        (["--threads", "0"], "--threads"),
        (["--seed", "-1"], "--seed"),
        (["--device", "cuda"], "--device"),
        (["--picture", "3x3"], "--picture"),
        (["--picture", "no/such.jpg"], "does not exist"),
        (["--peers", "glip"], "research, clip_crops"),
        (["--peers", ","], "names nothing"),
        (["--peers", "openvino_fp32"], "--artifacts"),
        (["--model", "regionspot_xl"], "no model"),
        (["--model", "regionspot_bb", "--sam-weights", "sam.pth"], "clip_weights"),
    ],
)
def test_bad_options(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        peers.run(options(*arguments))


def test_artefacts_of_other_weights_are_refused(mini_artifacts: Path) -> None:
    command = "regionspot-export --model regionspot_mini --random-weights 3 --out"
    with pytest.raises(InputError, match=command):
        peers.run(options("--random-weights", "3", "--artifacts", str(mini_artifacts)))
    with pytest.raises(InputError, match="are of regionspot_mini, not of regionspot_bb"):
        parent._check_artifacts(*_setup_of(mini_artifacts), "regionspot_bb", lambda _: "")


def _setup_of(directory: Path) -> tuple[parent.Setup, Any, list[str]]:
    from regionspot.runtime.artifacts import Manifest

    setup = parent.Setup({}, "", str(directory), "", [1], "8x8", "all", 1, None, 1, 0)
    return setup, Manifest.load(directory), ["onnxruntime_fp32"]


def test_random_boxes_lie_in_the_picture() -> None:
    boxes = random_boxes(500, 30, 20, np.random.default_rng(0))
    assert boxes.shape == (500, 4) and boxes.dtype == np.float32
    assert (boxes >= 0).all() and (boxes <= [20, 30, 20, 30]).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= SMALLEST_BOX - 1e-5).all()


def test_grounding_dino_reads_many_words_in_passes() -> None:
    pytest.importorskip("transformers")
    from regionspot.benchmarks.detectors import grounding_size, grounding_texts

    texts = grounding_texts(100, 256, np.random.default_rng(0))
    assert [tuple(text.shape) for text in texts] == [(1, 254), (1, 50)]
    assert grounding_size(1080, 1920) == (750, 1333) and grounding_size(600, 800) == (800, 1067)


def test_a_small_detector() -> None:
    pytest.importorskip("transformers")
    code = """
import io, numpy as np
from PIL import Image
from regionspot.benchmarks.detectors import Detector, build
tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
vision = {**tower, "image_size": 64, "patch_size": 16}
config = dict(vision_config=vision, text_config=tower, projection_dim=32)
file = io.BytesIO()
Image.new("RGB", (50, 30)).save(file, "PNG")
print(Detector(build("owlv2", 0, **config), 7, 0)(file.getvalue(), None).scores.shape)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.strip() == "(16, 7)", child.stderr
