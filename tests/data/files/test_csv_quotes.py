"""A quote out of place costs its row, and no other."""

import csv
import io
import random
from typing import Any

import pytest

from omnistep.data.errors import DataError
from omnistep.data.files.formats import index_file, stream_file

GOOD = [f"{i},text {i}" for i in range(40)]


def read(path, stream):
    if stream:
        calls = list(stream_file(str(path), ("text",)))
    else:
        source = index_file(str(path), ("text",))
        calls = [lambda i=i: source[i] for i in range(len(source))]
    texts, lost = [], []
    for call in calls:
        try:
            content: Any = call().content
            texts.append(content["text"])
        except DataError as error:
            lost.append(str(error))
    return texts, lost


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chunk", [7, 64, 1 << 19])
@pytest.mark.parametrize(
    "bad",
    ['5" pipe', '"never closed', '"closed" and more', 'a "quoted" word', '"', '""odd"', '"a""'],
)
@pytest.mark.parametrize("at", [0, 20, 40])
def test_a_stray_quote_loses_one_row(bad, at, chunk, stream, tmp_path, monkeypatch):
    monkeypatch.setattr("omnistep.data.files.records.CHUNK_BYTES", chunk)
    path = tmp_path / "a.csv"
    lines = ["id,text", *GOOD]
    lines.insert(1 + at, f"99,{bad}")
    path.write_text("\n".join(lines) + "\n")
    texts, lost = read(path, stream)
    assert texts == [line.split(",")[1] for line in GOOD]
    assert len(lost) == 1
    assert f"a.csv, line {at + 2}: not a row of CSV" in lost[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chunk", [3, 50, 1 << 19])
def test_quotes_and_lines_within_values_stay(stream, chunk, tmp_path, monkeypatch):
    """As the csv module reads them."""
    monkeypatch.setattr("omnistep.data.files.records.CHUNK_BYTES", chunk)
    draw = random.Random(3)
    texts = ["".join(draw.choices('ab",\n\r é', k=draw.randrange(12))) for _ in range(200)]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    path = tmp_path / "a.csv"
    path.write_bytes(file.getvalue().encode())
    assert read(path, stream) == (texts, [])


def test_a_quote_after_the_last_sound_row_with_later_quoted_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"open\n2,"two"\n3,three\n4,"four, ""4"""\n')
    texts, lost = read(path, False)
    assert texts == ["two", "three", 'four, "4"']
    assert len(lost) == 1
