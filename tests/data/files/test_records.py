"""What is wrong with a record is its own error, with file and place; the others are read."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnistep.data.errors import DataError
from omnistep.data.files.formats import index_file, stream_file
from omnistep.data.files.records import LONGEST_RECORD
from tests.data.files.test_formats import KEYS, both, compressed, write_arrow


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNISTEP_CACHE", str(tmp_path / "cache"))


def check(path, expected):
    """Each record's text, or what its error matches; the same at random and as a stream."""
    found = both(path)
    assert len(found) == len(expected), found
    for outcome, wanted in zip(found, expected, strict=True):
        if isinstance(outcome, str):
            assert re.fullmatch(f"{re.escape(str(path))}, {wanted}", outcome, re.DOTALL), outcome
        else:
            assert outcome.content["text"] == wanted


def broken(path, match):
    """The file as a whole cannot be read, at random or as a stream."""
    with pytest.raises(DataError, match=match) as at_random:
        index_file(str(path), KEYS)
    found = []
    with pytest.raises(DataError, match=match) as streamed:
        found.extend(stream_file(str(path), KEYS))
    assert str(at_random.value).startswith(str(path))
    assert str(streamed.value).startswith(str(path))
    return found


JSON_CASES = [
    (b'{"text": "fine"}', "fine"),
    (b'{"text": }', r"{} 2: not JSON \(.*\): '{{\"text\": }}'"),
    (b"[1, 2]", r"{} 3: a JSON object is expected, this is a list"),
    (b'"a"', r"{} 4: a JSON object is expected, this is a str"),
    (b'{"text": "caf\xe9"}', r"{} 5: not UTF-8 \(byte 0xe9 at offset \d+\).*iconv.*"),
    (b'{"text": "\\ud83d x"}', r"{} 6: \\ud83d is half a character, its other half is missing"),
    (b"[" * 100_000 + b"]" * 100_000, r"{} 7: not JSON \(.*recursion.*\): '\[\[\[.*"),
    (b'{"text": "\\ud83d\\ude42"}', "\U0001f642"),
    (b'{"text": ' + b"9" * 5000 + b"}", r"{} 9: not JSON \(.*digits.*"),
    (b'{"text": "last"}', "last"),
]


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_bad_json(tmp_path, ending, codec):
    path = tmp_path / f"a{ending}{codec}"
    array = ending == ".json"
    raw = [case for case, _ in JSON_CASES]
    content = b"[" + b",".join(raw) + b"]" if array else b"\n".join(raw)
    path.write_bytes(compressed(content, codec))
    unit = "item" if array else "line"
    check(path, [expected.format(unit) for _, expected in JSON_CASES])


def test_offset_of_a_bad_byte(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\n[{"text": "a"}, {"text": "\xff"}]')
    offset = path.read_bytes().index(b"\xff")
    check(path, ["a", rf"item 2: not UTF-8 \(byte 0xff at offset {offset}\).*"])


def test_commas_too_many(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, , {"text": "b"} {"text": "c"}, ]')
    check(path, ["a", "item 2: not JSON .*", "item 3: not JSON .*Extra data.*", "item 4: not.*"])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('"a text"', r"it begins with '\"a text\"'\. A \.json may be an array of objects"),
        ('{\n "text": "a"\n}\n', r"one object that spreads over several lines\. A \.json may be"),
        ('[{"text": "a"}, {"te', r"ends within item 2 of its array: it is cut off"),
        ('[{"text": "a"}', r"ends within item 1 of its array"),
        ('[{"text": "a"}, {"text": "]}]', r"ends within item 2 of its array"),
        ('[{"text": "a"}] \n [', r"the array ends, but '\[' follows"),
    ],
)
def test_json_that_is_neither(tmp_path, content, match, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(content)
    broken(path, match)
    monkeypatch.setattr("omnistep.data.files.records.CHUNK_BYTES", 15)
    if "spreads" not in match and "begins" not in match:
        broken(path, match)


def test_bad_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\r\nid,text\r\n1,a\n\n2\n"
        b'3,"b\nb"\n4,c,d\n5,e "quoted" e\n6,"f" f\n7,caf\xe9\n8,"g ""g"""\n9,"never\nclosed\n'
    )
    place = r" not a row of CSV from {} on: .*stands in quotes.*"
    check(
        path,
        [
            "a",
            r"line 5: the row has 1 fields, the header 2: \['id', 'text'\]",
            "b\nb",
            r"line 8: the row has 3 fields, the header 2: .*",
            "line 9:" + place.format("'e \"quoted\" e'"),
            "line 10:" + place.format("'\"f\" f'"),
            r"line 11: not UTF-8 \(byte 0xe9 at offset \d+\).*",
            'g "g"',
            "line 13:" + place.format("'\"never'"),
            "line 14: the row has 1 fields, the header 2: .*",
        ],
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"id,other\n1,2\n", r"has none of the columns \['text'\].*header has \['id', 'other'\]"),
        (b"text,text\na,b\n", r"its header names \['text'\] more than once"),
        (b"text,id\ra,1\rb,2\r", r"end in a carriage return alone"),
        (b'te"xt\na\n', r"its first line is no header \(not a row of CSV"),
        (b"\xff,text\na,b\n", r"its first line is no header \(.*0xff"),
    ],
)
def test_csv_without_a_header(tmp_path, content, match):
    (tmp_path / "a.csv").write_bytes(content)
    assert broken(tmp_path / "a.csv", match) == []


