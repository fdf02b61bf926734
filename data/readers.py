"""One file as a sequence of records, by random access: an index in memory, the content on disk.

A reader opens its file anew for each record (microseconds) instead of keeping a handle: so it
pickles, survives a fork, and a thousand files need no thousand descriptors.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np
from attrs import field, frozen

from omnistep.data.errors import DataError

TEXT_BYTES = 16 * 1024
LONGEST_TEXT_BYTES = 64 * 1024
CHUNK_BYTES = 1 << 24
ROW_GROUPS = 4
"""Parquet row groups a process keeps decoded."""


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


def _read_bytes(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        parts = []
        while start < stop and (part := file.read(stop - start)):
            parts.append(part)
            start += len(part)
    return b"".join(parts)


def _line_number(path: str, offset: int) -> int:
    """The line (from 1) the byte at `offset` is on. Reads the file up to there: for errors only."""
    lines = 1
    with open(path, "rb") as file:
        while offset > 0 and (part := file.read(min(CHUNK_BYTES, offset))):
            lines += part.count(b"\n")
            offset -= len(part)
    return lines


def _decode(path: str, start: int, content: bytes, line: int | None = None) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = line or _line_number(path, start + error.start)
        byte = content[error.start]
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x} at offset {start + error.start}). "
            "Convert the file, e.g. `iconv -f latin1 -t utf-8`"
        ) from error


@frozen(eq=False)
class TextFile:
    """A .txt: one document, its records are successive parts of it."""

    path: str
    starts: np.ndarray = field(repr=False)
    """int64 [records + 1]: byte offsets, the last is the file's size."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Record:
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        text = _decode(self.path, start, _read_bytes(self.path, start, stop))
        return Record(text, f"{self.path}, part {index + 1}", index + 1 == len(self))


def index_text(path: str, part: int = TEXT_BYTES, longest: int = LONGEST_TEXT_BYTES) -> TextFile:
    """Cuts at the first line end after every `part` bytes; reads only around the cuts.

    Where no line ends within `longest` bytes, the cut is there, between two characters.
    """
    size = Path(path).stat().st_size
    with open(path, "rb", buffering=4096) as file:
        start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # a byte order mark is no text
        starts = [start] if start < size else []
        while start < size:
            # From the last byte of the smallest part, so that a line end there counts.
            file.seek(start + part - 1)
            rest = file.readline(longest - part + 1)
            start = min(start + part - 1 + len(rest), size)
            if start < size and not rest.endswith(b"\n"):
                start -= _bytes_of_cut_character(file, start)
            starts.append(start)
    return TextFile(path, np.array(starts or [0], np.int64))


def _bytes_of_cut_character(file: Any, offset: int) -> int:
    """How many bytes before `offset` belong to the character that goes on at `offset`."""
    file.seek(offset - 3)
    around = file.read(4)
    for back in range(4):
        if around[3 - back] & 0xC0 != 0x80:  # not a continuation byte: a character begins here
            return back
    return 0


@frozen(eq=False)
class JsonLines:
    """A .jsonl: one JSON object a line. Empty lines are no records."""

    path: str
    starts: np.ndarray = field(repr=False)
    """int64 [records + 1]: byte offsets, the last is the file's size."""
    skipped: np.ndarray = field(repr=False)
    """int64: for each empty line, the number of records before it."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Record:
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        line = index + 1 + int(np.searchsorted(self.skipped, index, side="right"))
        where = f"{self.path}, line {line}"
        text = _decode(self.path, start, _read_bytes(self.path, start, stop), line)
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}): {text[:80]!r}") from error
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise DataError(f"{where}: a JSON object is expected, this is a {kind}")
        return Record(content, where)


def index_json_lines(path: str) -> JsonLines:
    """One pass over the file, in chunks."""
    size = Path(path).stat().st_size
    found, begin = [np.zeros(1, np.int64)], 0
    with open(path, "rb", buffering=0) as file:
        while part := file.read(CHUNK_BYTES):
            ends = np.flatnonzero(np.frombuffer(part, np.uint8) == ord("\n"))
            found.append(ends + (begin + 1))
            begin += len(part)
        starts = np.concatenate(found)
        starts = starts[starts < size]
        # A short line may be empty: only those are looked at again.
        lengths = np.diff(starts, append=size)
        short = np.flatnonzero(lengths <= 8).tolist()
        blank = [
            i for i in short if not _read_bytes(path, starts[i], starts[i] + lengths[i]).strip()
        ]
    skipped = np.array(blank, np.int64) - np.arange(len(blank))
    return JsonLines(path, np.append(np.delete(starts, blank), size), skipped)


@attrs.define(eq=False)
class Parquet:
    """A .parquet: a record a row, of the given columns; whole row groups are decoded and kept."""

    path: str
    columns: tuple[str, ...]
    firsts: np.ndarray = field(repr=False)
    """int64 [row groups + 1]: the number of rows before each group."""
    _decoded: OrderedDict[int, Any] = field(factory=OrderedDict, init=False, repr=False)

    def __getstate__(self) -> tuple[str, tuple[str, ...], np.ndarray]:
        return self.path, self.columns, self.firsts

    def __setstate__(self, state: tuple[str, tuple[str, ...], np.ndarray]) -> None:
        self.path, self.columns, self.firsts = state
        self._decoded = OrderedDict()

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> Record:
        group = int(np.searchsorted(self.firsts, index, side="right")) - 1
        row = index - int(self.firsts[group])
        table = self._row_group(group)
        content = {name: table.column(name)[row].as_py() for name in self.columns}
        return Record(content, f"{self.path}, row {index + 1}")

    def _row_group(self, group: int) -> Any:
        if group not in self._decoded:
            import pyarrow.parquet as pq

            with pq.ParquetFile(self.path) as file:
                # One thread: the process is one of several workers.
                table = file.read_row_group(group, columns=list(self.columns), use_threads=False)
            self._decoded[group] = table
            if len(self._decoded) > ROW_GROUPS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(group)
        return self._decoded[group]


def index_parquet(path: str, keys: Sequence[str]) -> Parquet:
    """Reads the footer. `keys`: the columns wanted; those the file lacks are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            present = file.schema_arrow.names
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    columns = tuple(key for key in keys if key in present)
    if not columns:
        raise DataError(
            f"{path} has none of the columns {list(keys)} (data.text_keys); it has {present}"
        )
    return Parquet(path, columns, np.cumsum([0, *groups]))


def reader_of(ending: str, keys: Sequence[str]) -> Callable[[str], Reader] | None:
    """The function that indexes a file of this ending; None for an ending not known here."""
    match ending:
        case ".txt":
            return index_text
        case ".jsonl":
            return index_json_lines
        case ".parquet":
            return lambda path: index_parquet(path, keys)
        case _:
            return None
