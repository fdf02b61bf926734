import math
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as some

from omnistep.core.checkpoint.cut import pieces

SIZES = some.lists(some.tuples(some.integers(1, 7), some.integers(1, 4)), max_size=4)


@settings(max_examples=300, deadline=None)
@given(SIZES, some.integers(1, 300), some.booleans())
def test_pieces_cover_the_whole_without_a_copy(
    sizes: Sequence[tuple[int, int]], limit: int, is_gridded: bool
) -> None:
    shape, grid = tuple(n for n, _ in sizes), tuple(g for _, g in sizes)
    origin = tuple(2 * g for g in grid)
    whole = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    covered = np.zeros(shape, dtype=np.int8)
    for offset, piece in pieces(whole, origin, limit, grid if is_gridded else None):
        spans = zip(offset, origin, piece.shape, strict=True)
        at = tuple(slice(o - begin, o - begin + n) for o, begin, n in spans)
        assert np.shares_memory(piece, whole)
        assert (piece == whole[at]).all()
        covered[at] += 1
        if is_gridded:
            assert all(o % g == 0 for o, g in zip(offset, grid, strict=True))
            one = all(n <= g for n, g in zip(piece.shape, grid, strict=True))
        else:
            assert piece.flags.c_contiguous
            one = piece.size == 1
        assert piece.nbytes <= limit or one
    assert (covered == 1).all()
