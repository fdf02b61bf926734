"""Files whose records are successive spans of bytes: cut in one pass, then read one by one.

The pass (`cut`) is the same for random access, which keeps the offsets, and for streaming,
which keeps the bytes until the record is asked for. A format is a `Cutter`, which finds where
records end, and a `Syntax`, which reads the bytes of one.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from os.path import dirname
from typing import Any, Protocol

import numpy as np
from attrs import field, frozen

from omnistep.data.errors import DataError
from omnistep.data.files.records import (
    LONGEST_RECORD,
    Record,
    Unread,
    chunks_of,
    not_utf8,
    read_bytes,
    too_long,
)


class Cutter(Protocol):
    """Finds where records end. It keeps what it must know of the bytes before: for one pass."""

    blank: bytes
    """A span of only these bytes is no record."""

    def __call__(self, chunk: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The next bytes: the ends of records in them, and the number of the line (or item)
        after each. DataError: the file as a whole is broken here."""
        ...

    def finish(self) -> bool:
        """No more bytes come: may what is left be a record? DataError: the file is cut off."""
        ...


@frozen
class Syntax:
    """How the bytes of one record are read."""

    unit: str
    """What records are numbered by: line or item."""
    parse: Callable[[str], Mapping[str, Any]]
    """Picklable. ValueError: what is wrong with the record."""
    separator: int = 0
    """Bytes at the end of a span that are not the record's."""

    def where(self, name: str, number: int) -> str:
        """File and line or item."""
        return f"{name}, {self.unit} {number}"

    def read(self, name: str, number: int, offset: int, content: bytes) -> Record:
        """The record whose bytes stand at `offset`, or its DataError."""
        where = f"{name}, {self.unit} {number}"
        try:
            return Record(self.parse(content.decode("utf-8")), where, folder=dirname(name))
        except UnicodeDecodeError as error:
            raise not_utf8(where, offset, error) from error
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error


@frozen(eq=False)
class Layout:
    """A file that has been opened up to its first record."""

    chunks: Iterator[bytes]
    begin: int
    """The offset at which they begin."""
    first: int
    """The number of the line (or item) they begin with."""
    cutter: Cutter
    syntax: Syntax


Prepare = Callable[[Iterator[bytes], str], Layout]
"""Reads a file's head: (its bytes, its name for errors) → Layout."""


@frozen(eq=False)
class Cut:
    """The records that end in one chunk."""

    starts: np.ndarray
    """int64 [records]: offsets in the file."""
    stops: np.ndarray
    """int64 [records]"""
    numbers: np.ndarray
    """int64 [records]: the line (or item) each begins with."""
    content: bytes
    offset: int
    """Where `content` begins in the file: after the start of a record too long to be kept."""


def cut(layout: Layout) -> Iterator[Cut]:
    """The records of a file, a chunk at a time. DataError: the file is broken."""
    held: list[bytes] = []  # the bytes of the record begun, unless they are too many
    kept, start, offset = 0, layout.begin, layout.begin
    number = layout.first
    cutter = layout.cutter
    for chunk in layout.chunks:
        ends, following = cutter(chunk)
        if len(ends):
            content = b"".join([*held, chunk])
            stops = ends + offset
            starts = np.concatenate([[start], stops[:-1]])
            numbers = np.concatenate([[number], following[:-1]])
            yield _filled(Cut(starts, stops, numbers, content, offset - kept), cutter.blank)
            start, number = int(stops[-1]), int(following[-1])
            held, kept = [], 0
            chunk = chunk[int(ends[-1]) :]
            offset = start
        offset += len(chunk)
        if offset - start > LONGEST_RECORD:
            held, kept = [], 0
        elif chunk:
            held.append(chunk)
            kept += len(chunk)
    if cutter.finish() and offset > start:
        one = (np.array([value], np.int64) for value in (start, offset, number))
        yield _filled(Cut(*one, b"".join(held), offset - kept), cutter.blank)


def _filled(cut: Cut, blank: bytes) -> Cut:
    """Without the spans that are blank."""
    if not blank:
        return cut
    # A blank span begins with a blank: only those that do are looked at closely.
    array_of_bytes = np.frombuffer(cut.content, np.uint8)
    places = cut.starts - cut.offset
    table = np.zeros(256, bool)
    table[list(blank)] = True
    held = places >= 0
    begins_blank = np.zeros(len(places), bool)
    begins_blank[held] = table[array_of_bytes[places[held]]]
    looked_at = np.flatnonzero(begins_blank)
    if not len(looked_at):
        return cut
    keep = np.ones(len(places), bool)
    spans = zip(
        looked_at.tolist(),
        places[looked_at].tolist(),
        (cut.stops[looked_at] - cut.offset).tolist(),
        strict=True,
    )
    for i, start, stop in spans:
        keep[i] = cut.content[start:stop].strip(blank)
    return Cut(cut.starts[keep], cut.stops[keep], cut.numbers[keep], cut.content, cut.offset)


@frozen(eq=False)
class Spans:
    """Random access to a file of spans."""

    path: str
    name: str
    """The file it was given as, where `path` is its decompressed copy."""
    syntax: Syntax
    starts: np.ndarray = field(repr=False)
    """int64 [records + 1]: byte offsets; the last is where the last record stops."""
    jumps: np.ndarray = field(repr=False)
    """int64 [jumps]: the records whose line (or item) is not the one after its predecessor's."""
    numbers: np.ndarray = field(repr=False)
    """int64 [jumps]: the lines (or items) of these."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Record:
        start, stop = self.starts[index : index + 2].tolist()
        jump = int(self.jumps.searchsorted(index, side="right")) - 1
        number = index + int(self.numbers[jump] - self.jumps[jump])
        if stop - start > LONGEST_RECORD:
            raise too_long(self.syntax.where(self.name, number), stop - start)
        content = read_bytes(self.path, start, stop - self.syntax.separator)
        return self.syntax.read(self.name, number, start, content)


def index_spans(path: str, name: str, prepare: Prepare) -> Spans:
    """One pass over the file. Holds a chunk and the index, which grows in place."""
    layout = prepare(chunks_of(path), name)
    starts, jumps, numbers = array("q"), array("q"), array("q")
    stop, number = layout.begin, -1
    for part in cut(layout):
        if not len(part.starts):
            continue
        jumped = np.flatnonzero(np.diff(part.numbers, prepend=number) != 1)
        jumps.frombytes((jumped + len(starts)).tobytes())
        numbers.frombytes(part.numbers[jumped].tobytes())
        starts.frombytes(part.starts.tobytes())
        stop, number = int(part.stops[-1]), int(part.numbers[-1])
    starts.append(stop)
    arrays = (np.frombuffer(values, np.int64) for values in (starts, jumps, numbers))
    return Spans(path, name, layout.syntax, *arrays)


def stream_spans(chunks: Iterator[bytes], name: str, prepare: Prepare) -> Iterator[Unread]:
    """The same records, in one pass without an index."""
    layout = prepare(chunks, name)
    syntax = layout.syntax
    for part in cut(layout):
        content, offset, separator = part.content, part.offset, syntax.separator
        for start, stop, number in zip(
            part.starts.tolist(), part.stops.tolist(), part.numbers.tolist(), strict=True
        ):
            if stop - start > LONGEST_RECORD:
                yield partial(_raise_too_long, syntax.where(name, number), stop - start)
                continue
            span = content[start - offset : stop - separator - offset]
            yield partial(syntax.read, name, number, start, span)


def _raise_too_long(where: str, size: int) -> Record:
    raise too_long(where, size)
