"""The faults, and how each is drawn: whom it befalls, where, and on how many ranks one goes on."""

import errno
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs
from attrs import frozen

from omnistep.bin.stop import WISHES
from tests.bin.runs import saved_steps
from tests.faults.jobs import Job
from tests.faults.shim import NOTHING, Call, Made, Strike, Whom, area_of, pattern_of
from tests.faults.truth import Truth, World

SPACE = frozenset({Call.CREATE, Call.WRITE, Call.MKDIR})
"""What a full disk refuses."""
CHANGES = frozenset({Call.CREATE, Call.MKDIR, Call.RENAME, Call.UNLINK})
"""What a directory refuses that cannot be written; READ_ONLY: and how."""
READ_ONLY = (errno.EROFS, errno.EACCES)
STORES = frozenset({Call.WRITE, Call.SYNC})
FETCHES = frozenset({Call.OPEN, Call.READ})
KILL, STOP = (signal.SIGKILL,), (signal.SIGSTOP,)
LOST_DATA = (errno.EIO, errno.ESTALE, errno.ENOENT)
"""What reading data ends with where a disk or a mount goes."""
LOST_CONSOLE = (errno.EPIPE, errno.EIO, errno.ENOSPC)


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
    strike: Strike = NOTHING
    damages: tuple[Damage, ...] = ()
    second: float | None = None
    """Seconds after which another run is started in the same directory."""


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


def calls_on(area: str, job: Job) -> list[Made]:
    return [made for made in job.seen.calls if area_of(made.place) == area]


def moment(draw: random.Random, job: Job, share: float = 1.0) -> float:
    """Seconds until a moment within the first `share` of a job."""
    return draw.uniform(0, share * max(made.seconds for made in job.seen.calls))


def at_a_call(draw: random.Random, calls: Sequence[Made], ranks: frozenset[int]) -> Strike:
    """At one of these calls, all alike, by any of the ranks; the fault is still to be added.

    Threads make calls in changing order: so the place is a file, not a number among all calls.
    """
    mine = [made for made in calls if made.rank in ranks]
    number = draw.randrange(len(mine))
    chosen = mine[number]
    alike = [m for m in mine[: number + 1] if (m.call, m.pattern) == (chosen.call, chosen.pattern)]
    return Strike(ranks, chosen.call, chosen.pattern, len(alike))


def signal_at_a_call(numbers: tuple[int, ...], whom: Whom, chosen: Ranks) -> Draw:
    def draw_plan(draw: random.Random, ranks: int, truth: Truth) -> Plan:
        resumed, run = begin(draw, truth)
        strike = at_a_call(draw, calls_on("run", run), chosen(draw, ranks))
        return Plan(resumed, attrs.evolve(strike, signal=draw.choice(numbers), whom=whom))

    return draw_plan


def signal_at_a_moment(numbers: tuple[int, ...], *whom: Whom) -> Draw:
    def draw_plan(draw: random.Random, ranks: int, truth: Truth) -> Plan:
        (resumed, run), struck = begin(draw, truth), one(draw, ranks)
        seconds = moment(draw, run)
        number = draw.choice(numbers)
        return Plan(resumed, Strike(struck, signal=number, whom=draw.choice(whom), seconds=seconds))

    return draw_plan


def error_at_a_call(
    kinds: frozenset[Call], numbers: tuple[int, ...], chosen: Ranks, lasting: float = 1.0
) -> Draw:
    """`lasting`: how often all calls of these kinds fail from there on, not only that one."""

    def draw_plan(draw: random.Random, ranks: int, truth: Truth) -> Plan:
        resumed, run = begin(draw, truth)
        calls = [made for made in calls_on("run", run) if made.call in kinds]
        strike = at_a_call(draw, calls, chosen(draw, ranks))
        return Plan(resumed, fail(draw, strike, kinds, numbers, lasting))

    return draw_plan


def error_of_data(chosen: Ranks) -> Draw:
    """From there on, or once."""

    def draw_plan(draw: random.Random, ranks: int, truth: Truth) -> Plan:
        resumed, run = begin(draw, truth)
        strike = at_a_call(draw, calls_on("data", run), chosen(draw, ranks))
        return Plan(resumed, fail(draw, strike, FETCHES, LOST_DATA, 0.5))

    return draw_plan


def kill_of_a_worker(draw: random.Random, ranks: int, truth: Truth) -> Plan:
    (resumed, run), (rank,) = begin(draw, truth), one(draw, ranks)
    calls = calls_on("data", run)
    opened = [made for made in calls if (made.rank, made.call) == (rank, Call.OPEN)]
    at = draw.randrange(1, len(opened))  # the first is the rank's own, which counts the records
    struck, pattern = frozenset({rank}), opened[0].pattern
    return Plan(resumed, Strike(struck, Call.OPEN, pattern, at, signal=KILL[0], workers=True))


def error_of_the_console(draw: random.Random, ranks: int, truth: Truth) -> Plan:
    resumed, run = begin(draw, truth)
    strike = at_a_call(draw, calls_on("console", run), frozenset({0}))
    return Plan(resumed, fail(draw, strike, frozenset({Call.WRITE}), LOST_CONSOLE, 0.8))


