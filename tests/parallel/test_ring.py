"""Which tokens the ranks of a ring hold, and whose keys pass where."""

import pytest
import torch

from omnistep.parallel.mesh import Group
from omnistep.parallel.ring import chunks_of, holder, local_chunks, take_local, tokens_before

SIZES = [1, 2, 3, 4, 7]


def tokens_of(chunks):
    return [token for begin, end in chunks for token in range(begin, end)]


@pytest.mark.parametrize("size", SIZES)
def test_every_token_is_held_once_and_in_order(size):
    seq = 6 * size
    held = [tokens_of(chunks_of(seq, size, index)) for index in range(size)]
    assert sorted(token for tokens in held for token in tokens) == list(range(seq))
    assert all(tokens == sorted(tokens) and len(tokens) == 6 for tokens in held)
    assert chunks_of(seq, size, 0)[1][1] == seq
    assert local_chunks(seq, Group(("cp",), size, size - 1)) == chunks_of(seq, size, size - 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [0, 1])
def test_take_local(size, dim):
    rows = torch.arange(4 * size).expand(3, -1)
    for index in range(size):
        local = take_local(rows if dim else rows.T, Group(("cp",), size, index), dim)
        expected = tokens_of(chunks_of(4 * size, size, index))
        assert (local if dim else local.T).tolist() == [expected] * 3


@pytest.mark.parametrize("size", SIZES)
def test_tokens_before(size):
    seq = 6 * size
    for index in range(size):
        chunks = chunks_of(seq, size, index)
        counts = tokens_before(torch.arange(seq + 1), chunks).tolist()
        tokens = tokens_of(chunks)
        assert counts == [sum(t < position for t in tokens) for position in range(seq + 1)]


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_meets_each_block_and_has_two_pairs_of_chunks_at_every_hop(size):
    for index in range(size):
        assert sorted(holder(hop, size, index) for hop in range(size)) == list(range(size))
        for hop in range(1, size):
            # what is here came from the rank before, where it was one hop ago
            assert holder(hop, size, index) == holder(hop - 1, size, (index - 1) % size)
            queries = chunks_of(2 * size, size, index)
            keys = chunks_of(2 * size, size, holder(hop, size, index))
            assert sum(k < q for q, _ in queries for k, _ in keys) == 2


def test_lengths_that_do_not_divide():
    with pytest.raises(ValueError, match=r"10 tokens .* 2 x 3 .* a multiple of 6, such as 6 or 12"):
        chunks_of(10, 3, 0)
    with pytest.raises(ValueError, match=r"multiple of 6, such as 6$"):
        chunks_of(4, 3, 0)
    assert chunks_of(7, 1, 0) == ((0, 3), (3, 7))
