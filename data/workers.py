"""The processes that read data: how they start, and how they end with the one that started them."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def no_errors_by_signal() -> Iterator[None]:
    """Takes back the handler of SIGCHLD that the DataLoader sets: where a worker dies, it raises an
    error in the middle of whatever this process does. Reading finds it out, too."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if main and before is not None:
        signal.signal(signal.SIGCHLD, before)


def start_worker(_: int) -> None:
    """Runs first in a worker."""
    # Ctrl-C and a scheduler's SIGTERM go to the whole group. The main process decides what is
    # to happen then (save, and end its workers), so workers must not die before it.
    os.setpgrp()
    # When the main process is killed, a worker that is sending a block waits for ever: the pipe
    # is full and the other workers keep it open. The DataLoader's own watch does not cover that.
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def start_context() -> Any:
    """How workers start.

    fork is fast, and scripts need no `if __name__ == "__main__"`. It is safe while the process
    has no threads that hold locks; jax starts such threads, and a CUDA context does not survive
    it. Then workers come from a server process that has imported nothing but this folder.
    """
    if "jax" not in sys.modules and not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["omnistep.data.blocks", "torch.utils.data"])
    return context
