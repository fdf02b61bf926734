"""One file as a sequence of records, by random access: an index in memory, the content on disk.

A reader opens its file anew for each record (microseconds) instead of keeping a handle: so it
pickles, survives a fork, and a thousand files need no thousand descriptors.
"""

import csv
import io
import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from attrs import field, frozen

from omnistep.data.archives import open_plain
from omnistep.data.errors import DataError

TEXT_BYTES = 16 * 1024
LONGEST_TEXT_BYTES = 64 * 1024
CHUNK_BYTES = 1 << 24
BOM = b"\xef\xbb\xbf"
"""A byte order mark, which is no text."""
LONGEST_RECORD = 32 << 20
"""Bytes. Longer lines are taken for a mistake: they are not read, and named."""


@frozen
class Record:
    """One sample as it stands in its file."""

    content: str | Mapping[str, Any]
    """Plain text, or named fields."""
    where: str
    """File and line or row, for errors."""
    ends_document: bool = True
    """False for a part of a document that goes on in the next record."""


class Reader(Protocol):
    """Random access to a file's records."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


def read_bytes(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        parts = []
        while start < stop and (part := file.read(stop - start)):
            parts.append(part)
            start += len(part)
    return b"".join(parts)


def _line_number(path: str, offset: int) -> int:
    """The line (from 1) the byte at `offset` (of the plain content) is on. Reads the file up to
    there: for errors only."""
    lines = 1
    with open_plain(path) as file:
        while offset > 0 and (part := file.read(min(CHUNK_BYTES, offset))):
            lines += part.count(b"\n")
            offset -= len(part)
    return lines


def decode(
    path: str, start: int, content: bytes, line: int | None = None, name: str | None = None
) -> str:
    """UTF-8. `path`, `start`, `line`: the file, byte and line it begins at, for the error, where
    the file is called `name`; without `line` it is counted."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if line is None:
            line = _line_number(name or path, start + error.start)
        byte = content[error.start]
        raise DataError(
            f"{name or path}, line {line}: not UTF-8 (byte 0x{byte:02x} at offset "
            f"{start + error.start}). Convert the file, e.g. `iconv -f latin1 -t utf-8`"
        ) from error


