"""Labels lie inside the picture and apart, at the cheapest of all places."""

from __future__ import annotations

import numpy as np
import pytest

from regionspot.label_places import place_labels, shared_area


def test_no_label() -> None:
    assert place_labels(np.zeros((0, 4), int), [], (100, 100)) == []


@pytest.mark.parametrize("copies", [1, 12])
def test_labels_stay_inside_and_apart(copies: int) -> None:
    grid = [[x, y, x + 110, y + 110] for x in range(0, 800, 160) for y in range(0, 800, 160)]
    boxes = np.array(grid if copies == 1 else [[400, 400, 500, 500]] * copies)
    size = (150, 24)
    places = np.array(place_labels(boxes, [size] * len(boxes), (800, 800)))
    assert (places >= 0).all()
    assert (places + size <= 800).all()
    for index, place in enumerate(places):
        apart = (np.abs(places - place) >= size).any(1)
        apart[index] = True
        assert apart.all()


def all_places(box: np.ndarray, width: int, height: int) -> list[tuple[float, float, float]]:
    """x, y and cost of every place around a box."""
    x0, y0, x1, y1 = box.astype(float)
    xs = (x0, x1 - width, (x0 + x1 - width) / 2)
    rows = [(y0 - height, 0.0), (y0, 0.12), (y1, 0.16), (y1 - height, 0.2)]
    places = [(x, y, cost + 0.04 * rank) for y, cost in rows for rank, x in enumerate(xs)]
    places += [
        (x, y, 0.3) for x in (x0 - width, x1) for y in (y0, y1 - height, (y0 + y1 - height) / 2)
    ]
    return places + [
        (x + across * width / 2, y + down * height / 2, 0.5 + 0.15 * (abs(across) + abs(down)))
        for x, y in ((x0, y0 - height), (x1 - width, y1))
        for across in range(-4, 5)
        for down in range(-8, 9)
    ]


def by_trying_all(
    boxes: np.ndarray, sizes: list[tuple[int, int]], canvas: tuple[int, int]
) -> list[tuple[int, int]]:
    chosen: dict[int, np.ndarray] = {}
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in np.argsort(areas, kind="stable").tolist():
        size = np.array(sizes[index])
        x, y, costs = np.array(all_places(boxes[index], *sizes[index])).T
        corners = np.clip(np.stack([x, y], axis=1), 0, np.maximum(np.array(canvas) - size, 0))
        labels = np.concatenate([corners, corners + size], axis=1)
        for label in chosen.values():
            costs = costs + 8 * shared_area(labels, label[None])[:, 0] / size.prod()
        for other in range(len(boxes)):
            shared = shared_area(labels, boxes[other][None].astype(float))[:, 0]
            smaller = max(min(areas[other], size.prod()), 1)
            costs = costs + (
                0.8 * shared / max(areas[index], 1) if other == index else 0.25 * shared / smaller
            )
        chosen[index] = labels[costs.round(9).argmin()]
    return [(int(chosen[index][0]), int(chosen[index][1])) for index in range(len(boxes))]


@pytest.mark.parametrize("count", [1, 2, 8, 30])
@pytest.mark.parametrize("canvas", [(400, 300), (90, 500), (20, 10)])
def test_equals_trying_all_places(count: int, canvas: tuple[int, int]) -> None:
    rng = np.random.default_rng(count)
    corners = rng.integers(0, canvas, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 120, (count, 2))], axis=1)
    sizes = [(int(width), 20) for width in rng.integers(30, 130, count)]
    assert place_labels(boxes, sizes, canvas) == by_trying_all(boxes, sizes, canvas)
