"""What exists in the mini world: its categories and its scenes. Nothing here draws; see `render`.

A category is a pattern and an ordered pair of colours, said as a phrase: "red toy with blue stripes". The six shapes
are nuisance variation. 10 plain colours and 4 patterns x 90 ordered pairs make 370 categories; 74 of them are novel:
they never appear where the head is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 40),
    "orange": (242, 135, 25),
    "yellow": (245, 222, 60),
    "green": (45, 150, 60),
    "cyan": (75, 205, 225),
    "blue": (35, 65, 195),
    "purple": (125, 45, 165),
    "pink": (245, 145, 190),
    "brown": (115, 70, 35),
    "white": (243, 243, 240),
}
PATTERNS = {
    "stripes": "{base} toy with {detail} stripes",
    "dots": "{base} toy with {detail} dots",
    "border": "{base} toy with a {detail} border",
    "bottom": "{base} toy with a {detail} bottom",
}
SHAPES = ("disc", "square", "triangle", "hexagon", "star", "cross")
SIZES = ((256, 256), (320, 240), (240, 320), (384, 256), (256, 384), (288, 288), (360, 240))  # (width, height)
NUM_NOVEL = 74
WORLD_VERSION = 1  # raise it with any change to what the same seed draws: pictures of another version are made anew

FREQUENT_WEIGHT, COMMON_WEIGHT, RARE_WEIGHT = 1.0, 0.22, 0.022  # relative instance rates of the long tail's thirds


@dataclass(frozen=True)
class ToyCategory:
    """One category. `detail` is None for plain toys; `tail_weight` is 0 for novel ones."""

    id: int
    name: str
    pattern: str
    base: str
    detail: str | None
    novel: bool
    tail_weight: float


@dataclass(frozen=True)
class Toy:
    """One object of a scene: centre and radius in pixels of the image, angles in radians."""

    category: int  # index into CATEGORIES
    shape: str
    centre: tuple[float, float]  # x, y
    radius: float
    angle: float
    pattern_angle: float
    pattern_phase: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """What one picture shows, back to front. `texture_seed` decides the background and every colour's jitter."""

    width: int
    height: int
    toys: tuple[Toy, ...]
    texture_seed: int


def _make_categories() -> tuple[ToyCategory, ...]:
    kinds: list[tuple[str, str, str, str | None]] = [(f"plain {c} toy", "plain", c, None) for c in COLOURS]
    for pattern, phrase in PATTERNS.items():
        kinds += [(phrase.format(base=b, detail=d), pattern, b, d) for b, d in permutations(COLOURS, 2)]
    rng = np.random.default_rng(20231101)
    patterned = np.arange(len(COLOURS), len(kinds))
    novel = set(rng.choice(patterned, NUM_NOVEL, replace=False).tolist())
    base = rng.permutation([i for i in range(len(kinds)) if i not in novel])
    weights = dict.fromkeys(novel, 0.0)
    for group, weight in zip(np.array_split(base, 3), (FREQUENT_WEIGHT, COMMON_WEIGHT, RARE_WEIGHT), strict=True):
        weights.update(dict.fromkeys(group.tolist(), weight))
    return tuple(ToyCategory(i + 1, *kind, novel=i in novel, tail_weight=weights[i]) for i, kind in enumerate(kinds))


CATEGORIES: tuple[ToyCategory, ...] = _make_categories()
TAIL_WEIGHTS = np.array([c.tail_weight for c in CATEGORIES])  # (370,) the head's training set: a long tail, none novel
UNIFORM_WEIGHTS = np.ones(len(CATEGORIES))  # (370,) validation and pretraining: every category alike


def sample_scene(rng: np.random.Generator, weights: np.ndarray, num_toys: Sequence[int] = (2, 3, 4, 5, 6)) -> Scene:
    """Draw one scene with up to `max(num_toys)` toys of categories drawn by `weights`.

    A quarter of the scenes put a small toy inside a large one, so that a box alone does not say which is meant.
    """
    width, height = SIZES[rng.integers(len(SIZES))]
    side = min(width, height)
    probabilities = weights / weights.sum()
    toys: list[Toy] = []
    for _ in range(int(rng.choice(num_toys))):
        radius = side * rng.uniform(0.12, 0.26)
        x, y = rng.uniform(0.6 * radius, width - 0.6 * radius), rng.uniform(0.6 * radius, height - 0.6 * radius)
        toys.append(_sample_toy(rng, probabilities, x, y, radius))
    host = max(toys, key=lambda toy: toy.radius)
    if rng.random() < 0.25 and host.radius > 0.19 * side:
        offset = rng.uniform(-0.3, 0.3, 2) * host.radius
        inner = _sample_toy(
            rng, probabilities, host.centre[0] + offset[0], host.centre[1] + offset[1], host.radius * 0.48
        )
        toys.insert(toys.index(host) + 1, inner)
    return Scene(width, height, tuple(toys), int(rng.integers(2**31)))


def sample_portrait(rng: np.random.Generator, weights: np.ndarray, side: int) -> Scene:
    """Draw a picture of one toy that fills most of a `side` x `side` square, as a caption's subject does."""
    radius = side * rng.uniform(0.25, 0.55)
    x, y = rng.uniform(0.35, 0.65, 2) * side
    return Scene(side, side, (_sample_toy(rng, weights / weights.sum(), x, y, radius),), int(rng.integers(2**31)))


def _sample_toy(rng: np.random.Generator, probabilities: np.ndarray, x: float, y: float, radius: float) -> Toy:
    return Toy(
        category=int(rng.choice(len(CATEGORIES), p=probabilities)),
        shape=SHAPES[rng.integers(len(SHAPES))],
        centre=(float(x), float(y)),
        radius=float(radius),
        angle=float(rng.uniform(-0.45, 0.45)),
        pattern_angle=float(rng.uniform(0, np.pi)),
        pattern_phase=(float(rng.uniform(0, 1)), float(rng.uniform(0, 1))),
    )
