"""Every format: the same records by random access and from the front; errors that name a place."""

import csv
import gzip
import io
import json
import multiprocessing
import os
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistep.data import archives, readers
from omnistep.data.archives import in_cache
from omnistep.data.errors import DataError
from omnistep.data.file_stream import _parts
from omnistep.data.source import open_source, open_stream

RECORDS = [
    {"text": f'{i}: "é" 漢字 🙂,\nsecond {"line" * (i % 7)}\r\n', "other": str(i)}
    for i in range(50)
]
KEYS = ("text", "other")
FORMATS = ["jsonl", "json", "lines.json", "csv", "parquet", "file.arrow", "stream.arrow"]
FORMATS += [f"{kind}.{packed}" for kind in ("jsonl", "json", "csv") for packed in ("gz", "zst")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNISTEP_CACHE", str(tmp_path / "cache"))


def compressed(content: bytes, packed: str) -> bytes:
    """In two members, as `cat` of two archives makes."""
    half = len(content) // 2
    if packed == "gz":
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    codec = pa.Codec("zstd")
    return b"".join(codec.compress(p, asbytes=True) for p in (content[:half], content[half:]))


def write(path, records=RECORDS):
    """Writes `records` in the format of the path's ending."""
    kinds = path.name.split(".")[1:]
    table = pa.table({key: [r[key] for r in records] for key in KEYS})
    if kinds[-1] == "parquet":
        pq.write_table(table, path, row_group_size=7)
        return path
    if kinds[-1] == "arrow":
        new = pa.ipc.new_file if kinds[0] == "file" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
        return path
    packed = kinds.pop() if kinds[-1] in ("gz", "zst") else None
    if kinds == ["json"]:
        content = json.dumps(records, indent=1, ensure_ascii=False).encode()
    elif kinds[-1] == "csv":
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, KEYS)
        writer.writeheader()
        writer.writerows(records)
        content = file.getvalue().encode()
    else:
        content = b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)
    path.write_bytes(content if packed is None else compressed(content, packed))
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_holds_the_same(tmp_path, kind):
    path = write(tmp_path / f"data.{kind}")
    source = pickle.loads(pickle.dumps(open_source(str(path), KEYS)))
    assert len(source) == 50
    for i in random.Random(0).sample(range(50), 50):
        assert source[i].content == RECORDS[i]
    stream = pickle.loads(pickle.dumps(open_stream(str(path), KEYS)))
    assert stream.files == 1
    streamed = [unread() for unread in stream.open(0)]
    assert streamed == [source[i] for i in range(50)]  # with the same places


def test_formats_side_by_side(tmp_path):
    for kind in ("jsonl", "csv.gz", "parquet", "stream.arrow"):
        write(tmp_path / f"data.{kind}")
    source = open_source(str(tmp_path), KEYS)
    assert [source[i].content for i in range(200)] == RECORDS * 4
    only = open_source(f"{tmp_path}/*.parquet,{tmp_path}/data.jsonl", "text")
    assert [only[0].content, only[99].content] == [{"text": RECORDS[0]["text"]}, RECORDS[49]]


LINES = st.lists(st.text(st.sampled_from('a",é🙂 \r\n{}'), max_size=12), max_size=30)


@settings(max_examples=60, deadline=None)
@given(LINES, st.integers(1, 3), st.booleans(), st.booleans())
def test_csv_is_what_python_reads(tmp_path_factory, words, columns, quote_all, crlf):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    rows = [
        [w.replace("\r", "") for w in words[i : i + columns]] for i in range(0, len(words), columns)
    ]
    rows = [row for row in rows if len(row) == columns and any(row)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
        writer = csv.writer(file, quoting=quoting, lineterminator="\r\n" if crlf else "\n")
        writer.writerow([f"c{i}" for i in range(columns)])
        writer.writerows(rows)
    wanted = [{f"c{i}": value for i, value in enumerate(row)} for row in rows]
    file = readers.index_csv(str(path))
    assert [file[i].content for i in range(len(file))] == wanted
    assert [unread().content for unread in open_stream(str(path), "c0").open(0)] == wanted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("aé🙂\n\r "), max_size=40), max_size=20), st.integers(1, 3))
def test_texts_are_cut_alike(tmp_path_factory, words, size):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_bytes("x".join(words).encode())
    by_index = readers.index_text(str(path), part=16 * size, longest=32 * size)
    with open(path, "rb") as file:
        streamed = [unread() for unread in _parts(file, str(path), 16 * size, 32 * size)]
    assert streamed == [by_index[i] for i in range(len(by_index))]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([b'{"a": 1}', b"", b" ", b"{", b'{"b": "x"}\r']), max_size=30))
