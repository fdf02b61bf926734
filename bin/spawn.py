"""Starts the ranks of a job on this machine, and ends them: `bin/train recipe.yaml --nproc 2`.

torchrun's own machinery would end the ranks that still save as soon as the first one has exited
with RESUME_ME, and reports a failure in some forty lines; so this is written out. For its ranks
it looks like torchrun.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from attrs import Factory, define, frozen

from omnistep.bin.heartbeat import LOST_PEER, silence
from omnistep.bin.launch import FAILURE, LAUNCHER
from omnistep.bin.stop import AT_ONCE, INTERRUPTED, RESUME_ME, WISHES
from omnistep.core.screen import show

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for the ranks that are left when one has failed."""

POLL = 0.05
TAIL = 4000
"""Characters shown of the standard error of a rank that could not say why it ended."""


def spawn(
    command: Sequence[str], nproc: int, grace: float = GRACE, rank_timeout: float = 120.0
) -> int:
    """Runs `command` as ranks 0 to nproc - 1; returns the exit code for all of them.

    Rank 0 has our standard output and error. When a rank fails the others are ended, and what it
    said is printed if it was not rank 0; the code is its own, 128 + n where signal n killed it.
    RESUME_ME when the ranks ended with it, LOST_PEER when one is still there `rank_timeout` seconds
    after another has ended well: they leave together. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C reach
    every rank as SIGTERM; a second Ctrl-C kills them.
    """
    # here, and not in rank 0: it picks a free port by itself, and outlives every rank
    store = _serve_store()
    with tempfile.TemporaryDirectory(prefix="omnistep-") as folder, _Signals() as signals:
        errors = [Path(folder, f"{rank}") for rank in range(nproc)]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(nproc):
                environment = rank_environment(os.environ, rank, nproc, store.port)
                ranks.append(_start(command, environment, errors[rank] if rank else None))
            failed, silent = _watch(ranks, signals, grace, rank_timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        codes = [process.returncode for process in ranks]
        if signals.interrupts > 1:
            return INTERRUPTED
        if silent:
            show(silence(silent[0], rank_timeout), sys.stderr)
            return LOST_PEER
        if not failed:
            return max(codes)
        if signals.asked and {codes[rank] for rank in failed} <= {-signal.SIGTERM, LOST_PEER}:
            return 128 + signals.first  # it came before all took it as a wish to save and end
        tails = {rank: _tail(errors[rank]) for rank in failed if rank}
        said = store.get(FAILURE).decode() if store.check([FAILURE]) else None
        verdict = blame(codes_of_failed(codes, failed, said), said, tails)
    for line in verdict.lines:
        show(line, sys.stderr)
    return verdict.code


def _serve_store() -> dist.TCPStore:
    """Serves a store on a free port of this machine, for this machine alone: torch itself would
    listen on all of its addresses."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    port = listening.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def rank_environment(
    environ: Mapping[str, str], rank: int, nproc: int, port: int
) -> dict[str, str]:
    """The environment of a rank: torchrun's names, and what a user has not set otherwise."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    chosen = {
        # together the ranks have as many threads as there are cores
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        # gloo would look for the host's own name, which need not resolve
        "GLOO_SOCKET_IFNAME": loopback,
    }
    return {
        **chosen,
        **environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store runs already
        LAUNCHER: str(os.getpid()),
    }


def _start(
    command: Sequence[str], environment: dict[str, str], error: Path | None
) -> subprocess.Popen[bytes]:
    # a group of its own: the terminal's Ctrl-C is for us alone, else ranks would get it twice
    options: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL, "process_group": 0}
    if error is None:
        return subprocess.Popen(command, **options)
    with error.open("wb") as file:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, **options)


@define
class _Signals:
    """The wishes to end, and SIGINT, that we got."""

    asked: bool = False
    first: int = 0
    interrupts: int = 0
    _before: dict[int, Any] = Factory(dict)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        self.asked = True
        self.interrupts += number == signal.SIGINT
        if self.interrupts == 2:
            os.write(2, AT_ONCE)

    def __enter__(self) -> "_Signals":
        for number in (*WISHES, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _watch(
    ranks: Sequence[subprocess.Popen[bytes]], signals: _Signals, grace: float, rank_timeout: float
) -> tuple[list[int], list[int]]:
    """Waits for all ranks, and ends them when one fails. The ranks that failed by themselves, and
    those that were waited for in vain when others had ended well."""
    failed: list[int] = []
    told, deadline, first_end = False, None, None
    while (running := [p for p in ranks if p.poll() is None]) and signals.interrupts < 2:
        if signals.asked and not told:
            told = True
            for process in running:
                process.send_signal(signal.SIGTERM)
        if deadline is None and (failed := _failed(ranks)):
            deadline = time.monotonic() + grace
            for process in running:
                process.send_signal(signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            for process in running:
                process.kill()
        if len(running) < len(ranks):
            first_end = first_end or time.monotonic()
            if deadline is None and time.monotonic() > first_end + rank_timeout:
                return [], [i for i, process in enumerate(ranks) if process in running]
        time.sleep(POLL)
    return failed or _failed(ranks), []


def _failed(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [i for i, p in enumerate(ranks) if p.returncode not in (None, 0, RESUME_ME)]


@frozen
class Verdict:
    code: int
    lines: tuple[str, ...]
    """What rank 0 has not printed yet."""


def codes_of_failed(
    codes: Sequence[int], failed: Sequence[int], said: str | None
) -> dict[int, int]:
    """The exit codes, by rank, of the ranks that `failed` before any was ended, and of the one that
    `said` why: another one, which ends because of it, may be seen to end before it does."""
    speaker = (said or "").partition("\n")[0]
    found = {rank: codes[rank] for rank in failed}
    if speaker.isdecimal() and int(speaker) < len(codes) and codes[int(speaker)] > 0:
        found.setdefault(int(speaker), codes[int(speaker)])
    return found


def blame(codes: Mapping[int, int], said: str | None, tails: Mapping[int, str]) -> Verdict:
    """Why the job failed.

    `codes`: of the ranks that failed by themselves (`codes_of_failed`). `said`: `rank\\ntext`
    of the first one that failed by itself and could say why. `tails`: the end of each one's
    standard error, save rank 0's.
    """
    speaker, _, text = (said or "").partition("\n")
    if not speaker.isdecimal():  # no rank of ours wrote that
        said, text = None, ""
    lines = [text] if text and speaker != "0" else []
    killed = [rank for rank, code in codes.items() if code < 0]
    if said and not killed:
        return Verdict(codes.get(int(speaker), 1), tuple(lines))
    # without a word: killed, or ended by a library
    silent = [rank for rank, code in codes.items() if code != LOST_PEER]
    rank = (killed or silent or list(codes))[0]
    lines += [tails[rank]] if tails.get(rank) else []
    code = codes[rank]
    how = f"was killed by {_signal_name(-code)}" if killed else f"ended with exit code {code}"
    lines.append(f"error: rank {rank} {how}, so the others were ended")
    return Verdict(128 - code if killed else code, tuple(lines))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(path: Path) -> str:
    return path.read_text(errors="replace").strip()[-TAIL:]
