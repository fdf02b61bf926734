"""One rank's share of a state: which slices it owns, in which chunks they are stored, its copy."""

import math
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from omnistep.core.checkpoint.protocol import CheckpointError

CHUNK_BYTES = 4 << 20
"""Small chunks make another mesh's sub-ranges cheap to read: 2.5 times faster than 32 MiB ones."""


# --- dtypes: numpy lacks bfloat16 and float8, ml_dtypes adds them -------------------------------

_EXTENSIONS: dict[torch.dtype, tuple[Any, torch.dtype]] = {
    torch.bfloat16: (ml_dtypes.bfloat16, torch.int16),
    torch.float8_e4m3fn: (ml_dtypes.float8_e4m3fn, torch.uint8),
    torch.float8_e4m3fnuz: (ml_dtypes.float8_e4m3fnuz, torch.uint8),
    torch.float8_e5m2: (ml_dtypes.float8_e5m2, torch.uint8),
    torch.float8_e5m2fnuz: (ml_dtypes.float8_e5m2fnuz, torch.uint8),
}
_EXTENSIONS_BY_NAME = {np.dtype(extension).name: t for t, (extension, _) in _EXTENSIONS.items()}


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The numpy (or ml_dtypes) twin; its name is the one on disk. TypeError when it has none."""
    if dtype in _EXTENSIONS:
        return np.dtype(_EXTENSIONS[dtype][0])
    return torch.empty(0, dtype=dtype).numpy().dtype


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype stored under `name` (`bfloat16`, `int64`, `bool`, …)."""
    if name in _EXTENSIONS_BY_NAME:
        return _EXTENSIONS_BY_NAME[name]
    try:
        return torch.from_numpy(np.empty(0, np.dtype(name))).dtype
    except TypeError as error:
        raise CheckpointError(f"torch has no counterpart of the stored dtype {name!r}") from error


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The same memory as an array; `tensor` is contiguous and on the CPU."""
    if tensor.dtype not in _EXTENSIONS:
        return tensor.numpy()
    extension, carrier = _EXTENSIONS[tensor.dtype]
    return tensor.view(carrier).numpy().view(extension)


def from_numpy(array: np.ndarray) -> Tensor:
    """The same memory as a tensor."""
    dtype = _EXTENSIONS_BY_NAME.get(array.dtype.name)
    if dtype is None:
        return torch.from_numpy(array)
    carrier = _EXTENSIONS[dtype][1]
    return torch.from_numpy(array.view(numpy_dtype(carrier))).view(dtype)


# --- geometry -----------------------------------------------------------------------------------


def shard_offsets(size: int, parts: Sequence[int]) -> list[int]:
    """Where the shards of a dimension begin that is cut as torch.chunk cuts, nested over `parts`.

    Chunks are ceil(size / part) long, so the last ones may be short or empty; empty ones have
    no beginning.
    """
    spans = [(0, size)]
    for part in parts:
        spans = [
            (offset + start, min(step, length - start))
            for offset, length in spans
            if (step := -(-length // part))
            for start in range(0, length, step)
        ]
    return [offset for offset, length in spans if length]


def chunk_shape(
    shape: Sequence[int], parts: Sequence[Sequence[int]], itemsize: int, limit: int = CHUNK_BYTES
) -> tuple[int, ...]:
    """A chunk of at most `limit` bytes (or one element) whose grid holds every shard boundary.

    shape: the whole array's; parts: per dimension, the sizes of the mesh axes that cut it.
    Per dimension the gcd of the shard offsets fits; then the leading dimensions are split
    first, so that a chunk stays one piece of the shard's memory. A dimension that is cut by
    shards is only split into equal pieces: else pieces would straddle a boundary.
    """
    cuts = [math.gcd(*shard_offsets(n, p)) for n, p in zip(shape, parts, strict=True)]
    chunk = [max(1, cut or size) for cut, size in zip(cuts, shape, strict=True)]
    for dim, cut in enumerate(cuts):
        size, room = chunk[dim], limit // (itemsize * (math.prod(chunk) // chunk[dim]))
        if size <= room:
            break
        if cut:
            chunk[dim] = next(n for n in range(max(1, room), 0, -1) if size % n == 0)
        else:
            pieces = -(-size // max(1, room))
            chunk[dim] = -(-size // pieces)
    return tuple(chunk)


def as_dtensor(leaf: Any) -> Any | None:
    """`leaf` if it is a DTensor. The import takes 0.6 s: without it, no leaf can be one."""
    module = sys.modules.get("torch.distributed.tensor")
    return leaf if module is not None and isinstance(leaf, module.DTensor) else None


def local_extent(leaf: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, offset) of this rank's part of a tensor; all of it when it is no DTensor."""
    if (whole := as_dtensor(leaf)) is None:
        return tuple(leaf.shape), (0,) * leaf.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        whole.shape, whole.device_mesh, whole.placements
    )
    return tuple(shape), tuple(offset)


