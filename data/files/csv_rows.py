"""A .csv as records: the header names the fields of every row (RFC 4180); all values are texts."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from attrs import define, frozen

from omnistep.data.errors import DataError
from omnistep.data.files.records import LONGEST_RECORD, put_back, too_long, without_mark
from omnistep.data.files.spans import Layout, Syntax

LINE_ENDS = b"\r\n"
# A value, and the comma or the end behind it.
FIELD = re.compile(r'(?:"((?:[^"]++|"")*+)"|([^",\n]*+))(,|\Z)')


def fields(text: str) -> list[str]:
    """The values of a row, its line end taken off. ValueError: a quote or line end out of place.

    Not the csv module: its limit on a field's length is a global of the process, and it takes
    a quote in the middle of a value for text, where the cut between rows takes it for a quote.
    """
    values, place, more = [], 0, ","
    while more:
        match = FIELD.match(text, place)
        if match is None:
            raise ValueError(
                f"not a row of CSV from {text[place : place + 40]!r} on: a value that holds a "
                'quote, comma or line break stands in quotes, each quote in it doubled: "a ""b"""'
            )
        quoted, plain, more = match.groups()
        values.append(plain if quoted is None else quoted.replace('""', '"'))
        place = match.end()
    return values


@frozen
class Row:
    """Text of a row → its fields by name."""

    names: tuple[str, ...]

    def __call__(self, text: str) -> dict[str, str]:
        values = fields(text.rstrip("\r\n"))
        if len(values) != len(self.names):
            raise ValueError(
                f"the row has {len(values)} fields, the header {len(self.names)}: "
                f"{list(self.names)}"
            )
        return dict(zip(self.names, values, strict=True))


@define
class RowCutter:
    """A line end ends a row where the number of quotes before it is even."""

    blank: bytes = LINE_ENDS
    line: int = 1
    in_quotes: bool = False

    def __call__(self, chunk: bytes) -> tuple[np.ndarray, np.ndarray]:
        content = np.frombuffer(chunk, np.uint8)
        breaks = np.flatnonzero(content == ord("\n"))
        quotes = np.flatnonzero(content == ord('"'))
        before = np.searchsorted(quotes, breaks) + self.in_quotes
        outside = np.flatnonzero(before % 2 == 0)
        following = outside + (self.line + 1)
        self.line += len(breaks)
        self.in_quotes = (len(quotes) + self.in_quotes) % 2 == 1
        return breaks[outside] + 1, following

    def finish(self) -> bool:
        return True


def csv_file(chunks: Iterator[bytes], name: str, keys: Sequence[str]) -> Layout:
    """Reads the header. `keys`: the columns wanted; DataError where there is none of them."""
    begin, chunks = without_mark(chunks, name)
    line, held = 1, b""
    while True:
        cutter, chunk = RowCutter(), next(chunks, b"")
        held += chunk
        ends, following = cutter(held)
        if len(ends) or not chunk:
            end = int(ends[0]) if len(ends) else len(held)
            lines = int(following[0]) - 1 if len(ends) else 1
            header, held = held[:end], held[end:]
            begin, line = begin + end, line + lines
            if header.strip(LINE_ENDS) or not held:
                break
            chunks = put_back(held, chunks)
            held = b""
        elif len(held) > LONGEST_RECORD:
            raise too_long(f"{name}, the header", len(held))
    parse = Row(_names(header, name, keys))
    return Layout(put_back(held, chunks), begin, line, RowCutter(line=line), Syntax("line", parse))


def _names(header: bytes, name: str, keys: Sequence[str]) -> tuple[str, ...]:
    if not header.strip(LINE_ENDS):
        return ()  # an empty file: no header, no rows
    try:
        names = tuple(fields(header.decode("utf-8").rstrip("\r\n")))
    except ValueError as error:
        raise DataError(f"{name}: its first line is no header ({error})") from error
    if any("\r" in field for field in names):
        raise DataError(
            f"{name}: its lines end in a carriage return alone; a line of CSV ends in \\n or "
            "\\r\\n. Convert it, e.g. `tr '\\r' '\\n'`"
        )
    twice = sorted({field for field in names if names.count(field) > 1})
    if twice:
        raise DataError(f"{name}: its header names {twice} more than once")
    if not set(keys) & set(names):
        raise DataError(
            f"{name} has none of the columns {list(keys)} (data.text_keys); its header has "
            f"{list(names)}"
        )
    return names
