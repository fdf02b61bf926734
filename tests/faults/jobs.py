"""Jobs of bin/train that are struck: how they are started, and what they leave behind."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from tests.bin.runs import start_server
from tests.faults.shim import NOTHING, Seen, Strike, build, make_control, read_control

PATIENCE = 60.0
"""Seconds after which a job hangs. Undisturbed ones take one or two."""


@frozen
class Job:
    """One that has ended, together with all of its processes."""

    code: int | None
    """Of the launcher; None: it hung, and was killed."""
    out: str
    err: str
    seen: Seen
    seconds: float


class Server:
    """Starts jobs, one at a time, without their imports; see server.py. `directory` holds the
    library and the logs."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0
        shim = str(build(directory))
        self._process = start_server("tests.faults.server", directory, LD_PRELOAD=shim)
        self._answer()

    def run(
        self,
        argv: Sequence[str],
        nproc: int,
        directory: Path,
        strike: Strike = NOTHING,
        *,
        traced: bool = False,
    ) -> Job:
        """`bin/train argv --nproc nproc`, struck at its calls on paths below `directory`."""
        self._count += 1
        place = {n: self._directory / f"{self._count}.{n}" for n in ("control", "stdout", "stderr")}
        trace = self._directory / f"{self._count}.trace" if traced else None
        make_control(place["control"], directory, strike, trace)
        began = time.monotonic()
        files = {name: str(path) for name, path in place.items()}
        pid = self._ask({"argv": list(argv), "nproc": nproc, **files})
        code = self._ask({"wait": pid, "seconds": PATIENCE})
        out, err = (place[n].read_text(errors="replace") for n in ("stdout", "stderr"))
        seen = read_control(place["control"], trace)
        for path in place.values():
            os.unlink(path)
        return Job(code, out, err, seen, time.monotonic() - began)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server of jobs has ended")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
