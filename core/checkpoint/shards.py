"""One rank's share of a state: which slices it owns, and their way to and from the disk.

The arrays lie in orbax's own on-disk format, zarr3 in an OCDBT database, so that an ordinary
orbax reads them. Reading and writing need tensorstore alone, no orbax and no jax: every rank
does its own. A crc32c per chunk finds flipped bits, which orbax's default codecs do not.
"""

import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
import torch
from attrs import frozen
from torch import Tensor

from omnistep.core.checkpoint.cut import batches, pieces
from omnistep.core.checkpoint.place import (
    BUCKETS,
    OutOfReachError,
    is_out_of_reach,
    kvstore,
    reason,
)
from omnistep.core.checkpoint.protocol import CheckpointError, DamagedError

BATCH_BYTES = 64 << 20
"""Of what is written in one transaction: all of that is in memory once more, encoded, until it is
committed."""
READ_BYTES = 16 << 20
"""Of a leaf that is read at once: tensorstore holds all chunks of one reading in memory."""
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


# --- tensorstore --------------------------------------------------------------------------------


def _database(directory: str, name: str, **options: Any) -> dict[str, Any]:
    database = {"driver": "ocdbt", "base": kvstore(directory), "path": f"{name}/", **options}
    return {
        "driver": "zarr3",
        "kvstore": database,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }


def _write_spec(directory: str, shard: Shard) -> dict[str, Any]:
    config = {
        "max_inline_value_bytes": 1024,
        "max_decoded_node_bytes": 100_000_000,
        "manifest_kind": "single",
    }
    return _database(directory, shard.name, assume_config=True, config=config) | {
        "dtype": shard.dtype.name,
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": shard.shape,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard.chunk}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
    }


def _context() -> ts.Context:
    return ts.Context(
        {
            "file_io_concurrency": {"limit": 32},
            "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},
            **BUCKETS,
        }
    )


def write_shards(directory: str, rank: int, shards: Iterable[Shard]) -> None:
    """Writes this rank's data into a database of its own, which orbax's finalize merges.

    Its name differs from `ocdbt.process_0`, into which orbax writes the ints meanwhile.
    Every writer of a leaf writes its (small, equal) description; rank 0 that of empty leaves.
    """
    database, context = f"{directory}/ocdbt.process_torch{rank}", _context()
    mine = [s for s in shards if s.data is not None or (rank == 0 and 0 in s.shape)]
    streamed = [s for s in shards if s.blocks is not None]
    for batch in batches(_cut(mine), lambda part: getattr(part[2], "nbytes", 0), BATCH_BYTES):
        transaction, writes = ts.Transaction(atomic=True), []
        for shard, offset, piece in batch:
            spec = _write_spec(database, shard)
            options = {"context": context, "transaction": transaction}
            array = ts.open(spec, create=True, open=True, **options).result()
            if piece is not None:
                # the snapshot is not written to meanwhile: tensorstore need not copy it once more
                target = array[slices_at(offset, piece.shape)]
                writes.append(target.write(piece, can_reference_source_data_indefinitely=True))
        for pending in writes:
            pending.result()
        transaction.commit_sync()
    for shard in streamed:
        array = ts.open(_write_spec(database, shard), create=True, context=context).result()
        transaction, held = ts.Transaction(atomic=True), 0
        for offset, block in shard.blocks() if shard.blocks else ():
            target = array.with_transaction(transaction)[slices_at(offset, block.shape)]
            target.write(to_numpy(block.detach().cpu().contiguous())).result()
            # committed one by one, each would rewrite the index, and chunks it shares with others
            if (held := held + block.nbytes) >= BATCH_BYTES // 4:
                transaction.commit_sync()
                transaction, held = ts.Transaction(atomic=True), 0
        transaction.commit_sync()


def _cut(shards: Iterable[Shard]) -> Iterator[tuple[Shard, tuple[int, ...], Any]]:
    """(shard, offset, piece of its data) triples of at most BATCH_BYTES."""
    for shard in shards:
        if shard.data is None:
            yield shard, shard.offset, None
            continue
        for offset, piece in pieces(shard.data, shard.offset, BATCH_BYTES, shard.chunk):
            yield shard, offset, piece


def open_arrays(directory: str, names: Iterable[str]) -> dict[str, ts.TensorStore]:
    """The stored arrays, opened: shape and dtype are known, no data is read yet."""
    context = _context()
    cached = {"cache_pool": "cache_pool#ocdbt"}
    opening = {
        name: ts.open(
            _database(directory, name, **cached) | {"fill_missing_data_reads": False},
            open=True,
            read=True,
            context=context,
        )
        for name in names
    }
    opened = {}
    for name, pending in opening.items():
        try:
            opened[name] = pending.result()
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            raise unreadable(name, directory, error) from error
    return opened


def read_array(array: ts.TensorStore, name: str, directory: str, slices: Sequence[slice]) -> Tensor:
    """The part of a stored array that `slices` cut: one per dimension, whole numbers, step 1."""
    shape, offset = [s.stop - s.start for s in slices], tuple(s.start for s in slices)
    # Memory of torch's own, aligned to 64 bytes as in a run that was never interrupted. A
    # precaution: BLAS libraries may round by alignment. It was not seen to matter (torch 2.13).
    found = torch.empty(shape, dtype=torch_dtype(array.dtype.name))
    if 0 in shape:
        return found
    try:
        grid = array.chunk_layout.read_chunk.shape
        for begin, piece in pieces(to_numpy(found), offset, READ_BYTES, grid):
            into = ts.array(piece, copy=False, write=True)
            into.write(array[slices_at(begin, piece.shape)]).result()
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise unreadable(name, directory, error) from error
    return found


def unreadable(name: str, directory: str, error: Exception) -> CheckpointError:
    """What to raise when the leaf `name` cannot be read: damage, unless nobody could look."""
    if isinstance(error, OutOfReachError):
        return CheckpointError(str(error))
    if is_out_of_reach(error):
        return CheckpointError(f"{directory} is out of reach: {reason(error)}")
    return DamagedError(
        f"'{name}' in the checkpoint {directory} is damaged and cannot be restored: {reason(error)}"
    )


def slices_at(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """What cuts a block of `shape` at `offset`."""
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
