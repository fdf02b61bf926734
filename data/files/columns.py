"""Parquet and Arrow files: a record a row, of the columns wanted.

Both come in groups of rows (row groups, record batches), which are decoded whole. An Arrow file
is memory-mapped: where it is not compressed, decoding a batch reads nothing.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from os.path import dirname
from typing import Any

import attrs
import numpy as np
from attrs import field, frozen

from omnistep.data.errors import DataError
from omnistep.data.files.records import (
    LONGEST_RECORD,
    Record,
    Unread,
    check_size,
    too_long,
    without_nulls,
)

GROUPS = 4
"""Groups of rows a process keeps decoded, of each file."""
STREAM_ROWS = 64
"""Rows decoded at once from a streamed Parquet file."""
ARROW_FILE = b"ARROW1"


@frozen(eq=False)
class Rows:
    """Decoded rows."""

    columns: dict[str, Any]
    check: bool
    """One of them may be too long."""
    folder: str
    """That of the file."""

    def record(self, row: int, where: str) -> Record:
        if self.check:
            size = sum(_size(column.slice(row, 1)) for column in self.columns.values())
            if size > LONGEST_RECORD:
                raise too_long(where, size)
        try:
            content = {name: without_nulls(col[row].as_py()) for name, col in self.columns.items()}
            return Record(content, where, folder=self.folder)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 ({error})") from error


def _rows(decoded: Any, names: tuple[str, ...], path: str) -> Rows:
    columns = {name: decoded.column(name) for name in names}
    check = sum(map(_longest, columns.values())) > LONGEST_RECORD
    return Rows(columns, check, dirname(path))


def _longest(column: Any) -> int:
    """Bytes that no value of a column has more than."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, size = column.type, column.nbytes
    if size <= LONGEST_RECORD // 8 or not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        return size
    return pc.max(pc.binary_length(column)).as_py() or 0  # reads no more than the offsets


def _size(cell: Any) -> int:
    """Bytes of a column of one row."""
    import pyarrow as pa

    kind = cell.type
    if pa.types.is_dictionary(kind):  # it would count all of the dictionary
        cell = cell.cast(kind.value_type)
    elif pa.types.is_string_view(kind):  # and this all of the buffers
        cell = cell.cast(pa.large_string())
    return cell.nbytes


@attrs.define(eq=False)
class Columns:
    """Random access to rows."""

    path: str
    columns: tuple[str, ...]
    firsts: np.ndarray = field(repr=False)
    """int64 [groups + 1]: the number of rows before each group."""
    decode: Callable[[int], Any] = field(repr=False)
    """Group → its table or record batch. Picklable."""
    size: int
    """Of the file, in bytes."""
    _decoded: OrderedDict[int, Rows] = field(factory=OrderedDict, init=False, repr=False)
    _sound: set[int] = field(factory=set, init=False, repr=False)
    """Groups that were validated in this process."""

    def __getstate__(self) -> tuple[Any, ...]:
        return self.path, self.columns, self.firsts, self.decode, self.size

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.path, self.columns, self.firsts, self.decode, self.size = state
        self._decoded, self._sound = OrderedDict(), set()

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> Record:
        group = int(self.firsts.searchsorted(index, side="right")) - 1
        row = index - int(self.firsts[group])
        where = f"{self.path}, row {index + 1}"
        check_size(self.path, self.size)  # to read a mapped file behind its end kills the process
        return self._group(group, where).record(row, where)

    def _group(self, group: int, where: str) -> Rows:
        if group not in self._decoded:
            with _broken(where):
                decoded = self.decode(group)
                if group not in self._sound:
                    _validate(decoded)
                    self._sound.add(group)
                self._decoded[group] = _rows(decoded, self.columns, self.path)
            if len(self._decoded) > GROUPS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(group)
        return self._decoded[group]


