"""Every format is the same records: at random, pickled, and as a stream."""

import csv
import gzip
import io
import json
import os
import pickle
import random
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistep.data.errors import DataError
from omnistep.data.files import records, spans
from omnistep.data.files.csv_rows import csv_file
from omnistep.data.files.formats import ENDINGS, index_file, stream_file
from omnistep.data.files.json_records import json_file, json_lines
from omnistep.data.files.text import index_text, stream_text

KEYS = ("text",)
FORMS = [ending for ending in ENDINGS if ".txt" not in ending]
RECORDS = [
    {"text": text * (1 + i % 3), "other": f"{i}"}
    for i, text in enumerate(
        ["plain", 'quoted "twice"', "comma, [brackets] {braces}", "two\nlines\r\n", "漢字 🙂 é"] * 9
        + ["back\\slash\\\\", '\\"', "", '"', " spaces "]
    )
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNISTEP_CACHE", str(tmp_path / "cache"))


def compressed(content: bytes, ending: str) -> bytes:
    """As two members or frames, of which a reader must not stop after the first."""
    half, codec = len(content) // 2, {"gz": "gzip", "zst": "zstd"}.get(ending.rpartition(".")[2])
    if codec is None:
        return content
    both = b""
    for part in (content[:half], content[half:]):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(part)
        both += sink.getvalue().to_pybytes()
    return both


def as_csv(rows: list[list[str]], end: str = "\r\n") -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=end).writerows(rows)
    return file.getvalue().encode()


def write(path: Path, records: list[dict[str, str]]) -> str:
    ending = next(ending for ending in ENDINGS if path.name.endswith(ending))
    table = pa.table({key: [r[key] for r in records] for key in ("text", "other")})
    match ending.split(".")[1]:
        case "txt":
            content = "\n".join(r["text"] for r in records)
        case "jsonl" | "ndjson":
            content = "\n".join(
                json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(records)
            )
        case "json":
            content = json.dumps(records, indent=1, ensure_ascii=False)
        case "csv":
            rows = [["text", "other"], *([r["text"], r["other"]] for r in records)]
            content = as_csv(rows).decode()
        case "parquet":
            pq.write_table(table, path, row_group_size=7)
            return str(path)
        case _:
            write_arrow(path, table)
            return str(path)
    path.write_bytes(compressed(content.encode(), ending))
    return str(path)


def write_arrow(path: Path, table: pa.Table, form: str = "stream", codec: str | None = None):
    new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with new(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=7)


def streamed(path, keys=KEYS):
    return [unread() for unread in stream_file(str(path), keys)]


def at_random(path, keys=KEYS):
    """In random order, from a pickled reader."""
    reader = pickle.loads(pickle.dumps(index_file(str(path), keys)))
    order = random.Random(0).sample(range(len(reader)), len(reader))
    records = {i: reader[i] for i in order}
    return [records[i] for i in range(len(reader))]


def outcomes(calls):
    """Each record, or the message of its error."""
    found = []
    for call in calls:
        try:
            found.append(call())
        except DataError as error:
            found.append(str(error))
    return found


def both(path, keys=KEYS, beside=()):
    """Outcomes at random, which must be those of the stream."""
    reader = index_file(str(path), keys, beside)
    found = outcomes([lambda i=i: reader[i] for i in range(len(reader))])
    assert outcomes(stream_file(str(path), keys, beside)) == found
    return found


@pytest.mark.parametrize("chunk", [13, records.CHUNK_BYTES])
@pytest.mark.parametrize("ending", FORMS)
def test_every_format_is_the_same_records(tmp_path, ending, chunk, monkeypatch):
    monkeypatch.setattr("omnistep.data.files.records.CHUNK_BYTES", chunk)
    monkeypatch.setattr("omnistep.data.files.cache.CHUNK_BYTES", chunk)
    path = write(tmp_path / f"a{ending}", RECORDS)
    records = at_random(path)
    columns = ending in (".parquet", ".arrow")
    expected = [{"text": r["text"]} for r in RECORDS] if columns else RECORDS
    assert [record.content for record in records] == expected
    assert streamed(path) == records
    assert all(record.where.startswith(f"{path}, ") for record in records)
    assert len({record.where for record in records}) == 50


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
def test_arrow_of_both_formats(tmp_path, form, codec):
    table = pa.table(
        {
            "other": pa.array([{"a": [i]} for i in range(50)]),
            "text": pa.array([r["text"] for r in RECORDS], pa.large_string()),
        }
    )
    path = tmp_path / "a.arrow"
    write_arrow(path, table, form, codec)
    records = at_random(path, ("text", "other"))
    assert [dict(r.content) for r in records] == [
        {"text": r["text"], "other": {"a": [i]}} for i, r in enumerate(RECORDS)
    ]
    assert [r.where for r in records][::49] == [f"{path}, row 1", f"{path}, row 50"]
    assert streamed(path, ("text", "other")) == records


