"""What must hold of an overlay that no eye has seen: places, sizes, colours. Its beauty was judged
by looking.
"""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageDraw, ImageFont

from regionspot import fonts, visualize
from regionspot.errors import InputError
from regionspot.masks import Rle, decode_rle, encode_rle
from regionspot.structures import RegionPredictions
from regionspot.visualize import (
    PALETTE,
    _chip,
    _class_colours,
    _class_labels,
    _style,
    _Text,
    draw_predictions,
)

NAMES = (
    "cat",
    "dog",
    "a very long class name that nobody would write but somebody will in the end",
)


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def predictions(
    height: int,
    width: int,
    boxes: Sequence[Sequence[float]],
    class_ids: list[int] | None = None,
    masks: bool = True,
    names: tuple[str, ...] = NAMES,
) -> RegionPredictions:
    ids = np.array(class_ids if class_ids is not None else [0] * len(boxes), int)
    scores = np.full(len(boxes), 0.5, np.float32)
    rles = []
    for x0, y0, x1, y1 in boxes:
        mask = np.zeros((height, width), bool)
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
        rles.append(encode_rle(mask))
    return RegionPredictions(
        height,
        width,
        np.array(boxes, np.float32).reshape(-1, 4),
        names,
        scores,
        ids,
        ids[:, None],
        scores[:, None],
        tuple(rles) if masks else None,
    )


class TestSize:
    @pytest.mark.parametrize("masks", [True, False])
    def test_no_region(self, masks: bool) -> None:
        image = grey(800, 600)
        np.testing.assert_array_equal(
            draw_predictions(image, predictions(800, 600, [], masks=masks)), image
        )

    @pytest.mark.parametrize(
        ("height", "width", "min_long_side", "expected"),
        [
            (256, 256, 768, (768, 768)),
            (128, 256, 768, (384, 768)),
            (256, 256, 0, (256, 256)),
            (900, 700, 768, (900, 700)),
            (1, 1, 768, (768, 768)),
            (8, 3000, 768, (8, 3000)),
        ],
    )
    def test_small_pictures_are_enlarged(
        self, height: int, width: int, min_long_side: int, expected: tuple[int, int]
    ) -> None:
        image = grey(height, width)
        drawn = draw_predictions(
            image, predictions(height, width, [[0, 0, width, height]]), min_long_side=min_long_side
        )
        assert drawn.shape == (*expected, 3)
        assert drawn.dtype == np.uint8
        assert (image == 128).all()  # the picture itself is not drawn on

    def test_refuses_the_predictions_of_another_image(self) -> None:
        with pytest.raises(
            InputError, match=r"image is 9 x 8 pixels but the predictions are of one of 8 x 9"
        ):
            draw_predictions(grey(8, 9), predictions(9, 8, []))


class TestDrawing:
    def test_inside_is_tinted_and_outside_is_not(self) -> None:
        shown = predictions(800, 800, [[300, 300, 500, 500]], [1])
        drawn = draw_predictions(grey(800, 800), shown).astype(int)
        colour = np.array(_class_colours(shown)[0])
        np.testing.assert_allclose(drawn[400, 400], 0.7 * 128 + 0.3 * colour, atol=2)
        assert (drawn[600:, :] == 128).all()
        assert (drawn[:, :200] == 128).all()
        assert (np.abs(drawn - colour).max(-1) < 3).sum() > 4 * 200  # contour and box
        without = draw_predictions(grey(800, 800), shown, masks=False)
        assert (without[400, 400] == 128).all()

    def test_outlines_alone_leave_the_pictures_colours(self) -> None:
        mask = np.zeros((800, 800), bool)
        mask[350:450, 350:450] = True  # well inside its box
        shown = replace(
            predictions(800, 800, [[300, 300, 500, 500]], [1]), masks=(encode_rle(mask),)
        )
        drawn = draw_predictions(grey(800, 800), shown, tint=False).astype(int)
        assert (drawn[365:435, 365:435] == 128).all()
        colour = np.array(_class_colours(shown)[0])
        assert (np.abs(drawn[346:354, 365:435] - colour).max(-1) < 3).any(0).all()  # the upper edge
        assert (draw_predictions(grey(800, 800), shown, masks=False)[320:480, 320:480] == 128).all()

    def test_enlarged_box_stays_in_place(self) -> None:
        drawn = draw_predictions(
            grey(96, 96), predictions(96, 96, [[24, 24, 72, 72]], masks=False)
        ).astype(int)
        changed = (drawn != 128).any(-1)
        rows, columns = np.flatnonzero(changed[:, 384]), np.flatnonzero(changed[384])
        assert abs(rows[-1] - 72 * 8) <= 2
        assert abs(columns[0] - 24 * 8) <= 2
        assert abs(columns[-1] - 72 * 8) <= 2

    @pytest.mark.parametrize(
        "box",
        [
            [0, 0, 900, 800],
            [-0.0, 0, 1, 1],
            [899, 799, 900, 800],
            [450, 400, 450, 400],
            [10, 10, 10, 300],
        ],
    )
    @pytest.mark.parametrize("masks", [True, False])
    def test_odd_boxes(self, box: list[float], masks: bool) -> None:
        drawn = draw_predictions(grey(800, 900), predictions(800, 900, [box], [2], masks=masks))
        assert (drawn != 128).any()

    def test_a_dot_without_a_recent_pillow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(ImageDraw.ImageDraw, "circle", raising=False)  # new in Pillow 10.4
        drawn = draw_predictions(
            grey(800, 800), predictions(800, 800, [[400, 400, 400, 400]], masks=False)
        )
        assert (drawn[397:404, 397:404] != 128).any(-1).all()

    def test_one_mask_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[weakref.ref[np.ndarray]] = []

        def counted(rle: Rle) -> np.ndarray:
            assert all(mask() is None for mask in decoded)
            mask = decode_rle(rle)
            decoded.append(weakref.ref(mask))
            return mask

        monkeypatch.setattr(visualize, "decode_rle", counted)
        boxes = [[10, 10, 300, 300], [50, 60, 200, 90], [700, 700, 800, 800]]
        draw_predictions(grey(800, 800), predictions(800, 800, boxes))
        assert len(decoded) == 6

    def test_forty_regions(self) -> None:
        rng = np.random.default_rng(0)
        corners = rng.uniform(0, 500, (40, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(20, 200, (40, 2))], axis=1)
        drawn = draw_predictions(
            grey(700, 700), predictions(700, 700, boxes.tolist(), [i % 3 for i in range(40)])
        )
        assert drawn.shape == (768, 768, 3)


