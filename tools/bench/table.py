"""Rows of text under a header, as all benchmarks of servers and engines print them."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column on the left and the others on the right. A row of two cells is a name and a remark,
    which may be of any length."""
    full = [header, *(row for row in rows if len(row) == len(header))]
    first = max(len(row[0]) for row in [header, *rows])
    widths = [max(len(row[column]) for row in full) for column in range(1, len(header))]
    lines = []
    for row in [header, *rows]:
        if len(row) == len(header):
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True)]
        else:
            cells = list(row[1:])
        lines.append("  ".join([row[0].ljust(first), *cells]))
    return lines
