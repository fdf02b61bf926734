"""Large arrays cut into pieces that are written, or read, one after another."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pieces(
    whole: np.ndarray, offset: tuple[int, ...], limit: int, grid: Sequence[int] | None = None
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(offset, piece) pairs that share the memory of `whole`, which lies at `offset`.

    A piece has at most `limit` bytes, or is one chunk of `grid` (by default one element), on whose
    boundaries `offset` lies and pieces begin. Of a contiguous `whole` they are contiguous where the
    grid is the default.
    """
    grid = grid or (1,) * whole.ndim
    dim = next((i for i, n in enumerate(whole.shape) if n > grid[i]), None)
    if dim is None or whole.nbytes <= limit:
        yield offset, whole
        return
    rows = limit // (whole.nbytes // whole.shape[dim])
    rows = max(rows // grid[dim], 1) * grid[dim]
    for start in range(0, whole.shape[dim], rows):
        part = whole[(slice(None),) * dim + (slice(start, start + rows),)]
        begin = (*offset[:dim], offset[dim] + start, *offset[dim + 1 :])
        yield from pieces(part, begin, limit, grid)


def batches(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The items in lists of `limit` bytes, or a little more, together."""
    batch, held = [], 0
    for item in items:
        batch.append(item)
        held += size(item)
        if held >= limit:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
