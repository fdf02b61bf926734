"""A .txt as records: one document, its records are successive parts of it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen

from omnistep.data.files.records import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    Record,
    Unread,
    check_encoding,
    not_utf8,
    read_bytes,
    without_mark,
)

TEXT_BYTES = 16 * 1024
LONGEST_TEXT_BYTES = 64 * 1024


@frozen(eq=False)
class TextFile:
    """The parts of a text, by random access."""

    path: str
    name: str
    """The file it was given as, where `path` is its decompressed copy."""
    starts: np.ndarray = field(repr=False)
    """int64 [records + 1]: byte offsets, the last is the file's size."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Record:
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        content = read_bytes(self.path, start, stop)
        try:
            return _record(self.name, index, content, index + 1 == len(self))
        except UnicodeDecodeError as error:
            line = _line_number(self.path, start + error.start)
            raise not_utf8(f"{self.name}, line {line}", start, error) from error


def _record(name: str, index: int, content: bytes, last: bool) -> Record:
    return Record(content.decode("utf-8"), f"{name}, part {index + 1}", last)


def _line_number(path: str, offset: int) -> int:
    """The line (from 1) the byte at `offset` is on. Reads the file up to there: for errors only."""
    lines = 1
    with open(path, "rb") as file:
        while offset > 0 and (part := file.read(min(CHUNK_BYTES, offset))):
            lines += part.count(b"\n")
            offset -= len(part)
    return lines


def index_text(
    path: str, name: str, part: int = TEXT_BYTES, longest: int = LONGEST_TEXT_BYTES
) -> TextFile:
    """Cuts at the first line end after every `part` bytes; reads only around the cuts.

    Where no line ends within `longest` bytes, the cut is there, between two characters.
    """
    size = Path(path).stat().st_size
    with open(path, "rb", buffering=4096) as file:
        head = file.read(256)
        check_encoding(head, name)
        start = 3 if head.startswith(BYTE_ORDER_MARK) else 0
        starts = [start] if start < size else []
        while start < size:
            # From the last byte of the smallest part, so that a line end there counts.
            file.seek(start + part - 1)
            rest = file.readline(longest - part + 1)
            start = min(start + part - 1 + len(rest), size)
            if start < size and not rest.endswith(b"\n"):
                start -= _bytes_of_cut_character(file, start)
            starts.append(start)
    return TextFile(path, name, np.array(starts or [0], np.int64))


def _bytes_of_cut_character(file: Any, offset: int) -> int:
    """How many bytes before `offset` belong to the character that goes on at `offset`."""
    file.seek(offset - 3)
    return _bytes_before_last(file.read(4))


def _bytes_before_last(around: bytes) -> int:
    """Of four bytes: how many before the last belong to the same character."""
    for back in range(4):
        if around[3 - back] & 0xC0 != 0x80:  # not a continuation byte: a character begins here
            return back
    return 0


def stream_text(
    chunks: Iterator[bytes],
    name: str,
    part: int = TEXT_BYTES,
    longest: int = LONGEST_TEXT_BYTES,
) -> Iterator[Unread]:
    """The same parts as `index_text` cuts, in one pass."""
    start, chunks = without_mark(chunks, name)
    line, index, held, place = 1, 0, b"", 0
    while True:
        # One byte more than the longest part: it says whether a character goes on there.
        while len(held) - place <= longest and (chunk := next(chunks, b"")):
            held, place = held[place:] + chunk, 0
        if place == len(held):
            return
        stop = held.find(b"\n", place + part - 1, place + longest) + 1
        if not stop:
            stop = min(place + longest, len(held))
            if stop < len(held):
                stop -= _bytes_before_last(held[stop - 3 : stop + 1])
        content = held[place:stop]
        yield partial(_part, name, index, content, stop == len(held), start, line)
        start, line, index = start + len(content), line + content.count(b"\n"), index + 1
        place = stop


def _part(name: str, index: int, content: bytes, last: bool, start: int, line: int) -> Record:
    try:
        return _record(name, index, content, last)
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise not_utf8(f"{name}, line {line}", start, error) from error
