"""Files as sequences of records."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnistep.data import source as source_module
from omnistep.data.errors import DataError
from omnistep.data.files.formats import ENDINGS
from omnistep.data.source import find_files, left_out_text, open_source, open_stream
from omnistep.data.tokenizer import load_tokenizer
from omnistep.data.transform import Plaintext, text_of
from tests.data.files.test_formats import write

KEYS = ("content_split", "text")
SHAKESPEARE = Path(source_module.__file__).parent / "shakespeare"


def texts(source):
    return [text_of(source[i], KEYS) for i in range(len(source))]


@pytest.fixture
def mixed(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    lines = [{"text": "three", "n": 1}, {"text": "x", "content_split": "four"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = pa.table({"text": [f"p{i}" for i in range(7)], "other": list(range(7))})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=3)
    (tmp_path / "notes.md").write_text("not data")
    return tmp_path


EXPECTED = ["three", "four", "one\ntwo\n", *(f"p{i}" for i in range(7))]


def test_directory_glob_list_and_mix(mixed, monkeypatch):
    assert texts(open_source(str(mixed), KEYS)) == EXPECTED
    names = f"{mixed}/c.parquet, {mixed}/a.jsonl"
    assert texts(open_source(names, KEYS)) == EXPECTED[3:] + EXPECTED[:2]
    (mixed / "notes.md").unlink()
    assert texts(open_source(f"{mixed}/*", KEYS)) == EXPECTED
    assert find_files(f"{mixed}/b.txt,{mixed}/*.txt") == [f"{mixed}/b.txt"]
    monkeypatch.chdir(mixed)
    assert texts(open_source("**/*.txt", KEYS)) == ["one\ntwo\n"]
    (mixed / "a,b.txt").write_text("comma")
    assert texts(open_source("a,b.txt", KEYS)) == ["comma"]


def test_random_access_pickled_and_by_row_group(mixed):
    source = pickle.loads(pickle.dumps(open_source(str(mixed), KEYS)))
    for i in (9, 0, 4, 9, 2, 3):
        assert text_of(source[i], KEYS) == EXPECTED[i]
    with pytest.raises(IndexError):
        source[10]


def test_corpus_text_parts_and_eos():
    source = open_source(str(SHAKESPEARE / "train.txt"))
    assert len(source) == 125
    tokenizer = load_tokenizer(SHAKESPEARE / "tokenizer")
    plaintext = Plaintext(tokenizer, 512)
    last = [plaintext(source[i])[-1].ids[-1] for i in (0, 1, 123, 124)]
    assert [token == tokenizer.eos_id for token in last] == [False, False, False, True]
    pieces = plaintext(source[7])
    assert [len(piece.ids) for piece in pieces[:-1]] == [512] * (len(pieces) - 1)
    joined = [token for piece in pieces for token in piece.ids.tolist()]
    assert tokenizer.decode(joined) == source[7].content


def test_byte_order_mark_and_empty_lines(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "u.jsonl").write_text('\n{"text": "a"}\n\r\n   \n{"text": "b"}\n\n')
    source = open_source(str(tmp_path), KEYS)
    assert texts(source) == ["hello", "a", "b"]
    assert [source[i].where.split(", ")[1] for i in (1, 2)] == ["line 2", "line 5"]


def test_paths_that_name_nothing(tmp_path):
    with pytest.raises(
        DataError,
        match=r"nothing matches .*none\.txt.*\.txt, \.jsonl, \.ndjson, \.json, \.csv",
    ):
        open_source(str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="has no data"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="names nothing"):
        open_source(" , ")


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.docx", ".docx"), ("a.gz", ".gz"), ("b.parquet.gz", ".parquet.gz"), ("c", "")],
)
@pytest.mark.parametrize("open_it", [open_source, open_stream])
def test_endings_that_cannot_be_read(tmp_path, name, ending, open_it):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=rf"ending in '{ending}'; give .*\.parquet.*\.csv\.zst"):
        open_it(str(tmp_path / name))
    (tmp_path / "a.txt").write_text("x")
    assert open_it(str(tmp_path)).paths == (f"{tmp_path}/a.txt",)


def test_a_directory_of_every_format(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNISTEP_CACHE", str(tmp_path / "cache"))
    names = [f"{i:02}{ending}" for i, ending in enumerate(ENDINGS)]
    for name in names:
        write(tmp_path / name, [{"text": name, "other": "1"}])
    source = open_source(str(tmp_path), KEYS)
    assert source.paths == tuple(f"{tmp_path}/{name}" for name in names)
    assert texts(source) == names
    assert [source.path_of(i) for i in range(len(source))] == list(source.paths)
    with pytest.raises(IndexError):
        source.path_of(len(names))
    stream = open_stream(f"{tmp_path}/*.*", KEYS)
    assert stream.paths == source.paths
    assert not stream.only_text
    records = [unread() for i in range(stream.files) for unread in stream.open(i)]
    assert records == [source[i] for i in range(len(source))]
    assert pickle.loads(pickle.dumps(stream)) == stream


def test_endings_in_capitals(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNISTEP_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "a.jsonl.gz", [{"text": "a", "other": ""}])
    (tmp_path / "a.jsonl.gz").rename(tmp_path / "A.JSONL.GZ")
    (tmp_path / "B.TXT").write_text("b")
    assert texts(open_source(str(tmp_path), KEYS)) == ["a", "b"]
    assert open_stream(str(tmp_path / "B.TXT"), KEYS).only_text


def test_what_hugging_face_writes_beside_arrow_is_left_out(tmp_path):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{\n}")
    write(tmp_path / "data-00000-of-00001.arrow", [{"text": "a", "other": ""}])
    assert texts(open_source(str(tmp_path), KEYS)) == ["a"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_empty(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=rf"the data is empty, no record in .*{name}"):
        open_source(str(tmp_path / name))


def test_bad_records_name_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "fine"}\n\n{"text": }\n[1]\n{"other": 1}\n{"text": 5}\n{"text": "\xff"}\n'
    )
    source = open_source(str(path), KEYS)
    assert texts_of(source, 0) == "fine"
    for index, message in (
        (1, r"a\.jsonl, line 3: not JSON"),
        (2, r"a\.jsonl, line 4: a JSON object is expected, this is a list"),
        (3, r"a\.jsonl, line 5: none of the keys \['content_split', 'text'\].*has \['other'\]"),
        (4, r"a\.jsonl, line 6: 'text' must hold a text, it holds a int"),
        (5, r"a\.jsonl, line 7: not UTF-8 \(byte 0xff"),
    ):
        with pytest.raises(DataError, match=message):
            texts_of(source, index)


def texts_of(source, index):
    return text_of(source[index], KEYS)


def test_bad_text_and_parquet(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n" * 4000 + b"caf\xe9\n")
    source = open_source(str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"a\.txt, line 4001: not UTF-8 \(byte 0xe9 at offset"):
        [source[i] for i in range(len(source))]
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"b\.parquet is not a Parquet file"):
        open_source(str(tmp_path / "b.parquet"))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet has none of the columns .*it has \['x'\]"):
        open_source(str(tmp_path / "c.parquet"))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet, row 2: 'text' must hold a text"):
        texts_of(open_source(str(tmp_path / "d.parquet"), KEYS), 1)


# ---- what is no data, and data that is not what it seems ------------------------------------


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_what_is_left_out_of_a_folder_is_told(tmp_path):
    (tmp_path / "a.ndjson").write_text(lines("a", "b"))
    for name in ("._a.jsonl", ".b.jsonl", "notes.md", "c.jsonl.bak"):
        (tmp_path / name).write_text(lines("x"))
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    wanted = ("._a.jsonl", ".b.jsonl", "c.jsonl.bak", "gone.jsonl", "notes.md", "pipe.jsonl")
    for source in (open_source(str(tmp_path), KEYS), open_stream(str(tmp_path), KEYS)):
        assert source.paths == (str(tmp_path / "a.ndjson"),)
        assert source.left_out == wanted
    told = left_out_text(wanted)
    assert told == "; left out of the folder: ._a.jsonl, .b.jsonl, c.jsonl.bak, … (6)"
    assert left_out_text(()) == ""


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl is no file, it is a pipe"):
        open_source(str(tmp_path / "pipe.jsonl"))
    with pytest.raises(DataError, match=r"/dev/zero is no file, it is a device"):
        open_source("/dev/zero")
    with pytest.raises(DataError, match=r"gone\.jsonl' is a link to .*which is gone"):
        open_source(str(tmp_path / "gone.jsonl"))


def save_arrow(path, *texts):
    table = pa.table({"text": list(texts)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def test_a_folder_that_datasets_saved(tmp_path):
    """The files that state.json names; caches beside them hold the same rows again."""
    for name in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "cache-f00d.arrow"):
        save_arrow(tmp_path / name, name)
    shards = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in (1, 0)]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": shards}))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert texts(open_source(str(tmp_path), KEYS)) == [s["filename"] for s in shards]
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"state\.json names data-00001.*arrow, which is not"):
        open_source(str(tmp_path), KEYS)


def test_a_folder_of_splits_names_them(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "train").mkdir()
    save_arrow(tmp_path / "train" / "data-00000-of-00001.arrow", "a")
    with pytest.raises(DataError, match=r"DatasetDict with the splits train, test: give .*/train$"):
        open_source(str(tmp_path))
    assert texts(open_source(str(tmp_path / "train"), KEYS)) == ["a"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_wide_encodings_are_named(encoding, name, tmp_path):
    content = {"a.csv": "text\r\nhello\r\n"}.get(name, lines("hello"))
    (tmp_path / name).write_bytes(content.encode(encoding))
    form = encoding[:6].upper()
    for read in (
        lambda: open_source(str(tmp_path), KEYS),
        lambda: list(open_stream(str(tmp_path), KEYS).open(0)),
    ):
        with pytest.raises(DataError, match=rf"{name}: it is {form}, not UTF-8. .*iconv -f utf-"):
            read()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_a_file_that_loses_bytes_is_named(name, tmp_path):
    path = tmp_path / name
    words = [f"number {i}" for i in range(9000)]
    if name.endswith(("parquet", "arrow")):
        table = pa.table({"text": words})
        if name.endswith("arrow"):
            save_arrow(path, *words)
        else:
            pq.write_table(table, path)
    else:
        path.write_text(
            "text\n" * (name == "a.csv")
            + "\n".join(json.dumps({"text": w}) if name == "a.jsonl" else w for w in words)
        )
    source, stream = open_source(str(path), KEYS), open_stream(str(path), KEYS)
    assert source[len(source) - 1]
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(DataError, match=rf"{name}: it had .* bytes .*, now it ends"):
        source[len(source) - 1]
    with pytest.raises(DataError, match=rf"{name}: it had .* bytes .*, now it ends"):
        stream.open(0)


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_arrow_that_point_elsewhere(stream, tmp_path):
    """They ended the process, or read beyond the buffers."""
    path = tmp_path / "a.arrow"
    table = pa.table({"text": [f"row {i}" for i in range(300)]})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    offsets = np.cumsum([0] + [len(f"row {i}") for i in range(300)], dtype=np.int32).tobytes()
    at = content.index(offsets)
    for wrong in (-5, 20_000):
        changed = bytearray(content)
        changed[at + 4 : at + 8] = np.int32(wrong).tobytes()
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"a\.arrow.*cannot be decoded, the file is corrupt"):
            every_record(str(path), stream)


def every_record(path, stream):
    if stream:
        return [call() for call in open_stream(path, KEYS).open(0)]
    return texts(open_source(path, KEYS))


def test_a_footer_of_parquet_that_is_broken_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 50}), path)
    content = bytearray(path.read_bytes())
    content[-40:-10] = b"\xff" * 30
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is not a Parquet file"):
        open_source(str(path), KEYS)


def test_null_fields_of_structs_are_no_fields(tmp_path):
    """A table has each field of a struct in every row."""
    rows = [
        {"text": [{"role": "user", "content": "a"}, {"role": "tool", "args": {"x": {"n": 1}}}]},
        {"text": [{"role": "user", "content": "b", "args": {"x": {}, "list": [None, "c"]}}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), KEYS)
    assert [source[i].content for i in range(2)] == rows
