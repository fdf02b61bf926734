"""The faults, and how each is drawn: whom it befalls, where, and on how many ranks one goes on."""

import errno
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import frozen

from tests.bin.runs import saved_steps
from tests.faults.jobs import Job
from tests.faults.shim import ANY, Call, Strike, Whom
from tests.faults.truth import Truth, World

SPACE = frozenset({Call.CREATE, Call.WRITE, Call.MKDIR})
"""What a full disk refuses."""
CHANGES = frozenset({Call.CREATE, Call.MKDIR, Call.RENAME, Call.UNLINK})
"""What a directory refuses that cannot be written."""
STORES = frozenset({Call.WRITE, Call.SYNC})
FETCHES = frozenset({Call.OPEN, Call.READ})


@frozen
class Damage:
    """Bytes of a checkpoint that are no longer those that were written."""

    file: Path
    """Below the run's directory."""
    how: str
    """`truncated`, `missing` or `flipped`."""
    at: float
    """Where in the file, as a share of its length."""
    bit: int

    def apply(self, output: Path) -> None:
        path = output / self.file
        data = bytearray(path.read_bytes())
        place = int(self.at * len(data))
        if self.how == "missing":
            path.unlink()
        elif self.how == "truncated":
            path.write_bytes(data[:place])
        else:
            data[place] ^= 1 << self.bit
            path.write_bytes(data)

    def __str__(self) -> str:
        return f"{self.how} {self.file}"


@frozen
class Plan:
    """What happens to one run."""

    resumed: bool = False
    """It goes on from a checkpoint; else it starts."""
    strike: Strike = Strike(frozenset())
    damages: tuple[Damage, ...] = ()


Draw = Callable[[random.Random, int, Truth], Plan]
"""Of a number of ranks, and what an undisturbed run on them does."""


@frozen
class Case:
    number: int
    fault: str
    ranks: int
    retry_ranks: int
    plan: Plan


def one(draw: random.Random, ranks: int) -> frozenset[int]:
    return frozenset({draw.randrange(ranks)})


def every(draw: random.Random, ranks: int) -> frozenset[int]:
    return frozenset(range(ranks))


Ranks = Callable[[random.Random, int], frozenset[int]]


def begin(draw: random.Random, truth: Truth) -> tuple[bool, Job]:
    """Whether the struck run goes on from a checkpoint, and such a run undisturbed."""
    resumed = draw.random() < 0.3
    return resumed, truth.resumed if resumed else truth.fresh


def place(draw: random.Random, run: Job, ranks: frozenset[int], calls: frozenset[Call]) -> int:
    return draw.randint(1, run.seen.count(ranks, calls))


def signal_at_a_call(number: int, whom: Whom, chosen: Ranks) -> Draw:
    def draw_plan(draw: random.Random, ranks: int, truth: Truth) -> Plan:
        (resumed, run), struck = begin(draw, truth), chosen(draw, ranks)
        at = place(draw, run, struck, ANY)
        return Plan(resumed, Strike(struck, at=at, signal=number, whom=whom))

    return draw_plan


def signal_at_a_moment(number: int, *whom: Whom) -> Draw:
    def draw_plan(draw: random.Random, ranks: int, truth: Truth) -> Plan:
        (resumed, run), struck = begin(draw, truth), one(draw, ranks)
        seconds = draw.uniform(0.05, 0.9 * run.seconds)
        return Plan(resumed, Strike(struck, signal=number, whom=draw.choice(whom), seconds=seconds))

    return draw_plan


def error_at_a_call(
    calls: frozenset[Call], numbers: tuple[int, ...], chosen: Ranks, lasting: float = 1.0
) -> Draw:
    """`lasting`: how often it is not of one call only."""

    def draw_plan(draw: random.Random, ranks: int, truth: Truth) -> Plan:
        (resumed, run), struck = begin(draw, truth), chosen(draw, ranks)
        at, number = place(draw, run, struck, calls), draw.choice(numbers)
        strike = Strike(struck, calls, at, error=number, lasting=draw.random() < lasting)
        return Plan(resumed, strike)

    return draw_plan


