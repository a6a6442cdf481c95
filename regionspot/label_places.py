"""Where labels go: near their boxes, within the picture, away from each other and from small
boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Rectangles = npt.NDArray[np.float64]
"""(K, 4) xyxy."""

# A place (K, 2) for a label's top-left corner is a corner of its box, moved by multiples of the
# label's size.
_NEAR = [
    (x, y, cost + 0.04 * rank)
    for y, cost in enumerate((0.0, 0.12, 0.16, 0.2))
    for rank, x in enumerate(range(3))
]
_STEPS: Rectangles = np.array(
    [(across / 2, down / 2) for across in range(-4, 5) for down in range(-8, 9)]
)
_STEP_COSTS = 0.5 + 0.3 * np.abs(_STEPS).sum(axis=1)
_OVERLAP_COST, _COVERED_BOX_COST, _OWN_BOX_COST = 8.0, 0.25, 0.8


def place_labels(
    boxes: npt.NDArray[np.int_], sizes: Sequence[tuple[int, int]], canvas_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """The top-left corner of each label, for boxes (N, 4) and labels of N sizes (width, height).

    Small boxes choose first: they have fewest places. The cost of a place is what it covers, and
    how far it is.
    """
    places = [(0, 0)] * len(sizes)
    canvas, all_boxes = np.array(canvas_size), boxes.astype(float)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    taken = np.zeros((len(sizes), 4))
    for count, index in enumerate(np.argsort(areas, kind="stable")):
        size = np.array(sizes[index])
        best: tuple[float, Rectangles | None] = (np.inf, None)
        for corners, costs in (_near(all_boxes[index], size), _further(all_boxes[index], size)):
            hopeful = costs < best[0]  # covering something only adds to a cost
            corners = np.clip(corners[hopeful], 0, np.maximum(canvas - size, 0))
            labels = np.concatenate([corners, corners + size], axis=1)  # (K, 4)
            costs = costs[hopeful] + _covered(
                labels, index, all_boxes, areas, taken[:count], float(size.prod())
            )
            if len(costs) and costs.min() < best[0]:
                best = float(costs.min()), labels[costs.argmin()]
        assert best[1] is not None
        taken[count] = best[1]
        places[index] = (int(best[1][0]), int(best[1][1]))
    return places


def _near(box: Rectangles, size: npt.NDArray[np.int_]) -> tuple[Rectangles, Rectangles]:
    """Places (K, 2) at the edges of a box and the cost (K,) of each: above its left corner is
    best.
    """
    (x0, y0, x1, y1), (width, height) = box, size
    xs, ys = (x0, x1 - width, (x0 + x1 - width) / 2), (y0 - height, y0, y1, y1 - height)
    places = [(xs[x], ys[y]) for x, y, _ in _NEAR]
    beside = [(x, y) for x in (x0 - width, x1) for y in (y0, y1 - height, (y0 + y1 - height) / 2)]
    return np.array(places + beside, float), np.array(
        [cost for _, _, cost in _NEAR] + [0.3] * len(beside)
    )


def _further(box: Rectangles, size: npt.NDArray[np.int_]) -> tuple[Rectangles, Rectangles]:
    """Places (K, 2) around two corners of a box, in steps of half a label."""
    (x0, y0, x1, y1), (width, height) = box, size
    starts = np.array([(x0, y0 - height), (x1 - width, y1)], float)
    return (starts[:, None] + _STEPS * size).reshape(-1, 2), np.tile(_STEP_COSTS, 2)


def _covered(
    labels: Rectangles,
    index: int,
    boxes: Rectangles,
    areas: npt.NDArray[np.int_],
    taken: Rectangles,
    size: float,
) -> npt.NDArray[np.float64]:
    """(K,) the cost of what a label of that size covers: other labels, other boxes, its own box."""
    if not len(labels):
        return np.zeros(0)
    reach = np.concatenate([labels[:, :2].min(axis=0), labels[:, 2:].max(axis=0)])
    other_labels = taken[_touching(reach, taken)]
    near = _touching(reach, boxes)
    near[index] = False
    smaller = np.maximum(np.minimum(areas[near], size), 1)
    own = shared_area(labels, boxes[index : index + 1])[:, 0] / max(areas[index], 1)
    return (
        _OVERLAP_COST * shared_area(labels, other_labels).sum(axis=1) / size
        + _COVERED_BOX_COST * (shared_area(labels, boxes[near]) / smaller).sum(axis=1)
        + _OWN_BOX_COST * own
    )


def _touching(reach: Rectangles, rectangles: Rectangles) -> npt.NDArray[np.bool_]:
    touching = (rectangles[:, :2] < reach[2:]) & (rectangles[:, 2:] > reach[:2])  # (N, 2)
    return np.logical_and.reduce(touching, axis=1)


def shared_area(first: Rectangles, second: Rectangles) -> npt.NDArray[np.float64]:
    """(K, N) areas that K and N rectangles xyxy share."""
    width = np.minimum(first[:, None, 2], second[:, 2]) - np.maximum(
        first[:, None, 0], second[:, 0]
    )
    height = np.minimum(first[:, None, 3], second[:, 3]) - np.maximum(
        first[:, None, 1], second[:, 1]
    )
    shared: npt.NDArray[np.float64] = np.maximum(width, 0) * np.maximum(height, 0)
    return shared
