"""Where samples come from: the files a path names, as one sequence of records."""

import glob
import json
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from attrs import field, frozen

from omnistep.data.errors import DataError
from omnistep.data.files.cache import CODECS
from omnistep.data.files.formats import ENDINGS, ending_of, form_of, index_file, stream_file
from omnistep.data.files.records import Reader, Record, Unread, check_size
from omnistep.data.files.text import TextFile

STATE, SPLITS = "state.json", "dataset_dict.json"
"""What save_to_disk of Hugging Face `datasets` writes into the folder of a Dataset, and into that
of a DatasetDict, which has a folder for each split."""
BESIDE_ARROW = ("dataset_info.json", STATE)
"""Not data, beside .arrow files."""

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
    left_out: tuple[str, ...] = ()
    """Names of files in the directories that are not read."""

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
    left_out: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    """Bytes of each file when they were found."""

    @property
    def files(self) -> int:
        return len(self.paths)

    @property
    def only_text(self) -> bool:
        """Whether all records are parts of a .txt."""
        return all(form_of(path)[0] == ".txt" for path in self.paths)

    def open(self, file: int) -> Iterator[Unread]:
        """Opens the records of one of the files; see formats.stream_file. Raises DataError where it
        has lost bytes."""
        check_size(self.paths[file], self.sizes[file])
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
    paths, left_out = readable_files(path, argument=argument)
    readers = tuple(index_file(name, keys, beside) for name in paths)
    starts = tuple(accumulate((len(reader) for reader in readers), initial=0))
    if starts[-1] == 0:
        names = ", ".join(paths[:5]) + (", …" if len(paths) > 5 else "")
        raise DataError(f"{argument} {path!r}: the data is empty, no record in {names}")
    return Files(tuple(paths), readers, starts, sum(_sizes(paths)), left_out)


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
    paths, left_out = readable_files(path, argument=argument)
    return FileStream(tuple(paths), key_names(keys), tuple(beside), left_out, _sizes(paths))


def _sizes(paths: Sequence[str]) -> tuple[int, ...]:
    return tuple(os.stat(path).st_size for path in paths)


def left_out_text(names: Sequence[str]) -> str:
    """Tells a person which files were left out; nothing where there are none."""
    if not names:
        return ""
    first = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"; left out of the folder: {first} ({len(names)})"


def key_names(keys: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (keys,) if isinstance(keys, str) else tuple(keys)


def readable_files(path: str, *, argument: str) -> tuple[list[str], tuple[str, ...]]:
    """Finds the files that `path` names, in reading order; and the names of those that were left
    out of directories. Raises DataError: there are none, or one of them can't be read."""
    left_out: list[str] = []
    paths = find_files(path, argument=argument, left_out=left_out)
    for name in paths:
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise DataError(f"{argument}: {name} is no file, it is {_kind(name)}; {_allowed()}")
        if ending_of(name) is None:
            ending = Path(name).suffix
            if ending.lower() in CODECS:
                ending = Path(name).with_suffix("").suffix + ending
            raise DataError(f"{name}: cannot read a file ending in {ending!r}; {_allowed()}")
    return paths, tuple(left_out)


def find_files(
    path: str, *, argument: str = "data.train_path", left_out: list[str] | None = None
) -> list[str]:
    """Finds the files that `path` names, in reading order. `left_out` is given the names of those
    in directories that are not data. Raises DataError where there are none."""
    whole = Path(path).expanduser()
    parts = [path] if whole.exists() else [part.strip() for part in path.split(",")]
    aside: list[str] = [] if left_out is None else left_out
    found = [file for part in parts if part for file in _expand(part, argument, aside)]
    if not found:
        raise DataError(f"{argument} {path!r} names nothing; {_allowed()}")
    return list(dict.fromkeys(found))


def _expand(part: str, argument: str, left_out: list[str]) -> list[str]:
    place = Path(part).expanduser()
    if place.is_dir():
        return _data_of(place, argument, left_out)
    if place.exists():
        return [str(place)]
    if place.is_symlink():
        raise DataError(f"{argument}: {part!r} is a link to {os.readlink(place)}, which is gone")
    matches = sorted(glob.glob(str(place), recursive=True))
    files = [match for match in matches if Path(match).is_file()]
    if not files:
        raise DataError(
            f"{argument}: nothing matches {part!r} (looked from {Path.cwd()}); {_allowed()}"
        )
    return files


def _data_of(folder: Path, argument: str, left_out: list[str]) -> list[str]:
    """The data files directly in a folder, sorted; those that `datasets` saved, as it wrote them.
    What is hidden, is no file or has another ending is left out."""
    names = sorted(os.listdir(folder))
    if SPLITS in names:
        splits = [str(name) for name in _read(folder / SPLITS).get("splits", ())]
        raise DataError(
            f"{argument}: {folder} holds a DatasetDict with the splits {', '.join(splits)}: give "
            f"the folder of one, such as {folder / (splits or ['train'])[0]}"
        )
    known = _saved(folder, names) if STATE in names else []
    if not known:
        known = [name for name in names if ending_of(name) and not name.startswith(".")]
        known = [name for name in known if (folder / name).is_file()]
        if any(name.endswith(".arrow") for name in known):
            known = [name for name in known if name not in BESIDE_ARROW]
        aside = (name for name in names if name not in (*known, *BESIDE_ARROW))
        left_out += [name for name in aside if not (folder / name).is_dir()]
    if not known:
        has = f" (it has {', '.join(names[:5])}{', …' * (len(names) > 5)})" if names else ""
        raise DataError(f"{argument}: the directory {str(folder)!r} has no data{has}; {_allowed()}")
    return [str(folder / name) for name in known]


def _saved(folder: Path, names: Sequence[str]) -> list[str]:
    """The files that state.json names; other .arrow files beside them are caches."""
    shards = _read(folder / STATE).get("_data_files")
    shards = shards if isinstance(shards, list) else []
    known = [str(shard.get("filename")) for shard in shards if isinstance(shard, dict)]
    if missing := sorted(set(known) - set(names)):
        raise DataError(f"{folder / STATE} names {', '.join(missing)}, which is not there")
    return known


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _kind(path: str) -> str:
    mode = os.stat(path).st_mode
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISDIR: "a directory"}
    return next((name for is_it, name in kinds.items() if is_it(mode)), "a device")


def _allowed() -> str:
    return f"give a file, directory, glob or comma-separated list of {', '.join(ENDINGS)}"
