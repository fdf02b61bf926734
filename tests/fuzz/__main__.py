"""Reads changed copies of every kind of file that a run reads, and counts what comes of them.

    python -m tests.fuzz --inputs 150 --seed 0

prints a table in Markdown (docs/fuzz.md has one). A file may be accepted (the change is in what it
says), or refused by the product's own errors; anything else is a fault: a process that ends, an
error of another kind, ten seconds, a gigabyte.
"""

import argparse
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from attrs import frozen

from tests.fuzz.kinds import KINDS
from tests.fuzz.mutate import mutated

SECONDS = 10
MEMORY = 1 << 30
OUTCOMES = ("accepted", "refused", "crash", "traceback", "hang", "memory")
FAULTS = OUTCOMES[2:]


@frozen
class Found:
    """What came of one input."""

    seed: int
    outcome: str
    detail: str = ""


def fuzz(kind: str, inputs: int, first: int = 0) -> list[Found]:
    """Reads `inputs` changed files of a kind, in processes of their own: one ends only where an
    input ends it."""
    found: list[Found] = []
    while len(found) < inputs:
        found += _batch(kind, first + len(found), first + inputs)
    return found


def _batch(kind: str, start: int, stop: int) -> list[Found]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(kind, start, stop, write)
    os.close(write)
    found, rest = [], b""
    with open(read, "rb", buffering=0) as answers:
        while start + len(found) < stop:
            ready, _, _ = select.select([answers], [], [], SECONDS)
            if not ready:
                os.kill(child, signal.SIGKILL)
                found.append(Found(start + len(found), "hang"))
                break
            chunk = answers.read(1 << 16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                outcome, _, detail = line.decode("utf-8", "replace").partition(" ")
                found.append(Found(start + len(found), outcome, detail))
    _, status = os.waitpid(child, 0)
    if start + len(found) < stop and not (found and found[-1].outcome in ("hang", "memory")):
        number = os.waitstatus_to_exitcode(status)
        found.append(Found(start + len(found), "crash", f"exit {number}"))
    return found


def _child(kind: str, start: int, stop: int, answers: int) -> None:
    place = Path(tempfile.mkdtemp(prefix="omnistep-fuzz-"))
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        os.environ["OMNISTEP_CACHE"] = str(place / "cache")
        sound = KINDS[kind].make()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for seed in range(start, stop):
            outcome = _one(kind, sound, seed, place)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            if used > MEMORY:
                os.write(answers, f"memory {used >> 20} MiB\n".encode())
                break
            os.write(
                answers, outcome.replace("\n", " | ")[:1000].encode("utf-8", "replace") + b"\n"
            )
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os._exit(0)


def _one(kind: str, sound: bytes, seed: int, place: Path) -> str:
    one = KINDS[kind]
    path = place / one.name
    path.write_bytes(mutated(sound, seed))
    try:
        one.read(path)
    except one.refusals as error:
        return f"refused {error}"
    except BaseException:
        return f"traceback {traceback.format_exc(limit=-3)}"
    return "accepted"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=150, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--kind", choices=KINDS, action="append")
    args = parser.parse_args()
    print(f"| file | inputs | {' | '.join(OUTCOMES)} |")
    print("| --- " * (len(OUTCOMES) + 2) + "|")
    total: Counter[str] = Counter()
    for kind in args.kind or KINDS:
        found = fuzz(kind, args.inputs, args.seed)
        counts = Counter(one.outcome for one in found)
        total += counts
        print(
            f"| {kind} | {len(found)} | {' | '.join(str(counts[o]) for o in OUTCOMES)} |",
            flush=True,
        )
        for one in found:
            if one.outcome in FAULTS:
                print(f"{kind}, seed {one.seed}: {one.outcome} {one.detail}", file=sys.stderr)
    print(f"| **all** | {total.total()} | {' | '.join(str(total[o]) for o in OUTCOMES)} |")
    return int(any(total[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