def second_run(draw: random.Random, ranks: int, truth: Truth) -> Plan:
    resumed, run = begin(draw, truth)
    return Plan(resumed, second=moment(draw, run, 0.6))  # later, the first has mostly ended


def fail(
    draw: random.Random,
    strike: Strike,
    kinds: frozenset[Call],
    numbers: tuple[int, ...],
    lasting: float,
) -> Strike:
    lasts = kinds if draw.random() < lasting else frozenset()
    return attrs.evolve(strike, error=draw.choice(numbers), lasting=lasts)


def error_of_a_restore(draw: random.Random, ranks: int, truth: Truth) -> Plan:
    newest = f"checkpoints/{saved_steps(truth.half)[-1]}"
    reads = [
        made
        for made in truth.resumed.seen.calls
        if made.call in FETCHES and made.place.startswith(newest + "/")
    ]
    strike = at_a_call(draw, reads, draw.choice((one, every))(draw, ranks))
    return Plan(True, fail(draw, strike, FETCHES, (errno.EIO,), 0.5))


def damage(draw: random.Random, truth: Truth, step: int, how: str, needed: float = 0.7) -> Damage:
    """Of any file of a step; `needed`: how often of one that a restore on this mesh opens."""
    directory = truth.half / f"checkpoints/{step}"
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size)
    places = [str(path.relative_to(truth.half)) for path in files]
    if draw.random() < needed:
        newest = saved_steps(truth.half)[-1]
        calls = [made for made in truth.resumed.seen.calls if made.call == Call.OPEN]
        opened = {
            m.pattern.replace(f"checkpoints/{newest}/", f"checkpoints/{step}/") for m in calls
        }
        places = [place for place in places if pattern_of(place) in opened]
    return Damage(Path(draw.choice(places)), how, draw.random(), draw.randrange(8))


HOWS = ("truncated", "missing", "flipped")


def damage_newest(how: str) -> Draw:
    def draw_plan(draw: random.Random, ranks: int, truth: Truth) -> Plan:
        return Plan(True, damages=(damage(draw, truth, saved_steps(truth.half)[-1], how),))

    return draw_plan


def damage_all(draw: random.Random, ranks: int, truth: Truth) -> Plan:
    steps = saved_steps(truth.half)
    return Plan(True, damages=tuple(damage(draw, truth, s, draw.choice(HOWS), 1.0) for s in steps))


def damage_older(draw: random.Random, ranks: int, truth: Truth) -> Plan:
    older = draw.choice(saved_steps(truth.half)[:-1])
    return Plan(True, damages=(damage(draw, truth, older, draw.choice(HOWS)),))


FAULTS: Mapping[str, Draw] = {
    "SIGKILL of one rank at a call": signal_at_a_call(KILL, Whom.SELF, one),
    "SIGKILL of all ranks at a call": signal_at_a_call(KILL, Whom.EVERYONE, every),
    "SIGKILL of one rank at a moment": signal_at_a_moment(KILL, Whom.SELF),
    "SIGKILL of all ranks at a moment": signal_at_a_moment(
        KILL, Whom.RANKS, Whom.LAUNCHER, Whom.EVERYONE
    ),
    "a wish to end of one rank at a call": signal_at_a_call(WISHES, Whom.SELF, one),
    "a wish to end of the job at a moment": signal_at_a_moment(WISHES, Whom.LAUNCHER),
    "one of several ranks is stopped at a call": signal_at_a_call(STOP, Whom.SELF, one),
    "one of several ranks is stopped at a moment": signal_at_a_moment(STOP, Whom.SELF),
    "disk full on one rank": error_at_a_call(SPACE, (errno.ENOSPC,), one),
    "disk full on all ranks": error_at_a_call(SPACE, (errno.ENOSPC,), every),
    "disk full for one call": error_at_a_call(SPACE, (errno.ENOSPC,), one, lasting=0),
    "directory read-only on one rank": error_at_a_call(CHANGES, READ_ONLY, one),
    "directory read-only on all ranks": error_at_a_call(CHANGES, READ_ONLY, every),
    "I/O error of a write or fsync": error_at_a_call(STORES, (errno.EIO,), one, lasting=0.5),
    "I/O error of any read": error_at_a_call(FETCHES, (errno.EIO,), one, lasting=0.5),
    "I/O error of a restore": error_of_a_restore,
    "data cannot be read by one rank": error_of_data(one),
    "data cannot be read by any rank": error_of_data(every),
    "SIGKILL of a process that reads data": kill_of_a_worker,
    "standard output cannot be written": error_of_the_console,
    "a second run in the same directory": second_run,
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
    if "of several ranks" in fault:
        ranks = tuple(n for n in ranks if n > 1)
    here = ranks[(turn + at) % len(ranks)]
    draw = random.Random(f"{seed}/{number}")
    others = [n for n in ranks if n != here]
    there = draw.choice(others) if others and draw.random() < ELSEWHERE else here
    return Case(number, fault, here, there, FAULTS[fault](draw, here, world.truth(here)))