class TestColours:
    def test_a_class_keeps_its_colour(self) -> None:
        boxes = [[0, 0, 5, 5], [5, 5, 9, 9]]
        first = _class_colours(predictions(10, 10, boxes, [0, 1]))
        second = _class_colours(predictions(10, 10, boxes, [1, 0]))
        other_words = _class_colours(predictions(10, 10, boxes, [2, 1], names=("x", "dog", "cat")))
        assert first == second[::-1] == other_words

    def test_classes_of_one_picture_differ_while_colours_last(self) -> None:
        count = len(PALETTE)
        names = tuple(f"class {index}" for index in range(count + 5))
        boxes = [[0, 0, 5, 5]] * len(names)
        few = _class_colours(predictions(10, 10, boxes[:count], list(range(count)), names=names))
        assert len(set(few)) == count
        many = _class_colours(predictions(10, 10, boxes, list(range(len(names))), names=names))
        assert len(set(many)) == count


def drawn_name(name: str) -> np.ndarray:
    """A picture with one label; classes of all names have one colour and one number."""
    return draw_predictions(
        grey(300, 600), predictions(300, 600, [[20, 100, 300, 250]], masks=False, names=(name,))
    )


@pytest.fixture(params=["with the system's fonts", "without"])
def fonts_of_the_system(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    if request.param == "without":
        monkeypatch.setattr(fonts, "_system_fonts", lambda letters: iter(()))
    fonts._file_for.cache_clear()
    yield request.param != "without"
    fonts._file_for.cache_clear()


class TestLabels:
    def test_long_names_are_shortened(self) -> None:
        style = _style(768, 768, 1)
        labels, legend = _class_labels(predictions(768, 768, [[0, 0, 9, 9]], [2]), style, 768, None)
        assert labels[2].text.startswith("a very") and labels[2].text.endswith("...") and not legend
        assert _chip(labels[2], "0.50", PALETTE[0], style).width <= style.label_width(768)
        narrow, _ = _class_labels(predictions(768, 768, [[0, 0, 9, 9]]), style, 1, None)
        assert narrow[0].text == "c..."  # never none at all

    def test_each_script_is_drawn_in_its_own_letters_or_by_number(
        self, fonts_of_the_system: bool
    ) -> None:
        """No two words look the same, whatever fonts there are."""
        words = [
            "cat",
            "dog",
            "犬",
            "猫",
            "собака",
            "кошка",
            "كلب",
            "قطة",
            "हिन्दी",
            "मराठी",
            "🐕",
            "🐈",
            "dog 🐕",
            "dog 🐈",
        ]
        words += ["naïve", "naive", "a\x00b", "a\x01b", "\u202eab", "ab", "\ud800", "\ud801"]
        pictures = [drawn_name(word) for word in words]
        colours = [
            _class_colours(predictions(9, 9, [[0, 0, 5, 5]], names=(word,)))[0] for word in words
        ]
        for first in range(len(words)):
            for second in range(first):
                if (
                    colours[first] == colours[second]
                    or pictures[first].shape != pictures[second].shape
                ):
                    assert not np.array_equal(pictures[first], pictures[second]), (
                        words[first],
                        words[second],
                    )

    @pytest.mark.parametrize(
        "words", [("犬", "猫"), ("🐕", "🐈"), ("\ue000", "\ue001"), ("हि", "मरा")]
    )
    def test_words_differ_in_more_than_colour(
        self, words: tuple[str, str], fonts_of_the_system: bool
    ) -> None:
        texts = [self.texts_of(word) for word in words]
        assert texts[0] != texts[1]
        for label, legend in texts:
            assert label == "#0" if legend else label in words

    @staticmethod
    def texts_of(word: str) -> tuple[str, dict[str, str]]:
        labels, legend = _class_labels(
            predictions(9, 9, [[0, 0, 5, 5]], names=(word,)), _style(768, 768, 1), 768, None
        )
        return labels[0].text, {number: entry.text for number, entry in legend.items()}

    def test_without_a_font_labels_are_numbers_with_a_legend(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fonts, "_system_fonts", lambda letters: iter(()))
        fonts._file_for.cache_clear()
        assert self.texts_of("🐕 dog") == ("#0", {"#0": "\\N{DOG} dog"})
        assert self.texts_of("caf\u00e9") == self.texts_of("cafe\u0301")
        assert self.texts_of("one\ntwo\tthree\x00") == ("one two three\\x00", {})
        plain, numbered = drawn_name("dog"), drawn_name("犬")
        assert plain.shape == (384, 768, 3) and numbered.shape[0] > 384 and numbered.shape[1] == 768
        assert (numbered[384:] < 128).any() and (numbered[384:] == 255).mean() > 0.5
        fonts._file_for.cache_clear()

    def test_names_that_are_shortened_to_one_are_numbered(self) -> None:
        names = (
            "the same long beginning of two names, A",
            "the same long beginning of two names, B",
            "cat",
            "#0",
            "",
        )
        boxes = [[0, 0, 50, 50]] * 5
        shown = predictions(200, 300, boxes, [0, 1, 2, 3, 4], masks=False, names=names)
        labels, legend = _class_labels(shown, _style(768, 1152, 5), 300, None)
        assert [labels[index].text for index in range(5)] == ["#0", "#1", "cat", "#3", "#4"]
        assert {number: entry.text for number, entry in legend.items()} == {
            "#0": names[0],
            "#1": names[1],
            "#3": "#0",
            "#4": "",
        }
        assert draw_predictions(grey(200, 300), shown).shape[0] > 512

    def test_a_legend_keeps_within_bounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fonts, "_system_fonts", lambda letters: iter(()))
        fonts._file_for.cache_clear()
        drawn = drawn_name("犬" * 20_000)
        assert 384 < drawn.shape[0] < 900 and drawn.shape[1] == 768
        assert drawn_name("x" * 20_000).shape == (384, 768, 3)
        fonts._file_for.cache_clear()

    def test_a_font_of_ones_own(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"font .*none.ttf' cannot be used"):
            draw_predictions(grey(300, 600), predictions(300, 600, []), font=tmp_path / "none.ttf")
        (tmp_path / "text.ttf").write_text("no font")
        for wrong in (tmp_path / "text.ttf", tmp_path, 7):
            with pytest.raises(InputError, match="cannot be used"):
                draw_predictions(grey(300, 600), predictions(300, 600, []), font=wrong)  # type: ignore[arg-type]
        path: Any = fonts.default_font(12).path  # type: ignore[union-attr]
        (tmp_path / "own.ttf").write_bytes(
            path.getvalue() if isinstance(path, io.BytesIO) else Path(path).read_bytes()
        )
        shown = predictions(300, 600, [[20, 100, 300, 250]], masks=False, names=("dog",))
        labels, legend = _class_labels(
            shown, _style(300, 600, 1), 600, fonts.read_font(tmp_path / "own.ttf")
        )
        assert not legend and isinstance(labels[0].font, ImageFont.FreeTypeFont)
        assert labels[0].font.path == str(tmp_path / "own.ttf")
        assert (draw_predictions(grey(300, 600), shown, font=tmp_path / "own.ttf") != 128).any()

    @pytest.mark.parametrize(
        ("image", "shown", "options", "message"),
        [
            (grey(9, 9).astype(float), predictions(9, 9, []), {}, "an image array must be"),
            (None, predictions(9, 9, []), {}, "an image is a path"),
            (grey(9, 9), None, {}, "must be RegionPredictions, got None"),
            (
                grey(9, 9),
                predictions(9, 9, []),
                {"min_long_side": -1},
                "min_long_side must be a whole number",
            ),
            (
                grey(9, 9),
                predictions(9, 9, []),
                {"min_long_side": "9"},
                "min_long_side must be a whole number",
            ),
        ],
    )
    def test_what_cannot_be_drawn(
        self, image: Any, shown: Any, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            draw_predictions(image, shown, **options)

    def test_boxes_far_outside(self) -> None:
        shown = predictions(80, 90, [[-1e30, -1e30, 1e30, 1e30], [1e9, 1e9, 1e9, 1e9]], masks=False)
        assert (draw_predictions(grey(80, 90), shown) != 128).any()

    def test_an_empty_name_has_a_chip(self) -> None:
        style = _style(768, 768, 1)
        assert _chip(_Text("", style.font), "0.50", PALETTE[0], style).width < 100
