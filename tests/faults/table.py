"""docs/faults.md: faults x outcomes."""

from collections.abc import Iterable, Sequence

from tests.faults.cases import FAULTS, RANKS
from tests.faults.play import Outcome
from tests.faults.truth import (
    ALIVE,
    CUT,
    KEEP,
    KEEP_EVERY,
    LOSS_TOLERANCE,
    SAVE,
    STEPS,
    WEIGHT_TOLERANCE,
)

HEADINGS = (
    "fault",
    f"runs on {' + '.join(map(str, RANKS))} ranks",
    "went on: the same bits",
    "of these fell back",
    "ended, and the retry: the same bits",
    "the retry on other ranks: equal but for rounding",
    "failed",
)

TEXT = f"""# Faults and what comes of them

`python -m tests.faults --runs {{runs}} --seed {{seed}}` wrote this page.

Each run is the real `bin/train` (`--nproc` where there are several ranks; 2 with fsdp2, 4 with
fsdp2 and tensor parallelism) of a tiny model for {STEPS} steps. It saves every {SAVE} steps, and
keeps the newest {KEEP} and the multiples of {KEEP_EVERY}. It starts anew, or goes on from the
directory of a run that was cut off at step {CUT}: three of ten do, and all that meet damage or fail
to restore. One fault befalls it, at a place drawn from the seed.

{{table}}

**The same bits**: the loss, gradient norm and number of targets of every step, and all arrays and
texts of the last checkpoint (weights, moments, step, keys, data position, meters, the model's
config) are those of a run on the same mesh that nobody disturbed.

**Ended**: killed by the fault; or by the ranks that miss a stopped one, which they name within
{ALIVE:.0f} seconds (train.rank_timeout; 120 by default); or asked to stop, having saved (before the
run listens, in its first tenths of a second, and after its last line the signal alone ends it); or
with one `error:` that names the cause, every step that was made saved where it was the data. Never
with a traceback, never by hanging. At that moment every checkpoint that had been committed and was
to be kept is there, and each one there restores to the bits of the undisturbed run's. The retry
(`--train.load_checkpoint_path auto`, no fault) begins at the newest of them, finds none that is not
sound, and leaves no remains of the save that was cut off.

**Fell back**: the newest checkpoint could not be read. The run said so, naming step and array, set
it aside as `<step>.damaged` and went on from an older one. Damage to a file that no restore reads
changes nothing. Where all checkpoints are damaged the error names step and array of each, and
nothing is changed; the retry is then made with the files whole again.

**Equal but for rounding**: each loss within {LOSS_TOLERANCE:.0e} of the undisturbed run's on the
first mesh, each weight's leaf within {WEIGHT_TOLERANCE:.0e} by its norm, data position and meters
equal.

**A second run** is refused and told whose process holds the directory; where standard output can't
be written that is said once on standard error. The run goes on in both cases.

How a fault is made: a small library (`tests/faults/shim.c`, by LD_PRELOAD) sees every call that
opens, reads, writes, syncs, renames, makes or deletes something below the run's directory, reads
its data, or writes to standard output. The
calls of an undisturbed run are listed, one is drawn, and there the call fails, or a signal comes
before it; of a struck write the first half is made, as a full disk or a kill may leave it. "Full"
and "read-only" last for the rest of the run. "At a moment" is by the clock, from the start of
`main` to the last call. {{drawn}} runs were drawn; {{missed}} had ended before their fault came and
are not counted.

Not covered: the loss of power or of a host, after which a disk may have lost what was not synced;
network file systems that reorder; buckets; faults of memory. An error of reading counts as damage
even if the disk recovers: the step is set aside whole, and may be renamed back.
"""


def page(outcomes: Sequence[Outcome], runs: int, seed: int) -> str:
    counted = [outcome for outcome in outcomes if outcome.verdict != "missed"]
    rows = [_row(name, [o for o in counted if o.case.fault == name]) for name in FAULTS]
    rows.append(_row("**all**", counted))
    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS)), *rows]
    return TEXT.format(
        runs=runs,
        seed=seed,
        table="\n".join(lines),
        drawn=len(outcomes),
        missed=len(outcomes) - len(counted),
    )


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    verdicts = [outcome.verdict for outcome in outcomes]
    ranks = [sum(outcome.case.ranks == n for outcome in outcomes) for n in RANKS]
    cells = [
        name,
        f"{len(outcomes)} = {' + '.join(map(str, ranks))}",
        verdicts.count("finished"),
        sum(outcome.verdict == "finished" and outcome.fell_back for outcome in outcomes),
        verdicts.count("retried"),
        verdicts.count("elsewhere"),
        verdicts.count("failed"),
    ]
    return _line(cells)
