"""Files that can't be read at random as they are: compressed ones, and JSON arrays.

They are written once to a cache, as plain text or JSON lines, and read from there. A stream reads
them as they are, from the front.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from omnistep.data.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
CACHE = "OMNISTEP_CACHE"
CHUNK_BYTES = 1 << 20


def cache_directory() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "omnistep" / "data")


def open_plain(path: str) -> io.BufferedReader:
    """The content of a file, decompressed where its name says so. Reading raises OSError where it
    is corrupt (`corrupt` says so to a user)."""
    compression = COMPRESSIONS.get(Path(path).suffix)
    if compression is None:
        return open(path, "rb", buffering=CHUNK_BYTES)
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(path, compression=compression), CHUNK_BYTES)


def corrupt(path: str, error: Exception) -> DataError:
    return DataError(f"{path}: the file can't be read to its end ({error}); it may be cut off")


def is_array(path: str) -> bool:
    """Whether a .json holds one array, and not JSON lines. Raises DataError: neither."""
    with open_plain(path) as file:
        while (first := file.read(1)).isspace() or first == b"\xef":
            file.read(2 if first == b"\xef" else 0)
    if first not in (b"[", b"{", b""):
        raise DataError(f"{path}: an array of objects, or one object a line is expected")
    return first == b"["


def array_items(path: str) -> Iterator[Any]:
    """The items of a .json that holds one array, one by one."""
    import ijson

    with open_plain(path) as file:
        try:
            yield from ijson.items(file, "item", use_float=True)
        except ijson.JSONError as error:
            raise DataError(f"{path}: not JSON ({error})") from error
        except OSError as error:
            raise corrupt(path, error) from error


def in_cache(path: str, *, array: bool) -> str:
    """The path of a plain copy; made by the first who asks, while others wait. `array`: JSON
    lines of the array's items. Half a copy is never taken for a whole one."""
    status = Path(path).stat()
    key = f"{Path(path).resolve()}|{status.st_size}|{status.st_mtime_ns}|{array}"
    directory = cache_directory()
    target = directory / hashlib.sha256(key.encode()).hexdigest()[:32]
    if target.exists():
        return str(target)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock"):
            if not target.exists():
                draft = target.with_suffix(".draft")
                try:
                    _write(path, draft, array)
                    os.replace(draft, target)
                finally:
                    draft.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path}: no plain copy can be written to {directory} ({error.strerror}); set "
            f"{CACHE} to a directory with room, or data.datasets_type to iterable"
        ) from error
    return str(target)


def _write(path: str, draft: Path, array: bool) -> None:
    with draft.open("wb") as out:
        if array:
            for item in array_items(path):
                out.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
            return
        with open_plain(path) as file:
            while part := _read(file, path):
                out.write(part)


def _read(file: io.BufferedReader, path: str) -> bytes:
    try:
        return file.read(CHUNK_BYTES)
    except OSError as error:
        raise corrupt(path, error) from error
