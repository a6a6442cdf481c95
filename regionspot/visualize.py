"""Predictions drawn over their picture: mask, contour, box, and a chip with class and score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from zlib import crc32

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from regionspot.errors import InputError
from regionspot.masks import decode_rle, mask_to_box, rle_area
from regionspot.structures import RegionPredictions, Rle
from regionspot.transforms import UInt8Array, resize_image, scale_points

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

PALETTE: tuple[Colour, ...] = (
    (255, 64, 90),
    (0, 176, 240),
    (255, 176, 0),
    (52, 199, 89),
    (164, 107, 255),
    (255, 122, 26),
    (0, 199, 178),
    (255, 92, 205),
    (168, 214, 0),
    (74, 124, 255),
    (255, 221, 51),
    (197, 75, 220),
    (255, 142, 133),
    (196, 138, 74),
    (190, 190, 255),
    (214, 50, 30),
)
INK, PAPER = (16, 18, 22), (255, 255, 255)
FILL_OPACITY, HALO_OPACITY = 0.3, 0.45
CROWD = 16
"""From this many regions on, labels are drawn smaller."""

SUPERSAMPLING = 4
"""Chips are drawn this much larger and shrunk: Pillow's rounded rectangles are not antialiased."""


def draw_predictions(
    image: UInt8Array, predictions: RegionPredictions, *, min_long_side: int = 768, masks: bool = True
) -> UInt8Array:
    """The picture with its regions on it.

    Args:
        image: (H, W, 3) uint8 RGB, as `read_image` gives it.
        predictions: of this image.
        min_long_side: smaller pictures are enlarged to it, so that labels can be read; 0 keeps the size.
        masks: draw masks where the predictions have them.

    Returns:
        (H', W', 3) uint8: the size of the image unless it was enlarged.

    Raises:
        InputError: the predictions are of an image of another size.
    """
    height, width = image.shape[:2]
    if (height, width) != (predictions.image_height, predictions.image_width):
        raise InputError(
            f"the image is {width} x {height} pixels but the predictions are of one of {predictions.image_width} x "
            f"{predictions.image_height}: draw on the picture as read_image gives it"
        )
    enlargement = max(1.0, min_long_side / max(height, width))
    drawn_height, drawn_width = round(height * enlargement), round(width * enlargement)
    canvas = Image.fromarray(resize_image(image, drawn_height, drawn_width) if enlargement > 1 else image)
    corners = scale_points(predictions.boxes.reshape(-1, 2, 2), (height, width), (drawn_height, drawn_width))
    boxes = np.rint(corners.reshape(-1, 4)).astype(int)
    style = _style(drawn_height, drawn_width, len(predictions))
    colours = _class_colours(predictions)
    if masks and predictions.masks is not None:
        _draw_masks(canvas, predictions.masks, colours, style, enlargement)
    _draw_boxes(canvas, boxes, colours, style)
    _draw_labels(canvas, boxes, _labels(predictions), colours, style)
    return np.array(canvas)


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels of the drawn picture."""

    line: int
    font_size: int

    @property
    def font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(self.font_size)


def _style(height: int, width: int, num_regions: int) -> _Style:
    side = (max(height, width) + 2 * min(height, width)) / 3
    crowding = 0.75 if num_regions >= CROWD else 1.0
    return _Style(line=max(2, round(side / 380 * crowding)), font_size=max(13, round(side / 42 * crowding)))


def _class_colours(predictions: RegionPredictions) -> list[Colour]:
    """A colour for each region. A class prefers the same colour in every picture; no two share one while they last."""
    taken: dict[str, int] = {}
    for name in sorted({predictions.class_names[int(index)] for index in predictions.class_ids}):
        preferred = crc32(name.encode()) % len(PALETTE)
        order = [(preferred + 7 * step) % len(PALETTE) for step in range(len(PALETTE))]
        taken[name] = next((slot for slot in order if slot not in taken.values()), preferred)
    return [PALETTE[taken[predictions.class_names[int(index)]]] for index in predictions.class_ids]


def _labels(predictions: RegionPredictions) -> list[tuple[str, str]]:
    names = (predictions.class_names[int(index)] for index in predictions.class_ids)
    return [(name, f"{score:.2f}") for name, score in zip(names, predictions.scores, strict=True)]


def _draw_masks(
    canvas: Image.Image, masks: Sequence[Rle], colours: Sequence[Colour], style: _Style, enlargement: float
) -> None:
    """Tints from the largest to the smallest, then the contours over all of them.

    Every mask is decoded twice, so that never more than one is in memory.
    """
    areas = np.array([rle_area(rle) for rle in masks], int)
    order = [index for index in np.argsort(-areas, kind="stable").tolist() if areas[index]]
    blur = max(0.7 * style.line, 0.9 * enlargement)
    margin = int(4 * blur) + style.line
    for index in order:
        coverage, corner = _mask_patch(decode_rle(masks[index]), canvas.size, margin)
        canvas.paste(colours[index], corner, coverage.point([round(FILL_OPACITY * value) for value in range(256)]))
    for index in order:
        coverage, corner = _mask_patch(decode_rle(masks[index]), canvas.size, margin)
        blurred = coverage.filter(ImageFilter.GaussianBlur(blur))
        canvas.paste(INK, corner, blurred.point(_contour_opacity(style.line + 2, blur, HALO_OPACITY)))
        canvas.paste(colours[index], corner, blurred.point(_contour_opacity(style.line, blur, 1.0)))


def _mask_patch(
    mask: npt.NDArray[np.bool_], canvas_size: tuple[int, int], margin: int
) -> tuple[Image.Image, tuple[int, int]]:
    """A mask's coverage (0..255) in the drawn picture, cut to its surroundings, and where its top-left corner lies."""
    height, width = mask.shape
    canvas_width, canvas_height = canvas_size
    low, high = scale_points(mask_to_box(mask).reshape(2, 2), (height, width), (canvas_height, canvas_width))
    x0, y0 = np.maximum(np.floor(low).astype(int) - margin, 0).tolist()
    x1, y1 = np.minimum(np.ceil(high).astype(int) + margin, canvas_size).tolist()
    if (canvas_height, canvas_width) == mask.shape:
        coverage = mask[y0:y1, x0:x1].astype(np.uint8) * np.uint8(255)
    else:
        grey = mask.astype(np.uint8) * np.uint8(255)
        coverage = np.ascontiguousarray(resize_image(grey, canvas_height, canvas_width)[y0:y1, x0:x1])
    return Image.fromarray(coverage), (x0, y0)


