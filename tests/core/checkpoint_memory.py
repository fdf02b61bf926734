"""What a save and a restore take beside the state. `main([DIRECTORY, FORMAT])`.

Prints MB: of the state, beyond its copy while it is written, and beyond it while it is restored.
"""

import ctypes
from pathlib import Path

import torch

import omnistep.core.checkpoint.catalogue  # imported before memory is looked at
import omnistep.core.checkpoint.dcp  # noqa: F401
from omnistep.core.checkpoint.store import Format, open_store


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(field))


def forget_peak() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def main(argv: list[str]) -> None:
    format: Format = argv[1]  # pyright: ignore[reportAssignmentType]
    store = open_store(Path(argv[0]), format=format)
    store.save(1, {"w": torch.ones(10)})  # starts threads, fills caches
    state = {name: torch.full((24, 1 << 20), 0.5) for name in "abcd"}
    store.save(2, state)
    with_copy = forget_peak()
    store.wait()
    writing = memory("VmHWM") - with_copy
    size = sum(leaf.nbytes for leaf in state.values()) >> 20
    before = forget_peak()
    found = store.restore({name: leaf.to("meta") for name, leaf in state.items()})
    reading = memory("VmHWM") - before - size
    assert all(torch.equal(found[name], leaf) for name, leaf in state.items())
    print(size, writing, reading)
    store.close()
