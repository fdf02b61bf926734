"""A contestant as a process of its own, which waits at a gate: so that all step in turn."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Process:
    """Makes one step for each line it is sent, and answers with a JSON line of figures."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self.name, self.started = name, time.time()
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        self.log.seek(0)
        sys.exit(f"{self.name} died:\n{self.log.read()[-3000:]}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def paired(
    start: Mapping[str, Callable[[], Process]], warm: int, rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """The figures of every step but `warm` first ones of all contestants, who step in turn A B C,
    C B A, ...; and the seconds from each one's start to the end of its first step."""
    processes, first = [], {}
    for name, run in start.items():
        process = run()
        for i in range(warm):
            process.step()
            if i == 0:
                first[name] = time.time() - process.started
        processes.append(process)
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in start}
    for i in range(rounds):
        for process in processes[:: 1 if i % 2 == 0 else -1]:
            steps[process.name].append(process.step())
    for process in processes:
        process.end()
    return steps, first
