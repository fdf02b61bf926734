"""Starts runs of bin/train and bin/sample by fork, so that each is a process of its own and yet
pays for no imports. It reads one request a line: `{"program", "argv", "stdout", "stderr", "stdin"}`
starts one and answers its process id, `{"wait": pid}` answers how that one ended. It must stay free
of jax: the runs fork their workers."""

import json
import os
import sys
from typing import Any

import torch

from omnistep.bin import sample, train

MAINS = {"train": train.main, "sample": sample.main}


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        elif (answer := os.fork()) == 0:
            raise SystemExit(child(request))
        print(answer, flush=True)


def child(request: dict[str, Any]) -> int:
    for number, name, flags in (
        (0, "stdin", os.O_RDONLY),
        (1, "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(request[name], flags, 0o644), number)
    # it makes its pool of threads anew at the first use, which threads must not race for
    torch.set_num_threads(1)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # the parent's has read ahead
    return MAINS[request["program"]](request["argv"])


if __name__ == "__main__":
    serve()
