"""The order of an epoch: a permutation computed element by element, never held."""

import numpy as np
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
    """Elements `start` to `stop` of epoch `epoch`'s permutation of range(size).

    A Feistel network over the next even number of bits; an index that lands outside range(size)
    is sent through again until it lands inside (Black and Rogaway 2002, cycle walking). So any
    part of the order costs its own length alone, whatever `size` is.
    """
    if not 0 <= start <= stop <= size:
        raise ValueError(f"positions {start} to {stop} are not within 0 to {size}")
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

    index = once(np.arange(start, stop, dtype=np.uint64))
    while (outside := index >= np.uint64(size)).any():
        index[outside] = once(index[outside])
    return index.astype(np.int64)
