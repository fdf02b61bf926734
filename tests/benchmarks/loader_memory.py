"""The loader over a file that does not fit into memory: does its own memory stay flat?

    python -m tests.benchmarks.loader_memory --gb 20 --folder /tmp

Writes a .jsonl of that size (the chat corpus again and again, with a running number), reads it by
random access and as a stream, and prints the resident memory of the main process and its workers,
without pages of files, as batches go by. The file is deleted afterwards.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

from omnistep.data.loader import make_loader
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.sources import Described, open_reader
from omnistep.data.tokenizer import load_tokenizer
from tests.benchmarks.chitchat import conversations

TOKENIZER = Path(__file__).parents[2] / "data/shakespeare/tokenizer"


def write(path: Path, size: int) -> int:
    """Conversations of about `size` bytes; returns how many."""
    lines = [json.dumps(messages, ensure_ascii=False) for messages in conversations()]
    count = written = 0
    with path.open("wb", buffering=1 << 22) as file:
        while written < size:
            line = f'{{"messages": {lines[count % len(lines)]}, "number": {count}}}\n'
            written += file.write(line.encode())
            count += 1
    return count


def resident() -> list[float]:
    """MB of anonymous memory: of this process, and of its workers together."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    each = [
        int(line.split()[1]) / 1024
        for pid in pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("RssAnon")
    ]
    return [each[0], sum(each[1:])]


def read(path: Path, kind: str, batches: int, workers: int) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    config = LoaderConfig(
        max_seq_len=2048, micro_batch_size=4, rmpad_with_pos_ids=True, num_workers=workers
    )
    described = Described(
        path=str(path),
        data_type="conversation",
        datasets_type=kind,
        text_keys=("messages",),
        chat_template="chatml",
    )
    start = time.perf_counter()
    before = resident()[0]
    reader = open_reader(described, tokenizer, config.rules, seed=0)
    print(
        f"{kind}: opened in {time.perf_counter() - start:.1f} s, "
        f"{resident()[0] - before:.0f} MB in the main process"
    )
    loader = make_loader(reader, tokenizer, config)
    start = time.perf_counter()
    for number, (_, state) in enumerate(loader.batches(), 1):
        if number % (batches // 8) == 0:
            main, others = resident()
            speed = state.given[0][1] / (time.perf_counter() - start)
            print(
                f"  {number:6} batches: main {main:.0f} MB, {workers} workers {others:.0f} MB, "
                f"{speed / 1e3:.0f}k tokens/s",
                flush=True,
            )
        if number == batches:
            break
    loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=20)
    parser.add_argument("--batches", type=int, default=800, help="of 8192 tokens")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "chat.jsonl"
        count = write(path, int(options.gb * 1e9))
        print(f"{count} conversations, {path.stat().st_size / 1e9:.1f} GB")
        for kind in ("mapping", "iterable"):
            read(path, kind, options.batches, options.workers)


if __name__ == "__main__":
    main()
