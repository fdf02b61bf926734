"""The server: `python -m tests.forkserver MODULE ...` imports the modules and then forks what it is
asked for, so that each job is a process of its own and yet pays for no imports.

It reads one request a line and writes one answer a line. `{"call", "argv", "ranks", "environ",
"cwd", "stdin", "stdout", "stderr", "control"}` starts a job and answers its process id; `{"wait":
pid, "seconds": s}` answers how that one ended, null where it had to be killed for taking longer.

A job of several ranks is the real launcher (omnistep.bin.spawn): its ranks are forked here, before
it has threads, and begin when it starts them. `control` arms the shim of tests/faults.
"""

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from attrs import define

SET_CHILD_SUBREAPER = 36  # prctl's: orphans of a job become our children, so that we see their end
END_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
ENDED: dict[int, int] = {}
"""The exit codes of children that nobody has asked for yet."""


def main(early: Sequence[str]) -> None:
    warnings.filterwarnings("ignore", "os.fork")
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name in early:
        importlib.import_module(name)
    print("null", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
        elif (answer := os.fork()) == 0:
            begin(request)
        print(json.dumps(answer), flush=True)


# ---- how jobs end --------------------------------------------------------------------------


def wait(job: int, seconds: float) -> int | None:
    """Until no process of the job is left: then nothing writes any more."""
    deadline = time.monotonic() + seconds
    while job not in ENDED or members(job):
        if time.monotonic() > deadline:
            kill(job)
            return None
        time.sleep(0.002)
        reap()
    return ENDED.pop(job)


def kill(job: int) -> None:
    while job not in ENDED or members(job):  # orphans follow, one after another
        for pid in members(job):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap()
    del ENDED[job]


def reap() -> None:
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            ENDED[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        return


def members(job: int) -> list[int]:
    """The processes of a job's session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, _, session, *_ = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(session) == job:
            found.append(int(path.parent.name))
    return found


# ---- jobs ----------------------------------------------------------------------------------


def begin(request: dict[str, Any]) -> NoReturn:
    os.setsid()
    end_with_parent()
    redirect(*(request[name] for name in ("stdin", "stdout", "stderr")))
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    run(lambda: job(request))


def job(request: dict[str, Any]) -> Any:
    argv, control, count = request["argv"], request["control"], request["ranks"]
    if count == 1:
        prepare(control, 0, 0)
        return find(request["call"])(argv)
    from omnistep.bin import spawn

    ranks = [fork_rank(rank, control) for rank in range(count)]
    for rank in ranks:
        os.setpgid(rank.pid, ranks[0].pid)
    waiting = iter(ranks)

    def start(command: Sequence[str], environment: dict[str, str], error: Path | None) -> Any:
        rank = next(waiting)
        rank.start(command[command.index("-m") + 1 :], environment, error)
        return rank

    spawn._start = start
    return find(request["call"])(argv)


def prepare(control: str | None, rank: int, launcher: int) -> None:
    # a pool of threads of its own, not that of a process which was forked: threads race for it
    torch.set_num_threads(1)
    if control is not None:
        from tests.faults.shim import arm

        arm(control, rank, launcher)


def find(call: str) -> Callable[[list[str]], Any]:
    module, _, name = call.partition(":")
    return getattr(importlib.import_module(module), name)


def redirect(stdin: str, stdout: str, stderr: str) -> None:
    for number, name in enumerate((stdin, stdout, stderr)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        os.dup2(os.open(name, flags, 0o644), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # the parent's has read ahead


def run(function: Callable[[], Any]) -> NoReturn:
    """As the interpreter does, but that it does not take itself down, which takes a second."""
    try:
        code = function() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """0: not any more."""
    ctypes.CDLL(None).prctl(END_WITH_PARENT, number, 0, 0, 0)


# ---- ranks ---------------------------------------------------------------------------------


@define
class Rank:
    """What `spawn` needs of a subprocess.Popen, of a process that was forked and waits."""

    pid: int
    pipe: int
    returncode: int | None = None

    def start(self, command: Sequence[str], environ: dict[str, str], error: Path | None) -> None:
        told = {"command": command, "environ": environ, "error": error and str(error)}
        with os.fdopen(self.pipe, "w") as pipe:
            pipe.write(json.dumps(told) + "\n")

    def poll(self) -> int | None:
        if self.returncode is None:
            self._reap(os.WNOHANG)
        return self.returncode

    def wait(self) -> int | None:
        if self.returncode is None:
            self._reap(0)
        return self.returncode

    def _reap(self, flags: int) -> None:
        ended, status = os.waitpid(self.pid, flags)
        if ended:
            self.returncode = os.waitstatus_to_exitcode(status)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_rank(rank: int, control: str | None) -> Rank:
    launcher, (reads, writes) = os.getpid(), os.pipe()
    if pid := os.fork():
        os.close(reads)
        return Rank(pid, writes)
    end_with_parent()
    os.close(writes)
    with os.fdopen(reads) as pipe:
        told = json.loads(pipe.readline() or "null")
    if told is None or os.getppid() != launcher:
        os._exit(1)
    end_with_parent(0)  # from here on the rank itself must see to it
    os.environ.clear()
    os.environ.update(told["environ"])
    if told["error"] is not None:
        redirect(os.devnull, os.devnull, told["error"])
    module, *argv = told["command"]
    prepare(control, rank, launcher)
    run(lambda: find(f"{module}:main")(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
