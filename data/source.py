"""Where samples come from: the files a path names, as one sequence of records."""

import glob
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from attrs import field, frozen

from omnistep.data.errors import DataError
from omnistep.data.readers import Reader, Record, TextFile, reader_of

ENDINGS = (".txt", ".jsonl", ".parquet")
LATER_ENDINGS = (".json", ".csv", ".arrow", ".gz", ".zst")
"""Formats of the contract that cannot be read yet: named in the error, never skipped."""


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
    twice is read once. `keys`: the fields wanted of each record, the first present wins.
    `argument`: where `path` was given, for errors. Raises DataError: nothing there, an ending
    that cannot be read, no records.
    """
    keys = key_names(keys)
    paths = find_files(path, argument=argument)
    readers = []
    for name in paths:
        index = reader_of(Path(name).suffix, keys)
        if index is None:
            raise DataError(_unreadable(name))
        readers.append(index(name))
    starts = tuple(accumulate((len(reader) for reader in readers), initial=0))
    if starts[-1] == 0:
        names = ", ".join(paths[:5]) + (", …" if len(paths) > 5 else "")
        raise DataError(f"{argument} {path!r}: the data is empty, no record in {names}")
    return Files(tuple(readers), starts)


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
        files = sorted(str(file) for file in place.iterdir() if file.is_file())
        known = [file for file in files if Path(file).suffix in ENDINGS + LATER_ENDINGS]
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
    return f"give a file, directory, glob or comma-separated list of {', '.join(ENDINGS)}"


def _unreadable(name: str) -> str:
    ending = Path(name).suffix
    if ending in (*LATER_ENDINGS, ".yaml"):
        return f"{name}: {ending} as data is not available yet; {_allowed()}"
    return f"{name}: cannot read a file ending in {ending!r}; {_allowed()}"
