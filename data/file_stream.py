"""A file's records from the front, each parsed only when it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BufferedReader
from typing import Any

from omnistep.data.archives import array_items, corrupt, is_array, open_plain
from omnistep.data.errors import DataError
from omnistep.data.readers import (
    BOM,
    LONGEST_RECORD,
    LONGEST_TEXT_BYTES,
    TEXT_BYTES,
    Record,
    bytes_of_cut_character,
    csv_header,
    decode,
    parse_csv,
    parse_json,
    too_long,
)
from omnistep.data.tables import index_arrow, index_parquet

Unread = Callable[[], Record]
"""A record; calling it parses it, or raises DataError."""


def stream_file(path: str, kind: str, keys: Sequence[str]) -> Iterator[Unread]:
    """The records of a file, with the same contents and places as by random access. `kind`: its
    ending, without that of a compression. Raises DataError where the file itself is broken."""
    match kind:
        case ".parquet":
            yield from index_parquet(path, keys).stream()
            return
        case ".arrow":
            yield from index_arrow(path, keys).stream()
            return
        case ".json" if is_array(path):
            for number, item in enumerate(array_items(path), 1):
                yield partial(_item, item, f"{path}, item {number}")
            return
    read = {".txt": _parts, ".csv": _rows}.get(kind, _lines)
    with open_plain(path) as file:
        try:
            yield from read(file, path)
        except OSError as error:
            raise corrupt(path, error) from error


def _item(item: Any, where: str) -> Record:
    if isinstance(item, dict):
        return Record(item, where)
    raise DataError(f"{where}: a JSON object is expected, this is a {type(item).__name__}")


def _fail(error: DataError) -> Record:
    raise error


def _line(file: BufferedReader) -> tuple[bytes, int]:
    """The next line, and its length; where it is too long, only its beginning."""
    line = file.readline(LONGEST_RECORD + 1)
    size, part = len(line), line
    while len(part) == LONGEST_RECORD + 1 and not part.endswith(b"\n"):
        part = file.readline(LONGEST_RECORD + 1)
        size += len(part)
    return line, size


def _lines(file: BufferedReader, path: str) -> Iterator[Unread]:
    start = number = 0
    while True:
        line, size = _line(file)
        if not line:
            return
        number += 1
        where = f"{path}, line {number}"
        if size > LONGEST_RECORD:
            yield partial(_fail, too_long(where, size))
        elif line.strip():
            yield partial(parse_json, line, where, path, start, number)
        start += size


def _rows(file: BufferedReader, path: str) -> Iterator[Unread]:
    header: tuple[str, ...] | None = None
    start = number = 0
    while True:
        row, size = _line(file)
        if not row:
            return
        quotes = row.count(b'"')
        while quotes % 2 and size <= LONGEST_RECORD:
            more, length = _line(file)
            if not more:
                break
            row, size, quotes = row + more, size + length, quotes + more.count(b'"')
        if header is None:
            header = csv_header(row, path)
        elif row.strip(b"\r\n"):
            number += 1
            where = f"{path}, row {number}"
            if size > LONGEST_RECORD:
                yield partial(_fail, too_long(where, size))
            else:
                yield partial(parse_csv, row, header, where, path, start)
        start += size


def _parts(
    file: BufferedReader,
    path: str,
    size: int = TEXT_BYTES,
    longest: int = LONGEST_TEXT_BYTES,
) -> Iterator[Unread]:
    """Cut where readers.index_text cuts."""
    rest = file.read(len(BOM))
    start, rest, number = (len(BOM), b"", 0) if rest == BOM else (0, rest, 0)
    while rest or file.peek(1):
        part = rest + file.read(max(0, size - 1 - len(rest)))
        line = file.readline(longest - size + 1)
        part, ahead = part + line, file.peek(1)[:1]
        cut = bytes_of_cut_character(part[-3:] + ahead) if ahead and line[-1:] != b"\n" else 0
        part, rest = part[: len(part) - cut], part[len(part) - cut :]
        number += 1
        yield partial(_text, part, f"{path}, part {number}", path, start, not ahead)
        start += len(part)


def _text(part: bytes, where: str, path: str, start: int, ends_document: bool) -> Record:
    return Record(decode(path, start, part), where, ends_document)
