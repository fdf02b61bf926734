"""Which pieces share a row. Pure functions of sizes: the same plan in a worker and in main."""

from collections.abc import Sequence

import numpy as np
from attrs import frozen

FULL = 1 / 64
"""A row with at most this share of its tokens or of its patches free is full."""

Size = tuple[int, int]
"""Tokens, patches."""


@frozen
class PackLimits:
    """What a row holds. Padded rows are rows of one piece."""

    budget: int
    """tokens"""
    most: int
    """pieces"""
    patches: int = 0


def first_fit(sizes: Sequence[Size], limits: PackLimits) -> list[list[int]]:
    """Rows of indices within the limits, every index once.

    First-fit decreasing: what takes most of a row first, its share of the tokens and its share of
    the patches together, each into the first row that has room for both. So text fills up the rows
    that images have filled, and the other way round. A piece longer than the budget stands alone.
    Order is kept as near as that allows: within a row, and of rows by their first piece, pieces
    stand as they came.
    """
    whole = np.array([limits.budget, limits.patches], np.int64)
    needs = np.array(sizes, np.int64).reshape(-1, 2)
    shares = (needs / np.maximum(whole, 1)).sum(axis=1)
    rows: list[list[int]] = []
    free = np.zeros((len(sizes), 2), np.int64)
    for index in np.argsort(-shares, kind="stable").tolist():
        room = (free[: len(rows)] >= needs[index]).all(axis=1)
        row = int(np.argmax(room)) if len(room) else 0
        if not len(room) or not room[row]:
            row = len(rows)
            rows.append([])
            free[row] = whole
        rows[row].append(index)
        free[row] -= needs[index]
        if len(rows[row]) >= limits.most:
            free[row] = -1
    return sorted(sorted(row) for row in rows)


def pack(
    sizes: Sequence[Size], limits: PackLimits, due: int = 0
) -> tuple[list[list[int]], list[int]]:
    """Rows to be given now, and the indices that wait for better company.

    Given are the full rows and every row with one of the first `due` pieces, those that have
    waited long enough. With `most` = 1 (padded rows) every row is full.
    """
    rows, left = [], []
    for row in first_fit(sizes, limits):
        tokens, patches = (sum(sizes[i][kind] for i in row) for kind in (0, 1))
        full = limits.budget - tokens <= limits.budget * FULL or (
            patches > 0 and limits.patches - patches <= limits.patches * FULL
        )
        if full or len(row) >= limits.most or row[0] < due:
            rows.append(row)
        else:
            left.extend(row)
    return rows, sorted(left)


def prefix(lengths: Sequence[int], budget: int) -> int:
    """How many pieces from the front fit into `budget` tokens; one at least."""
    ends = np.cumsum(lengths)
    return max(1, int(np.searchsorted(ends, budget, side="right")))
