"""Where samples come from: the files a path names, as one sequence of records."""

import glob
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from attrs import field, frozen

from omnistep.data.archives import COMPRESSIONS, in_cache, is_array
from omnistep.data.errors import DataError
from omnistep.data.file_stream import Unread, stream_file
from omnistep.data.readers import (
    Reader,
    Record,
    TextFile,
    index_csv,
    index_json_lines,
    index_text,
)
from omnistep.data.tables import index_arrow, index_parquet

ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
COMPRESSED = (".txt", ".jsonl", ".json", ".csv")
"""Formats that may be compressed too, as in .jsonl.gz."""

BLOCK_SAMPLES = 64
"""Samples that are packed together, unless the source knows better: enough to fill rows well."""
BLOCK_PARTS = 16
"""The same for the 16 KiB parts of a .txt: some 80,000 tokens, a third of a second's work."""


class Source(Protocol):
    """Random access to samples. Anything with these two methods, and picklable, will do."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


@frozen(eq=False)
class Files:
    """The records of several files, one file after another."""

    readers: tuple[Reader, ...] = field(repr=False)
    starts: tuple[int, ...] = field(repr=False)
    """Records before each file, and the total."""
    bytes: int
    """of all files"""

    @property
    def block_samples(self) -> int:
        """Samples of a block: a number that keeps its work short and its rows full."""
        text = all(isinstance(reader, TextFile) for reader in self.readers)
        return BLOCK_PARTS if text else BLOCK_SAMPLES

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = bisect_right(self.starts, index) - 1
        return self.readers[file][index - self.starts[file]]


def open_source(
    path: str,
    keys: str | Sequence[str] = ("content_split",),
    *,
    argument: str = "data.train_path",
) -> Files:
    """Indexes the files that `path` names; their content stays on disk.

    `path`: a file, a directory (the data files directly in it), a glob, or a comma-separated
    list of these; kinds may be mixed. Directories and globs are sorted by name; a file named
    twice is read once. Compressed files and JSON arrays are copied to a cache. `keys`: the fields
    wanted of each record, the first present wins.
    `argument`: where `path` was given, for errors. Raises DataError: nothing there, an ending
    that cannot be read, no records.
    """
    keys = key_names(keys)
    paths = find_files(path, argument=argument)
    readers = [_open(name, keys) for name in paths]
    starts = tuple(accumulate((len(reader) for reader in readers), initial=0))
    if starts[-1] == 0:
        raise _empty(argument, path, paths)
    return Files(tuple(readers), starts, sum(Path(name).stat().st_size for name in paths))


def _open(path: str, keys: tuple[str, ...]) -> Reader:
    kind, compressed = kind_of(path)
    if kind == ".parquet":
        return index_parquet(path, keys)
    if kind == ".arrow":
        return index_arrow(path, keys)
    listed = kind == ".json" and is_array(path)
    plain = in_cache(path, array=listed) if compressed or listed else path
    if kind == ".txt":
        return index_text(plain, path)
    if kind == ".csv":
        return index_csv(plain, path)
    return index_json_lines(plain, path, "item" if listed else "line")


@frozen(eq=False)
class FileStream:
    """The records of several files, each file from the front."""

    paths: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def files(self) -> int:
        return len(self.paths)

    @property
    def only_text(self) -> bool:
        return all(kind_of(path)[0] == ".txt" for path in self.paths)

    def open(self, file: int) -> Iterator[Unread]:
        path = self.paths[file]
        return stream_file(path, kind_of(path)[0], self.keys)


def open_stream(
    path: str, keys: str | Sequence[str], *, argument: str = "data.train_path"
) -> FileStream:
    """The same files as open_source's, none of them read yet."""
    return FileStream(tuple(find_files(path, argument=argument)), key_names(keys))


def kind_of(path: str) -> tuple[str, bool]:
    """A file's format by its ending, and whether it is compressed. Raises DataError: unknown."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2:-1] if compressed else suffixes[-1:]
    if not kind or kind[0] not in (COMPRESSED if compressed else ENDINGS):
        raise DataError(f"{path}: cannot read a file of this ending; {_allowed()}")
    return kind[0], compressed


def _known(path: Path) -> bool:
    try:
        return bool(kind_of(str(path)))
    except DataError:
        return False


def _empty(argument: str, path: str, paths: Sequence[str]) -> DataError:
    names = ", ".join(paths[:5]) + (", …" if len(paths) > 5 else "")
    return DataError(f"{argument} {path!r}: the data is empty, no record in {names}")


def key_names(keys: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (keys,) if isinstance(keys, str) else tuple(keys)


def find_files(path: str, *, argument: str = "data.train_path") -> list[str]:
    """The files that `path` names, in reading order."""
    whole = Path(path).expanduser()
    parts = [path] if whole.exists() else [part.strip() for part in path.split(",")]
    found = [file for part in parts if part for file in _expand(part, argument)]
    if not found:
        raise DataError(f"{argument} {path!r} names nothing; {_allowed()}")
    return list(dict.fromkeys(found))


def _expand(part: str, argument: str) -> list[str]:
    place = Path(part).expanduser()
    if place.is_dir():
        known = sorted(str(file) for file in place.iterdir() if file.is_file() and _known(file))
        if not known:
            raise DataError(f"{argument}: the directory {part!r} has no data; {_allowed()}")
        return known
    if place.exists():
        return [str(place)]
    matches = sorted(glob.glob(str(place), recursive=True))
    files = [match for match in matches if Path(match).is_file()]
    if not files:
        raise DataError(
            f"{argument}: nothing matches {part!r} (looked from {Path.cwd()}); {_allowed()}"
        )
    return files


def _allowed() -> str:
    return (
        f"give a file, directory, glob or comma-separated list of {', '.join(ENDINGS)}; "
        f"{', '.join(COMPRESSED)} also as .gz or .zst"
    )
