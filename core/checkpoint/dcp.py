"""Steps in the format of torch.distributed.checkpoint (DCP).

A step is a DCP checkpoint, which plain `torch.distributed.checkpoint.load` reads: files of pieces
from each rank, and `.metadata`, which says where they lie. DCP verifies nothing that it reads, but
a piece is a zip archive with a crc32 of each of its records: these are checked here, and the crc32
of `.metadata` stands in a file beside it. `.metadata` is a pickle, which is read without running
what it names (dcp_metadata.py).
"""

import math
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from omnistep.core.checkpoint.arrays import unreadable
from omnistep.core.checkpoint.cut import pieces
from omnistep.core.checkpoint.dcp_metadata import load_metadata
from omnistep.core.checkpoint.dcp_weights import METADATA, METADATA_SUM
from omnistep.core.checkpoint.place import committed, outdated
from omnistep.core.checkpoint.ranks import Ranks
from omnistep.core.checkpoint.saving import Leaves
from omnistep.core.checkpoint.shards import Shard, from_numpy, torch_dtype

PIECE_BYTES = 16 << 20
"""A piece is read whole, since its checksum covers the whole: two of them are in memory for each
leaf that is being read."""


class DcpWriter:
    """Writes the steps of one directory."""

    def __init__(self, directory: Path, ranks: Ranks, keep: int | None, keep_every: int | None):
        self._directory, self._ranks = directory, ranks
        self._keep, self._keep_every = keep, keep_every

    def commit(self, step: int, leaves: Leaves) -> None:
        temporary = self._directory / f"{step}.tmp"

        def clear() -> None:
            for left in self._directory.glob("*.tmp"):
                shutil.rmtree(left)

        def finish() -> None:
            temporary.rename(self._directory / str(step))
            self._drop_old()

        self._ranks.ask_first(clear)
        write_step(temporary, leaves, self._ranks)
        self._ranks.ask_first(finish)

    def close(self) -> None:
        pass

    def _drop_old(self) -> None:
        for step in outdated(committed(self._directory), self._keep, self._keep_every):
            # renamed first: half deleted, it would still have a committed step's name
            old = (self._directory / str(step)).rename(self._directory / f"{step}.tmp")
            shutil.rmtree(old)


# --- writing ------------------------------------------------------------------------------------


def write_step(directory: Path, leaves: Leaves, ranks: Ranks) -> None:
    """Writes str, int and this rank's Shards. Collective: what torch's `save` does, in the same
    order, but one rank's failure is told in our words, and a single rank warns of nothing."""
    first, done = ranks.rank == 0, {}
    writer, planner = FileSystemWriter(directory), _Planner(leaves, first)

    def plan() -> None:
        writer.set_up_storage_writer(first)
        done["plan"] = writer.prepare_local_plan(planner.create_local_plan())

    def agree() -> list[SavePlan]:
        parts, done["metadata"] = planner.create_global_plan(plans)
        return writer.prepare_global_plan(parts)

    def write() -> None:
        try:
            done["written"] = writer.write_data(parts[ranks.rank], planner).value()
        except RuntimeError as error:  # of torch closing what could not be written
            raise (error.__context__ or error) from error

    def finish() -> None:
        writer.finish(done["metadata"], results)
        checksum = zlib.crc32((directory / METADATA).read_bytes())
        (directory / METADATA_SUM).write_text(str(checksum))

    ranks.together(plan)
    plans = ranks.gather(done["plan"])
    parts = ranks.ask_first(agree)
    ranks.together(write)
    results = ranks.gather(done["written"])
    ranks.ask_first(finish)


