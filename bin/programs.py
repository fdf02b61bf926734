"""The programs' entry points: they import what takes seconds, and can be interrupted meanwhile."""

import sys
from importlib import import_module

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def _run(module: str) -> int:
    try:
        return import_module(module).main()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def train() -> int:
    return _run("omnistep.bin.train")


def sample() -> int:
    return _run("omnistep.bin.sample")


def convert() -> int:
    return _run("omnistep.bin.convert")


def caption() -> int:
    return _run("omnistep.bin.caption")