class HostCopies:
    """Host memory for the copies of a save, kept for the next one.

    Fresh pages cost several times the copy itself, and given back they fragment the heap.
    Copies from a GPU go to pinned memory, which the device writes at full speed, in the order of
    its other work: only `wait` waits for them.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    def copy(self, name: str, local: Tensor) -> Tensor:
        """A contiguous CPU copy of `local`, good from `wait` until the next copy by this name."""
        pinned = local.device.type == "cuda"
        held = self._held.get(name)
        if held is None or (held.shape, held.dtype) != (local.shape, local.dtype):
            held = torch.empty(local.shape, dtype=local.dtype, pin_memory=pinned)
            self._held[name] = held
        held.copy_(local, non_blocking=True)
        if pinned:
            self._arrived = self._arrived or torch.cuda.Event()
            self._arrived.record()
        return held

    def wait(self) -> None:
        """Returns when all copies hold their values."""
        if self._arrived is not None:
            self._arrived.synchronize()


Blocks = Callable[[], Iterable[tuple[tuple[int, ...], Tensor]]]
"""Makes the values of a leaf: (offset, block) pairs that together cover it."""


@frozen(eq=False)
class Streamed:
    """A leaf that is never whole in memory: its blocks are made one by one as they are written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Blocks


@frozen(eq=False)
class Shard:
    """This rank's part of one leaf: `data`, or `blocks` of it. Both are None where another rank
    writes it, or it is empty."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    offset: tuple[int, ...]
    data: np.ndarray | None
    blocks: Blocks | None = None


def snapshot(
    name: str, leaf: Tensor | Streamed, rank: int, ranks: int, copies: HostCopies
) -> Shard:
    """This rank's part of `leaf`, copied; the leaf may be overwritten at once.

    Of the replicas of a leaf one writes it, drawn by the leaf's name so that the work spreads.
    Raises ValueError, naming the leaf, for placements other than Shard and Replicate.
    """
    draw = zlib.crc32(name.encode())
    if isinstance(leaf, Streamed):
        dtype, uncut = _stored_dtype(name, leaf.dtype), [[] for _ in leaf.shape]
        chunk, origin = chunk_shape(leaf.shape, uncut, dtype.itemsize), (0,) * len(leaf.shape)
        mine = rank == draw % ranks and 0 not in leaf.shape
        return Shard(name, leaf.shape, dtype, chunk, origin, None, leaf.blocks if mine else None)
    shape, offset = local_extent(leaf)
    parts: list[list[int]] = [[] for _ in leaf.shape]
    if (whole := as_dtensor(leaf)) is None:
        local, owner = leaf, rank == draw % ranks
    else:
        mesh, coordinate = whole.device_mesh, whole.device_mesh.get_coordinate()
        local, owner = whole.to_local(), coordinate is not None
        for axis, placement in enumerate(whole.placements):
            if placement.is_replicate():
                owner = owner and coordinate[axis] == draw % mesh.size(axis)
            elif placement.is_shard():
                parts[placement.dim % leaf.ndim].append(mesh.size(axis))
            else:
                raise ValueError(
                    f"{name}: placements {whole.placements} cannot be saved; "
                    "only Shard(dim) and Replicate() can: redistribute it first"
                )
    dtype = _stored_dtype(name, leaf.dtype)
    chunk = chunk_shape(leaf.shape, parts, dtype.itemsize)
    extent = list(zip(offset, shape, chunk, leaf.shape, strict=True))
    if any(n and (o % c or ((o + n) % c and o + n != size)) for o, n, c, size in extent):
        # two writers of one chunk: the merge would silently drop the work of one
        raise ValueError(f"{name}: shard {offset} + {shape} is not on the grid of {chunk}")
    mine = owner and local.numel() > 0
    data = to_numpy(copies.copy(name, local.detach())) if mine else None
    return Shard(name, tuple(leaf.shape), dtype, chunk, offset, data)


def _stored_dtype(name: str, dtype: torch.dtype) -> np.dtype:
    try:
        return numpy_dtype(dtype)
    except TypeError as error:
        raise ValueError(f"{name}: a tensor of {dtype} cannot be stored") from error


def slices_at(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """What cuts a block of `shape` at `offset`."""
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
