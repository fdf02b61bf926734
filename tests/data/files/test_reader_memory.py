"""No file is held whole: the memory a process grows by, measured in a process of its own."""

import subprocess
import sys

import pyarrow as pa
import pytest

BYTES = 300 << 20
LINE = b'{"text": "' + b"words and more words " * 45 + b'"}'

MEASURE = """
import os, sys, random, threading
import pyarrow, pyarrow.parquet, numpy
from omnistep.data.files.formats import index_file, stream_file

def anonymous():  # what is mapped from a file the system takes back when it needs it
    with open("/proc/self/status") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["RssAnon"].split()[0])

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

path, way = sys.argv[1:]
index_file(path + ".small.jsonl", ("text",))[0]  # what is imported is not counted
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
if way == "random":
    reader = index_file(path, ("text",))
    number = len(reader)
    for i in random.Random(0).sample(range(number), 2000):
        assert len(reader[i].content["text"]) == 945
else:
    number = 0
    for unread in stream_file(path, ("text",)):
        if number % 50 == 0:
            assert len(unread().content["text"]) == 945
        number += 1
done.set()
watcher.join()
print(number, max(peak, anonymous()) - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("big")


def make(path, name):
    """A file of 300 MB."""
    many = BYTES // len(LINE)
    block = 10_000
    if name.startswith("b.arrow"):
        batch = pa.record_batch({"text": ["words and more words " * 45] * block})
        with pa.ipc.new_stream(path, batch.schema) as writer:
            for _ in range(many // block):
                writer.write_batch(batch)
        return many // block * block
    sink = pa.output_stream(path, compression="gzip" if name.endswith(".gz") else None)
    with sink as file:
        if ".json" in name and ".jsonl" not in name:
            for i in range(many):
                file.write((b"," if i else b"[") + LINE)
            file.write(b"]")
        elif ".csv" in name:
            file.write(b"text\n")
            row = b"words and more words " * 45 + b"\n"
            for _ in range(many):
                file.write(row)
        else:
            for _ in range(many):
                file.write(LINE + b"\n")
    return many


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b.jsonl", "b.json", "b.csv", "b.arrow", "b.jsonl.gz"])
def test_memory_grows_by_less_than_64_mb(folder, name, monkeypatch):
    monkeypatch.setenv("OMNISTEP_CACHE", str(folder / "cache"))
    path = folder / name
    many = make(str(path), name)
    (folder / f"{name}.small.jsonl").write_bytes(LINE)
    for way in ("random", "stream"):
        command = [sys.executable, "-c", MEASURE, str(path), way]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        number, grown = map(int, done.stdout.split())
        print(name, way, number, f"{grown / 1024:.1f} MB")
        assert number == many
        assert grown * 1024 < 64 << 20
    path.unlink()
