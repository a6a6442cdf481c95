"""Average precision through the real server equals that of PyTorch: by its public model, and graph
by graph.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from regionspot.cli.main import main
from regionspot.data.coco_json import CocoDataset
from regionspot.evaluation.average_precision import evaluate_detections
from regionspot.serving.client import RegionClient
from regionspot.serving.records import ServerRecord

MAX_DIFFERENCE = 0.1


@pytest.fixture(scope="module")
def expected(dataset: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> float:
    """By PyTorch."""
    return evaluate(dataset, tmp_path_factory.mktemp("torch") / "metrics.json")


def evaluate(dataset: CocoDataset, metrics: Path, *options: str) -> float:
    import json

    assert main(["eval", "--data", str(dataset.path), "--json", str(metrics), *options]) == 0
    return float(json.loads(metrics.read_text())["head"]["AP"])


def test_graph_by_graph(
    dataset: CocoDataset, server: ServerRecord, expected: float, tmp_path: Path
) -> None:
    found = evaluate(
        dataset, tmp_path / "metrics.json", "--runtime", "triton", "--url", server.ports.grpc_url
    )
    assert expected > 40 and abs(found - expected) <= MAX_DIFFERENCE


def test_by_the_public_model(dataset: CocoDataset, client: RegionClient, expected: float) -> None:
    names = client.info().vocabularies["mini"]
    category_ids = {category.name: category.id for category in dataset.categories}
    results = []
    for record in dataset.images:
        boxes = [annotation.box for annotation in dataset.annotations_by_image[record.id]]
        found = client.recognize(dataset.image_path(record), boxes, "mini", top_k=len(names))
        pairs = [
            (float(score), category_ids[names[index]], [x0, y0, x1 - x0, y1 - y0])
            for (x0, y0, x1, y1), ids, scores in zip(
                boxes, found.top_class_ids, found.top_scores, strict=True
            )
            for index, score in zip(ids, scores, strict=True)
        ]
        results += [
            {"image_id": record.id, "category_id": category_id, "bbox": xywh, "score": score}
            for score, category_id, xywh in sorted(pairs, reverse=True)[:900]
        ]
    figures = evaluate_detections(dataset, results)
    assert figures["AP"] is not None and abs(figures["AP"] - expected) <= MAX_DIFFERENCE
    assert np.isfinite(figures["AP"])
