"""The chat corpus of the benchmarks: chitchat-dataset 0.9.0 (MIT), as conversations of two.

    python -m tests.benchmarks.chitchat chat.jsonl

It is fetched from PyPI. A sender's messages in a row become one turn; the first to speak is the
user. Conversations of fewer than two turns, or of other than two senders, are left out.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

PACKAGE = "chitchat-dataset==0.9.0"


def fetch() -> dict[str, dict[str, list[list[dict[str, str]]]]]:
    """The package's dataset.json. Raises CalledProcessError where PyPI can't be reached."""
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder)
        subprocess.run([*command, PACKAGE], check=True, capture_output=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return json.loads(archive.read("chitchat_dataset/dataset.json"))


def conversations() -> Iterator[list[dict[str, str]]]:
    for entry in fetch().values():
        messages = [message for turn in entry["messages"] for message in turn]
        turns = [
            (sender, "\n".join(text for message in said if (text := message["text"].strip())))
            for sender, said in groupby(messages, key=lambda message: message["sender"])
        ]
        turns = [(sender, text) for sender, text in turns if text]
        if len({sender for sender, _ in turns}) != 2 or len(turns) < 2:
            continue
        first = turns[0][0]
        yield [
            {"role": "user" if sender == first else "assistant", "content": text}
            for sender, text in turns
        ]


def write(path: Path) -> int:
    """One `{"messages": …}` a line; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, messages in enumerate(conversations(), 1):  # noqa: B007
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return count


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} conversations in {sys.argv[1]}")
