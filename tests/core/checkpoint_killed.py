"""Killed in the middle of a save. `main([DIRECTORY, FORMAT, FRACTION, ...])`.

For each fraction a forked child saves steps 1 and 2 in DIRECTORY/<i> and is killed (SIGKILL)
when that fraction of the time of a save has passed in its third. One process imports jax once.
"""

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

import omnistep.core.checkpoint.catalogue  # before the fork, while no backend exists
import omnistep.core.checkpoint.dcp  # noqa: F401
from omnistep.core.checkpoint.store import Format, open_store


def state_of(step: int) -> dict[str, Tensor | str | int]:
    weights = torch.arange(6 << 20, dtype=torch.float32).reshape(3, -1) * step
    return {"a": weights[0].clone(), "b": weights[1:].clone(), "position": f"{step}", "n": step}


def child(directory: Path, format: Format, ready: int) -> None:
    store = open_store(directory, format=format)
    states = [state_of(step) for step in range(4)]
    began = 0.0
    for step in (1, 2):
        began = time.perf_counter()
        store.save(step, states[step])
        store.wait()
    os.write(ready, f"{time.perf_counter() - began}\n".encode())
    store.save(3, states[3])
    store.wait()
    time.sleep(60)  # killed in here at the latest


def main(argv: list[str]) -> None:
    directory, format = Path(argv[0]), argv[1]
    for index, fraction in enumerate(map(float, argv[2:])):
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(directory / str(index), format, writes)  # pyright: ignore[reportArgumentType]
            os._exit(1)
        with os.fdopen(reads) as ready:
            duration = float(ready.readline())
        time.sleep(duration * fraction)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(writes)
