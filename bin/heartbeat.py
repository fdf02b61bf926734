"""Signs of life: a rank that is stopped, or whose machine is gone, is named and ends the run.

Ranks wait for each other in collectives, where nothing of Python runs, and a collective can't tell
a rank that is slow from one that is gone. So a thread of each rank writes a number into the store
from time to time, also while its rank compiles. Rank 0 looks at all of them, the others at rank 0.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from attrs import define, field

from omnistep.core.screen import show

LOST_PEER = 69
"""Exit code of a rank that missed another one (EX_UNAVAILABLE)."""
SILENT = "silent"
"""The store's key for what is said of a rank that gave no sign of life."""


@define(eq=False)
class Heartbeat:
    """One per rank; `start` it once. Ends the process, after a line on standard error, where a rank
    gave no sign of life for `timeout` seconds."""

    connect: Callable[[timedelta], dist.Store]
    """Opens a connection of this thread's own to the ranks' store."""
    rank: int
    size: int
    timeout: float
    told: Callable[[str], None] = lambda text: None
    """Is given the line, on the rank that found it out."""
    end: Callable[[int], None] = os._exit
    _store: dist.Store | None = field(default=None, init=False)
    _beat: int = field(default=0, init=False)
    _seen: dict[int, tuple[int, float]] = field(factory=dict, init=False)
    """By rank: its last number, and when it was new."""

    @property
    def interval(self) -> float:
        """Seconds between two signs."""
        return min(self.timeout / 8, 5.0)

    def start(self) -> None:
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        before = time.monotonic()
        while True:
            now = time.monotonic()
            if now - before > 4 * self.interval:  # we were stopped: nobody else is to blame
                self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}
            before = now
            try:
                if (line := self.look(now)) is not None:
                    show(line, sys.stderr)
                    self.end(LOST_PEER)
                    return
            except dist.DistError:
                self._store = None  # rank 0 may have it, and be gone or stopped
                if (silence := self._silence(0, None, now)) is not None and self.rank:
                    show(silence, sys.stderr)
                    self.end(LOST_PEER)
                    return
            time.sleep(self.interval)

    def look(self, now: float) -> str | None:
        """Gives a sign and looks for those of others: "" where another rank has told of one that is
        silent, else what is to be told. None: all are alive."""
        if self._store is None:
            self._store = self.connect(timedelta(seconds=max(2 * self.interval, 1.0)))
        self._beat += 1
        self._store.set(f"beat/{self.rank}", str(self._beat))
        if self._store.check([SILENT]):
            self.end(LOST_PEER)
            return None
        watched = range(1, self.size) if self.rank == 0 else (0,)
        for rank in watched:
            key = f"beat/{rank}"
            beat = int(self._store.get(key)) if self._store.check([key]) else 0
            if (line := self._silence(rank, beat, now)) is not None:
                if self._store.compare_set(SILENT, "", line).decode() != line:
                    self.end(LOST_PEER)
                    return None
                self.told(line)
                return line
        return None

    def _silence(self, rank: int, beat: int | None, now: float) -> str | None:
        """What is to be told of a rank whose number is `beat` (None: can't be known)."""
        last, since = self._seen.setdefault(rank, (beat or 0, now))
        if beat is not None and beat != last:
            self._seen[rank] = (beat, now)
        elif now - since > self.timeout:
            return silence(rank, self.timeout)
        return None


def silence(rank: int, seconds: float) -> str:
    """What is said of a rank that was waited for in vain."""
    return (
        f"error: rank {rank} has given no sign of life for {seconds:.0f} s (train.rank_timeout): "
        "it is stopped, or its machine or the network is gone. What was saved is sound"
    )
