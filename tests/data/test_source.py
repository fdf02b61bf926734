"""Files as sequences of records."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnistep.data import source as source_module
from omnistep.data.errors import DataError
from omnistep.data.files.formats import ENDINGS
from omnistep.data.source import find_files, open_source, open_stream
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
        DataError, match=r"nothing matches .*none\.txt.*\.txt, \.jsonl, \.json, \.csv, \.parquet"
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