def error_of_a_restore(draw: random.Random, ranks: int, truth: Truth) -> Plan:
    struck = one(draw, ranks) if draw.random() < 0.5 else every(draw, ranks)
    at = place(draw, truth.resumed, struck, FETCHES)
    lasting = draw.random() < 0.5
    return Plan(True, Strike(struck, FETCHES, at, error=errno.EIO, lasting=lasting))


def damage(draw: random.Random, half: Path, step: int, how: str) -> Damage:
    directory = half / f"checkpoints/{step}"
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size)
    chosen = draw.choice(files).relative_to(half)
    return Damage(chosen, how, draw.random(), draw.randrange(8))


HOWS = ("truncated", "missing", "flipped")


def damage_newest(how: str) -> Draw:
    def draw_plan(draw: random.Random, ranks: int, truth: Truth) -> Plan:
        return Plan(True, damages=(damage(draw, truth.half, saved_steps(truth.half)[-1], how),))

    return draw_plan


def damage_all(draw: random.Random, ranks: int, truth: Truth) -> Plan:
    steps = saved_steps(truth.half)
    return Plan(True, damages=tuple(damage(draw, truth.half, s, draw.choice(HOWS)) for s in steps))


def damage_older(draw: random.Random, ranks: int, truth: Truth) -> Plan:
    older = draw.choice(saved_steps(truth.half)[:-1])
    return Plan(True, damages=(damage(draw, truth.half, older, draw.choice(HOWS)),))


FAULTS: Mapping[str, Draw] = {
    "SIGKILL of one rank at a call": signal_at_a_call(signal.SIGKILL, Whom.SELF, one),
    "SIGKILL of all ranks at a call": signal_at_a_call(signal.SIGKILL, Whom.EVERYONE, every),
    "SIGKILL of one rank at a moment": signal_at_a_moment(signal.SIGKILL, Whom.SELF),
    "SIGKILL of all ranks at a moment": signal_at_a_moment(
        signal.SIGKILL, Whom.RANKS, Whom.LAUNCHER, Whom.EVERYONE
    ),
    "SIGTERM of one rank at a call": signal_at_a_call(signal.SIGTERM, Whom.SELF, one),
    "SIGTERM of the job at a moment": signal_at_a_moment(signal.SIGTERM, Whom.LAUNCHER),
    "disk full on one rank": error_at_a_call(SPACE, (errno.ENOSPC,), one),
    "disk full on all ranks": error_at_a_call(SPACE, (errno.ENOSPC,), every),
    "disk full for one call": error_at_a_call(SPACE, (errno.ENOSPC,), one, lasting=0),
    "directory read-only or forbidden": error_at_a_call(
        CHANGES, (errno.EROFS, errno.EACCES), every
    ),
    "… on one rank": error_at_a_call(CHANGES, (errno.EROFS, errno.EACCES), one),
    "I/O error of a write or fsync": error_at_a_call(STORES, (errno.EIO,), one, lasting=0.5),
    "I/O error of a restore": error_of_a_restore,
    "newest checkpoint truncated": damage_newest("truncated"),
    "newest checkpoint lacks a file": damage_newest("missing"),
    "newest checkpoint has a flipped bit": damage_newest("flipped"),
    "all checkpoints damaged": damage_all,
    "older checkpoint damaged": damage_older,
}

RANKS = (1, 2, 4)
ELSEWHERE = 0.25
"""How often one goes on on another number of ranks."""


def make_case(world: World, seed: int, number: int, ranks: tuple[int, ...] = RANKS) -> Case:
    """The case of this number: the faults come in turn, each on every number of ranks in turn."""
    turn, at = divmod(number, len(FAULTS))
    fault = list(FAULTS)[at]
    here = ranks[(turn + at) % len(ranks)]
    draw = random.Random(f"{seed}/{number}")
    others = [n for n in ranks if n != here]
    there = draw.choice(others) if others and draw.random() < ELSEWHERE else here
    return Case(number, fault, here, there, FAULTS[fault](draw, here, world.truth(here)))
