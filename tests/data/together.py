"""Ranks that read together, as threads of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import attrs

from omnistep.core.checkpoint.ranks import Ranks


@attrs.frozen(eq=False)
class Thread(Ranks):
    """A rank whose gather meets the others' in memory."""

    meeting: threading.Barrier
    box: list

    def gather(self, value):
        self.box[self.rank] = value
        self.meeting.wait(timeout=30)
        values = list(self.box)
        self.meeting.wait(timeout=30)
        return values


def together(size, act):
    """act(ranks) on each of `size` ranks at once; what each returned."""
    meeting, box = threading.Barrier(size), [None] * size

    def run(rank):
        try:
            return act(Thread(rank, size, None, meeting, box))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
