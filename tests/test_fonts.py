"""A font is chosen by the letters that it has; these tests hold on machines with many fonts and
with none.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageFont

from regionspot import fonts
from regionspot.fonts import FontFile, font_for


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    for cache in (fonts._file_for, fonts._in_folders):
        cache.cache_clear()
    yield
    for cache in (fonts._file_for, fonts._in_folders):
        cache.cache_clear()


@pytest.fixture
def default_file(tmp_path: Path) -> Path:
    """Pillow's own font as a file, in a folder of fonts with one that is damaged."""
    path: Any = ImageFont.load_default(12).path  # type: ignore[union-attr]
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "a-damaged.ttf").write_bytes(b"no font")
    found = tmp_path / "fonts" / "own-sans.ttf"
    found.write_bytes(path.getvalue() if isinstance(path, io.BytesIO) else Path(path).read_bytes())
    return found


def test_pillows_own_font_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_listed_by_fontconfig", lambda letters: pytest.fail("asked for"))
    assert font_for("The quick brown fox 0.75", 20) is fonts.default_font(20)
    assert font_for("", 20) is fonts.default_font(20)


@pytest.mark.parametrize("text", ["\ue000", "\uffff", "犬\ue000"])
def test_letters_that_no_font_has(text: str) -> None:
    assert font_for(text, 20) is None


def test_no_letter_is_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_system_fonts", lambda letters: iter(()))
    assert (
        font_for("犬", 20) is None and font_for("cat 犬", 20) is None and font_for("🐕", 20) is None
    )


def test_fonts_are_found_in_folders(default_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_listed_by_fontconfig", lambda letters: None)
    monkeypatch.setattr(
        fonts, "_folders", lambda: [default_file.parent, default_file.parent / "none"]
    )
    assert list(fonts._system_fonts("cat")) == [
        FontFile(str(default_file)),
        FontFile(str(default_file.with_name("a-damaged.ttf"))),
    ]
    monkeypatch.setattr(
        fonts, "_has", lambda font, letter: font.path is not None and bool(fonts._load(font, 20))
    )
    found = font_for("cat", 20)
    assert isinstance(found, ImageFont.FreeTypeFont) and found.path == str(default_file)


def test_fonts_of_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform in ("linux", "darwin"):
        monkeypatch.setattr("sys.platform", platform)
        assert len(fonts._folders()) >= 3


def test_fontconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "fc-list"
    program.write_text(
        '#!/bin/sh\necho "$@" > $(dirname $0)/asked\nprintf \'/a '
        "b.ttc\\t1\\n/v.ttf\\t65536\\n/v.ttf\\t0\\n'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    listed = fonts._listed_by_fontconfig("犬a ")
    assert listed is not None and set(listed) == {FontFile("/a b.ttc", 1), FontFile("/v.ttf", 0)}
    assert ":charset=72ac 61:scalable=true" in (tmp_path / "asked").read_text()
    program.write_text("#!/bin/sh\nexit 1\n")
    assert fonts._listed_by_fontconfig("a") is None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert fonts._listed_by_fontconfig("a") is None


def test_plain_fonts_without_serifs_come_first() -> None:
    names = [
        "DejaVuMathTeXGyre.ttf",
        "NotoSansCJK-Bold.ttc",
        "NotoSerifCJK-Regular.ttc",
        "NotoSansCJK-Regular.ttc",
    ]
    names += ["wqy-microhei.ttc", "DejaVuSansMono.ttf"]
    ordered = [font.path for font in sorted(map(FontFile, names), key=fonts._preference)]
    assert ordered[:3] == ["NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "NotoSansCJK-Bold.ttc"]


def test_scripts_that_need_shaping_are_not_drawn_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fonts.features, "check", lambda name: False)
    assert (
        font_for("كلب", 20) is None
        and font_for("שלום", 20) is None
        and font_for("हिन्दी", 20) is None
    )
    assert font_for("cat", 20) is not None