def _contour_opacity(width: float, blur: float, opacity: float) -> list[int]:
    """Opacity for each blurred coverage 0..255: a line of that width, antialiased, where the coverage passes one half.

    Across a straight edge the blurred coverage is the normal distribution of the distance from it, so its inverse is
    that distance.
    """
    normal = NormalDist()
    distances = [blur * normal.inv_cdf(min(max(value / 255, 1e-4), 1 - 1e-4)) for value in range(256)]
    return [round(255 * opacity * min(max(width / 2 + 0.5 - abs(distance), 0), 1)) for distance in distances]


def _draw_boxes(canvas: Image.Image, boxes: npt.NDArray[np.int_], colours: Sequence[Colour], style: _Style) -> None:
    """Outlines on a dark halo; a dot for a box without area, which is a click."""
    halo = Image.new("L", canvas.size)
    halo_pen, pen = ImageDraw.Draw(halo), ImageDraw.Draw(canvas)
    for box in boxes.tolist():
        _outline(halo_pen, box, round(255 * HALO_OPACITY), style.line, grown=1)
    canvas.paste(INK, (0, 0), halo)
    for box, colour in zip(boxes.tolist(), colours, strict=True):
        _outline(pen, box, colour, style.line)


def _outline(pen: ImageDraw.ImageDraw, box: Sequence[int], fill: int | Colour, line: int, grown: int = 0) -> None:
    x0, y0, x1, y1 = box
    if x0 == x1 and y0 == y1:
        radius = 2 * line + grown
        pen.ellipse((x0 - radius, y0 - radius, x0 + radius, y0 + radius), fill=fill)
        return
    right, bottom = max(x1, x0 + 2) - 1, max(y1, y0 + 2) - 1
    pen.rectangle((x0 - grown, y0 - grown, right + grown, bottom + grown), outline=fill, width=line + 2 * grown)


def _draw_labels(
    canvas: Image.Image,
    boxes: npt.NDArray[np.int_],
    labels: Sequence[tuple[str, str]],
    colours: Sequence[Colour],
    style: _Style,
) -> None:
    limit = min(round(0.45 * canvas.width), 18 * style.font_size)
    chips = [_chip(*label, colour, style, limit) for label, colour in zip(labels, colours, strict=True)]
    places = _place_chips(boxes, [chip.size for chip in chips], canvas.size)
    pen = ImageDraw.Draw(canvas)
    for box, chip, (x, y), colour in zip(boxes.tolist(), chips, places, colours, strict=True):
        _draw_leader(pen, box, (x, y, x + chip.width, y + chip.height), colour, style)
    for chip, place in zip(chips, places, strict=True):
        canvas.paste(chip, place, chip)


