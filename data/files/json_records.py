"""JSON lines, and a .json that is one array of objects: both cut without parsing."""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from attrs import define

from omnistep.data.errors import DataError
from omnistep.data.files.records import put_back, without_mark
from omnistep.data.files.spans import Layout, Syntax

SPACES = b" \t\r\n"
decode = json.JSONDecoder().decode
"""As json.loads, without its look at its arguments."""
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def json_object(text: str) -> dict[str, Any]:
    """One record. ValueError: not JSON, not an object, or no text that UTF-8 can hold."""
    try:
        content = decode(text)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", error)  # without the line: it counts from the record's own
        raise ValueError(f"not JSON ({why}): {text[:80].strip()!r}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"a JSON object is expected, this is a {kind}")
    if "\\" in text and ESCAPED_SURROGATE.search(text):
        try:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"{half} is half a character, its other half is missing") from error
    return content


@define
class LineCutter:
    """A record a line."""

    blank: bytes = SPACES
    line: int = 1

    def __call__(self, chunk: bytes) -> tuple[np.ndarray, np.ndarray]:
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + 1
        following = np.arange(self.line + 1, self.line + 1 + len(ends))
        self.line += len(ends)
        return ends, following

    def finish(self) -> bool:
        return True


def json_lines(chunks: Iterator[bytes], name: str) -> Layout:
    """A .jsonl: an object a line. Lines of spaces are no records."""
    begin, chunks = without_mark(chunks, name)
    return Layout(chunks, begin, 1, LineCutter(), Syntax("line", json_object))


def json_file(chunks: Iterator[bytes], name: str) -> Layout:
    """A .json: an array of objects, or JSON lines under another name."""
    begin, chunks = without_mark(chunks, name)
    spaces = b""
    for chunk in chunks:
        head = chunk.lstrip(SPACES)
        spaces += chunk[: len(chunk) - len(head)]
        if head:
            break
    else:
        return Layout(iter(()), begin, 1, LineCutter(), Syntax("line", json_object))
    if head[:1] == b"{":
        if head.partition(b"\n")[0].strip(SPACES) == b"{":
            raise _neither(name, "it is one object that spreads over several lines")
        whole = put_back(spaces + head, chunks)
        return Layout(whole, begin, 1, LineCutter(), Syntax("line", json_object))
    if head[:1] == b"[":
        begin += len(spaces) + 1
        syntax = Syntax("item", json_object, separator=1)
        return Layout(put_back(head[1:], chunks), begin, 1, ArrayCutter(name), syntax)
    raise _neither(name, f"it begins with {head[:20].decode('utf-8', 'replace')!r}")


def _neither(name: str, what: str) -> DataError:
    return DataError(
        f"{name}: {what}. A .json may be an array of objects, `[{{…}}, {{…}}]`, "
        "or hold one object on each line"
    )


COMMA, QUOTE, BACKSLASH, OPEN, CLOSE = 1, 2, 3, 4, 5
KINDS = bytearray(256)
for _characters, _kind in (
    (b",", COMMA), (b'"', QUOTE), (b"\\", BACKSLASH), (b"[{", OPEN), (b"]}", CLOSE),
):  # fmt: skip
    for _character in _characters:
        KINDS[_character] = _kind
STEPS = np.array([0, 0, 0, 0, 1, -1], np.int64)
"""By kind: what the character does to the depth."""


@define
class ArrayCutter:
    """The items of an array whose bracket is open: commas and the last bracket end them.

    Reads no more of JSON than strings and depth, so that a broken item is that item's error.
    """

    name: str
    """Of the file, for errors."""
    blank: bytes = b""
    item: int = 1
    depth: int = 1
    in_string: bool = False
    escaped: bool = False
    """The next byte stands behind a backslash that is not itself escaped."""
    empty: bool = True
    """Nothing but spaces so far."""

    def __call__(self, chunk: bytes) -> tuple[np.ndarray, np.ndarray]:
        nothing = np.zeros(0, np.int64)
        if self.depth == 0:
            self._check_after(chunk)
            return nothing, nothing
        kinds = np.frombuffer(bytearray(chunk.translate(KINDS)), np.uint8)
        self._drop_escaped(kinds)
        places = np.flatnonzero(kinds)
        kinds = kinds[places]
        quotes = kinds == QUOTE
        inside = (np.cumsum(quotes) + self.in_string) % 2 == 1
        places, kinds = places[~inside & ~quotes], kinds[~inside & ~quotes]
        if len(inside):
            self.in_string = bool(inside[-1])
        depths = self.depth + np.cumsum(STEPS[kinds])
        closing = np.flatnonzero(depths == 0)
        if len(closing):
            last = int(closing[0])
            self._check_after(chunk[int(places[last]) + 1 :])
            places, kinds, depths = places[: last + 1], kinds[: last + 1], depths[: last + 1]
        ends = places[((kinds == COMMA) & (depths == 1)) | (depths == 0)] + 1
        if len(depths):
            self.depth = int(depths[-1])
        if self.empty:
            self.empty = not chunk[: ends[0] - 1 if len(ends) else None].strip(SPACES)
            if self.empty and len(closing) and len(ends) == 1:  # `[ ]` has no items
                return nothing, nothing
            self.empty = self.empty and not len(ends)
        following = np.arange(self.item + 1, self.item + 1 + len(ends))
        self.item += len(ends)
        return ends, following

    def _drop_escaped(self, kinds: np.ndarray) -> None:
        """Sets to 0 the kind of every character behind an odd run of backslashes."""
        if self.escaped:
            kinds[0] = 0
        slashes = np.flatnonzero(kinds == BACKSLASH)
        self.escaped = False
        if not len(slashes):
            return
        first = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
        lengths = np.diff(first, append=len(slashes))
        behind = slashes[first] + lengths
        kinds[slashes] = 0
        behind = behind[lengths % 2 == 1]
        if len(behind) and behind[-1] == len(kinds):
            self.escaped = True
            behind = behind[:-1]
        kinds[behind] = 0

    def _check_after(self, rest: bytes) -> None:
        rest = rest.strip(SPACES)
        if rest:
            found = rest[:20].decode("utf-8", "replace")
            raise DataError(
                f"{self.name}: the array ends, but {found!r} follows. "
                "A .json may be one array of objects, or hold one object on each line"
            )

    def finish(self) -> bool:
        if self.depth > 0:
            raise DataError(
                f"{self.name}: the file ends within item {self.item} of its array: it is cut off, "
                "or a quote or bracket is missing"
            )
        return False
