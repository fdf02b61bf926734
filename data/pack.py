"""Which pieces share a row. Pure functions of lengths: the same plan in a worker and in main."""

from collections.abc import Sequence

import numpy as np

FULL = 1 / 64
"""A row with at most this share of its budget free is full."""


def first_fit(lengths: Sequence[int], budget: int, most: int) -> list[list[int]]:
    """Rows of indices: sums of at most `budget`, at most `most` pieces each, every index once.

    First-fit decreasing: the longest first, each into the first row that has room. A piece
    longer than the budget stands alone. Order is kept as near as that allows: within a row, and
    of rows by their first piece, pieces stand as they came.
    """
    rows: list[list[int]] = []
    free = np.zeros(len(lengths), np.int64)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        row = int(np.argmax(free[: len(rows)] >= length)) if rows else 0
        if not rows or free[row] < length:
            row = len(rows)
            rows.append([])
            free[row] = budget
        rows[row].append(index)
        free[row] = free[row] - length if len(rows[row]) < most else 0
    return sorted(sorted(row) for row in rows)


def pack(
    lengths: Sequence[int], budget: int, most: int, due: int = 0
) -> tuple[list[list[int]], list[int]]:
    """Rows to be given now, and the indices that wait for better company.

    Given are the full rows and every row with one of the first `due` pieces, those that have
    waited long enough. With `most` = 1 (padded rows) every row is full.
    """
    rows, left = [], []
    for row in first_fit(lengths, budget, most):
        free = budget - sum(lengths[i] for i in row)
        if free <= budget * FULL or len(row) >= most or row[0] < due:
            rows.append(row)
        else:
            left.extend(row)
    return rows, sorted(left)


def prefix(lengths: Sequence[int], budget: int) -> int:
    """How many pieces from the front fit into `budget` tokens; one at least."""
    ends = np.cumsum(lengths)
    return max(1, int(np.searchsorted(ends, budget, side="right")))
