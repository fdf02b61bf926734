"""The cache of decompressed files: made once, whole or not at all."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omnistep.data.errors import DataError
from omnistep.data.files import cache
from omnistep.data.files.cache import cached, decompressed
from omnistep.data.files.formats import index_file, stream_file
from tests.data.files.test_formats import KEYS, RECORDS, compressed, write


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNISTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def entries(place):
    return [path for path in place.iterdir() if path.suffix != ".lock"]


def test_made_once_and_again_when_the_file_changes(tmp_path, place, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    write(path, RECORDS)
    first = cached(str(path))
    assert Path(first).parent == place
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decompressed", None)
        assert cached("a.jsonl.gz") == first
    write(path, RECORDS[:10])
    assert cached(str(path)) != first
    assert len(index_file(str(path), KEYS)) == 10
    monkeypatch.delenv("OMNISTEP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Path(cached(str(path))).parent == tmp_path / "home/.cache/omnistep/data"


READ = """
import sys
from omnistep.data.files import cache
from omnistep.data.files.formats import index_file
inner = cache.decompressed
def counted(path):
    print("made", flush=True)
    yield from inner(path)
cache.decompressed = counted
reader = index_file(sys.argv[1], ("text",))
print(len(reader), reader[49999].content["text"], flush=True)
"""


def start(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=-1, text=True)


def test_four_processes_at_once_make_it_once(tmp_path, place):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50000))
    processes = [start(READ, str(path)) for _ in range(4)]
    output = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(line for lines in output for line in lines) == ["50000 text 49999"] * 4 + ["made"]
    assert len(entries(place)) == 1


KILLED = """
import sys, time
from omnistep.data.files import cache
inner = cache.decompressed
def slow(path):
    for chunk in inner(path):
        yield chunk
        print("wrote", flush=True)
        time.sleep(60)
cache.decompressed = slow
cache.cached(sys.argv[1])
"""


def test_killed_half_way(tmp_path, place):
    path = tmp_path / "a.jsonl.gz"
    content = json.dumps(RECORDS[0]).encode() + b"\n"
    path.write_bytes(gzip.compress(content * 100_000, 1))
    process = start(KILLED, str(path))
    assert process.stdout is not None
    assert process.stdout.readline() == "wrote\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = entries(place)
    assert left.suffix == ".part"
    begun = time.monotonic()
    assert len(index_file(str(path), KEYS)) == 100_000
    assert time.monotonic() - begun < 30  # the lock of the dead is not waited for
    assert [entry.suffix for entry in entries(place)] == [""]


@pytest.mark.parametrize("codec", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 3],
        lambda whole: whole[:-3],
        lambda whole: whole[:3],
        lambda whole: b"",
        lambda whole: whole + b"and more that is none",
        lambda whole: whole[:40] + bytes(255 - byte for byte in whole[40:60]) + whole[60:],
        lambda whole: b'{"text": "not compressed"}\n',
    ],
    ids=["third", "end", "head", "empty", "garbage", "flipped", "plain"],
)
def test_archives_that_are_corrupt(tmp_path, place, codec, damage):
    path = tmp_path / f"a.jsonl{codec}"
    lines = b"".join(json.dumps({"text": os.urandom(30).hex()}).encode() + b"\n" for _ in range(99))
    path.write_bytes(damage(compressed(lines, codec)))
    match = rf"a\.jsonl\{codec}: (corrupt or cut off|no (gzip|zstd) file)"
    with pytest.raises(DataError, match=match):
        index_file(str(path), KEYS)
    assert entries(place) == []
    with pytest.raises(DataError, match=match):
        list(stream_file(str(path), KEYS))


def test_an_archive_of_nothing_is_empty(tmp_path, place):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b""))
    assert len(index_file(str(path), KEYS)) == 0
    assert list(stream_file(str(path), KEYS)) == []
    assert list(decompressed(str(path))) == []


def test_no_space_left(tmp_path, place, monkeypatch):
    path = Path(write(tmp_path / "a.jsonl.gz", RECORDS))

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", full)
        with pytest.raises(
            DataError,
            match=r"a\.jsonl\.gz: cannot write .*into .*cache/data \(No space .*OMNISTEP_CACHE",
        ):
            cached(str(path))
    assert entries(place) == []
    assert len(index_file(str(path), KEYS)) == 50
    (tmp_path / "file").touch()
    monkeypatch.setenv("OMNISTEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"into .*file .*OMNISTEP_CACHE"):
        cached(str(path))


def test_a_missing_archive_is_named(tmp_path, place):
    for read in (cached, lambda path: list(decompressed(path))):
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl\.gz"):
            read(str(tmp_path / "none.jsonl.gz"))
