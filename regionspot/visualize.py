"""Predictions drawn over their picture: mask, contour, box, and a chip with class and score."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from zlib import crc32

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from regionspot.arrays import checked_count
from regionspot.errors import InputError, shown
from regionspot.fonts import Font, FontFile, default_font, font_for, read_font
from regionspot.images import read_image
from regionspot.label_places import place_labels
from regionspot.masks import Rle, decode_rle, mask_to_box, rle_area
from regionspot.structures import RegionPredictions, UInt8Array
from regionspot.transforms import resize_image, scale_points

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


JOINERS = "\u200c\u200d"
"""Invisible letters that change the shape of their neighbours."""

MAX_LEGEND_LETTERS = 1000
"""Of one class name; a longer one is cut in the middle."""

MAX_LINE_LETTERS = 256
"""No line has more: it bounds the time that measuring takes."""


def draw_predictions(
    image: UInt8Array,
    predictions: RegionPredictions,
    *,
    min_long_side: int = 768,
    masks: bool = True,
    tint: bool = True,
    font: str | os.PathLike[str] | None = None,
) -> UInt8Array:
    """The picture with its regions on it.

    A class name is drawn in a font that has its letters: the given one, Pillow's own, or one of the
    system. Where there is none, and where two names are too long to be told apart, labels show the
    class's number (its index in `predictions.class_names`), and a strip below the picture says what
    the numbers mean.

    Args:
        image: (H, W, 3) uint8 RGB, as `read_image` gives it.
        predictions: of this image.
        min_long_side: smaller pictures are enlarged to it, so that labels can be read; 0 keeps the
            size.
        masks: draw masks where the predictions have them.
        tint: fill them with their colours too; without it their outlines alone are drawn, and the
            picture's own colours stay as they are.
        font: a .ttf, .otf or .ttc file to draw class names with.

    Returns:
        (H', W', 3) uint8: the size of the image unless it was enlarged or has the strip below.

    Raises:
        InputError: the predictions are of an image of another size, or the font cannot be read.
    """
    if not isinstance(predictions, RegionPredictions):
        raise InputError(f"predictions must be RegionPredictions, got {shown(predictions)}")
    image, given_font = read_image(image), None if font is None else read_font(font)
    height, width = image.shape[:2]
    if (height, width) != (predictions.image_height, predictions.image_width):
        raise InputError(
            f"the image is {width} x {height} pixels but the predictions are of one of "
            f"{predictions.image_width} x {predictions.image_height}: draw on the picture as "
            "read_image gives it"
        )
    enlargement = max(
        1.0, checked_count(min_long_side, "min_long_side", least=0) / max(height, width)
    )
    drawn_height = max(1, round(height * enlargement))
    drawn_width = max(1, round(width * enlargement))
    canvas = Image.fromarray(
        resize_image(image, drawn_height, drawn_width) if enlargement > 1 else image
    )
    corners = scale_points(
        predictions.boxes.reshape(-1, 2, 2), (height, width), (drawn_height, drawn_width)
    )
    far = 2 * max(canvas.size)  # outside, where boxes need no exact place
    boxes = np.clip(np.rint(corners.reshape(-1, 4)), -far, far).astype(int)
    style = _style(drawn_height, drawn_width, len(predictions))
    colours = _class_colours(predictions)
    if masks and predictions.masks is not None:
        _draw_masks(canvas, predictions.masks, colours, style, enlargement, tint)
    _draw_boxes(canvas, boxes, colours, style)
    names, legend = _class_labels(predictions, style, drawn_width, given_font)
    labels = [names[int(index)] for index in predictions.class_ids]
    _draw_labels(canvas, boxes, labels, predictions.scores.tolist(), colours, style)
    return np.array(_with_legend(canvas, legend, style))


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels of the drawn picture."""

    line: int
    font_size: int

    @property
    def font(self) -> Font:
        return default_font(self.font_size)

    def label_width(self, canvas_width: int) -> int:
        """The most that a label may take."""
        return min(round(0.45 * canvas_width), 18 * self.font_size)

    def name_width(self, canvas_width: int) -> int:
        """What is left of that for the class name."""
        return (
            self.label_width(canvas_width)
            - 2 * self.padding
            - self.gap
            - round(self.font.getlength("0.00"))
        )

    @property
    def gap(self) -> int:
        return round(0.4 * self.font_size)

    @property
    def padding(self) -> int:
        return round(0.35 * self.font_size)


