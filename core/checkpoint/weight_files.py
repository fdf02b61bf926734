"""Hugging Face weight directories, written by all ranks at once, one tensor at a time.

Files are written here rather than by safetensors.torch, which wants every tensor of a file in
memory at once, on one rank.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import torch
from attrs import frozen
from torch import Tensor

from omnistep.core.checkpoint.pieces import LazyTensor, exchange, outgoing
from omnistep.core.checkpoint.ranks import ALONE, Ranks
from omnistep.core.checkpoint.safetensors import DTYPE_NAMES, INDEX, SHARD, SINGLE

UNFINISHED = ".unfinished-weights"

Shard = Mapping[str, LazyTensor]


def shard_bytes(total: int) -> float:
    """The most that a file holds of weights of `total` bytes: 1 GB, so that a small model is one
    file; of more than 64 GB a 64th, so that many ranks write at once; at most 5 GB. It does not
    depend on the number of ranks: a model has the same files whoever writes them."""
    return min(5e9, max(1e9, total / 64))


def write_weights(
    directory: str | Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    *,
    max_shard_bytes: float | None = None,
    metadata: Mapping[str, str] | None = None,
    ranks: Ranks = ALONE,
) -> list[Path]:
    """Writes `model.safetensors`, or shards and their index where it would be larger than
    `max_shard_bytes` (None: `shard_bytes` of the whole).

    Shards are filled in the order of `tensors`; a tensor larger than a shard has one of its own.
    metadata: strings for the files' headers, by default {"format": "pt"}, which transformers
    insists on.

    Collective: each shard is written by one rank, all ranks at once. A rank holds one tensor of
    its shard at a time, to which the other ranks send their pieces.

    Everything is written and synced aside before an older export in `directory` is replaced: a
    failure leaves that one whole, a kill does too. Only a kill amid the final renames, where
    both have equally many shards, leaves no index: an error when opened, never a mix of both.
    Raises CheckpointError on all ranks where one fails.
    """
    sources = {
        name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) if isinstance(t, Tensor) else t
        for name, t in tensors.items()
    }
    total = sum(map(_size, sources.values()))
    limit = shard_bytes(total) if max_shard_bytes is None else max_shard_bytes
    _check_sources(sources, limit)
    shards = _plan(sources, limit)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in _counted(shards)]
    files = dict(zip(names, shards, strict=True))
    header = dict(metadata if metadata is not None else {"format": "pt"})

    directory = Path(directory)
    aside = directory / UNFINISHED

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a killed write
        aside.mkdir()

    def finish() -> None:
        if missing := [name for name in files if not (aside / name).is_file()]:
            raise FileNotFoundError(
                f"{directory} holds no {missing[0]}, which rank "
                f"{_writer(names.index(missing[0]), len(files), ranks.size)} wrote there: "
                "all ranks must see one directory; use a file system that they share"
            )
        if len(files) > 1:
            with (aside / INDEX).open("wb") as file:
                file.write(_index(files))
                _sync(file)
        _replace(directory, aside, names)

    try:
        ranks.ask_first(begin)
        _write_files(aside, files, header, ranks)
        ranks.ask_first(finish)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
    return [directory / name for name in names]


# --- the plan -----------------------------------------------------------------------------------


def _counted(shards: Sequence[Any]) -> range:
    return range(1, len(shards) + 1)


def _check_sources(sources: Shard, max_shard_bytes: float) -> None:
    if not sources:
        raise ValueError("there are no tensors to write")
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be above 0")
    for name, source in sources.items():
        if source.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: {source.dtype} cannot be written as safetensors")
        if name == "__metadata__":
            raise ValueError("'__metadata__' cannot name a tensor: the format reserves it")


def _size(source: LazyTensor) -> int:
    return torch.Size(source.shape).numel() * source.dtype.itemsize


def _plan(sources: Shard, limit: float) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, source in sources.items():
        if shards[-1] and filled + _size(source) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = source
        filled += _size(source)
    return shards


def _writer(file: int, files: int, ranks: int) -> int:
    """The rank that writes a file: fewer files than ranks are spread over all machines."""
    return file * ranks // files if files < ranks else file % ranks


# --- writing ------------------------------------------------------------------------------------


@frozen(eq=False)
class _Turn:
    """One tensor to be written at the end of a file."""

    file: str
    name: str
    source: LazyTensor
    before: bytes
    """The file's header where the tensor is its first."""
    is_last: bool