@pytest.mark.parametrize("codec", ["", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_a_record_too_long_is_not_read(tmp_path, ending, codec, monkeypatch):
    path = tmp_path / f"a{ending}{codec}"
    long = b"x" * (LONGEST_RECORD + 1)
    fits = b"y" * (LONGEST_RECORD - 100)
    if ending == ".csv":
        content = b"text\na\n" + long + b"\n" + fits + b"\nb\n" + long
        expected = ["line 3", "line 6"]
    else:
        lines = [b'{"text": "' + text + b'"}' for text in (b"a", long, fits, b"b", long)]
        content = b"\n".join(lines)
        expected = ["line 2", "line 5"]
        if ending == ".json":
            content = b"[" + b",".join(lines) + b"]"
            expected = ["item 2", "item 5"]
    path.write_bytes(compressed(content, path.suffix))
    first, last = (f"{where}: the record has 33,554,4.. bytes, at most .*" for where in expected)
    check(path, ["a", first, fits.decode(), "b", last])
    reader = index_file(str(path), KEYS)
    monkeypatch.setattr("omnistep.data.files.spans.read_bytes", None)
    with pytest.raises(DataError, match=r"Split it, or take it out"):
        reader[1]


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", ["string", "dictionary", "string_view"])
def test_a_row_too_long(tmp_path, ending, kind):
    texts = pa.array(["a", "x" * (LONGEST_RECORD + 1), "b"])
    column = texts.dictionary_encode() if kind == "dictionary" else texts
    column = column.cast(pa.string_view()) if kind == "string_view" else column
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"text": column}), path)
    else:
        write_arrow(path, pa.table({"text": column}), "file")
    check(path, ["a", r"row 2: the record has 33,554,\d+ bytes, at most .*", "b"])


def test_rows_that_are_not_utf8(tmp_path):
    bad = pa.array([b"a", b"caf\xe9", b"b"]).view(pa.string())
    write_arrow(tmp_path / "a.arrow", pa.table({"text": bad}))
    check(tmp_path / "a.arrow", ["a", r"row 2: not UTF-8 \(.*0xe9.*", "b"])


def test_a_row_group_that_is_corrupt(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{i}" * 50 for i in range(20)]})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)
    reader = index_file(str(path), KEYS)
    assert reader[9].content == {"text": "9" * 50}
    with pytest.raises(DataError, match=r"a\.parquet, row 11: cannot be decoded, the file is corr"):
        reader[10]
    with pytest.raises(DataError, match=r"a\.parquet, after row \d+: cannot be decoded"):
        list(stream_file(str(path), KEYS))


@pytest.mark.parametrize("content", [b"", b"nothing", b"ARROW1\0\0nothing" * 9, b"x" * 1000])
@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_files_of_another_kind(tmp_path, ending, content):
    (tmp_path / f"a{ending}").write_bytes(content)
    assert broken(tmp_path / f"a{ending}", rf"a\{ending} is not an? (Parquet|Arrow) file") == []


@pytest.mark.parametrize("form", ["stream", "file"])
def test_an_arrow_file_cut_off(tmp_path, form):
    path = tmp_path / "a.arrow"
    write_arrow(path, pa.table({"text": ["a" * 100] * 50}), form)
    path.write_bytes(path.read_bytes()[:-2500])
    broken(path, "corrupt" if form == "stream" else "not an Arrow file")


@pytest.mark.parametrize("codec", ["", ".gz"])
def test_a_text_that_is_not_utf8(tmp_path, codec):
    path = tmp_path / f"a.txt{codec}"
    path.write_bytes(compressed(b"good\n" * 8000 + b"caf\xe9\n" + b"good\n" * 4000, codec))
    found = both(path)
    bad = [outcome for outcome in found if isinstance(outcome, str)]
    assert len(found) == 4
    assert len(bad) == 1
    assert bad[0].startswith(f"{path}, line 8001: not UTF-8 (byte 0xe9 at offset 40003)")


def test_columns_that_are_not_there(tmp_path):
    write_arrow(tmp_path / "a.arrow", pa.table({"x": [1]}))
    broken(tmp_path / "a.arrow", r"has none of the columns \['text'\].*it has \['x'\]")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    broken(tmp_path / "a.parquet", r"has none of the columns \['text'\].*it has \['x'\]")


def test_values_beyond_text_are_kept(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a", "n": 1.0, "m": 2**70, "l": [{"k": None}]}]))
    (record,) = both(path)
    assert record.content == {"text": "a", "n": 1.0, "m": 2**70, "l": [{"k": None}]}
    assert isinstance(record.content["n"], float)