def test_arrow_dictionaries(tmp_path):
    table = pa.table({"text": pa.array([r["text"] for r in RECORDS]).dictionary_encode()})
    write_arrow(tmp_path / "file.arrow", table, "file")
    records = at_random(tmp_path / "file.arrow")
    assert [r.content for r in records] == [{"text": r["text"]} for r in RECORDS]
    write_arrow(tmp_path / "stream.arrow", table)
    assert [r.content for r in streamed(tmp_path / "stream.arrow")] == [r.content for r in records]
    with pytest.raises(DataError, match=r"stream\.arrow: .*dictionary.*datasets_type to iterable"):
        index_file(str(tmp_path / "stream.arrow"), KEYS)


def test_arrow_as_hugging_face_writes_it(tmp_path):
    """The stream format with their metadata in the schema, and no more than one batch."""
    table = pa.table({"text": ["a", "b"]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": {"text": {"dtype": "string"}}}})}
    )
    write_arrow(tmp_path / "data-00000-of-00001.arrow", table)
    assert [r.content["text"] for r in at_random(tmp_path / "data-00000-of-00001.arrow")] == [
        "a",
        "b",
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["", "a", "é", "漢字", "🙂" * 9, "x" * 40, " "]), max_size=60),
    st.sampled_from(["\n", "\r\n", ""]),
    st.integers(1, 3),
    st.sampled_from([4, 50, 10**6]),
    st.booleans(),
)
def test_a_text_is_its_parts(tmp_path_factory, words, joint, size, chunk, mark):
    """Whatever the line lengths, the parts make the file, and lines are cut only if too long."""
    path = tmp_path_factory.mktemp("text") / "t.txt"
    text = joint.join(words)
    content = (records.BYTE_ORDER_MARK if mark else b"") + text.encode()
    path.write_bytes(content)
    small, longest = 16 * size, 64 * size
    file = index_text(str(path), "t.txt", small, longest)
    parts = [file[i] for i in range(len(file))]
    assert "".join(str(part.content) for part in parts) == text
    assert [part.ends_document for part in parts] == [False] * (len(parts) - 1) + [True] * bool(
        parts
    )
    for part in parts[:-1]:
        encoded = str(part.content).encode()
        assert longest - 4 < len(encoded) <= longest if encoded[-1:] != b"\n" else True
        assert small <= len(encoded) <= longest
        first_line_end = encoded.find(b"\n", small - 1)
        assert first_line_end in (-1, len(encoded) - 1)
    chunks = stream_text(pieces(content, chunk), "t.txt", small, longest)
    assert [unread() for unread in chunks] == parts


def pieces(content: bytes, size: int):
    return iter([content[i : i + size] for i in range(0, len(content), size)])


