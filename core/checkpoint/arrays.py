"""Shards on their way to and from the disk, or a bucket.

The arrays lie in orbax's own on-disk format, zarr3 in an OCDBT database, so that an ordinary
orbax reads them. Reading and writing need tensorstore alone, no orbax and no jax: every rank
does its own. A crc32c per chunk finds flipped bits, which orbax's default codecs do not.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorstore as ts
import torch
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
from omnistep.core.checkpoint.shards import Shard, slices_at, to_numpy, torch_dtype

BATCH_BYTES = 64 << 20
"""Of what is written in one transaction: all of that is in memory once more, encoded, until it is
committed."""
READ_BYTES = 16 << 20
"""Of a leaf that is read at once: tensorstore holds all chunks of one reading in memory."""


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
