"""Random numbers as functions of a key: no generator, no hidden state.

A key is two 32-bit words. Element i of a random tensor is a function of the key and of i
alone (i is the row-major index in the whole tensor), so a rank makes just its own shard and
every mesh and device holds the same whole. The hash is Threefry-2x32 with 20 rounds (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), counted and folded as
jax.random does with `jax_threefry_partitionable` (its default): key, split, fold_in, bits
and uniform give jax's bits, normal its values to a few ulp.

Words are unsigned; torch has few operators on uint32, so keys and bits travel as int64 in
[0, 2**32), and the hash runs on int32, whose addition wraps in the same way.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Key = Int[Tensor, "2"]
Shape = tuple[int, ...]

_WORD = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Eager code works through a tensor in pieces. On a CPU they are so small that the temporaries
# stay in cache and torch runs an operation on one thread; threads of our own take a piece each.
# (With a hundred short parallel loops per piece instead, a busy machine is 10 times slower:
# the loops wait for each other's threads.) On a GPU they only bound the temporaries' memory.
_CPU_PIECE = 1 << 15
_GPU_PIECE = 1 << 24


class Block(NamedTuple):
    """The part of a global tensor that starts at `offset` and has the shape `shape`."""

    offset: Shape
    shape: Shape


def key(seed: int | Tensor, device: torch.device | str | None = None) -> Key:
    """The key of a seed of at most 64 bits, as jax.random.key gives it with x64 enabled."""
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    return torch.stack([seed >> 32, seed]) & _WORD


def split(key: Key, n: int = 2) -> Int[Tensor, "n 2"]:
    """`n` new keys; unbind them along axis 0."""
    high, low = _hash(key, torch.arange(n, device=key.device))
    return torch.stack([high, low], dim=1).to(torch.int64) & _WORD


def fold_in(key: Key, data: int | Tensor) -> Key:
    """A new key from a key and a number in [0, 2**32)."""
    if isinstance(data, int) and not 0 <= data <= _WORD:
        raise ValueError(f"fold_in takes a number in [0, 2**32), not {data}")
    data = torch.as_tensor(data, dtype=torch.int64, device=key.device) & _WORD
    return torch.stack(_hash(key, data)).to(torch.int64) & _WORD


def name_key(key: Key, name: str) -> Key:
    """A new key from a key and a name: `fold_in` of the name's CRC-32."""
    return fold_in(key, _crc32(name))


@torch.compiler.assume_constant_result  # a compiler cannot trace zlib, nor need it
def _crc32(name: str) -> int:
    return zlib.crc32(name.encode())


def bits(key: Key, shape: Shape, width: int = 32, block: Block | None = None) -> Int[Tensor, "..."]:
    """Random bits as int64: [0, 2**32) for width 32, the pattern of a uint64 for width 64."""
    if width == 32:
        return _fill(key, shape, block, torch.int64, lambda h, l: (h ^ l).to(torch.int64) & _WORD)
    if width == 64:
        return _fill(key, shape, block, torch.int64, _bits64)
    raise ValueError(f"bits come 32 or 64 wide, not {width}")


