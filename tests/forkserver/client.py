"""What tests see of the server: jobs that start at once, each a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "COLUMNS": "200",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONFAULTHANDLER": "1",  # a crash says where
    "PYTHONUNBUFFERED": "",  # unbuffered, Python drops the rest of a line that is half written
}
"""Of every process that tests start."""

PROGRAMS = ("omnistep.bin.train", "omnistep.bin.sample", "omnistep.bin.convert")
WITH_JAX = (
    *PROGRAMS,
    "omnistep.core.checkpoint.catalogue",
    "omnistep.core.checkpoint.dcp",
    "matplotlib.pyplot",
)
"""What runs import on their way. Their data workers are forked only where jax is not loaded, so
that jobs with workers want a server of PROGRAMS alone."""
PATIENCE = 240.0
"""Seconds after which a job hangs. Undisturbed ones take one or two."""


@frozen
class Result:
    code: int | None
    """None: it hung, and was killed."""
    out: str
    err: str


@frozen(eq=False)
class Job:
    """A process that was started by a ForkServer."""

    server: "ForkServer"
    pid: int
    stdout: Path
    stderr: Path

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> Result:
        """Until no process of it is left."""
        code = self.server.ask({"wait": self.pid, "seconds": seconds})
        return Result(code, *(p.read_text(errors="replace") for p in (self.stdout, self.stderr)))


class ForkServer:
    """Starts jobs without their imports; see __main__.py. `directory` holds their output, and is
    their home. They know no wandb account."""

    def __init__(
        self, directory: Path, early: Sequence[str] = WITH_JAX, environ: Mapping[str, str] = {}
    ) -> None:
        self._directory, self._count = directory, 0
        plain = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("WANDB")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forkserver", *early],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=plain | {"HOME": str(directory)} | dict(environ),
        )
        self._answer()

    def start(
        self,
        call: str,
        argv: Sequence[object],
        *,
        ranks: int = 1,
        environ: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        stdin: Path = Path(os.devnull),
        control: Path | None = None,
    ) -> Job:
        """Calls a program's main ("train") or a function ("package.module:name") with `argv`. Of
        several `ranks` it is the launcher: it must start so many (a program's `--nproc`)."""
        self._count += 1
        stdout, stderr = (self._directory / f"{self._count}.{name}" for name in ("out", "err"))
        request = {
            "call": call if ":" in call else f"omnistep.bin.{call}:main",
            "argv": [*map(str, argv), *(["--nproc", str(ranks)] if ranks > 1 else [])],
            "ranks": ranks,
            "environ": dict(environ or {}),
            "cwd": str(cwd),
            "stdin": str(stdin),
            "stdout": str(stdout),
            "stderr": str(stderr),
            "control": control and str(control),
        }
        return Job(self, self.ask(request), stdout, stderr)

    def run(self, call: str, argv: Sequence[object], **options: Any) -> Result:
        return self.start(call, argv, **options).wait()

    def run_ranks(
        self, call: str, ranks: int, argv: Sequence[object], **options: Any
    ) -> list[Result]:
        """Calls it with [*argv, rank] in as many processes at once."""
        jobs = [self.start(call, [*argv, rank], **options) for rank in range(ranks)]
        return [job.wait() for job in jobs]

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the fork server has ended")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
