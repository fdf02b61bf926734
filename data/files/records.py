"""What every format is read as: records, and the few functions on bytes that the formats share.

A reader opens its file anew for each record (microseconds) instead of keeping a handle: so it
pickles, survives a fork, and a thousand files need no thousand descriptors.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from attrs import frozen

from omnistep.data.errors import DataError

CHUNK_BYTES = 1 << 19
"""Of a pass over a file: what is held at once is a few times this, and the record begun."""
LONGEST_RECORD = 32 << 20
"""Bytes. A record longer than this is an error of its own, and is not read into memory."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@frozen
class Record:
    """One sample as it stands in its file."""

    content: str | Mapping[str, Any]
    """Plain text, or named fields."""
    where: str
    """File and line, row or item, for errors."""
    ends_document: bool = True
    """False for a part of a document that goes on in the next record."""
    folder: str = ""
    """Where the paths in it begin: that of its file; empty: the working directory."""


class Reader(Protocol):
    """Random access to a file's records. What is wrong with one of them, only reading it raises."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


Unread = Callable[[], Record]
"""A record that a stream has come to: the call parses it, or raises its DataError."""


def read_bytes(path: str, start: int, stop: int) -> bytes:
    """Reads the bytes start:stop of a file that had them when it was indexed. Raises DataError
    where it ends before."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = os.pread(file, stop - start, start)
        while len(content) < stop - start:
            part = os.pread(file, stop - start - len(content), start + len(content))
            if not part:
                raise shorter(path, stop, start + len(content))
            content += part
    finally:
        os.close(file)
    return content


def chunks_of(path: str) -> Iterator[bytes]:
    """A file's bytes from first to last."""
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def without_mark(chunks: Iterator[bytes], name: str) -> tuple[int, Iterator[bytes]]:
    """Leaves out a byte order mark, which is no text: (bytes left out, the rest). Raises DataError
    where the file `name` is text in another encoding than UTF-8."""
    first = next(chunks, b"")
    check_encoding(first, name)
    marked = first.startswith(BYTE_ORDER_MARK)
    return (3, put_back(first[3:], chunks)) if marked else (0, put_back(first, chunks))


WIDE = {
    "UTF-32": (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"),
    "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
}
"""Encodings by their marks; the longer ones first."""


def check_encoding(head: bytes, name: str) -> None:
    """Raises DataError where a file's first bytes are UTF-16 or UTF-32, with a mark or without:
    then most characters bring bytes of 0, which no UTF-8 text has."""
    marked = (form for form, marks in WIDE.items() if head.startswith(marks))
    found = next(marked, None)
    sample = head[:256]
    if found is None and sample.count(0) * 4 > len(sample) > 1:
        found = "UTF-32" if sample.count(0) * 2 > len(sample) + 1 else "UTF-16"
    if found:
        raise DataError(
            f"{name}: it is {found}, not UTF-8. Convert it, e.g. "
            f"`iconv -f {found.lower()} -t utf-8`"
        )


def without_nulls(value: Any) -> Any:
    """Takes the fields that are null out of a value's objects: a table has each field of a struct
    in every row, where JSON has those that are given."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def put_back(first: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """`first`, then the others."""
    if first:
        yield first
    yield from chunks


def check_size(path: str, size: int) -> None:
    """Raises DataError where a file has fewer than the `size` bytes it had when it was opened."""
    if (now := os.stat(path).st_size) < size:
        raise shorter(path, size, now)


def shorter(path: str, size: int, now: int) -> DataError:
    """The error of a file that lost bytes while it was in use."""
    return DataError(
        f"{path}: it had {size:,} bytes when it was opened, now it ends after {now:,}: it was cut "
        "off or replaced meanwhile. Put it back"
    )


def too_long(where: str, size: int) -> DataError:
    """The error of a record of `size` bytes."""
    return DataError(
        f"{where}: the record has {size:,} bytes, at most {LONGEST_RECORD:,} are read. "
        "Split it, or take it out"
    )


def not_utf8(where: str, offset: int, error: UnicodeDecodeError) -> DataError:
    """The error of a text that begins `offset` bytes into its file."""
    byte = error.object[error.start]
    return DataError(
        f"{where}: not UTF-8 (byte 0x{byte:02x} at offset {offset + error.start}). "
        "Convert the file, e.g. `iconv -f latin1 -t utf-8`"
    )
