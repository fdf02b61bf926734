"""How a run is asked to end, and how all of its ranks agree on the step to end at."""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

import torch

from omnistep.parallel.collectives import all_reduce
from omnistep.parallel.mesh import Group

RESUME_ME = 75
"""Exit code after such a wish: all is saved, the run is not finished (EX_TEMPFAIL)."""

WISHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that wish a run to save and end. SIGHUP: the terminal or the connection has gone; under
nohup, which has it ignored, it stays so."""

INTERRUPTED = 130
"""Exit code after a second Ctrl-C, as shells have it: 128 + SIGINT."""

ASKED = b"stopping: this step is finished and saved first; Ctrl-C once more ends at once\n"
AT_ONCE = b"interrupted a second time: ended at once, without saving\n"


class Stop:
    """SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C ask the loop to save and end; a second Ctrl-C
    ends at once. SLURM warns of the end of a job by the signal that `sbatch --signal` names, often
    USR1."""

    def __init__(self, *, silent: bool = False) -> None:
        self.asked = False
        """Of this rank: the others may not have heard yet. See `agreed`."""
        self._silent = silent
        self._before: dict[int, Any] = {}

    def agreed(self, world: Group) -> bool:
        """Whether any rank was asked. Collective, and the same on all: call it once a step.

        The flags travel between hosts (gloo): nothing waits for a device.
        """
        if world.size == 1:
            return self.asked
        return bool(all_reduce(torch.tensor([int(self.asked)]), world, "max"))

    def __enter__(self) -> "Stop":
        for number in (*WISHES, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            end_at_once(silent=self._silent)
        if not (self.asked or self._silent):
            with suppress(OSError):  # the terminal may be what has gone
                os.write(2, ASKED)
        self.asked = True


def end_at_once(*, silent: bool = False) -> None:
    """Ends the process now: no save is waited for, no log flushed. For a signal's handler."""
    # os.write: print may have been interrupted in the middle of a line, and may not be entered
    # a second time. A progress bar has hidden the cursor.
    if not silent:
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")
        os.write(2, AT_ONCE)
    os._exit(INTERRUPTED)
