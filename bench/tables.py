"""The one table printer: a result as aligned text, or as Markdown for the docs."""

from collections.abc import Sequence
from typing import NamedTuple

from bench.schema import Result, Row, place


class Column(NamedTuple):
    """A column: the key of a row, its heading, and how a number is written."""

    key: str
    head: str
    form: str = ""


def text(result: Result, columns: Sequence[Column]) -> str:
    """Where and when, the rows under their headings (numbers to the right), and what was left out."""
    cells = [[column.head for column in columns], *_cells(result.rows, columns)]
    right = [_is_number(result.rows, column.key) for column in columns]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    lines = [f"{result.command}", place(result), ""]
    for row in cells:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    lines += [f"left out: {name}: {why}" for name, why in result.left_out.items()]
    return "\n".join(lines)


def markdown(result: Result, columns: Sequence[Column]) -> str:
    """The rows as a Markdown table."""
    marks = ["--:" if _is_number(result.rows, column.key) else ":--" for column in columns]
    rows = [[column.head for column in columns], marks, *_cells(result.rows, columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    return [[_cell(row.get(column.key), column.form) for column in columns] for row in rows]


def _cell(value: object, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if isinstance(value, int | float) else str(value)


def _is_number(rows: Sequence[Row], key: str) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)
