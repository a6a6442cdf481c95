"""Average precision of every runtime and precision on the same pictures and regions, and its
distance to PyTorch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.targets import Target
from regionspot.data.coco_json import CocoDataset
from regionspot.data.json_reading import Id
from regionspot.errors import RegionSpotError
from regionspot.evaluation.average_precision import Rules, average_precision_by_class
from regionspot.evaluation.detections import Detections
from regionspot.evaluation.evaluator import Metrics, evaluate
from regionspot.evaluation.proposals import Proposals
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.vocabulary import VocabularyEncoder

logger = logging.getLogger(__name__)

SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AP_base", "AP_novel")
MOST_MOVED = 20
"""Of classes whose AP differs from the reference, so many are in the report."""

Best = tuple[Id, float]
Open = Callable[[Target], AbstractContextManager[RegionSpot | RegionPipeline]]


@dataclass(frozen=True, eq=False)
class Setup:
    """What to measure.

    Args:
        targets: the first one is what the others are compared with.
        open_target: the model or pipeline of a target.
        source: of the data, in words.
    """

    targets: Sequence[Target]
    open_target: Open
    dataset: CocoDataset
    proposals: Proposals
    source: str
    rules: Rules = "lvis"
    batch_size: int = 8


def measure(setup: Setup) -> dict[str, Any]:
    """The report; a target that fails is a row with a note, unless it is the one to compare with.

    Raises:
        RegionSpotError: the first target cannot be measured.
    """
    first, *others = setup.targets
    reference, detections = _evaluated(setup, first)
    rows = [_row(setup, first, reference, detections, reference, detections)]
    for target in others:
        try:
            rows.append(_row(setup, target, *_evaluated(setup, target), reference, detections))
        except RegionSpotError as error:
            note = f"not measured: {str(error).splitlines()[0]}"
            rows.append({"runtime": target.runtime, "precision": target.precision, "note": note})
    protocol = {
        name: value
        for name, value in reference["protocol"].items()
        if name not in ("runtime", "precision")
    }
    return {
        "benchmark": "accuracy",
        "rows": rows,
        "conditions": conditions(data=setup.source, reference=first.name, protocol=protocol),
    }


def _evaluated(setup: Setup, target: Target) -> tuple[Metrics, Detections]:
    logger.info(f"measuring {target.name}")
    with setup.open_target(target) as model:
        vocabulary = VocabularyEncoder(model.text_encoder).encode(setup.dataset.class_names)
        began = time.perf_counter()
        metrics, detections = evaluate(
            model,
            setup.dataset,
            vocabulary,
            setup.proposals,
            rules=setup.rules,
            batch_size=setup.batch_size,
        )
        return {**metrics, "seconds": time.perf_counter() - began}, detections


def _row(
    setup: Setup,
    target: Target,
    metrics: Metrics,
    detections: Detections,
    reference: Metrics,
    expected: Detections,
) -> dict[str, Any]:
    moved = _moved(setup, detections, expected)
    best, wanted = best_classes(detections), best_classes(expected)
    agreeing = [found[0] == wanted[key][0] for key, found in best.items() if key in wanted]
    return {
        "runtime": target.runtime,
        "precision": target.precision,
        **{name: metrics[name] for name in SHOWN},
        **{f"d{name}": _distance(metrics[name], reference[name]) for name in SHOWN},
        "agreement": sum(agreeing) / max(len(best), len(wanted), 1),
        "max_score_difference": max(
            (abs(found[1] - wanted[key][1]) for key, found in best.items() if key in wanted),
            default=0.0,
        ),
        "worst_class": next(iter(moved), None),
        "worst_class_dAP": next(iter(moved.values()), 0.0),
        "classes": moved,
        "seconds": metrics["seconds"],
    }


def best_classes(detections: Detections) -> dict[tuple[Id, bytes], Best]:
    """(image id, box) of each region -> its best class and score."""
    best: dict[tuple[Id, bytes], Best] = {}
    image_ids, category_ids = detections.image_ids.tolist(), detections.category_ids.tolist()
    order = np.argsort(detections.scores, kind="stable")  # the best comes last
    for index in order.tolist():
        key = image_ids[index], detections.boxes[index].tobytes()
        best[key] = category_ids[index], float(detections.scores[index])
    return best


def _moved(setup: Setup, detections: Detections, expected: Detections) -> dict[str, float]:
    """Class -> how far its AP is from the reference, in points, the classes that moved most
    first.
    """
    if detections is expected:
        return {}
    found, wanted = (
        average_precision_by_class(setup.dataset, one, setup.rules)
        for one in (detections, expected)
    )
    differences = {name: (ap or 0.0) - (wanted[name] or 0.0) for name, ap in found.items()}
    ordered = sorted(differences.items(), key=lambda item: -abs(item[1]))
    return {name: difference for name, difference in ordered[:MOST_MOVED] if difference}


def _distance(found: float | None, wanted: float | None) -> float | None:
    return None if found is None or wanted is None else abs(found - wanted)
