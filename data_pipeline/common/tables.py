"""Tables as text."""

from collections.abc import Iterable, Sequence


def table_row(cells: Sequence[object], columns: Sequence[str], between: str = "") -> str:
    """One line of a table.

    columns: a form for each cell: the spaces before it, < or > for its side, and its width, such as "  <20" or ">8".
    A cell that is wider pushes the others to the right. There may be fewer cells than columns.
    between: what stands between two cells.
    """
    parts = []
    for cell, column in zip(cells, columns, strict=False):
        form = column.lstrip(" ")
        parts.append(" " * (len(column) - len(form)) + format(str(cell), form))
    return between.join(parts)


def text_table(header: Sequence[object], rows: Iterable[Sequence[object]], columns: Sequence[str]) -> list[str]:
    """The lines of a table with a header; see `table_row`."""
    return [table_row(row, columns) for row in (header, *rows)]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], side: str = "<") -> list[str]:
    """The lines of a Markdown table whose columns are as wide as their cells; side: < or >, where cells stand."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for width in widths]
    lines = [table_row(row, [f"{side}{width}" for width in widths], " | ") for row in (header, rule, *rows)]
    return [f"| {line} |" for line in lines]
