"""Files as sequences of records."""

import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistep.data import readers
from omnistep.data.errors import DataError
from omnistep.data.source import find_files, open_source
from omnistep.data.tokenizer import load_tokenizer
from omnistep.data.transform import Plaintext, text_of

KEYS = ("content_split", "text")
SHAKESPEARE = Path(readers.__file__).parent / "shakespeare"


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


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["", "a", "é", "漢字", "🙂" * 9, "x" * 40, " "]), max_size=60),
    st.sampled_from(["\n", "\r\n", ""]),
    st.integers(1, 3),
)
def test_a_text_is_its_parts(tmp_path_factory, words, joint, size):
    """Whatever the line lengths, the parts make the file, and lines are cut only if too long."""
    path = tmp_path_factory.mktemp("text") / "t.txt"
    text = joint.join(words)
    path.write_bytes(text.encode())
    small, longest = 16 * size, 64 * size
    file = readers.index_text(str(path), part=small, longest=longest)
    parts = [file[i] for i in range(len(file))]
    assert "".join(str(part.content) for part in parts) == text
    assert [part.ends_document for part in parts] == [False] * (len(parts) - 1) + [True] * bool(
        parts
    )
    for part in parts[:-1]:
        content = str(part.content).encode()
        assert longest - 4 < len(content) <= longest if content[-1:] != b"\n" else True
        assert small <= len(content) <= longest
        first_line_end = content.find(b"\n", small - 1)
        assert first_line_end in (-1, len(content) - 1)


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


def test_the_content_stays_on_disk(tmp_path):
    """A sparse file of 300 MB is indexed and read without holding it."""
    import tracemalloc

    path = tmp_path / "big.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "first"}\n')
        file.seek(300 << 20)
        file.write(b'\n{"text": "last"}\n')
    assert os.stat(path).st_blocks * 512 < 1 << 20
    tracemalloc.start()
    source = open_source(str(path), KEYS)
    assert text_of(source[len(source) - 1], KEYS) == "last"
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_paths_that_name_nothing(tmp_path):
    with pytest.raises(DataError, match=r"nothing matches .*none\.txt.*\.txt, \.jsonl, \.json"):
        open_source(str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="has no data"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="names nothing"):
        open_source(" , ")


def test_unsupported_endings(tmp_path):
    for name in ("a.docx", "a.parquet.gz", "a.gz", "a.yaml", "a"):
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match=r"a file of this ending; give .*\.txt, \.jsonl, "):
            open_source(str(tmp_path / name))
    (tmp_path / "a.txt").write_text("x")
    assert len(open_source(str(tmp_path))) == 1  # what is no data is not read


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
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
