"""`regionspot-benchmark latency`, and what its roofline is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regionspot.benchmarks.latency import MEASURED, cost_of, parts_of, roofline
from regionspot.benchmarks.roofline import Cost, GraphCosts, Rates
from regionspot.cli.main import main

WORDS = 12


def row_of(graph: str, precision: str = "fp32", native: bool = False) -> dict[str, Any]:
    """Of 20 regions in chunks of 8."""
    sizes = {"batch": 1, "regions": 20, "prompt_chunk": 8}
    return {
        "graph": graph,
        "runtime": "openvino",
        "precision": precision,
        "native": native,
        "p50_ms": 1.0,
        **sizes,
    }


@pytest.fixture(scope="module")
def full_size() -> GraphCosts:
    return GraphCosts("regionspot_bl")


class TestCosts:
    def test_sam_vit_b_and_clip_vit_l(self, full_size: GraphCosts) -> None:
        """972 GFLOP is the figure of SAM's ViT-B with its windows padded; 304 M parameters has
        CLIP's ViT-L/14.
        """
        sam, clip = (
            full_size.of(graph, {"batch": 1})
            for graph in ("sam_image_encoder", "clip_image_encoder")
        )
        assert 930e9 < sam.flops < 972e9
        assert 155e9 < clip.flops < 170e9
        assert clip.bytes == pytest.approx(4 * 304e6, rel=0.01)

    def test_a_product_by_hand(self, full_size: GraphCosts) -> None:
        """Eleven projections of 4096 cells from 256 to 128 channels, and the statistics'
        products.
        """
        cost = full_size.of("sam_token_decoder_image", {"batch": 1})
        assert cost.flops == pytest.approx(11 * 2 * 4096 * 256 * 128, rel=0.01)

    def test_batches_add_up_and_weights_do_not(self, full_size: GraphCosts) -> None:
        one, two = (full_size.of("clip_image_encoder", {"batch": batch}) for batch in (1, 2))
        assert two.flops == 2 * one.flops and one.bytes < two.bytes < 1.1 * one.bytes
        assert full_size.of("clip_image_encoder", {"batch": 1}, "int8").bytes < 0.3 * one.bytes

    def test_the_whole_path_is_its_graphs(self, full_size: GraphCosts) -> None:
        rates = Rates({"fp32": 1e11, "int8": 4e11}, copy=1e10)
        whole, *parts = (
            roofline(row_of(graph), full_size, rates, WORDS)
            for graph in ("whole path", *MEASURED[:3], "sam_token_decoder_prompts", "region_head")
        )
        for figure in ("gflop", "mbytes", "least_ms"):
            assert whole[figure] == pytest.approx(sum(part[figure] for part in parts))

    def test_prompts_in_chunks(self, full_size: GraphCosts) -> None:
        prompts = cost_of(
            "sam_token_decoder_prompts", row_of("whole path"), WORDS, "fp32", full_size
        )
        eight, four = (
            full_size.of(
                "sam_token_decoder_prompts", {"batch": 1, "prompts": n, "points": 2, "tokens": 1}
            )
            for n in (8, 4)
        )
        assert prompts.flops == 2 * eight.flops + four.flops

    def test_what_stays_in_single_precision(self) -> None:
        single = [
            graph
            for graph, precision in parts_of(row_of("whole path", "int8"))
            if precision == "fp32"
        ]
        assert single == ["sam_token_decoder_image", "region_head"]
        native = dict(parts_of(row_of("whole path with masks", "int8", native=True)))
        assert native["sam_mask_decoder"] == "fp32" and native["sam_image_encoder"] == "int8"
        engine = {**row_of("whole path", "fp8"), "runtime": "tensorrt"}
        assert dict(parts_of(engine))["region_head"] == "fp16"
        assert parts_of(row_of("clip_image_encoder", "int8")) == [("clip_image_encoder", "int8")]

    def test_least_time(self) -> None:
        rates = Rates({"fp32": 100.0}, copy=10.0)
        assert rates.least_seconds(Cost(1000, 50), "fp32") == 10.0
        assert rates.least_seconds(Cost(1000, 500), "fp32") == 50.0
        assert rates.least_seconds(Cost(1000, 500), "fp16") is None


def test_torch_and_artifacts(
    mini_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "latency.json"
    options = [
        "--artifacts",
        str(mini_artifacts),
        "--regions",
        "1,9",
        "--batch",
        "2",
        "--words",
        str(WORDS),
    ]
    options += [
        "--picture",
        "90x70",
        "--seconds",
        "0",
        "--repetitions",
        "1",
        "--graphs",
        "region_head,whole path",
    ]
    assert main(["benchmark", "latency", *options, "--json", str(path)]) == 0
    assert "whole path" in capsys.readouterr().out
    report = json.loads(path.read_text())
    rows = {
        (row["runtime"], row["graph"], row["batch"], row["regions"]): row for row in report["rows"]
    }
    sizes = [
        ("region_head", 2, 1),
        ("region_head", 2, 9),
        ("whole path", 1, 1),
        ("whole path", 1, 9),
    ]
    assert list(rows) == [
        (runtime, *size) for runtime in ("torch", "onnxruntime") for size in sizes
    ]
    for row in report["rows"]:
        assert row["p50_ms"] > 0 and row["n"] == 1 and row["gflop"] > 0 and row["roofline"] > 0
        assert row["per_second"] == pytest.approx(1000 * row["batch"] / row["p50_ms"])
    assert (
        rows["torch", "whole path", 1, 1]["gflop"]
        == rows["onnxruntime", "whole path", 1, 1]["gflop"]
    )
    assert report["rates"]["gemm_gflops"]["fp32"] > 0
    assert {"processor", "commit", "includes", "picture", "threads"} <= set(report["conditions"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--graphs", "head"], "there is no head"),
        (["--regions", "0"], "--regions '0'"),
        (["--batch", "many"], "--batch 'many'"),
        (["--targets", "openvino_int8"], "cannot be measured here"),
        (["--targets", ","], "names nothing"),
        (["--repetitions", "0"], "1 or more"),
        (["--threads", "0"], "--threads"),
        (["--model", "regionspot_xl"], "regionspot_xl"),
        (["--artifacts", "nowhere"], "holds no artefacts"),
        (["--picture", "3x3"], "--picture 3x3"),
    ],
)
def test_what_cannot_be_measured(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "latency", "--graphs", "region_head", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
