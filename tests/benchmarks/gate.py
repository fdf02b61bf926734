"""A contestant as a process of its own, which waits at a gate: so that all step in turn."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
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