def _chip(name: str, score: str, colour: Colour, style: _Style, max_width: int) -> Image.Image:
    """An RGBA label: the name, shortened to max_width, and the score in a quieter tone."""
    font = style.font
    gap, padding = round(0.4 * style.font_size), round(0.35 * style.font_size)
    room = max_width - 2 * padding - gap - round(font.getlength(score))
    name = _shortened(name, font, room)
    name_width, score_width = round(font.getlength(name)), round(font.getlength(score))
    size = (name_width + score_width + gap + 2 * padding, round(1.45 * style.font_size))
    large = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    corner = round(0.3 * style.font_size * SUPERSAMPLING)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, large.width - 1, large.height - 1), corner, fill=255)
    chip = Image.new("RGBA", size, colour)
    chip.putalpha(large.resize(size, Image.Resampling.BOX))
    ink = INK if _luminance(colour) > 0.27 else PAPER
    quiet = tuple(round(0.75 * strong + 0.25 * weak) for strong, weak in zip(ink, colour, strict=True))
    pen = ImageDraw.Draw(chip)
    middle = round(size[1] / 2)
    pen.text((padding, middle), name, font=font, fill=ink, anchor="lm")
    pen.text((size[0] - padding, middle), score, font=font, fill=quiet, anchor="rm")
    return chip


def _shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    if font.getlength(name) <= room:
        return name
    kept = next(
        (length for length in range(len(name), 0, -1) if font.getlength(f"{name[:length].rstrip()}...") <= room), 1
    )
    return f"{name[:kept].rstrip()}..."


def _luminance(colour: Colour) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    red, green, blue = ((value / 255) ** 2.2 for value in colour)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def _draw_leader(pen: ImageDraw.ImageDraw, box: Sequence[int], chip: Rectangle, colour: Colour, style: _Style) -> None:
    """A line from a chip to its box, where they do not touch."""
    nearest = [min(max((chip[axis] + chip[axis + 2]) // 2, box[axis]), box[axis + 2]) for axis in (0, 1)]
    start = [min(max(nearest[axis], chip[axis]), chip[axis + 2]) for axis in (0, 1)]
    if max(abs(start[0] - nearest[0]), abs(start[1] - nearest[1])) > style.line:
        pen.line((*start, *nearest), fill=INK, width=style.line + 2)
        pen.line((*start, *nearest), fill=colour, width=style.line)


def _place_chips(
    boxes: npt.NDArray[np.int_], sizes: Sequence[tuple[int, int]], canvas_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """The top-left corner of each chip: near its box, within the picture, away from other chips and small boxes.

    Small boxes choose first: they have fewest places. The cost of a place is what it covers, and how far it is.
    """
    places = [(0, 0)] * len(sizes)
    taken = np.zeros((0, 4))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in np.argsort(areas, kind="stable"):
        size = np.array(sizes[index])
        corners, costs = _candidates(boxes[index], size)
        corners = np.clip(corners, 0, np.maximum(np.array(canvas_size) - size, 0))  # (K, 2)
        chips = np.concatenate([corners, corners + size], axis=1)  # (K, 4)
        costs = costs + 8 * _shared_area(chips, taken).sum(1) / size.prod()
        others = np.delete(boxes, index, axis=0)
        covered = _shared_area(chips, others) / np.maximum(np.minimum(np.delete(areas, index), size.prod()), 1)
        costs = costs + 0.25 * covered.sum(1)
        costs = costs + 0.8 * _shared_area(chips, boxes[index : index + 1])[:, 0] / max(areas[index], 1)
        best = int(costs.argmin())
        places[index] = (int(corners[best, 0]), int(corners[best, 1]))
        taken = np.concatenate([taken, chips[best : best + 1]])
    return places


def _candidates(
    box: npt.NDArray[np.int_], size: npt.NDArray[np.int_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Places (K, 2) for a chip around a box and the cost (K,) of each: above its left corner is best."""
    (x0, y0, x1, y1), (width, height) = box.astype(float), size
    xs = np.array([x0, x1 - width, (x0 + x1 - width) / 2])
    rows = [(y0 - height, 0.0), (y0, 0.12), (y1, 0.16), (y1 - height, 0.2)]
    near = [((x, y), cost + 0.04 * rank) for y, cost in rows for rank, x in enumerate(xs)]
    beside = [((x, y), 0.3) for x in (x0 - width, x1) for y in (y0, y1 - height, (y0 + y1 - height) / 2)]
    steps = [
        ((x + across * width / 2, y + down * height / 2), 0.5 + 0.15 * (abs(across) + abs(down)))
        for x, y in ((x0, y0 - height), (x1 - width, y1))
        for across in range(-4, 5)
        for down in range(-8, 9)
    ]
    places, costs = zip(*near, *beside, *steps, strict=True)
    return np.array(places), np.array(costs)


def _shared_area(first: npt.NDArray[np.number], second: npt.NDArray[np.number]) -> npt.NDArray[np.float64]:
    """(K, N) areas that K and N rectangles xyxy share."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.clip(high - low, 0, None).astype(float).prod(-1)
