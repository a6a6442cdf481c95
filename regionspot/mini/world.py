"""What exists in the mini world: its categories and its scenes. Nothing here draws; see `render`.

A category is a pattern and an ordered pair of colours, said as a phrase: "red toy with blue
stripes". The seven shapes are nuisance variation. 12 plain colours and 5 patterns x 132 ordered
pairs could be said; 410 of these 672 are the world's categories. 300 of them are base: the head is
trained on them. 110 are novel, of two kinds: 60 new pairs of words that base categories have too,
and 50 with a word that no base category has ("lime", "cross"), so that only captions have named it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

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
    "black": (28, 28, 32),
    "lime": (165, 225, 45),
}
PATTERNS = {
    "stripes": "{base} toy with {detail} stripes",
    "dots": "{base} toy with {detail} dots",
    "border": "{base} toy with {article} {detail} border",
    "bottom": "{base} toy with {article} {detail} bottom",
    "cross": "{base} toy with {article} {detail} cross",
}
CAPTION_WORDS = ("lime", "cross")
"""A colour and a pattern that no base category has."""

SHAPES = ("disc", "square", "triangle", "hexagon", "star", "cross", "ring")
SIZES = (  # (width, height) of scenes
    (256, 256),
    (320, 240),
    (240, 320),
    (384, 256),
    (256, 384),
    (288, 288),
    (360, 240),
    (448, 336),
    (336, 448),
)
CROWD_SIZES = ((640, 480), (480, 640), (576, 576))
NUM_BASE, NUM_NEW_PAIRS, NUM_NEW_WORDS = 300, 60, 50
# raise it with any change to what the same seed draws: pictures of another version are made anew
WORLD_VERSION = 2

# relative instance rates of the long tail's thirds
FREQUENT_WEIGHT = 1.0
COMMON_WEIGHT = 0.22
RARE_WEIGHT = 0.022

Novelty = Literal["pair", "word"]


@dataclass(frozen=True)
class ToyCategory:
    """One category.

    Attributes:
        detail: the pattern's colour; None for plain toys.
        novelty: None for base categories; "pair" for a new pair of known words, "word" for one with
            a word of CAPTION_WORDS.
        tail_weight: its rate in the long tail; 0 for novel ones.
    """

    id: int
    name: str
    pattern: str
    base: str
    detail: str | None
    novelty: Novelty | None = None
    tail_weight: float = 0.0

    @property
    def novel(self) -> bool:
        return self.novelty is not None


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
    """What one picture shows, back to front. `texture_seed` decides the background and every
    colour's jitter.
    """

    width: int
    height: int
    toys: tuple[Toy, ...]
    texture_seed: int


def article(word: str) -> str:
    """The indefinite article before a word: "an" before "orange", "a" before "red"."""
    return "an" if word[0] in "aeiou" else "a"


def _make_categories() -> tuple[ToyCategory, ...]:
    kinds: list[tuple[str, str, str, str | None]] = [
        (f"plain {c} toy", "plain", c, None) for c in COLOURS
    ]
    for pattern, phrase in PATTERNS.items():
        kinds += [
            (phrase.format(base=b, detail=d, article=article(d)), pattern, b, d)
            for b, d in permutations(COLOURS, 2)
        ]
    rng = np.random.default_rng(20231101)
    only_in_captions = [
        bool({base, detail, pattern} & set(CAPTION_WORDS)) for _, pattern, base, detail in kinds
    ]
    known_plain = [
        i for i, kind in enumerate(kinds) if kind[1] == "plain" and not only_in_captions[i]
    ]
    known_pairs = rng.permutation(
        [i for i, kind in enumerate(kinds) if kind[3] and not only_in_captions[i]]
    ).tolist()
    base = known_plain + known_pairs[: NUM_BASE - len(known_plain)]
    novelty: dict[int, Novelty | None] = dict.fromkeys(base)
    novelty |= dict.fromkeys(known_pairs[len(base) - len(known_plain) :][:NUM_NEW_PAIRS], "pair")
    novelty |= dict.fromkeys(
        rng.permutation(np.flatnonzero(only_in_captions))[:NUM_NEW_WORDS].tolist(), "word"
    )
    weights: dict[int, float] = {}
    thirds = np.array_split(rng.permutation(base), 3)
    for group, weight in zip(thirds, (FREQUENT_WEIGHT, COMMON_WEIGHT, RARE_WEIGHT), strict=True):
        weights |= dict.fromkeys(group.tolist(), weight)
    return tuple(
        ToyCategory(number, *kinds[i], novelty=novelty[i], tail_weight=weights.get(i, 0.0))
        for number, i in enumerate(sorted(novelty), start=1)
    )


CATEGORIES: tuple[ToyCategory, ...] = _make_categories()
UNIFORM_WEIGHTS = np.ones(
    len(CATEGORIES)
)  # (410,) validation and pretraining: every category alike
BASE_WEIGHTS = np.array(
    [float(not c.novel) for c in CATEGORIES]
)  # (410,) the head's training set: base ones alike
TAIL_WEIGHTS = np.array([c.tail_weight for c in CATEGORIES])  # (410,) base ones in a long tail


def sample_scene(
    rng: np.random.Generator, weights: np.ndarray, num_toys: Sequence[int] = (2, 3, 4, 5, 6)
) -> Scene:
    """Draw one scene with `num_toys` toys of categories drawn by `weights`, and up to three more.

    In a part of the scenes a box alone does not say which toy is meant: a small toy lies on a large
    one, a toy shows through a ring, or one toy hides a part of another.
    """
    width, height = SIZES[rng.integers(len(SIZES))]
    side = min(width, height)
    probabilities = weights / weights.sum()
    toys: list[Toy] = []
    for _ in range(int(rng.choice(num_toys))):
        radius = side * rng.uniform(0.12, 0.26)
        x = rng.uniform(0.6 * radius, width - 0.6 * radius)
        y = rng.uniform(0.6 * radius, height - 0.6 * radius)
        toys.append(_sample_toy(rng, probabilities, (x, y), radius))
    if rng.random() < 0.25:  # on the largest
        host = _largest(toys)
        centre = np.add(host.centre, rng.uniform(-0.3, 0.3, 2) * host.radius)
        inner = _sample_toy(rng, probabilities, centre, host.radius * rng.uniform(0.4, 0.55))
        toys.insert(toys.index(host) + 1, inner)
    if rng.random() < 0.12:  # behind the largest, which becomes a ring
        host = _largest(toys)
        place, ring = toys.index(host), replace(host, shape="ring")
        inner = _sample_toy(rng, probabilities, host.centre, host.radius * rng.uniform(0.4, 0.7))
        toys[place : place + 1] = [inner, ring]
    if rng.random() < 0.2:  # in front of one
        host = toys[rng.integers(len(toys))]
        direction, radius = rng.uniform(0, 2 * np.pi), host.radius * rng.uniform(0.7, 1.2)
        centre = np.add(
            host.centre,
            0.6 * (host.radius + radius) * np.array([np.cos(direction), np.sin(direction)]),
        )
        toys.append(_sample_toy(rng, probabilities, centre, radius))
    return Scene(width, height, tuple(toys), int(rng.integers(2**31)))


def sample_crowd(
    rng: np.random.Generator, weights: np.ndarray, num_toys: tuple[int, int] = (20, 100)
) -> Scene:
    """Draw a larger scene with many small toys, their number between the two, that seldom hide each
    other.
    """
    width, height = CROWD_SIZES[rng.integers(len(CROWD_SIZES))]
    side, probabilities = min(width, height), weights / weights.sum()
    toys: list[Toy] = []
    for _ in range(int(rng.integers(num_toys[0], num_toys[1] + 1))):
        radius = side * rng.uniform(0.025, 0.07)
        for _ in range(20):
            centre = rng.uniform(radius, np.array([width, height]) - radius)
            if all(
                np.hypot(*np.subtract(centre, toy.centre)) > 0.9 * (radius + toy.radius)
                for toy in toys
            ):
                break
        toys.append(_sample_toy(rng, probabilities, centre, radius))
    return Scene(width, height, tuple(toys), int(rng.integers(2**31)))


def sample_portrait(rng: np.random.Generator, weights: np.ndarray, side: int) -> Scene:
    """Draw a picture of one toy that fills most of a `side` x `side` square, as a caption's subject
    does.
    """
    radius = side * rng.uniform(0.25, 0.55)
    centre = rng.uniform(0.35, 0.65, 2) * side
    return Scene(
        side,
        side,
        (_sample_toy(rng, weights / weights.sum(), centre, radius),),
        int(rng.integers(2**31)),
    )


def _largest(toys: Sequence[Toy]) -> Toy:
    return max(toys, key=lambda toy: toy.radius)


def _sample_toy(
    rng: np.random.Generator,
    probabilities: np.ndarray,
    centre: Sequence[float] | np.ndarray,
    radius: float,
) -> Toy:
    return Toy(
        category=int(rng.choice(len(CATEGORIES), p=probabilities)),
        shape=SHAPES[rng.integers(len(SHAPES))],
        centre=(float(centre[0]), float(centre[1])),
        radius=float(radius),
        angle=float(rng.uniform(-0.45, 0.45)),
        pattern_angle=float(rng.uniform(0, np.pi)),
        pattern_phase=(float(rng.uniform(0, 1)), float(rng.uniform(0, 1))),
    )
