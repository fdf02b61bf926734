"""An epoch's order: a permutation, a function of (seed, epoch) alone, evenly spread."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistep.data.order import permuted


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(-3, 2**70), st.integers(0, 10**6))
def test_every_index_once(size, seed, epoch):
    order = permuted(size, seed, epoch, 0, size)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 500), st.data())
def test_a_part_is_the_part_of_the_whole(size, data):
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = permuted(size, 1, 2, 0, size)
    assert permuted(size, 1, 2, start, stop).tolist() == whole[start:stop].tolist()


def test_a_part_costs_its_own_length_alone():
    part = permuted(10**15, 7, 0, 10**14, 10**14 + 5)
    assert len(set(part.tolist())) == 5
    assert ((part >= 0) & (part < 10**15)).all()


def test_seeds_and_epochs_differ_and_repeat():
    orders = [tuple(permuted(50, seed, epoch, 0, 50)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert orders[1] == tuple(permuted(50, 0, 1, 0, 50))


def test_evenly_spread():
    """Places and neighbours over many epochs: within 5 standard deviations of uniform."""
    size, epochs = 7, 1500
    orders = np.stack([permuted(size, 3, epoch, 0, size) for epoch in range(epochs)])
    steps = (orders[:, 1] - orders[:, 0]) % size
    for drawn, kinds in ((orders[:, 0], size), (orders[:, -1], size), (steps - 1, size - 1)):
        expected = epochs / kinds
        counts = np.bincount(drawn, minlength=kinds)
        assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    big = permuted(10_000, 0, 0, 0, 10_000)
    assert abs(np.corrcoef(big, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(big[1:], big[:-1])[0, 1]) < 0.05


def test_positions_outside():
    with pytest.raises(ValueError, match="3 to 6 are not within 0 to 5"):
        permuted(5, 0, 0, 3, 6)
