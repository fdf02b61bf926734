"""Jobs of bin/train that are struck: how they are started, and what they leave behind."""

import time
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from tests.faults.shim import NOTHING, Seen, Strike, build, make_control, read_control
from tests.forkserver.client import ForkServer

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
    """Starts jobs of bin/train, one at a time, with the shim loaded. `directory` holds the library
    and the logs."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0
        self._server = ForkServer(directory, environ={"LD_PRELOAD": str(build(directory))})

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
        control, trace = (self._directory / f"{self._count}.{n}" for n in ("control", "trace"))
        make_control(control, directory, strike, trace if traced else None)
        began = time.monotonic()
        job = self._server.start("train", argv, ranks=nproc, control=control)
        done = job.wait(PATIENCE)
        seen = read_control(control, trace if traced else None)
        for path in (control, job.stdout, job.stderr):
            path.unlink()
        return Job(done.code, done.out, done.err, seen, time.monotonic() - began)

    def close(self) -> None:
        self._server.close()
