"""Tables of text cells."""

from __future__ import annotations

import pytest

from regionspot.tables import markdown_table, text_table

HEADER, ROWS = ("graph", "ms"), [("region_head", "7.25"), ("sam", "100.00")]


def test_columns_of_text_are_as_wide_as_their_widest_cells() -> None:
    assert text_table(HEADER, ROWS) == "graph        ms\nregion_head  7.25\nsam          100.00"


def test_numbers_are_aligned_to_the_right() -> None:
    table = text_table((*HEADER, "note"), [(*row, "") for row in ROWS], right={1})
    assert table == "graph            ms  note\nregion_head    7.25\nsam          100.00"


def test_a_table_without_rows_is_its_header() -> None:
    assert text_table(HEADER, []) == "graph  ms"


def test_a_row_that_is_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        text_table(HEADER, [("sam",)])


def test_markdown_escapes_bars() -> None:
    table = markdown_table(HEADER, [("max|x|", "1")], right={1})
    assert table == "| graph | ms |\n| --- | ---: |\n| max\\|x\\| | 1 |"