def test_lines_are_counted_alike(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "t.jsonl"
    path.write_bytes(b"\n".join(lines))
    by_index = readers.index_json_lines(str(path))
    outcomes = [outcome(lambda i=i: by_index[i]) for i in range(len(by_index))]
    assert outcomes == [outcome(unread) for unread in open_stream(str(path), "a").open(0)]
    assert len(outcomes) == sum(bool(line.strip()) for line in lines)


def outcome(read):
    try:
        return read()
    except DataError as error:
        return str(error)


def test_a_line_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    """50 MB, between two others: by its place and size, and the rest is read."""
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "a"}\n')
        file.seek(50 << 20)
        file.write(b'\n{"text": "b"}\n')
    message = rf"a\.jsonl, line 2: a record {(50 << 20) - 14 + 1} bytes, more than the 33554432"
    source = open_source(str(path), KEYS)
    monkeypatch.setattr(readers, "read_bytes", lambda path, start, stop: os.abort())
    with pytest.raises(DataError, match=message):
        source[1]
    monkeypatch.undo()
    assert [source[i].content for i in (0, 2)] == [{"text": "a"}, {"text": "b"}]
    first, long, last = open_stream(str(path), KEYS).open(0)
    with pytest.raises(DataError, match=message):
        long()
    assert [first().content, last().content] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, row 2: 1 fields, but the header has 2"),
        ("a.csv", b'a,b\n1,2\n"x"y,3\n', r"a\.csv, row 2: not CSV"),
        ("a.csv", b"a,b\n1,2\n\xff,3\n", r"a\.csv, line 3: not UTF-8"),
        ("a.json", b'[{"a": 1}, 5]', r"a\.json, item 2: a JSON object is expected, this is a int"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n\n{]\n'), r"a\.jsonl\.gz, line 3: not JSON"),
        ("a.txt.gz", gzip.compress(b"a\nb\xff\n" * 4000), r"a\.txt\.gz, line 2: not UTF-8"),
    ],
)
def test_a_bad_record_is_one_record(tmp_path, name, content, message):
    """By both ways of reading it, and only when it is asked for."""
    path = tmp_path / name
    path.write_bytes(content)
    source = open_source(str(path), "a")
    outcomes = [outcome(lambda i=i: source[i]) for i in range(len(source))]
    assert outcomes == [outcome(unread) for unread in open_stream(str(path), "a").open(0)]
    with pytest.raises(DataError, match=message):
        [source[i] for i in range(len(source))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"a": [', "not JSON"),
        ("a.json", b"3", "an array of objects, or one object a line is expected"),
        ("a.json", b'[{"a": 1}, {]', "not JSON"),
        ("a.jsonl.zst", compressed(b'{"a": 1}\n' * 1000, "zst")[:-9], "to its end .*cut off"),
        ("a.jsonl.gz", compressed(b'{"a": 1}\n' * 1000, "gz")[:-9], "to its end .*cut off"),
        ("a.csv.gz", b"no archive at all", "can't be read to its end"),
        ("a.arrow", b"nothing", "is not an Arrow file"),
        ("a.csv", b"a,a\n1,2\n", "stands twice in the header"),
    ],
)
def test_a_file_that_is_broken(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        every(tmp_path / name)
    assert not list(tmp_path.glob("cache/*[!k]"))  # no half copies, only locks
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        [unread() for unread in open_stream(str(tmp_path / name), "a").open(0)]


def copy_slowly(path, pipe):
    write, calls = archives._write, []
    archives._write = lambda *args: (calls.append(1), write(*args))
    pipe.send((in_cache(path, array=False), len(calls)))


def every(path):
    source = open_source(str(path), "a")
    return [source[i] for i in range(len(source))]


def test_one_of_many_makes_the_copy(tmp_path):
    path = str(write(tmp_path / "a.jsonl.gz", RECORDS * 200))
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(4)]
    for _, end in pipes:
        context.Process(target=copy_slowly, args=(path, end)).start()
    places, calls = zip(*(ours.recv() for ours, _ in pipes), strict=True)
    assert len(set(places)) == 1
    assert sum(calls) == 1
    os.utime(path, ns=(1, 1))  # another file by the same name
    assert in_cache(path, array=False) != places[0]


def test_no_room_for_the_copy(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OMNISTEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set OMNISTEP_CACHE to a directory with room"):
        open_source(str(path), KEYS)