def uniform(
    key: Key,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    minval: float = 0.0,
    maxval: float = 1.0,
    block: Block | None = None,
) -> Float[Tensor, "..."]:
    """Uniform on [minval, maxval). bfloat16 and float16 are the rounded float32 values.

    Equal to jax's bits in float32 (in float64 where minval is 0 or the range is a power of 2:
    else jax's compiler may fuse the multiplication and the addition into one rounding).
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    unit = _unit64 if wide == torch.float64 else lambda high, low: _unit32(high ^ low)
    _check_dtype("uniform", dtype)
    if minval == 0.0 and maxval == 1.0:
        return _fill(key, shape, block, dtype, unit)
    # the bounds and their difference are numbers of the dtype, as in jax
    low = torch.full((), minval, dtype=wide, device=key.device)
    span = torch.full((), maxval, dtype=wide, device=key.device) - low
    return _fill(key, shape, block, dtype, lambda h, l: _affine(unit(h, l), low, span))


def normal(
    key: Key, shape: Shape, dtype: torch.dtype = torch.float32, block: Block | None = None
) -> Float[Tensor, "..."]:
    """Standard normal: sqrt(2) erfinv(u), u uniform on (-1, 1), as in jax.

    In float32 only operations that IEEE 754 rounds exactly are used, so eager CPU and GPU
    give the same bits. bfloat16 and float16 are the rounded float32 values.
    """
    _check_dtype("normal", dtype)
    if dtype == torch.float64:
        return _fill(key, shape, block, dtype, _normal64)
    return _fill(key, shape, block, dtype, lambda h, l: _normal32(_unit32(h ^ l)))


# ---- the hash


def _hash(key: Key, counter: Int[Tensor, "*n"]) -> tuple[Int[Tensor, "*n"], Int[Tensor, "*n"]]:
    """Threefry-2x32 of 64-bit counters: two int32 words each."""
    k0, k1 = key.to(torch.int32).unbind()
    keys = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0 = (counter >> 32).to(torch.int32) + keys[0]
    x1 = counter.to(torch.int32) + keys[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 += x1
            # Rotation by r. The right shift copies the sign, hence the mask; the left shift
            # is a scaled addition to save a pass over the piece
            rotated = x1 >> (32 - r)
            rotated &= (1 << r) - 1
            rotated.add_(x1, alpha=1 << r)
            x1 = rotated.bitwise_xor_(x0)
        x0 += keys[(i + 1) % 3]
        x1 += keys[(i + 2) % 3] + (i + 1)
    return x0, x1


def _fill(
    key: Key,
    shape: Shape,
    block: Block | None,
    dtype: torch.dtype,
    value: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`value(high, low)` of the hash of each element's global index, piece by piece in eager."""
    block = block or Block((0,) * len(shape), tuple(shape))
    whole, merged = _collapse(tuple(shape), block)
    device = key.device

    def make(piece: Block) -> Tensor:
        return value(*_hash(key, _index(whole, piece, device)))

    if torch.compiler.is_compiling() or type(key) is not Tensor:
        return make(merged).to(dtype).reshape(block.shape)  # traced: whole, for one fused kernel
    out = torch.empty(block.shape, dtype=dtype, device=device)
    if device.type == "meta":
        return out
    flat, inference = out.view(-1), torch.is_inference_mode_enabled()

    def fill(start: int, piece: Block) -> None:
        with torch.inference_mode(inference):  # a thread does not inherit the mode
            flat[start : start + math.prod(piece.shape)].copy_(make(piece).view(-1))

    on_cpu = device.type == "cpu"
    pieces = list(_pieces(merged, _CPU_PIECE if on_cpu else _GPU_PIECE))
    starts = itertools.accumulate((math.prod(piece.shape) for piece in pieces), initial=0)
    workers = torch.get_num_threads() if on_cpu and len(pieces) > 1 else 1
    if workers == 1:
        for start, piece in zip(starts, pieces, strict=False):
            fill(start, piece)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, starts, pieces))
    return out


def _collapse(shape: Shape, block: Block) -> tuple[Shape, Block]:
    """Fewer axes for the same elements: an axis the block holds whole joins the one before."""
    if not len(shape) == len(block.offset) == len(block.shape) or any(
        o < 0 or o + n > size for size, o, n in zip(shape, block.offset, block.shape, strict=True)
    ):
        raise ValueError(f"{block} does not lie inside a tensor of shape {shape}")
    axes: list[tuple[int, int, int]] = []
    for size, o, n in reversed(list(zip(shape, block.offset, block.shape, strict=True))):
        if axes and axes[-1][2] == axes[-1][0]:
            inner = axes.pop()[0]
            axes.append((size * inner, o * inner, n * inner))
        else:
            axes.append((size, o, n))
    axes = axes[::-1] or [(1, 0, 1)]
    return tuple(a[0] for a in axes), Block(tuple(a[1] for a in axes), tuple(a[2] for a in axes))