@frozen(eq=False)
class TextFile:
    """A .txt: one document, its records are successive parts of it."""

    path: str
    name: str
    """of the file the user gave, for errors"""
    starts: np.ndarray = field(repr=False)
    """int64 [records + 1]: byte offsets, the last is the file's size."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Record:
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        text = decode(self.path, start, read_bytes(self.path, start, stop), name=self.name)
        return Record(text, f"{self.name}, part {index + 1}", index + 1 == len(self))


def index_text(
    path: str,
    name: str | None = None,
    *,
    part: int = TEXT_BYTES,
    longest: int = LONGEST_TEXT_BYTES,
) -> TextFile:
    """Cuts at the first line end after every `part` bytes; reads only around the cuts.

    Where no line ends within `longest` bytes, the cut is there, between two characters.
    """
    size = Path(path).stat().st_size
    with open(path, "rb", buffering=4096) as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        starts = [start] if start < size else []
        while start < size:
            # From the last byte of the smallest part, so that a line end there counts.
            file.seek(start + part - 1)
            rest = file.readline(longest - part + 1)
            start = min(start + part - 1 + len(rest), size)
            if start < size and not rest.endswith(b"\n"):
                file.seek(start - 3)
                start -= bytes_of_cut_character(file.read(4))
            starts.append(start)
    return TextFile(path, name or path, np.array(starts or [0], np.int64))


def bytes_of_cut_character(around: bytes) -> int:
    """How many of the bytes before the last belong to the character that goes on with it."""
    for back, byte in enumerate(reversed(around)):
        if byte & 0xC0 != 0x80:  # not a continuation byte: a character begins here
            return back
    return 0


def parse_json(line: bytes, where: str, path: str, start: int, number: int) -> Record:
    """A line of JSON. `path`, `start`, `number`: the file, byte and line it begins at."""
    text = decode(path, start, line.rstrip(), number)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}): {text[:80]!r}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"{where}: a JSON object is expected, this is a {kind}")
    return Record(content, where)


def too_long(where: str, size: int | None = None) -> DataError:
    told = "longer than" if size is None else f"{size} bytes, more than"
    return DataError(f"{where}: a record {told} the {LONGEST_RECORD} bytes that are allowed")


@frozen(eq=False)
class JsonLines:
    """A .jsonl: one JSON object a line. Empty lines are no records."""

    path: str
    starts: np.ndarray = field(repr=False)
    """int64 [records + 1]: byte offsets, the last is the file's size."""
    skipped: np.ndarray = field(repr=False)
    """int64: for each empty line, the number of records before it."""
    name: str
    """of the file the user gave, for errors"""
    unit: str = "line"
    """what a line is of that file"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Record:
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        line = index + 1 + int(np.searchsorted(self.skipped, index, side="right"))
        where = f"{self.name}, {self.unit} {line}"
        if stop - start > LONGEST_RECORD:
            raise too_long(where, stop - start)
        return parse_json(read_bytes(self.path, start, stop), where, self.name, start, line)


def index_json_lines(path: str, name: str | None = None, unit: str = "line") -> JsonLines:
    """One pass over the file, in chunks."""
    starts = _row_starts(path)
    blank = _blank(path, starts, most=8)
    skipped = np.array(blank, np.int64) - np.arange(len(blank))
    return JsonLines(path, np.delete(starts, blank), skipped, name or path, unit)


def _row_starts(path: str, *, quoted: bool = False) -> np.ndarray:
    """int64: where rows begin, and the file ends. A row ends with a line; where a field may be
    `quoted`, only outside of quotes: after an even number of them."""
    found, begin, quotes = array("q", [0]), 0, 0
    with open(path, "rb", buffering=0) as file:
        while part := file.read(CHUNK_BYTES):
            content = np.frombuffer(part, np.uint8)
            ends = np.flatnonzero(content == ord("\n"))
            if quoted:
                marks = np.cumsum(content == ord('"'), dtype=np.int32)
                ends = ends[(marks[ends] + quotes) % 2 == 0]
                quotes += int(marks[-1])
            found.frombytes((ends + (begin + 1)).tobytes())
            begin += len(part)
    if found[-1] != begin:
        found.append(begin)
    return np.frombuffer(found, np.int64)


def _blank(path: str, starts: np.ndarray, most: int, blanks: bytes | None = None) -> list[int]:
    """The rows that hold nothing but `blanks`. Only those of at most `most` bytes are looked at."""
    short = np.flatnonzero(np.diff(starts) <= most).tolist()
    return [i for i in short if not read_bytes(path, starts[i], starts[i + 1]).strip(blanks)]


@frozen(eq=False)
class Csv:
    """A .csv: a header, then a record a row; quoted as RFC 4180 says. All values are texts."""

    path: str
    starts: np.ndarray = field(repr=False)
    """int64 [records + 1]: byte offsets of the rows after the header, and the file's size."""
    header: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Record:
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        where = f"{self.name}, row {index + 1}"
        if stop - start > LONGEST_RECORD:
            raise too_long(where, stop - start)
        return parse_csv(read_bytes(self.path, start, stop), self.header, where, self.name, start)


def parse_csv(row: bytes, header: tuple[str, ...], where: str, path: str, start: int) -> Record:
    """A row; `path`, `start`: the file and the byte it begins at."""
    values = _csv_values(decode(path, start, row), where)
    if len(values) != len(header):
        raise DataError(f"{where}: {len(values)} fields, but the header has {len(header)}")
    return Record(dict(zip(header, values, strict=True)), where)


def csv_header(row: bytes, name: str) -> tuple[str, ...]:
    header = tuple(_csv_values(decode(name, 0, row.removeprefix(BOM), 1), f"{name}, header"))
    if len(set(header)) != len(header):
        raise DataError(f"{name}: a column's name stands twice in the header {list(header)}")
    return header


def _csv_values(text: str, where: str) -> list[str]:
    csv.field_size_limit(LONGEST_RECORD)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"{where}: not CSV ({error})") from error
    return rows[0] if rows else []


def index_csv(path: str, name: str | None = None) -> Csv:
    """One pass over the file, in chunks. Empty lines are no records."""
    starts = _row_starts(path, quoted=True)
    if len(starts) == 1:
        return Csv(path, starts, (), name or path)
    header = read_bytes(path, 0, min(int(starts[1]), LONGEST_RECORD))
    rows = starts[1:]
    rows = np.delete(rows, _blank(path, rows, most=2, blanks=b"\r\n"))
    return Csv(path, rows, csv_header(header, name or path), name or path)
