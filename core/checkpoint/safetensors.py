"""Hugging Face weight directories, read and written one tensor at a time.

Nothing here knows a model: a directory is a map from tensor names to tensors, in one
`model.safetensors` or in shards listed by `model.safetensors.index.json`. Files are written
here rather than by safetensors.torch, which wants every tensor of a file in memory at once.
"""

import difflib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
UNFINISHED = ".unfinished-weights"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's dtype names (safetensors 0.8)."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# --- reading ------------------------------------------------------------------------------------


@frozen
class TensorInfo:
    """Where a tensor lies and what it is, known without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """The tensors of one directory or file, by name; none is read until asked for."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], files: Mapping[Path, Any]):
        self.path = path
        self.infos = infos
        self._files = files

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ValueError where there is no such tensor."""
        return self._info(name).shape

    def _info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise ValueError(f"{self.path} holds no tensor {name!r}{_nearest(name, self.infos)}")
        return self.infos[name]

    def read(self, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """The tensor, or the part of it that `slices` cut (one per dimension, step 1).

        Only the bytes needed are read; the result has its own memory, on the CPU.
        """
        info = self._info(name)
        try:
            if slices is None:
                return self._files[info.file].get_tensor(name).clone()
            spans = [s.indices(n) for s, n in zip(slices, info.shape, strict=True)]
            if any(step != 1 for _, _, step in spans):
                raise ValueError(f"{name}: {slices} has a step; only whole ranges can be read")
            if not spans:
                return self._files[info.file].get_tensor(name).clone()
            shape = [max(0, stop - start) for start, stop, _ in spans]
            if 0 in shape:
                return torch.empty(shape, dtype=info.dtype)
            part = self._files[info.file].get_slice(name)[
                tuple(slice(start, stop) for start, stop, _ in spans)
            ]
            return part.clone(memory_format=torch.contiguous_format)
        except SafetensorError as error:
            raise ValueError(f"{info.file}: tensor {name!r} cannot be read: {error}") from error


def read_index(path: str | Path) -> dict[str, Path]:
    """Tensor names to the files that hold them, for a directory or a single .safetensors file.

    In a directory `model.safetensors` comes before `model.safetensors.index.json`, as in
    transformers. Raises FileNotFoundError when there are no weights or a listed file is
    missing, ValueError when the index or the file is damaged.
    """
    path = Path(path)
    if path.is_file() and path.name.endswith(".safetensors"):
        return dict.fromkeys(_open(path).keys(), path)
    if path.is_file() and path.name.endswith(".index.json"):
        return _read_shard_index(path)
    if (path / SINGLE).is_file():
        return read_index(path / SINGLE)
    if (path / INDEX).is_file():
        return _read_shard_index(path / INDEX)
    raise FileNotFoundError(_no_weights(path))


def open_weights(path: str | Path) -> Weights:
    """Opens every file of `path` (see read_index) and checks that it is whole; reads no tensor.

    Raises FileNotFoundError or ValueError, naming the file and what is wrong with it.
    """
    index = read_index(path)
    files = {file: _open(file) for file in sorted(set(index.values()))}
    held = {file: set(opened.keys()) for file, opened in files.items()}
    infos = {}
    for name, file in index.items():
        if name not in held[file]:
            raise ValueError(
                f"the index of {path} says {name!r} is in {file.name}, which does not hold it: "
                "index and files are of different exports; fetch or export them again"
            )
        part = files[file].get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise ValueError(
                f"{file}: {name!r} has dtype {part.get_dtype()}; readable are {sorted(DTYPES)}"
            )
        infos[name] = TensorInfo(file, tuple(part.get_shape()), DTYPES[part.get_dtype()])
    return Weights(Path(path), infos, files)


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(
            f"{file} ({file.stat().st_size:,} bytes) is no complete safetensors file: {reason}; "
            "fetch or export it again"
        ) from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _read_shard_index(index: Path) -> dict[str, Path]:
    try:
        entries = dict(json.loads(index.read_bytes())["weight_map"])
        files = {name: index.parent / file for name, file in entries.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is no index of shards: it needs an object 'weight_map' of tensor names to "
            f"file names ({type(error).__name__}: {error})"
        ) from error
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise FileNotFoundError(
            f"{index} lists {len(set(files.values()))} files, of which {len(missing)} are "
            f"missing: {', '.join(missing[:5])}{', …' * (len(missing) > 5)}"
        )
    return files


def _no_weights(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist"
    if path.is_file():
        return f"{path} is no weights file: give a .safetensors file or a directory that holds one"
    shards = sorted(file.name for file in path.iterdir() if SHARD.fullmatch(file.name))
    if shards:
        return f"{path} holds {len(shards)} shards ({shards[0]}, …) but no {INDEX} that lists them"
    other = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    hint = f"; {other[0]} must first be converted to safetensors" if other else ""
    return f"{path} holds neither {SINGLE} nor {INDEX}{hint}"


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest name is {near[0]!r}" if near else ""


# --- writing ------------------------------------------------------------------------------------


@frozen(eq=False)
class LazyTensor:
    """A tensor to be made when its turn to be written comes; its size is known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_weights(
    directory: str | Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    *,
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes `model.safetensors`, or shards and their index where it would be larger than allowed.

    At most one LazyTensor is in memory at a time. Shards are filled in the order of `tensors`;
    a tensor larger than `max_shard_bytes` has a shard of its own. metadata: strings for the
    files' headers, by default {"format": "pt"}, which transformers insists on.

    Everything is written and synced aside before an older export in `directory` is replaced: a
    failure leaves that one whole, a kill does too. Only a kill amid the final renames, where
    both have equally many shards, leaves no index: an error when opened, never a mix of both.
    """
    sources = {
        name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) if isinstance(t, Tensor) else t
        for name, t in tensors.items()
    }
    _check_sources(sources, max_shard_bytes)
    shards = _plan(sources, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in _counted(shards)]
    header = dict(metadata if metadata is not None else {"format": "pt"})

    directory = Path(directory)
    aside = directory / UNFINISHED
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)  # of a killed write
    aside.mkdir()
    try:
        for name, shard in zip(names, shards, strict=True):
            with (aside / name).open("wb") as file:
                _write_file(file, shard, header)
                _sync(file)
        if len(shards) > 1:
            with (aside / INDEX).open("wb") as file:
                file.write(_index(dict(zip(names, shards, strict=True))))
                _sync(file)
        _replace(directory, aside, names)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [directory / name for name in names]


def _counted(shards: Sequence[Any]) -> range:
    return range(1, len(shards) + 1)


def _check_sources(sources: Mapping[str, LazyTensor], max_shard_bytes: float) -> None:
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


def _plan(sources: Mapping[str, LazyTensor], limit: float) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, source in sources.items():
        if shards[-1] and filled + _size(source) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = source
        filled += _size(source)
    return shards


def _write_file(
    file: BinaryIO, shard: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> None:
    """8 bytes of header length, the JSON header padded to 8 bytes, the data without gaps.

    Wide dtypes come first, so that every tensor is aligned to its element size.
    """
    ordered = dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, source in ordered.items():
        end = offset + _size(source)
        header[name] = {
            "dtype": DTYPE_NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, source in ordered.items():
        _write_tensor(file, name, source)


def _write_tensor(file: BinaryIO, name: str, source: LazyTensor) -> None:
    tensor = source.read().detach()
    if tuple(tensor.shape) != tuple(source.shape) or tensor.dtype != source.dtype:
        raise ValueError(
            f"{name}: announced as {source.dtype} {list(source.shape)}, "
            f"read as {tensor.dtype} {list(tensor.shape)}"
        )
    file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _index(shards: Mapping[str, Mapping[str, LazyTensor]]) -> bytes:
    entries = {name: file for file, shard in shards.items() for name in shard}
    total = sum(_size(source) for shard in shards.values() for source in shard.values())
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
