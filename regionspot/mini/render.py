"""Draw a scene: signed distances for the shapes, so every edge is antialiased, and a pattern in the
toy's own frame.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from regionspot.mini.world import CATEGORIES, COLOURS, Scene, Toy

LIGHT_DEVIATION = 0.17  # of the logarithm of each channel
MIN_VISIBLE_FRACTION = (
    0.35  # of a toy's own area inside the picture; what shows less of itself is not annotated
)


def render_scene(scene: Scene) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw `scene`.

    Returns:
        The picture, (height, width, 3) uint8 RGB, and for each toy that is visible enough its
        category index and its visible mask, (height, width) bool, back to front.
    """
    rng = np.random.default_rng(scene.texture_seed)
    canvas = _background(rng, scene.width, scene.height)  # (H, W, 3) float32
    owner = np.full((scene.height, scene.width), -1, np.int16)
    areas = []
    for index, toy in enumerate(scene.toys):
        rows, columns = _window(toy, scene)
        alpha, colour = _draw_toy(toy, rows, columns, rng)  # (h, w), (h, w, 3)
        areas.append(int((alpha > 0.5).sum()))
        patch = canvas[rows, columns]
        patch += alpha[..., None] * (colour - patch)
        owner[rows, columns][alpha > 0.5] = index
    canvas *= _light(rng)
    canvas += rng.normal(0, 3.0, canvas.shape[:2]).astype(np.float32)[..., None]
    visible = []
    for index, toy in enumerate(scene.toys):
        mask = owner == index
        if mask.sum() >= max(MIN_VISIBLE_FRACTION * areas[index], 16):
            visible.append((toy.category, mask))
    return np.clip(canvas, 0, 255).astype(np.uint8), visible


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Soft blotches of two dull tones and a finer grain: (H, W, 3) float32."""
    tones = rng.uniform(60, 190, (2, 1)) + rng.uniform(-18, 18, (2, 3))
    cells = int(rng.integers(3, 14))
    blend = _smooth_noise(rng, cells, width, height)[..., None]  # (H, W, 1)
    grain = _smooth_noise(rng, 48, width, height)[..., None] * rng.uniform(5, 30)
    return (tones[0] + (tones[1] - tones[0]) * blend + grain).astype(np.float32)


def _light(rng: np.random.Generator) -> np.ndarray:
    """The colour and strength of the scene's light, (3,) float32: what a toy looks like depends on
    both, as in photos.

    The colour alone of white paper in warm light and of cream paper in daylight is the same; what
    lies around tells.
    """
    colour = np.exp(
        np.clip(rng.normal(0, LIGHT_DEVIATION, 3), -2 * LIGHT_DEVIATION, 2 * LIGHT_DEVIATION)
    )
    return (colour / colour.mean() * rng.uniform(0.7, 1.1)).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, cells: int, width: int, height: int) -> np.ndarray:
    noise = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255


def _window(toy: Toy, scene: Scene) -> tuple[slice, slice]:
    reach = toy.radius * 1.25 + 2
    x, y = toy.centre
    rows = slice(max(0, int(y - reach)), min(scene.height, int(y + reach) + 1))
    return rows, slice(max(0, int(x - reach)), min(scene.width, int(x + reach) + 1))


def _draw_toy(
    toy: Toy, rows: slice, columns: slice, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (h, w) in [0, 1] and colour (h, w, 3) of `toy` over its window."""
    category = CATEGORIES[toy.category]
    y, x = np.ogrid[rows, columns]
    x = ((x + 0.5 - toy.centre[0]) / toy.radius).astype(np.float32)
    y = ((y + 0.5 - toy.centre[1]) / toy.radius).astype(np.float32)
    cos, sin = np.float32(np.cos(toy.angle)), np.float32(np.sin(toy.angle))
    u, v = x * cos + y * sin, y * cos - x * sin  # the toy's own frame, (h, w), radius 1
    distance = _signed_distance(toy.shape, u, v)  # negative inside, in radii
    alpha = np.clip(0.5 - distance * toy.radius, 0, 1)
    base = _jittered(category.base, rng)
    colour = np.broadcast_to(base, (*alpha.shape, 3))
    if category.detail is not None:
        detail = _jittered(category.detail, rng)
        cover = np.clip(
            0.5 - _pattern_distance(category.pattern, toy, u, v, distance) * toy.radius, 0, 1
        )
        colour = base + cover[..., None] * (detail - base)
    shade = 1.04 - 0.16 * (v + 1) / 2 + 0.06 * u  # light from the upper right
    return alpha, (colour * shade[..., None]).astype(np.float32)


def _jittered(name: str, rng: np.random.Generator) -> np.ndarray:
    return (np.array(COLOURS[name]) * rng.uniform(0.88, 1.08) + rng.uniform(-10, 10, 3)).astype(
        np.float32
    )


def _signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance of (u, v) to the outline of a shape of circumradius about 1; near enough to exact
    for antialiasing.
    """
    if shape == "disc":
        return np.hypot(u, v) - 0.95
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.84
    if shape == "triangle":
        return np.maximum(0.866 * abs(u) - 0.5 * v, v) - 0.55
    if shape == "hexagon":
        return np.maximum(0.866 * abs(u) + 0.5 * abs(v), abs(v)) - 0.85
    if shape == "star":
        angle = np.arctan2(u, -v)
        wedge = np.pi / 5
        folded = np.abs((angle + wedge) % (2 * wedge) - wedge)
        radius = np.hypot(u, v)
        return 0.77 * (radius * np.cos(wedge - folded) - 0.80 * (1 - 0.45 * folded / wedge) * 1.02)
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.68) - 0.27
    # cross
    return np.minimum(
        np.maximum(abs(u) - 0.95, abs(v) - 0.42), np.maximum(abs(u) - 0.42, abs(v) - 0.95)
    )


def _pattern_distance(
    pattern: str, toy: Toy, u: np.ndarray, v: np.ndarray, outline: np.ndarray
) -> np.ndarray:
    """Signed distance, in radii, to the part of the toy that has the detail's colour."""
    if pattern == "border":
        return (-0.1 if toy.shape == "ring" else -0.24) - outline
    if pattern == "bottom":
        return 0.12 - v
    cos, sin = np.cos(toy.pattern_angle), np.sin(toy.pattern_angle)
    if pattern == "cross":  # two bars through the middle
        return np.minimum(abs(u * cos + v * sin), abs(v * cos - u * sin)) - 0.17
    along = (u * cos + v * sin) / 0.52 + toy.pattern_phase[0]
    if pattern == "stripes":
        return (abs(along % 1 - 0.5) - 0.19) * 0.52
    across = (v * cos - u * sin) / 0.52 + toy.pattern_phase[1]
    return (np.hypot(along % 1 - 0.5, across % 1 - 0.5) - 0.30) * 0.52  # dots
