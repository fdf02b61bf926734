"""Jobs of bin/train that are struck: how they are started, and what they leave behind."""

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from attrs import frozen

from tests.faults.shim import NOTHING, Seen, Strike, build, make_control, read_control
from tests.forkserver.client import PROGRAMS, ForkServer

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
    """Starts jobs of bin/train with the shim loaded, which watches what they read below `data`.
    `directory` holds the library and the logs."""

    def __init__(self, directory: Path, data: Path) -> None:
        self._directory, self._data, self._count = directory, data, 0
        self._environ = {"LD_PRELOAD": str(build(directory))}
        self._server = ForkServer(directory, environ=self._environ)

    @cached_property
    def _plain_server(self) -> ForkServer:
        directory = self._directory / "plain"
        directory.mkdir()
        return ForkServer(directory, PROGRAMS, self._environ)

    def run(
        self,
        argv: Sequence[str],
        nproc: int,
        directory: Path,
        strike: Strike = NOTHING,
        *,
        traced: bool = False,
        forks: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Job:
        """`bin/train argv --nproc nproc`, struck at its calls on paths below `directory`.

        `forks`: its data workers are forked, and so are watched, too: that takes a second longer.
        `meanwhile` is called when it has begun.
        """
        self._count += 1
        control, trace = (self._directory / f"{self._count}.{n}" for n in ("control", "trace"))
        make_control(control, directory, self._data, strike, trace if traced else None)
        began = time.monotonic()
        server = self._plain_server if forks else self._server
        job = server.start("train", argv, ranks=nproc, control=control)
        meanwhile()
        done = job.wait(PATIENCE)
        seen = read_control(control, trace if traced else None)
        for path in (control, job.stdout, job.stderr):
            path.unlink()
        return Job(done.code, done.out, done.err, seen, time.monotonic() - began)

    def close(self) -> None:
        self._server.close()
        if "_plain_server" in vars(self):
            self._plain_server.close()
