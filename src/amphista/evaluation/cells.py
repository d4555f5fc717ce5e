"""The cells of reports: numbers, ratios with their intervals, shares; and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

DASH = "-"


def number(value: float | None, form: str = ".2f") -> str:
    """A value, or a dash where there is none."""
    return DASH if value is None else format(value, form)


def times(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}x"


def with_interval(measures: dict[str, Any], name: str, form: str = ".2f", unit: str = "x") -> str:
    """A ratio and its interval, or the ratio alone where it cannot vary."""
    value, bounds = measures[name], measures.get(f"{name}_interval")
    if value is None:
        return DASH
    interval = "" if bounds is None or bounds[0] == bounds[1] else f" ({bounds[0]:{form}} to {bounds[1]:{form}})"
    return f"{value:{form}}{unit}{interval}"


def share(value: float | None, count: int) -> str:
    return DASH if value is None else f"{value:.1%} of {count}"


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    headers, *rows = [[cell.replace("|", "\\|") for cell in line] for line in (headers, *rows)]
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def pivot(
    rows: Sequence[dict[str, Any]],
    by: Sequence[str],
    column: Callable[[dict[str, Any]], str],
    cell: Callable[[dict[str, Any]], str],
) -> str:
    """A table with a line for each combination of the values `by`, a column for each of what `column` says."""
    names = list(dict.fromkeys(map(column, rows)))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(str(row[key]) for key in by), {})[column(row)] = cell(row)
    return table(
        [*by, *names], [[*place, *(cells.get(name, DASH) for name in names)] for place, cells in lines.items()]
    )
