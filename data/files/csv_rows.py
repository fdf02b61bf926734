"""A .csv as records: the header names the fields of every row (RFC 4180); all values are texts."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from attrs import Factory, define, frozen

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


_VALUE = rb'(?:"(?:[^"]++|"")*+"\r?|[^",\n]*+)'
ROW = re.compile(_VALUE + rb"(?:," + _VALUE + rb")*+\n")
LAST_ROW = re.compile(_VALUE + rb"(?:," + _VALUE + rb")*+\Z")
"""The beginning of one, or one at the end of a file that does not end in a line end."""
OPEN_ROW = re.compile(rb"(?:" + _VALUE + rb',)*+"(?:[^"]++|"")*+"?\Z')
"""A row whose last value is in quotes that have not been closed yet."""


@define
class RowCutter:
    """A line end ends a row, unless it stands in a quoted value. A row with a quote out of place
    ends with its line: it must not take further ones along. So where the file ends in a value whose
    quotes were never closed, the line that opened them is a row by itself."""

    blank: bytes = LINE_ENDS
    line: int = 1
    _ends: list[int] = Factory(list)
    """Of the rows in the block that `whole_rows` gave last."""

    def whole_rows(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The same bytes in blocks of whole rows. Of what is longer than a record may be, blocks
        without an end."""
        held = b""
        for chunk in chunks:
            held += chunk
            self._ends = _row_ends(held, last=False)
            if self._ends or (len(held) > LONGEST_RECORD and b"\n" not in held):
                stop = self._ends[-1] if self._ends else len(held)
                block, held = held[:stop], held[stop:]
                yield block
        if held:
            self._ends = _row_ends(held, last=True)
            yield held

    def __call__(self, chunk: bytes) -> tuple[np.ndarray, np.ndarray]:
        content = np.frombuffer(chunk, np.uint8)
        breaks = np.flatnonzero(content == ord("\n"))
        ends = np.array(self._ends, np.int64)
        following = np.searchsorted(breaks, ends) + self.line
        self.line += len(breaks)
        return ends, following

    def finish(self) -> bool:
        return True


def _row_ends(content: bytes, last: bool) -> list[int]:
    """Where rows end in bytes that begin with a row; `last`: no more bytes come."""
    if b'"' not in content:
        return (np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1).tolist()
    ends, place = [], 0
    while place < len(content):
        if found := ROW.match(content, place):
            place = found.end()
        else:
            may_go_on = not last and len(content) - place <= LONGEST_RECORD
            stop = content.find(b"\n", place) + 1
            sound = (may_go_on or last) and LAST_ROW.match(content, place)
            if not stop or sound or (may_go_on and OPEN_ROW.match(content, place)):
                break
            place = stop
        ends.append(place)
    return ends


def csv_file(chunks: Iterator[bytes], name: str, keys: Sequence[str]) -> Layout:
    """Reads the header. `keys`: the columns wanted; DataError where there is none of them."""
    begin, chunks = without_mark(chunks, name)
    cutter, line, header = RowCutter(), 1, b""
    blocks = cutter.whole_rows(chunks)
    for block in blocks:
        ends, following = cutter(block)
        if not len(ends):
            if len(block) > LONGEST_RECORD:
                raise too_long(f"{name}, the header", len(block))
            ends, following = np.array([len(block)]), np.array([line + 1])
        start = 0
        for i, end in enumerate(ends.tolist()):
            header = block[start:end]
            if header.strip(LINE_ENDS):
                parse = Row(_names(header, name, keys))
                line, rest = int(following[i]), block[end:]
                body = RowCutter(line=line)
                chunks = body.whole_rows(put_back(rest, blocks))
                return Layout(chunks, begin + end, line, body, Syntax("line", parse))
            start = end
        begin, line = begin + len(block), int(following[-1])
    return Layout(iter(()), begin, line, RowCutter(line=line), Syntax("line", Row(())))


def _names(header: bytes, name: str, keys: Sequence[str]) -> tuple[str, ...]:
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
