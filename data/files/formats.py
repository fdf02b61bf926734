"""Which function reads a file: by its ending, at random or as a stream."""

from collections.abc import Iterator, Sequence
from functools import partial

from omnistep.data.files.cache import CODECS, cached, decompressed
from omnistep.data.files.columns import index_arrow, index_parquet, stream_arrow, stream_parquet
from omnistep.data.files.csv_rows import csv_file
from omnistep.data.files.json_records import json_file, json_lines
from omnistep.data.files.records import Reader, Unread, chunks_of
from omnistep.data.files.spans import Prepare, index_spans, stream_spans
from omnistep.data.files.text import index_text, stream_text

PLAIN = (".txt", ".jsonl", ".ndjson", ".json", ".csv")
ENDINGS = (*PLAIN, ".parquet", ".arrow", *(f"{end}{codec}" for codec in CODECS for end in PLAIN))


def ending_of(path: str) -> str | None:
    """Which of ENDINGS a path has."""
    return next((ending for ending in ENDINGS if path.lower().endswith(ending)), None)


def index_file(path: str, keys: Sequence[str], beside: Sequence[str] = ()) -> Reader:
    """Random access to the records of a file whose ending is one of ENDINGS.

    `keys`: the fields wanted, of which files with columns must have one; `beside`: columns that are
    read where there are any. A compressed file is decompressed into the cache first. DataError: the
    file as a whole cannot be read.
    """
    form, codec = form_of(path)
    if form == ".parquet":
        return index_parquet(path, keys, beside)
    if form == ".arrow":
        return index_arrow(path, keys, beside)
    plain = cached(path) if codec else path
    if form == ".txt":
        return index_text(plain, path)
    return index_spans(plain, path, _prepare(form, keys))


def stream_file(path: str, keys: Sequence[str], beside: Sequence[str] = ()) -> Iterator[Unread]:
    """The same records in the same order, without an index or the cache.

    Each is parsed when it is called, so leaving it out is cheap, and a bad one raises its
    DataError then. What the iterator itself raises says that the file as a whole is broken.
    A row of a file with columns holds on to its neighbours until it is parsed.
    """
    form, codec = form_of(path)
    if form == ".parquet":
        return stream_parquet(path, keys, beside)
    if form == ".arrow":
        return stream_arrow(path, keys, beside)
    chunks = decompressed(path) if codec else chunks_of(path)
    if form == ".txt":
        return stream_text(chunks, path)
    return stream_spans(chunks, path, _prepare(form, keys))


def form_of(path: str) -> tuple[str, str]:
    """The ending without compression, and the compression's (or nothing)."""
    ending = ending_of(path)
    assert ending is not None, path
    codec = next((codec for codec in CODECS if ending.endswith(codec)), "")
    return ending.removesuffix(codec), codec


def _prepare(form: str, keys: Sequence[str]) -> Prepare:
    match form:
        case ".jsonl" | ".ndjson":
            return json_lines
        case ".json":
            return json_file
        case _:
            return partial(csv_file, keys=keys)
