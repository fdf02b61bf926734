"""The order of an epoch: a permutation computed element by element, never held."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
from attrs import frozen
from jaxtyping import Int64

ROUNDS = 8
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that mixes 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(
    size: int, seed: int, epoch: int, start: int, stop: int
) -> Int64[np.ndarray, "stop-start"]:
    """Elements `start` to `stop` of epoch `epoch`'s permutation of range(size)."""
    if not 0 <= start <= stop <= size:
        raise ValueError(f"positions {start} to {stop} are not within 0 to {size}")
    return permute(size, seed, epoch, np.arange(start, stop))


def permute(
    size: int, seed: int, epoch: int, places: Int64[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """The elements at `places`, each in range(size), of epoch `epoch`'s permutation.

    A Feistel network over the next even number of bits; an index that lands outside range(size)
    is sent through again until it lands inside (Black and Rogaway 2002, cycle walking). So any
    part of the order costs its own length alone, whatever `size` is.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    words = np.array([seed & _MASK, epoch & _MASK], np.uint64)
    base = _mix(_mix(words[:1] + np.uint64(0x9E3779B97F4A7C15)) ^ words[1:])
    keys = _mix(base + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        return (left << shift) | right

    index = once(places.astype(np.uint64))
    while (outside := index >= np.uint64(size)).any():
        index[outside] = once(index[outside])
    return index.astype(np.int64)


class Order(Protocol):
    """Which samples an epoch has, one after another."""

    def __len__(self) -> int: ...
    def __call__(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, "stop-start"]:
        """The samples at positions `start` to `stop` of an epoch."""
        ...


@frozen
class Shuffled:
    """Every sample once an epoch."""

    size: int
    seed: int

    def __len__(self) -> int:
        return self.size

    def __call__(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, "stop-start"]:
        return permuted(self.size, self.seed, epoch, start, stop)


@frozen
class Mixed:
    """Samples of several sources, each source as often as its share says.

    An epoch has as many samples as there are, and the same number of each source every time.
    A source is gone through by permutations of its own, one after another: whatever its share,
    its samples have been given equally often, or some once more than others.
    """

    sizes: tuple[int, ...]
    """Samples of each source; they are numbered one source after another."""
    counts: tuple[int, ...]
    """Samples of each source in an epoch."""
    seed: int

    def __len__(self) -> int:
        return sum(self.counts)

    def __call__(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, "stop-start"]:
        places = permuted(len(self), self.seed, epoch, start, stop)
        ends, firsts = np.cumsum(self.counts), np.cumsum((0, *self.sizes))
        source = np.searchsorted(ends, places, side="right")
        samples = np.zeros(len(places), np.int64)
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            here = source == number
            # the turn-th sample the source gives, counted from the start of the run
            turn = epoch * count + places[here] - (ends[number] - count)
            through = turn // size
            for times in np.unique(through).tolist():
                some = permute(size, self.seed + 1 + number, times, turn[through == times] % size)
                samples[np.flatnonzero(here)[through == times]] = firsts[number] + some
        return samples


def mix(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Mixed:
    """An epoch of sum(sizes) samples in which source i has the share weights[i] / sum(weights),
    rounded so that the sum is kept (largest remainders), at least one each."""
    total, parts = sum(sizes), [Fraction(str(weight)) for weight in weights]
    exact = [total * part / sum(parts) for part in parts]
    counts = [max(1, int(share)) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_rest[: max(0, total - sum(counts))]:
        counts[i] += 1
    return Mixed(tuple(sizes), tuple(counts), seed)
