"""The most rows whose memory fits."""

from __future__ import annotations

from collections.abc import Callable


def most_rows(peak: Callable[[int], int], memory: float, start: int) -> int:
    """The most rows with ``peak(rows) <= memory``, or 0; the search begins at ``start``.

    Memory grows almost linearly with the rows: the next to try are where the line through the last two peaks reaches
    ``memory``, between the most that fit and the fewest that do not, and at most four times as many.

    >>> most_rows(lambda rows: 100 + 7 * rows, memory=200, start=1)
    14
    """
    rows, fits, too_many, last = start, 0, None, None
    while too_many is None or too_many - fits > 1:
        found = peak(rows)
        if found <= memory:
            fits = rows
        else:
            too_many = rows
        last_rows, last_peak = last or (0, 0)
        a_row = max(1.0, (found - last_peak) / (rows - last_rows))
        last = rows, found
        rows = max(rows + int((memory - found) // a_row), fits + 1)
        rows = min(rows, 4 * last[0] if too_many is None else too_many - 1)
    return fits
