"""One run at a time writes into an output_dir."""

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from attrs import define, field
from filelock import FileLock, Timeout

from omnistep.bin.model import RunError
from omnistep.bin.report import Say
from omnistep.core.checkpoint.place import Place, try_to_write
from omnistep.core.checkpoint.ranks import Ranks
from omnistep.core.screen import show

PATIENCE = 10.0
"""Seconds that a lock of a process that has ended may take to go: its data workers hold it, too,
until they have seen that."""


@define
class OutputLock:
    """Holds a directory for this process, until it ends; a context manager.

    Entering raises RunError, naming the process, where another run holds it. Nothing is changed
    then. A file system without locks is told of by `say`, and not locked.
    """

    directory: Path
    say: Say
    _lock: FileLock = field(init=False)

    @_lock.default
    def _new_lock(self) -> FileLock:
        return FileLock(self.directory / ".lock")

    @property
    def _holder(self) -> Path:
        return self.directory / ".lock.holder"

    def __enter__(self) -> Self:
        try:
            held = self._holder.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            held = ""
        process, _, host = held.partition(" ")
        try:
            self._lock.acquire(timeout=0 if _runs(process, host) else PATIENCE)
            self._holder.write_text(f"{os.getpid()} {socket.gethostname()}", encoding="utf-8")
        except Timeout:
            who = f"process {process} on {host}" if host else "another process"
            raise RunError(
                f"another run writes into {self.directory} ({who}): wait for its end, or give "
                "train.output_dir another directory"
            ) from None
        except (OSError, NotImplementedError) as error:
            self.say(f"{self.directory} can't be locked ({error}): see to it that one run writes")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()


def _runs(process: str, host: str) -> bool:
    """Whether a process seems to run: of another host nobody can tell."""
    if not process.isdecimal() or host != socket.gethostname():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def lock_output(output: Path, ranks: Ranks, stack: ExitStack) -> None:
    """Has rank 0 hold the output_dir, before anything is written. Raises CheckpointError on all
    ranks: nothing can be written there, or another run writes."""

    def hold() -> None:
        try:
            str(output).encode("utf-8")
        except UnicodeEncodeError:
            raise RunError("train.output_dir: the name of a directory must be UTF-8") from None
        make_place("train.output_dir", output)
        stack.enter_context(OutputLock(output, show))

    ranks.ask_first(hold)


def make_place(argument: str, directory: Place) -> None:
    """Raises RunError where nothing can be written: now, not when the first checkpoint is due."""
    try:
        try_to_write(directory)
    except OSError as error:
        raise RunError(
            f"{argument}: nothing can be written to {directory} ({error.strerror or error}); "
            "choose another directory"
        ) from None