def _pieces(block: Block, limit: int) -> Iterator[Block]:
    """Cuts a block, in row-major order, into blocks of at most `limit` elements."""
    if math.prod(block.shape) <= limit:
        yield block
        return
    axis = next(i for i, n in enumerate(block.shape) if n > 1)
    step = max(1, limit // math.prod(block.shape[axis + 1 :]))
    offset, size = block.offset[axis], block.shape[axis]
    for i in range(0, size, step):
        part = Block(
            (*block.offset[:axis], offset + i, *block.offset[axis + 1 :]),
            (*block.shape[:axis], min(step, size - i), *block.shape[axis + 1 :]),
        )
        yield from _pieces(part, limit)


def _index(shape: Shape, block: Block, device: torch.device) -> Int[Tensor, "..."]:
    """int64 [block.shape]: each element's row-major index in a tensor of shape `shape`."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for axis, (o, n) in enumerate(zip(block.offset, block.shape, strict=True)):
        stride = math.prod(shape[axis + 1 :])
        along = torch.arange(o * stride, (o + n) * stride, stride, device=device)
        index = index.unsqueeze(-1) + along
    return index


# ---- from bits to numbers


def _check_dtype(what: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{what} gives float64, float32, bfloat16 or float16, not {dtype}")


def _bits64(high: Tensor, low: Tensor) -> Tensor:
    return (high.to(torch.int64) << 32) | (low.to(torch.int64) & _WORD)


def _unit32(word: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """float32 in [0, 1): 23 bits as the mantissa of a number in [1, 2), less 1."""
    mantissa = (word >> 9) & 0x7FFFFF
    return (mantissa | 0x3F800000).view(torch.float32) - 1.0


def _unit64(high: Tensor, low: Tensor) -> Float[Tensor, "*n"]:
    """float64 in [0, 1) with 52 random bits."""
    mantissa = (_bits64(high, low) >> 12) & 0xFFFFFFFFFFFFF
    return (mantissa | 0x3FF0000000000000).view(torch.float64) - 1.0


def _affine(unit: Tensor, low: Float[Tensor, ""], span: Float[Tensor, ""]) -> Tensor:
    """max(low, unit * span + low); in float32 rounded once, at the end."""
    wide = unit.to(torch.float64) * span.to(torch.float64) + low.to(torch.float64)
    return torch.maximum(wide.to(unit.dtype), low)


def _normal64(high: Tensor, low: Tensor) -> Float[Tensor, "*n"]:
    u = _unit64(high, low) * 2.0 - (1.0 - 2.0**-53)
    return torch.erfinv(u) * math.sqrt(2.0)


# Giles, "Approximating the erfinv function" (GPU Computing Gems, 2010), single precision:
# polynomials in w - 2.5 for w < 5 and in sqrt(w) - 3 beyond, where w = -log(1 - u**2).
# fmt: off
_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)
_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)
# fmt: on


def _normal32(unit: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """sqrt(2) erfinv(2 unit - 1) of float32 in [0, 1); consumes `unit`."""
    u = unit.mul_(2.0).sub_(1.0 - 2.0**-24)
    w = _log(1.0 - u * u).neg_()
    centre = _polynomial(_CENTRE, w - 2.5)
    tail = _polynomial(_TAIL, w.sqrt() - 3.0)
    return torch.where(w < 5.0, centre, tail).mul_(u).mul_(math.sqrt(2.0))


def _log(y: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Natural logarithm of positive, normal float32 numbers, from exact operations only.

    y = 2**e m with m in [sqrt(1/2), sqrt(2)); log m = 2 artanh(s), s = (m - 1) / (m + 1).
    Vendors' logarithms differ from device to device in the last bit.
    """
    pattern = y.view(torch.int32)
    exponent = (pattern - 0x3F3504F3) >> 23
    m = (pattern - (exponent << 23)).view(torch.float32)
    s = (m - 1.0).div_(m + 1.0)
    series = _polynomial((2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0), s * s).mul_(s)
    return series.add_(exponent.to(torch.float32).mul_(math.log(2.0)))


def _polynomial(coefficients: tuple[float, ...], x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Horner's rule, the highest power first."""
    total = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        total.mul_(x).add_(c)
    return total
