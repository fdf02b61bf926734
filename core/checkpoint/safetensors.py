"""Hugging Face weight directories, read one tensor, or a part of one, at a time.

Nothing here knows a model: a directory is a map from tensor names to tensors, in one
`model.safetensors` or in shards listed by `model.safetensors.index.json`.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

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


@frozen
class TensorInfo:
    """Where a tensor lies and what it is, known without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Byte of the file where its data begin."""


@frozen(eq=False)
class Weights:
    """The tensors of one directory or file, by name; none is read until asked for."""

    path: Path
    infos: Mapping[str, TensorInfo]

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ValueError where there is no such tensor."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._info(name).dtype

    def _info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise ValueError(f"{self.path} holds no tensor {name!r}{nearest(name, self.infos)}")
        return self.infos[name]

    def read(self, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """The tensor, or the part of it that `slices` cut (one per dimension, step 1).

        Only the bytes needed are read; the result has its own memory, on the CPU.
        """
        info = self._info(name)
        cuts = tuple(slice(None) for _ in info.shape) if slices is None else tuple(slices)
        spans = [s.indices(n) for s, n in zip(cuts, info.shape, strict=True)]
        if any(step != 1 for _, _, step in spans):
            raise ValueError(f"{name}: {slices} has a step; only whole ranges can be read")
        size = math.prod(info.shape) * info.dtype.itemsize
        if size == 0:
            return torch.empty(info.shape, dtype=info.dtype)[cuts]
        try:
            # This tensor alone is mapped, and let go after the copy: a file that stays mapped
            # counts as memory of the process, page by page as it is read.
            data = np.memmap(info.file, np.uint8, "c", info.start, (size,))
        except (OSError, ValueError) as error:
            raise ValueError(f"{info.file}: tensor {name!r} cannot be read: {error}") from error
        whole = torch.from_numpy(data).view(info.dtype).view(info.shape)
        return whole[cuts].clone(memory_format=torch.contiguous_format)


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
    held = {file: _read_header(file) for file in sorted(set(index.values()))}
    for name, file in index.items():
        if name not in held[file]:
            raise ValueError(
                f"the index of {path} says {name!r} is in {file.name}, which does not hold it: "
                "index and files are of different exports; fetch or export them again"
            )
    return Weights(Path(path), {name: held[file][name] for name, file in index.items()})


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """What a file holds: 8 bytes of length, a JSON object of that length, the data."""
    _open(file)  # safetensors itself checks the header, and that the data are as long as it says
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    infos = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: {name!r} has dtype {entry['dtype']}; readable are {sorted(DTYPES)}"
            )
        start = 8 + length + entry["data_offsets"][0]
        infos[name] = TensorInfo(file, tuple(entry["shape"]), DTYPES[entry["dtype"]], start)
    return infos


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
        if elsewhere := sorted({f for f in entries.values() if Path(f).name != f}):
            raise ValueError(f"it names {elsewhere[0]!r}, which is not beside it")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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


def nearest(name: str, names: Iterable[str]) -> str:
    """For an error: the name that was probably meant, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest name is {near[0]!r}" if near else ""
