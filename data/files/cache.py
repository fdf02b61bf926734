"""Compressed files decompressed: as a stream, or once into a cache that can be read at random.

An entry of the cache is named by the file's path, size and time of change, and stands under its
name only when it is whole. Nothing is ever removed: the directory may be, between two runs.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from omnistep.core.cache import VARIABLE, cache_directory
from omnistep.data.errors import DataError
from omnistep.data.files.records import CHUNK_BYTES

CODECS = {".gz": "gzip", ".zst": "zstd"}


def decompressed(path: str) -> Iterator[bytes]:
    """The content of a .gz or .zst, all its members. DataError: it is corrupt or cut off."""
    import pyarrow as pa

    codec = CODECS[Path(path).suffix.lower()]
    empty = True
    with pa.OSFile(path) as source:
        try:
            with pa.CompressedInputStream(source, codec) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    empty = False
                    yield chunk
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: corrupt or cut off, {codec} cannot decompress it ({error}). "
                "Copy or make it again"
            ) from error
    if empty and os.path.getsize(path) == 0:
        raise DataError(f"{path}: no {codec} file, it has 0 bytes. Copy or make it again")


def cached(path: str) -> str:
    """The path of a plain copy of a compressed file, made by the first process that asks.

    DataError: the file is corrupt (nothing is kept of it), or the copy cannot be written.
    """
    stat = os.stat(path)
    identity = f"{os.path.abspath(path)}\n{stat.st_size}\n{stat.st_mtime_ns}"
    name = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    place = os.environ.get(VARIABLE, "~/.cache/omnistep")
    try:
        place = cache_directory("data")
        if (entry := place / name).exists():
            return str(entry)
        with FileLock(f"{entry}.lock"):
            if not entry.exists():
                _write(decompressed(path), entry)
    except OSError as error:
        raise DataError(
            f"{path}: cannot write its decompressed copy into {place} "
            f"({error.strerror or error}). Free some space there, or set {VARIABLE} to a "
            "directory on a larger disk"
        ) from error
    return str(entry)


def _write(content: Iterator[bytes], entry: Path) -> None:
    """All of `content`, or nothing. The caller holds the entry's lock."""
    for left in entry.parent.glob(f"{entry.name}.*.part"):  # by a process that was killed
        left.unlink(missing_ok=True)
    number, name = tempfile.mkstemp(".part", f"{entry.name}.", entry.parent)
    try:
        with open(number, "wb") as file:
            for chunk in content:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, entry)
    except BaseException:
        os.unlink(name)
        raise
