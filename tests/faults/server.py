"""Starts jobs of bin/train by fork, so that they pay for no imports; LD_PRELOAD holds the shim.

It reads one request a line: `{"argv", "nproc", "control", "stdout", "stderr"}` starts a job and
answers its process id, `{"wait": pid, "seconds": s}` answers how it ended, null where it had to be
killed for taking longer. A job of several ranks is `bin/train --nproc`: the real launcher, whose
ranks are forked here, before it has threads, and begin when it starts them.
"""

import atexit
import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from attrs import define

from omnistep.bin import spawn, train
from tests.faults.shim import arm

# What runs import on their way; no backend of jax exists when they are forked.
EARLY = ("omnistep.core.checkpoint.catalogue", "matplotlib.pyplot")
SET_CHILD_SUBREAPER = 36  # prctl's: orphans of a job become our children, so that we see their end


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
        elif (answer := os.fork()) == 0:
            os.setpgid(0, 0)
            redirect(request["stdout"], request["stderr"])
            end(job(request))
        print(json.dumps(answer), flush=True)


def wait(job: int, seconds: float) -> int | None:
    """Until no process of the job is left: then nothing writes any more."""
    end, code = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == job:
            code = os.waitstatus_to_exitcode(status)
        elif pid == 0:
            time.sleep(0.002)
    for pid in children():  # theirs follow, one after another
        os.kill(pid, signal.SIGKILL)
    while children():
        os.waitpid(-1, 0)
    return None


def children() -> list[int]:
    """Of any of our threads: orphans are given to one of them."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for pid in " ".join(lists).split()]


def redirect(stdout: str, stderr: str) -> None:
    for number, name in ((0, os.devnull), (1, stdout), (2, stderr)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        os.dup2(os.open(name, flags, 0o644), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # the parent's has read ahead


def job(request: dict[str, Any]) -> int:
    argv, control, nproc = request["argv"], request["control"], request["nproc"]
    if nproc == 1:
        torch.set_num_threads(
            1
        )  # ours, not that of a process which was forked: threads race for it
        arm(control, 0, 0)
        return train.main(argv)
    ranks = [fork_rank(rank, control) for rank in range(nproc)]
    for rank in ranks:
        os.setpgid(rank.pid, ranks[0].pid)
    waiting = iter(ranks)

    def start(command: Sequence[str], environment: dict[str, str], error: Path | None) -> Any:
        rank = next(waiting)
        rank.start(command[command.index("omnistep.bin.train") + 1 :], environment, error)
        return rank

    spawn._start = start
    return train.main([*argv, "--nproc", str(nproc)])


def end(code: int) -> NoReturn:
    """As the interpreter does, but that it does not take itself down, which takes a second."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@define
class Rank:
    """What `spawn` needs of a subprocess.Popen, of a process that was forked and waits."""

    pid: int
    pipe: int
    returncode: int | None = None

    def start(self, argv: Sequence[str], environment: dict[str, str], error: Path | None) -> None:
        told = {"argv": argv, "environment": environment, "error": error and str(error)}
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


def fork_rank(rank: int, control: str) -> Rank:
    launcher, (reads, writes) = os.getpid(), os.pipe()
    if pid := os.fork():
        os.close(reads)
        return Rank(pid, writes)
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # pyright: ignore
    os.close(writes)
    with os.fdopen(reads) as pipe:
        told = json.loads(pipe.readline() or "null")
    if told is None or os.getppid() != launcher:
        os._exit(1)
    os.environ.clear()
    os.environ.update(told["environment"])
    if told["error"] is not None:
        redirect(os.devnull, told["error"])
    torch.set_num_threads(1)
    arm(control, rank, launcher)
    end(train.main(told["argv"]))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "os.fork")
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name in EARLY:
        importlib.import_module(name)
    print("null", flush=True)
    serve()