def _turns(file: str, shard: Shard, metadata: Mapping[str, str]) -> Iterator[_Turn]:
    """The tensors of a file in the order in which they lie: wide dtypes first, so that every
    tensor is aligned to its element size; then large ones, so that what the ranks write in one
    round is of similar size."""
    ordered = dict(
        sorted(shard.items(), key=lambda item: (-item[1].dtype.itemsize, -_size(item[1])))
    )
    *_, last = ordered
    header = _header(ordered, metadata)
    for name, source in ordered.items():
        yield _Turn(file, name, source, header, name == last)
        header = b""


def _header(shard: Shard, metadata: Mapping[str, str]) -> bytes:
    """8 bytes of length, the JSON header padded to 8 bytes; the data follow without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, source in shard.items():
        end = offset + _size(source)
        header[name] = {
            "dtype": DTYPE_NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_files(
    aside: Path, files: Mapping[str, Shard], metadata: Mapping[str, str], ranks: Ranks
) -> None:
    """In rounds: every rank that has a file left to write gets its next tensor, and writes it."""
    queues: list[list[_Turn]] = [[] for _ in range(ranks.size)]
    for i, (file, shard) in enumerate(files.items()):
        queues[_writer(i, len(files), ranks.size)] += _turns(file, shard, metadata)
    held: list[tuple[_Turn, Tensor | None]] = []  # at most one: what this rank is to write

    def write() -> None:
        while held:
            _write(aside, *held.pop())

    for row in zip_longest(*queues):
        wanted = {rank: turn.source for rank, turn in enumerate(row) if turn is not None}
        pieces: dict[int, Tensor] = {}

        # what may fail on one rank is agreed on before the next exchange: the others would hang
        def prepare(wanted=wanted, pieces=pieces) -> None:
            write()
            pieces.update(outgoing(ranks.rank, wanted))

        ranks.together(prepare)
        whole = exchange(ranks.rank, ranks.size, wanted.get(ranks.rank), pieces)
        if (mine := row[ranks.rank]) is not None:
            held.append((mine, whole))
        del whole
    ranks.together(write)


def _write(aside: Path, turn: _Turn, whole: Tensor | None) -> None:
    """`whole` is None where the tensor is not in pieces: it is read now."""
    tensor = (turn.source.read() if whole is None else whole).detach()
    if tuple(tensor.shape) != tuple(turn.source.shape) or tensor.dtype != turn.source.dtype:
        raise ValueError(
            f"{turn.name}: announced as {turn.source.dtype} {list(turn.source.shape)}, "
            f"read as {tensor.dtype} {list(tensor.shape)}"
        )
    path = aside / turn.file
    try:
        with path.open("ab") as file:
            file.write(turn.before)
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if turn.is_last:
                _sync(file)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _index(files: Mapping[str, Shard]) -> bytes:
    entries = {name: file for file, shard in files.items() for name in shard}
    total = sum(_size(source) for shard in files.values() for source in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(entries.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _replace(directory: Path, aside: Path, names: Sequence[str]) -> None:
    """Moves the new files in, the index last; then deletes what only the older export had.

    Where shards of both have the same names the older index and shards are moved out first.
    """
    new = [*names, INDEX] if len(names) > 1 else [*names]
    older = [path for path in directory.iterdir() if _is_weights(path.name)]
    outgoing = aside / "older"
    outgoing.mkdir()
    try:
        if len(names) > 1 and any(path.name in names for path in older):
            for path in sorted(older, key=lambda path: path.name != INDEX):
                if path.name in new:
                    path.replace(outgoing / path.name)
        for name in new:
            (aside / name).replace(directory / name)
    except BaseException:
        for path in sorted(outgoing.iterdir(), key=lambda path: path.name == INDEX):
            path.replace(directory / path.name)
        raise
    # one file wins over an index, so an older one is in force until it is deleted
    for path in sorted(older, key=lambda path: path.name != SINGLE):
        if path.name not in new:
            path.unlink()
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_weights(name: str) -> bool:
    return name in (SINGLE, INDEX) or SHARD.fullmatch(name) is not None