@contextmanager
def _broken(where: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (FileNotFoundError, DataError):
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{where}: cannot be decoded, the file is corrupt ({reason})") from error


def _validate(decoded: Any) -> None:
    """Arrow trusts the offsets and lengths that a file holds, and reads wherever they point.
    (Some 0.2 ms for a megabyte.)"""
    import pyarrow as pa

    for column in decoded.columns:
        for chunk in getattr(column, "chunks", [column]):
            try:
                chunk.validate(full=True)
            except pa.ArrowInvalid as error:
                if "UTF8" not in str(error):
                    raise
                _validate_as_bytes(chunk)  # a text that is no UTF-8 is its row's fault alone


def _validate_as_bytes(array: Any) -> None:
    """Validates all but that texts are UTF-8."""
    import pyarrow as pa

    kind = array.type
    array.validate()
    if pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            _validate_as_bytes(array.field(i))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lists = type(array).from_arrays(array.offsets, pa.nulls(len(array.values)))
        lists.validate(full=True)
        _validate_as_bytes(array.values)
    elif pa.types.is_string(kind):
        array.view(pa.binary()).validate(full=True)
    elif pa.types.is_large_string(kind):
        array.view(pa.large_binary()).validate(full=True)
    elif pa.types.is_string_view(kind):
        array.view(pa.binary_view()).validate(full=True)
    else:
        array.validate(full=True)


def _wanted(
    path: str, keys: Sequence[str], beside: Sequence[str], present: Sequence[str]
) -> tuple[str, ...]:
    """Those of `keys` a file has, and those of `beside`, which it need not have."""
    columns = tuple(key for key in keys if key in present)
    if not columns:
        raise DataError(
            f"{path} has none of the columns {list(keys)} (data.text_keys); it has {present}"
        )
    return (*columns, *(key for key in beside if key in present and key not in columns))


def _stream(path: str, columns: tuple[str, ...], groups: Iterator[Any]) -> Iterator[Unread]:
    before = 0
    while True:
        with _broken(f"{path}, after row {before}"):
            decoded = next(groups, None)
            if decoded is None:
                return
            _validate(decoded)
            rows = _rows(decoded, columns, path)
        for row in range(decoded.num_rows):
            yield partial(rows.record, row, f"{path}, row {before + row + 1}")
        before += decoded.num_rows


@frozen
class ParquetGroup:
    """Decodes a row group."""

    path: str
    columns: tuple[str, ...]

    def __call__(self, group: int) -> Any:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            # One thread: the process is one of several workers.
            return file.read_row_group(group, columns=list(self.columns), use_threads=False)


def _open_parquet(path: str, **options: Any) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, **options)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def index_parquet(path: str, keys: Sequence[str], beside: Sequence[str] = ()) -> Columns:
    """Reads the footer. `keys`: the columns wanted, of which it must have one; `beside`: those
    that are read where there are any."""
    with _open_parquet(path) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        columns = _wanted(path, keys, beside, file.schema_arrow.names)
    size = os.stat(path).st_size
    return Columns(path, columns, np.cumsum([0, *groups]), ParquetGroup(path, columns), size)


def stream_parquet(path: str, keys: Sequence[str], beside: Sequence[str] = ()) -> Iterator[Unread]:
    """The same rows. Holds a few pages of each column instead of row groups."""
    with _open_parquet(path, buffer_size=1 << 16) as file:
        columns = _wanted(path, keys, beside, file.schema_arrow.names)
        batches = file.iter_batches(STREAM_ROWS, columns=list(columns), use_threads=False)
        yield from _stream(path, columns, batches)


@frozen
class ArrowBatch:
    """Decodes a record batch of the file format, which has an index of its own."""

    path: str
    columns: tuple[str, ...]

    def __call__(self, group: int) -> Any:
        import pyarrow as pa

        with pa.memory_map(self.path) as file:
            return pa.ipc.open_file(file).get_batch(group).select(list(self.columns))


@frozen(eq=False)
class StreamedBatch:
    """Decodes a record batch of the stream format, from where it was found."""

    path: str
    columns: tuple[str, ...]
    schema: Any
    offsets: np.ndarray
    """int64 [batches]"""

    def __call__(self, group: int) -> Any:
        import pyarrow as pa

        with pa.memory_map(self.path) as file:
            file.seek(int(self.offsets[group]))
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), self.schema)
            return batch.select(list(self.columns))


@contextmanager
def _open_arrow(path: str) -> Iterator[tuple[Any, Any]]:
    """The memory-mapped file, and a reader of its batches in either format."""
    import pyarrow as pa

    with open(path, "rb") as file:
        indexed = file.read(len(ARROW_FILE)) == ARROW_FILE
    with pa.memory_map(path) as file:
        try:
            reader = pa.ipc.open_file(file) if indexed else pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} is not an Arrow file, neither of the file format nor of the stream "
                f"format: {error}"
            ) from error
        yield file, reader


def _batches(file: Any, reader: Any) -> Iterator[tuple[int, Any]]:
    """(where it stands, a record batch) one after another."""
    if hasattr(reader, "get_batch"):
        for group in range(reader.num_record_batches):
            yield 0, reader.get_batch(group)
        return
    while True:
        offset = file.tell()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        yield offset, batch


def index_arrow(path: str, keys: Sequence[str], beside: Sequence[str] = ()) -> Columns:
    """One pass over the batches' heads (over all of them where they are compressed)."""
    import pyarrow as pa

    with _open_arrow(path) as (file, reader):
        columns = _wanted(path, keys, beside, reader.schema.names)
        counts, offsets = [0], []
        with _broken(path):
            for offset, batch in _batches(file, reader):
                counts.append(batch.num_rows)
                offsets.append(offset)
        if hasattr(reader, "get_batch"):
            decode = ArrowBatch(path, columns)
        elif any(pa.types.is_dictionary(kind) for kind in reader.schema.types):
            raise DataError(
                f"{path}: Arrow's stream format with dictionary-encoded columns cannot be read at "
                "random. Write it in the file format or as Parquet, or set data.datasets_type to "
                "iterable"
            )
        else:
            decode = StreamedBatch(path, columns, reader.schema, np.array(offsets, np.int64))
        size = file.size()
    return Columns(path, columns, np.cumsum(counts), decode, size)


def stream_arrow(path: str, keys: Sequence[str], beside: Sequence[str] = ()) -> Iterator[Unread]:
    """The same rows, a batch at a time."""
    with _open_arrow(path) as (file, reader):
        columns = _wanted(path, keys, beside, reader.schema.names)
        yield from _stream(path, columns, _selected(path, columns, file, reader))


def _selected(path: str, columns: Sequence[str], file: Any, reader: Any) -> Iterator[Any]:
    for _, batch in _batches(file, reader):
        check_size(path, file.size())
        yield batch.select(list(columns))
