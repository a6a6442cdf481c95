"""The soak test: what it breaks when, and what it takes for a right answer. `make soak` runs it."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from regionspot.benchmarks.soak import KILLS, ROUNDS, Plan, main
from regionspot.benchmarks.soak_callers import Case
from regionspot.benchmarks.soak_service import TARGETS
from regionspot.masks import encode_rle
from regionspot.structures import RegionPredictions

HOME = Path(__file__).resolve().parents[2] / "build" / "server"


def answer(scores: list[list[float]], **more: object) -> RegionPredictions:
    top = np.array(scores, np.float32)
    order = np.argsort(-top, axis=1, kind="stable")
    return RegionPredictions(
        image_height=20,
        image_width=30,
        boxes=np.array([[1, 1, 9, 9]] * len(top), np.float32),
        class_names=("cat", "dog"),
        scores=top.max(axis=1),
        class_ids=order[:, 0],
        top_class_ids=order,
        top_scores=np.take_along_axis(top, order, axis=1),
        **more,  # type: ignore[arg-type]
    )


def test_every_process_is_killed_as_often_and_faults_are_spread() -> None:
    plan = Plan(1800)
    events = plan.events(random.Random(0))
    assert [time for time, _ in events] == sorted(time for time, _ in events)
    assert events[0][0] >= 0 and events[-1][0] + plan.steady_s < 1800
    count = Counter(kind for _, kind in events)
    assert {count[target] for target in TARGETS} == {KILLS // len(TARGETS)}
    assert count["overload"] == count["full shared memory"] == ROUNDS
    kinds = [kind for _, kind in events]
    for kind in ("overload", "full shared memory"):
        places = [index for index, one in enumerate(kinds) if one == kind]
        assert min(np.diff(places)) > len(kinds) / (ROUNDS + 1)


def test_right_and_wrong_answers() -> None:
    case = Case(b"", {}, answer([[0.9, 0.1], [0.4995, 0.5005]]))
    assert case.is_right(answer([[0.9005, 0.0995], [0.5005, 0.4995]]))  # the second is a tie
    assert not case.is_right(answer([[0.1, 0.9], [0.4995, 0.5005]]))
    assert not case.is_right(answer([[0.89, 0.11], [0.4995, 0.5005]]))
    assert not case.is_right(answer([[0.9, 0.1]]))
    assert not case.is_right(replace(case.expected, class_names=("cat", "cow")))


def test_wrong_masks() -> None:
    mask = np.zeros((20, 30), bool)
    mask[:10] = True
    other = mask.copy()
    other[0, 0] = False
    right, nearly, wrong = (encode_rle(one) for one in (mask, other, ~mask))
    case = Case(b"", {}, answer([[0.9, 0.1]], masks=(right,)))
    assert case.is_right(answer([[0.9, 0.1]], masks=(nearly,)))
    assert not case.is_right(answer([[0.9, 0.1]], masks=(wrong,)))
    assert not case.is_right(answer([[0.9, 0.1]]))


def test_every_process_killed_once(mini_artifacts_with_masks: Path, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    options = ["--artifacts", str(mini_artifacts_with_masks), "--home", str(HOME)]
    options += ["--minutes", "0.4", "--kills", "5", "--rounds", "0", "--out", str(out)]
    assert main(options) == 0
    found = json.loads(out.read_text())
    assert set(found["back_s"]) == set(TARGETS)
    assert found["faults"] == [] and found["processes_left"] == []
    kinds = ("vocabulary", "words", "clicks", "masks")
    assert all(found["calls"][f"{kind}, gateway"]["OK"] > 0 for kind in kinds)
    assert found["starts"]["gateway"] >= 2 and found["starts"]["supervisor"] >= 2
