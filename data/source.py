"""Where samples come from: the files a path names, as one sequence of records."""

import glob
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from attrs import field, frozen

from omnistep.data.errors import DataError
from omnistep.data.files.cache import CODECS
from omnistep.data.files.formats import ENDINGS, ending_of, form_of, index_file, stream_file
from omnistep.data.files.records import Reader, Record, Unread
from omnistep.data.files.text import TextFile

BESIDE_ARROW = ("dataset_info.json", "state.json")
"""What Hugging Face `datasets` writes beside its .arrow files: not data."""

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

    paths: tuple[str, ...]
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
        file = self._file_of(index)
        return self.readers[file][index - self.starts[file]]

    def path_of(self, index: int) -> str:
        """The file that record `index` is in."""
        return self.paths[self._file_of(index)]

    def _file_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return bisect_right(self.starts, index) - 1


@frozen
class FileStream:
    """Several files to be read from first to last record, without an index."""

    paths: tuple[str, ...]
    keys: tuple[str, ...]
    beside: tuple[str, ...] = ()

    @property
    def files(self) -> int:
        return len(self.paths)

    @property
    def only_text(self) -> bool:
        """Whether all records are parts of a .txt."""
        return all(form_of(path)[0] == ".txt" for path in self.paths)

    def open(self, file: int) -> Iterator[Unread]:
        """The records of one of the files; see formats.stream_file."""
        return stream_file(self.paths[file], self.keys, self.beside)


def open_source(
    path: str,
    keys: str | Sequence[str] = ("content_split",),
    *,
    beside: Sequence[str] = (),
    argument: str = "data.train_path",
) -> Files:
    """Indexes the files that `path` names; their content stays on disk.

    `path`: a file, a directory (the data files directly in it), a glob, or a comma-separated
    list of these; kinds may be mixed. Directories and globs are sorted by name; a file named
    twice is read once. `keys`: the fields wanted of each record, the first present wins; `beside`:
    columns that are read with them where there are any.
    `argument`: where `path` was given, for errors. Raises DataError: nothing there, an ending
    that cannot be read, no records.
    """
    keys = key_names(keys)
    paths = readable_files(path, argument=argument)
    readers = tuple(index_file(name, keys, beside) for name in paths)
    starts = tuple(accumulate((len(reader) for reader in readers), initial=0))
    if starts[-1] == 0:
        names = ", ".join(paths[:5]) + (", …" if len(paths) > 5 else "")
        raise DataError(f"{argument} {path!r}: the data is empty, no record in {names}")
    return Files(tuple(paths), readers, starts, sum(Path(name).stat().st_size for name in paths))


def open_stream(
    path: str,
    keys: str | Sequence[str] = ("content_split",),
    *,
    beside: Sequence[str] = (),
    argument: str = "data.train_path",
) -> FileStream:
    """The files that `path` names, not opened yet; arguments and errors as for `open_source`.

    Whether they hold any record only reading them shows.
    """
    paths = tuple(readable_files(path, argument=argument))
    return FileStream(paths, key_names(keys), tuple(beside))


def key_names(keys: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (keys,) if isinstance(keys, str) else tuple(keys)


def readable_files(path: str, *, argument: str) -> list[str]:
    """The files that `path` names. DataError: one has an ending that cannot be read."""
    paths = find_files(path, argument=argument)
    for name in paths:
        if ending_of(name) is None:
            ending = Path(name).suffix
            if ending.lower() in CODECS:
                ending = Path(name).with_suffix("").suffix + ending
            raise DataError(f"{name}: cannot read a file ending in {ending!r}; {_allowed()}")
    return paths


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
        known = [file for file in files if ending_of(file)]
        if any(file.endswith(".arrow") for file in known):
            known = [file for file in known if Path(file).name not in BESIDE_ARROW]
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