@dataclass(frozen=True, eq=False)
class _Text:
    """What is written, and the font that has its letters."""

    text: str
    font: Font


def _style(height: int, width: int, num_regions: int) -> _Style:
    side = (max(height, width) + 2 * min(height, width)) / 3
    crowding = 0.75 if num_regions >= CROWD else 1.0
    return _Style(
        line=max(2, round(side / 380 * crowding)), font_size=max(13, round(side / 42 * crowding))
    )


def _class_colours(predictions: RegionPredictions) -> list[Colour]:
    """A colour for each region. A class prefers the same colour in every picture; no two share one
    while they last.
    """
    taken: dict[str, int] = {}
    for name in sorted({predictions.class_names[int(index)] for index in predictions.class_ids}):
        preferred = crc32(name.encode("utf-8", "surrogatepass")) % len(PALETTE)
        order = [(preferred + 7 * step) % len(PALETTE) for step in range(len(PALETTE))]
        taken[name] = next((slot for slot in order if slot not in taken.values()), preferred)
    return [PALETTE[taken[predictions.class_names[int(index)]]] for index in predictions.class_ids]


def _class_labels(
    predictions: RegionPredictions, style: _Style, canvas_width: int, given_font: FontFile | None
) -> tuple[dict[int, _Text], dict[str, _Text]]:
    """What labels of each class that is there say; and for those that say a number, what it stands
    for.
    """
    full: dict[int, _Text] = {}
    short: dict[int, _Text] = {}
    for index in sorted(set(predictions.class_ids.tolist())):
        name = _one_line(predictions.class_names[index])
        font = font_for(name, style.font_size, given_font)
        full[index] = _Text(_escaped(name), style.font) if font is None else _Text(name, font)
        if font is not None and name:
            short[index] = _Text(_shortened(name, font, style.name_width(canvas_width)), font)
    times = Counter(label.text for label in short.values())
    numbered = [index for index in full if index not in short or times[short[index].text] > 1]
    if numbered:  # a class called "#3" must not be taken for number 3
        numbered += [index for index, label in short.items() if re.fullmatch(r"#\d+", label.text)]
    legend = {f"#{index}": full[index] for index in sorted(set(numbered))}
    return short | {index: _Text(f"#{index}", style.font) for index in numbered}, legend


def _one_line(name: str) -> str:
    """A name as it can be drawn: composed, without ends of lines; what has no shape of its own is
    escaped.
    """
    letters = " ".join(unicodedata.normalize("NFC", name).split())
    return "".join(_code(letter) if _is_invisible(letter) else letter for letter in letters)