VALUES = st.text(st.sampled_from("ab\",\r\n é漢🙂\\'[]{}:"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), max_size=12)
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(3, 40),
    st.booleans(),
)
def test_csv_is_what_python_reads(tmp_path_factory, rows, end, chunk, cut_end):
    width = len(rows[0]) if rows else 2
    if end == "\n":  # the csv module leaves a \r alone unquoted, and then does not read it back
        rows = [[value.replace("\r", "") for value in row] for row in rows]
    header = [f'the "{i}"\n' for i in range(width)]
    content = as_csv([header, *rows], end)
    content = content.removesuffix(end.encode()) if cut_end else content
    expected = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(content)
    records = at_random(path, header)
    assert [r.content for r in records] == expected
    prepare = partial(csv_file, keys=header)
    stream = spans.stream_spans(pieces(content, chunk), str(path), prepare)
    assert [unread() for unread in stream] == records
    for record in records:  # the line is where the record begins
        line = int(record.where.rpartition(" ")[2])
        rest = b"\n".join(content.split(b"\n")[line - 1 :])
        assert next(csv.reader(io.StringIO(rest.decode(), newline=""))) == list(
            record.content.values()
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(VALUES, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(VALUES, JSON, max_size=3), max_size=8)


@settings(max_examples=150, deadline=None)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 2]), st.integers(1, 40), st.booleans())
def test_json_arrays_are_what_python_reads(tmp_path_factory, items, escape, indent, chunk, wide):
    text = json.dumps(items, ensure_ascii=escape, indent=indent)
    content = (f" \n{text}\r\n " if wide else text).encode()
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(content)
    records = at_random(path)
    assert [r.content for r in records] == items
    assert [r.where for r in records] == [f"{path}, item {i + 1}" for i in range(len(items))]
    stream = spans.stream_spans(pieces(content, max(chunk, 3)), str(path), json_file)
    assert [unread() for unread in stream] == records


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.dictionaries(VALUES, JSON, max_size=3) | st.sampled_from(["", " ", "\t\r"])),
    st.integers(3, 40),
)
def test_json_lines_are_what_python_reads(tmp_path_factory, items, chunk):
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    content = "\n".join(lines).encode()
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(content)
    records = at_random(path)
    kept = [(i + 1, item) for i, item in enumerate(items) if isinstance(item, dict)]
    assert [(r.where, r.content) for r in records] == [(f"{path}, line {n}", x) for n, x in kept]
    stream = spans.stream_spans(pieces(content, chunk), str(path), json_lines)
    assert [unread() for unread in stream] == records


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_byte_order_mark(tmp_path, ending):
    path = Path(write(tmp_path / f"a{ending}", RECORDS[:3]))
    path.write_bytes(records.BYTE_ORDER_MARK + path.read_bytes())
    assert [r.content for r in at_random(path)] == RECORDS[:3]
    assert streamed(path) == at_random(path)


def test_json_lines_under_another_name(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n  {"text": "a"}\n{"text": "b"}\n')
    assert [(r.where, r.content) for r in both(path)] == [
        (f"{path}, line 2", {"text": "a"}),
        (f"{path}, line 3", {"text": "b"}),
    ]
    path.write_text(" \n ")
    assert both(path) == []
    path.write_text(" [ ] ")
    assert both(path) == []


def test_skipping_parses_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", RECORDS)
    monkeypatch.setattr("omnistep.data.files.json_records.decode", None)
    assert len(list(stream_file(path, KEYS))) == 50


def test_gzip_of_the_standard_library(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in RECORDS)
    assert [r.content for r in both(path)] == RECORDS


@pytest.mark.parametrize("ending", [".jsonl.zst", ".json", ".csv", ".parquet", ".arrow"])
def test_a_reader_survives_a_fork(tmp_path, ending):
    """Also one that has been read from before."""
    reader = index_file(write(tmp_path / f"a{ending}", RECORDS), KEYS)
    expected = [reader[i] for i in range(50)][::-1]
    out, into = os.pipe()
    child = os.fork()
    if child == 0:  # no test framework in the child: it says what it saw and is gone
        os.write(into, b"same" if [reader[i] for i in range(49, -1, -1)] == expected else b"not")
        os._exit(0)
    os.close(into)
    with open(out, "rb") as file:
        assert file.read() == b"same"
    assert os.waitpid(child, 0)[1] == 0
    assert [reader[i] for i in range(49, -1, -1)] == expected


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_columns_beside_those_wanted(tmp_path, ending):
    table = pa.table({"tools": ["[]"], "other": [1], "text": ["a"]})
    path = tmp_path / f"a{ending}"
    pq.write_table(table, path) if ending == ".parquet" else write_arrow(path, table)
    (record,) = both(path, beside=("tools", "images"))
    assert record.content == {"text": "a", "tools": "[]"}
    assert record.folder == str(tmp_path)
    assert [r.content for r in both(path)] == [{"text": "a"}]
