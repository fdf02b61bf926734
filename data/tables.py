"""Parquet and Arrow files as records: a row each, of the wanted columns, decoded in groups."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from attrs import field

from omnistep.data.errors import DataError
from omnistep.data.readers import Record

GROUPS = 4
"""Groups of rows a process keeps decoded."""


@attrs.define(eq=False)
class Table:
    """Rows in groups: a Parquet file's row groups, an Arrow file's record batches."""

    path: str
    columns: tuple[str, ...]
    firsts: np.ndarray = field(repr=False)
    """int64 [groups + 1]: the number of rows before each group."""
    read: Callable[[str, int, tuple[str, ...]], Any] = field(repr=False)
    """(path, group, columns) → a pyarrow table or batch of them"""
    _decoded: OrderedDict[int, Any] = field(factory=OrderedDict, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.path, self.columns, self.firsts, self.read)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> Record:
        group = int(np.searchsorted(self.firsts, index, side="right")) - 1
        row = index - int(self.firsts[group])
        return self._record(self._group(group), row, index)

    def stream(self) -> Iterator[Callable[[], Record]]:
        """Every record, not decoded until it is called."""
        for group in range(len(self.firsts) - 1):
            rows = self.read(self.path, group, self.columns)
            first = int(self.firsts[group])
            for row in range(int(self.firsts[group + 1]) - first):
                yield lambda rows=rows, row=row, index=first + row: self._record(rows, row, index)

    def _record(self, rows: Any, row: int, index: int) -> Record:
        content = {name: rows.column(name)[row].as_py() for name in self.columns}
        return Record(content, f"{self.path}, row {index + 1}")

    def _group(self, group: int) -> Any:
        if group not in self._decoded:
            self._decoded[group] = self.read(self.path, group, self.columns)
            if len(self._decoded) > GROUPS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(group)
        return self._decoded[group]


def index_parquet(path: str, keys: Sequence[str]) -> Table:
    """Reads the footer. `keys`: the columns wanted; those the file lacks are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            present = file.schema_arrow.names
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    return Table(path, _columns(path, keys, present), np.cumsum([0, *groups]), _row_group)


def _row_group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        # One thread: the process is one of several workers.
        return file.read_row_group(group, columns=list(columns), use_threads=False)


def index_arrow(path: str, keys: Sequence[str]) -> Table:
    """Reads where the record batches are, of both formats; the rest stays mapped on disk."""
    import pyarrow as pa

    try:
        batches, names = _batches(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not an Arrow file: {error}") from error
    columns = _columns(path, keys, names)
    firsts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    return Table(path, columns, firsts, _Batches())


@attrs.define(eq=False)
class _Batches:
    """Record batches of the memory-mapped file, each process its own."""

    _found: Mapping[str, Any] = field(factory=dict, init=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Batches, ()

    def __call__(self, path: str, group: int, columns: tuple[str, ...]) -> Any:
        if path not in self._found:
            self._found = {path: _batches(path)[0]}
        return self._found[path][group].select(list(columns))


def _batches(path: str) -> tuple[list[Any], list[str]]:
    """No byte of the content is read: they point into the mapped file."""
    import pyarrow as pa

    mapped = pa.memory_map(path)
    try:
        file = pa.ipc.open_file(mapped)
        return [file.get_batch(i) for i in range(file.num_record_batches)], file.schema.names
    except pa.ArrowInvalid:  # not the file format; the stream format has no mark of its own
        mapped.seek(0)
        stream = pa.ipc.open_stream(mapped)
        return list(stream), stream.schema.names


def _columns(path: str, keys: Sequence[str], present: Sequence[str]) -> tuple[str, ...]:
    """Those of `keys` a file has, and `tools`, which belongs to a conversation."""
    columns = tuple(key for key in keys if key in present)
    if not columns:
        raise DataError(
            f"{path} has none of the columns {list(keys)} (data.text_keys); it has {present}"
        )
    return (*columns, *(key for key in ("tools",) if key in present and key not in columns))