def _is_invisible(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs") and letter not in JOINERS


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _escaped(name: str) -> str:
    """A name in ASCII, other letters by their names in Unicode."""
    return name.encode("ascii", "namereplace").decode()


def _draw_masks(
    canvas: Image.Image,
    masks: Sequence[Rle],
    colours: Sequence[Colour],
    style: _Style,
    enlargement: float,
    tint: bool,
) -> None:
    """Tints from the largest to the smallest, then the contours over all of them.

    Every mask is decoded twice, so that never more than one is in memory.
    """
    areas = np.array([rle_area(rle) for rle in masks], int)
    order = [index for index in np.argsort(-areas, kind="stable").tolist() if areas[index]]
    blur = max(0.7 * style.line, 0.9 * enlargement)
    margin = int(4 * blur) + style.line
    for index in order if tint else ():
        coverage, corner = _mask_patch(decode_rle(masks[index]), canvas.size, margin)
        canvas.paste(
            colours[index],
            corner,
            coverage.point([round(FILL_OPACITY * value) for value in range(256)]),
        )
    for index in order:
        coverage, corner = _mask_patch(decode_rle(masks[index]), canvas.size, margin)
        blurred = coverage.filter(ImageFilter.GaussianBlur(blur))
        canvas.paste(
            INK, corner, blurred.point(_contour_opacity(style.line + 2, blur, HALO_OPACITY))
        )
        canvas.paste(colours[index], corner, blurred.point(_contour_opacity(style.line, blur, 1.0)))


def _mask_patch(
    mask: npt.NDArray[np.bool_], canvas_size: tuple[int, int], margin: int
) -> tuple[Image.Image, tuple[int, int]]:
    """A mask's coverage (0..255) in the drawn picture, cut to its surroundings, and where its
    top-left corner lies.
    """
    height, width = mask.shape
    canvas_width, canvas_height = canvas_size
    low, high = scale_points(
        mask_to_box(mask).reshape(2, 2), (height, width), (canvas_height, canvas_width)
    )
    x0, y0 = np.maximum(np.floor(low).astype(int) - margin, 0).tolist()
    x1, y1 = np.minimum(np.ceil(high).astype(int) + margin, canvas_size).tolist()
    if (canvas_height, canvas_width) == mask.shape:
        coverage = mask[y0:y1, x0:x1].astype(np.uint8) * np.uint8(255)
    else:
        grey = mask.astype(np.uint8) * np.uint8(255)
        coverage = np.ascontiguousarray(
            resize_image(grey, canvas_height, canvas_width)[y0:y1, x0:x1]
        )
    return Image.fromarray(coverage), (x0, y0)


def _contour_opacity(width: float, blur: float, opacity: float) -> list[int]:
    """Opacity for each blurred coverage 0..255: a line of that width, antialiased, where the
    coverage passes one half.

    Across a straight edge the blurred coverage is the normal distribution of the distance from it,
    so its inverse is that distance.
    """
    normal = NormalDist()
    distances = [
        blur * normal.inv_cdf(min(max(value / 255, 1e-4), 1 - 1e-4)) for value in range(256)
    ]
    return [
        round(255 * opacity * min(max(width / 2 + 0.5 - abs(distance), 0), 1))
        for distance in distances
    ]


def _draw_boxes(
    canvas: Image.Image, boxes: npt.NDArray[np.int_], colours: Sequence[Colour], style: _Style
) -> None:
    """Outlines on a dark halo; a dot for a box without area, which is a click."""
    halo = Image.new("L", canvas.size)
    halo_pen, pen = ImageDraw.Draw(halo), ImageDraw.Draw(canvas)
    for box in boxes.tolist():
        _outline(halo_pen, box, round(255 * HALO_OPACITY), style.line, grown=1)
    canvas.paste(INK, (0, 0), halo)
    for box, colour in zip(boxes.tolist(), colours, strict=True):
        _outline(pen, box, colour, style.line)


def _outline(
    pen: ImageDraw.ImageDraw, box: Sequence[int], fill: int | Colour, line: int, grown: int = 0
) -> None:
    x0, y0, x1, y1 = box
    if x0 == x1 and y0 == y1:
        radius = 2 * line + grown
        pen.ellipse((x0 - radius, y0 - radius, x0 + radius, y0 + radius), fill=fill)
        return
    right, bottom = max(x1, x0 + 2) - 1, max(y1, y0 + 2) - 1
    pen.rectangle(
        (x0 - grown, y0 - grown, right + grown, bottom + grown),
        outline=fill,
        width=line + 2 * grown,
    )


def _draw_labels(
    canvas: Image.Image,
    boxes: npt.NDArray[np.int_],
    names: Sequence[_Text],
    scores: Iterable[float],
    colours: Sequence[Colour],
    style: _Style,
) -> None:
    labels = zip(names, scores, colours, strict=True)
    chips = [_chip(name, f"{score:.2f}", colour, style) for name, score, colour in labels]
    places = place_labels(boxes, [chip.size for chip in chips], canvas.size)
    pen = ImageDraw.Draw(canvas)
    for box, chip, (x, y), colour in zip(boxes.tolist(), chips, places, colours, strict=True):
        _draw_leader(pen, box, (x, y, x + chip.width, y + chip.height), colour, style)
    for chip, place in zip(chips, places, strict=True):
        canvas.paste(chip, place, chip)


def _chip(name: _Text, score: str, colour: Colour, style: _Style) -> Image.Image:
    """An RGBA label: the name, and the score in a quieter tone."""
    gap, padding = style.gap, style.padding
    name_width = round(name.font.getlength(name.text))
    score_width = round(style.font.getlength(score))
    size = (name_width + score_width + gap + 2 * padding, round(1.45 * style.font_size))
    large = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    corner = round(0.3 * style.font_size * SUPERSAMPLING)
    ImageDraw.Draw(large).rounded_rectangle(
        (0, 0, large.width - 1, large.height - 1), corner, fill=255
    )
    chip = Image.new("RGBA", size, colour)
    chip.putalpha(large.resize(size, Image.Resampling.BOX))
    ink = INK if _luminance(colour) > 0.27 else PAPER
    quiet = tuple(
        round(0.75 * strong + 0.25 * weak) for strong, weak in zip(ink, colour, strict=True)
    )
    pen = ImageDraw.Draw(chip)
    middle = round(size[1] / 2)
    pen.text((padding, middle), name.text, font=name.font, fill=ink, anchor="lm")
    pen.text((size[0] - padding, middle), score, font=style.font, fill=quiet, anchor="rm")
    return chip


def _with_legend(canvas: Image.Image, legend: dict[str, _Text], style: _Style) -> Image.Image:
    """The picture with a strip below it that says what numbers stand for; without numbers the
    picture itself.
    """
    if not legend:
        return canvas
    margin, height = style.padding, round(1.45 * style.font_size)
    indent = margin + style.gap + max(round(style.font.getlength(number)) for number in legend)
    room = max(canvas.width - indent - margin, 4 * style.font_size)
    entries = [(number, entry.font, _wrapped(entry, room)) for number, entry in legend.items()]
    strip_height = sum(len(lines) for *_, lines in entries) * height + 2 * margin
    drawn = Image.new("RGB", (canvas.width, canvas.height + strip_height), PAPER)
    drawn.paste(canvas, (0, 0))
    pen, y = ImageDraw.Draw(drawn), canvas.height + margin + height // 2
    for number, font, lines in entries:
        pen.text((margin, y), number, font=style.font, fill=INK, anchor="lm")
        for line in lines:
            pen.text((indent, y), line, font=font, fill=INK, anchor="lm")
            y += height
    return drawn


def _wrapped(entry: _Text, room: int) -> list[str]:
    """Lines no wider than `room`."""
    text, lines = entry.text, []
    if len(text) > MAX_LEGEND_LETTERS:
        text = f"{text[: MAX_LEGEND_LETTERS // 2]} ... {text[-MAX_LEGEND_LETTERS // 2 :]}"
    while text:
        fits = _fitting(text, entry.font, room)
        lines.append(text[:fits])
        text = text[fits:]
    return lines or [""]


def _shortened(name: str, font: Font, room: int) -> str:
    if len(name) <= MAX_LINE_LETTERS and font.getlength(name) <= room:
        return name
    fits = _fitting(name, font, round(room - font.getlength("...")))
    return f"{name[:fits].rstrip()}..."


def _fitting(text: str, font: Font, room: int) -> int:
    """How many of the first letters are no wider than `room`; one at least."""
    low, high = 1, min(len(text), MAX_LINE_LETTERS)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= room else (low, middle - 1)
    return low


def _luminance(colour: Colour) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    red, green, blue = ((value / 255) ** 2.2 for value in colour)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def _draw_leader(
    pen: ImageDraw.ImageDraw, box: Sequence[int], chip: Rectangle, colour: Colour, style: _Style
) -> None:
    """A line from a chip to its box, where they do not touch."""
    nearest = [
        min(max((chip[axis] + chip[axis + 2]) // 2, box[axis]), box[axis + 2]) for axis in (0, 1)
    ]
    start = [min(max(nearest[axis], chip[axis]), chip[axis + 2]) for axis in (0, 1)]
    if max(abs(start[0] - nearest[0]), abs(start[1] - nearest[1])) > style.line:
        pen.line((*start, *nearest), fill=INK, width=style.line + 2)
        pen.line((*start, *nearest), fill=colour, width=style.line)