class _Planner(DefaultSavePlanner):
    """Plans to write the pieces of this rank's Shards, and on the first rank str and int."""

    def __init__(self, leaves: Leaves, first: bool):
        super().__init__()
        self._items: list[WriteItem] = []
        self._values: dict[MetadataIndex, Any] = {}
        self._paths = {name: tuple(name.split(".")) for name in leaves}
        for name, leaf in leaves.items():
            if not isinstance(leaf, Shard):
                if first:
                    self._add(MetadataIndex(name), leaf)
            elif leaf.blocks is not None:
                raise ValueError(f"{name} is Streamed; the dcp format holds tensors, ints and str")
            elif leaf.data is not None:
                for offset, piece in pieces(leaf.data, leaf.offset, PIECE_BYTES):
                    # of a numpy slice torch makes a storage that ends with it: DCP writes storages
                    self._add(MetadataIndex(name, offset), from_numpy(piece), leaf.shape)
            elif first and 0 in leaf.shape:
                empty = torch.empty(leaf.shape, dtype=torch_dtype(leaf.dtype.name))
                self._add(MetadataIndex(name, leaf.offset), empty, leaf.shape)

    def _add(self, index: MetadataIndex, value: Any, whole: Sequence[int] | None = None) -> None:
        kind, data = WriteItemType.BYTE_IO, None
        if whole is not None:
            kind = WriteItemType.SHARD
            chunk = ChunkStorageMetadata(torch.Size(index.offset or ()), value.shape)
            data = TensorWriteData(
                chunk, TensorProperties.create_from_tensor(value), torch.Size(whole)
            )
        self._items.append(WriteItem(index, kind, tensor_data=data))
        self._values[index] = value

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items, planner_data=self._paths)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._values[index]


# --- reading ------------------------------------------------------------------------------------


@frozen(eq=False)
class DcpStep:
    """One committed step, opened."""

    place: Path
    metadata: Metadata

    def leaves(self) -> dict[str, Any]:
        """By name: meta tensors, "" for texts, 0 for ints."""
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            if isinstance(entry, TensorStorageMetadata)
            else type(self._load(MetadataIndex(name)))()
            for name, entry in self.metadata.state_dict_metadata.items()
        }

    def value(self, name: str) -> str | int:
        return self._load(MetadataIndex(name))

    def part(self, name: str, slices: Sequence[slice]) -> Tensor:
        """Put together from the pieces it overlaps."""
        entry: Any = self.metadata.state_dict_metadata[name]
        offset, shape = [s.start for s in slices], [s.stop - s.start for s in slices]
        found, filled = torch.empty(shape, dtype=entry.properties.dtype), 0
        for chunk in entry.chunks:
            spans = [
                (max(a, b), min(a + n, b + m))
                for a, n, b, m in zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(low < high for low, high in spans):
                piece = self._load(MetadataIndex(name, chunk.offsets))
                found[_slices(spans, offset)] = piece[_slices(spans, chunk.offsets)]
                filled += math.prod(high - low for low, high in spans)
        if filled != found.numel():
            raise unreadable(name, str(self.place), ValueError("a part of it was never saved"))
        return found

    def _load(self, index: MetadataIndex) -> Any:
        """One piece, text or int, read from disk once and checked."""
        try:
            info = self.metadata.storage_data[index]
            with open(self.place / info.relative_path, "rb") as file:
                file.seek(info.offset)
                content = BytesIO(file.read(info.length))
            if zipfile.ZipFile(content).testzip() is not None:
                raise ValueError("its checksum does not match: bytes were altered")
            content.seek(0)
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # altered bytes make zipfile and torch raise nearly anything
            raise unreadable(index.fqn, str(self.place), error) from error


def open_dcp(place: Path) -> DcpStep:
    """Raises DamagedError where `.metadata` is; no piece is read yet."""
    try:
        content, guard = (place / METADATA).read_bytes(), place / METADATA_SUM
        if guard.exists() and int(guard.read_text()) != zlib.crc32(content):  # plain DCP has none
            raise ValueError("its checksum does not match: bytes were altered")
        return DcpStep(place, load_metadata(content))
    except Exception as error:
        raise unreadable(METADATA, str(place), error) from error


def _slices(spans: Sequence[tuple[int, int]], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(low - o, high - o) for (low, high), o in zip(spans, origin, strict=True))
