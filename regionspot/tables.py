"""Tables of text cells, aligned for a terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
) -> str:
    """Returns lines whose columns are as wide as their widest cells, two blanks apart, without
    blanks at the end.

    Args:
        right: the indices of columns that are aligned to the right.

    Raises:
        ValueError: a row has not as many cells as the header.
    """
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        aligned = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
) -> str:
    """Returns lines of a table in GitHub's Markdown; bars in cells are escaped. Arguments as of
    `text_table`.
    """
    rule = ["---:" if index in right else "---" for index in range(len(header))]
    return "\n".join(_markdown_row(row) for row in (header, rule, *rows))


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
