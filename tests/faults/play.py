"""One case from the fault to the end of the retry, and what is wrong with it."""

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Literal

from attrs import frozen

from omnistep.bin.heartbeat import LOST_PEER
from omnistep.bin.stop import ASKED, RESUME_ME
from tests.bin.runs import content, saved_steps
from tests.faults.cases import Case
from tests.faults.jobs import PATIENCE, Job
from tests.faults.shim import area_of
from tests.faults.truth import (
    CUT,
    Truth,
    World,
    differences,
    distances,
    kept,
    read_numbers,
    unlike,
)

Verdict = Literal["missed", "finished", "retried", "elsewhere", "failed"]
"""missed: the fault did not come before the run's end. finished: the run went on by itself, to the
bits of one undisturbed. retried: it ended as it should, all earlier checkpoints sound, and the
retry finished so. elsewhere: so, on another number of ranks, equal but for rounding."""


@frozen
class Outcome:
    case: Case
    verdict: Verdict
    problems: tuple[str, ...]
    how: str
    """Where the fault struck, and how the run ended."""
    fell_back: bool
    """The run set a damaged checkpoint aside and began at an older one."""
    seconds: float


def play(world: World, case: Case) -> Outcome:
    truth, output = world.truth(case.ranks), world.directory / f"runs/{case.number}"
    shutil.rmtree(output, ignore_errors=True)
    if case.plan.resumed:
        shutil.copytree(truth.half, output)
    for damage in case.plan.damages:
        damage.apply(output)
    before, steps = content(output / "checkpoints"), set(saved_steps(output))
    job, second = strike(world, case, output)
    where = "; ".join(map(str, case.plan.damages)) or job.seen.struck or "not struck"
    if second is not None:
        if "another run writes" in job.err:  # it came to the lock first
            job, second = second, job
        where = "one of two refused" if "another run writes" in second.err else "not struck"
    problems = [*ending(case, job, second, output), *harm(case, job, output, truth)]
    verdict: Verdict = "finished" if where != "not struck" else "missed"
    seconds = job.seconds
    if job.code == 0:
        problems += differences(output, truth)
        if area_of(case.plan.strike.pattern) != "console":  # which lacks a line
            problems += fall_back(job, output, steps)
        problems += retention(job, output, steps)
    elif job.code is not None:
        verdict = "retried" if case.retry_ranks == case.ranks else "elsewhere"
        where += f"; ended with {job.code}, {said(job)}"
        if case.plan.damages:
            if content(output / "checkpoints") != before:
                problems.append("a run that could not begin changed the checkpoints")
            for damage in case.plan.damages:  # whole again: nothing else may be lost
                shutil.copy(truth.half / damage.file, output / damage.file)
        retry, more = go_on(world, case, output, truth)
        problems += more
        seconds += retry.seconds
    fell_back = bool(set_aside(output))
    if problems:
        verdict = "failed"
    else:
        shutil.rmtree(output)
    return Outcome(case, verdict, tuple(problems), where, fell_back, seconds)


def strike(world: World, case: Case, output: Path) -> tuple[Job, Job | None]:
    """The struck run, and the one that was started beside it."""
    beside: list[Job] = []

    def meanwhile() -> None:
        if case.plan.second is not None:
            time.sleep(case.plan.second)
            beside.append(world.run(output, case.ranks))

    workers = int(case.plan.strike.workers)
    job = world.run(output, case.ranks, case.plan.strike, workers=workers, meanwhile=meanwhile)
    return job, next(iter(beside), None)


def said(job: Job) -> str:
    """The error that a run ended with."""
    *_, text = re.split(r"^(?=error: )", job.err, flags=re.M)
    return text.strip() if text.startswith("error: ") else "without an error"


def set_aside(output: Path) -> set[int]:
    places = (output / "checkpoints").glob("*.damaged*")
    return {int(path.name.partition(".")[0]) for path in places}


def fall_back(job: Job, output: Path, steps: set[int]) -> list[str]:
    """What is wrong with the step at which a run began that found damage, or with what it said."""
    damaged = set_aside(output)
    sound = max(steps - damaged, default=None)
    problems = []
    if sound is not None and f"  resume  step {sound}," not in job.out:
        problems.append(f"did not begin at step {sound}: {job.out}")
    for step in damaged:
        told = re.search(
            rf"^ damaged  step {step}, now \S+: (rank \d+: )?'[\w.]+' in the checkpoint",
            job.out,
            re.M,
        )
        problems += [] if told else [f"did not tell of step {step}: {job.out}"]
    return problems


def retention(job: Job, output: Path, steps: set[int]) -> list[str]:
    """Whether a finished run, which began among these steps, left what it was to keep."""
    saved = set(job.seen.commits)
    wanted = kept((steps - set_aside(output)) | saved) if saved else steps - set_aside(output)
    there = set(saved_steps(output))
    return [] if there == wanted else [f"holds the checkpoints {there}, not {wanted}"]


def saved(case: Case, job: Job, output: Path) -> list[str]:
    """What is wrong with the checkpoints of a run whose data failed: nothing, where each of its
    steps is saved."""
    if not job.seen.struck or not (output / "metrics.jsonl").exists():
        return []
    made, newest = max(read_numbers(output), default=0), max(saved_steps(output), default=0)
    if newest >= made or (case.plan.resumed and made <= CUT):  # those of the run that was cut off
        return []
    return [f"step {made} was made, step {newest} saved"]


def ending(case: Case, job: Job, second: Job | None, output: Path) -> list[str]:
    """What is wrong with the way in which a struck run ended, and the one beside it."""
    strike, text = case.plan.strike, f"exit {job.code}; stderr: {job.err.strip() or 'empty'}"
    if job.code is None:
        return [f"hung for {PATIENCE:.0f} s; stderr: {job.err.strip()}"]
    if "Traceback" in job.err or "terminate called" in job.err:
        return [f"not a clear error; {text}"]
    if second is not None:
        told = re.match(
            r"error: (rank \d+: )?another run writes into .* \(process \d+ on ", second.err
        )
        after = not second.err and second.code == 0  # the first was done by then
        fine = job.code == 0 and (after or (told and second.code == 1))
        return [] if fine else [f"{text}; the second: exit {second.code}; stderr: {second.err}"]
    if area_of(strike.pattern) == "console":
        told = "standard output can't be written (" in job.err
        return [] if job.code == 0 and told else [f"standard output was gone; {text}"]
    if job.code == 0:
        return []
    if not job.seen.struck and not case.plan.damages:
        return [f"failed without a fault; {text}"]
    if strike.workers:
        told = job.code == 1 and "DataLoader worker" in said(job)
        return saved(case, job, output) if told else [f"after a SIGKILL of a worker: {text}"]
    if strike.signal == signal.SIGKILL:
        told = job.code == 128 + signal.SIGKILL and "was killed by SIGKILL" in job.err
        return [] if job.code == -signal.SIGKILL or told else [f"after a SIGKILL: {text}"]
    if strike.signal == signal.SIGSTOP:
        silent = job.code == LOST_PEER and "has given no sign of life for" in job.err
        absent = job.code == 1 and "did not come within" in job.err
        return [] if silent or absent else [f"after a rank was stopped: {text}"]
    if strike.signal:
        if job.code == RESUME_ME:
            told = ASKED.decode() in job.err or case.ranks > 1
            return [] if told and "stopped and saved at step" in job.out else [text]
        # before the first step, or after the last line, nobody listens and nothing is to be saved
        idle = "\nstep " not in job.out or "loss curve  " in job.out
        unheard = idle and job.code in (-strike.signal, 128 + strike.signal)
        return [] if unheard else [f"after a wish to end: {text}; said: {job.out}"]
    reason = os.strerror(strike.error).lower() if strike.error else "is damaged"
    if job.code != 1 or not said(job).startswith("error: ") or reason not in job.err.lower():
        return [f"the error does not tell `{reason}`; {text}"]
    if area_of(strike.pattern) == "data":
        return saved(case, job, output)
    steps = [damage.file.parts[1] for damage in case.plan.damages]
    unnamed = [n for n in steps if not re.search(rf"step {n}: (rank \d+: )?'[\w.]+' in", job.err)]
    return [f"does not name what is damaged: {text}"] if unnamed else []


def harm(case: Case, job: Job, output: Path, truth: Truth) -> list[str]:
    """What the fault has done to checkpoints that were committed, at the moment of the failure."""
    damaged = {int(damage.file.parts[1]) for damage in case.plan.damages}
    before = set(saved_steps(truth.half)) - damaged if case.plan.resumed else set()
    there = set(saved_steps(output))
    problems = [p for step in sorted(there - damaged) for p in unlike(output, step, truth)]
    if job.code != 0:
        lost = kept(before | set(job.seen.commits)) - there
        problems += [f"checkpoint {step} is lost" for step in sorted(lost)]
    return problems


def go_on(world: World, case: Case, output: Path, truth: Truth) -> tuple[Job, list[str]]:
    """The retry without a fault."""
    steps = set(saved_steps(output))
    newest = max(steps, default=None)
    job = world.run(output, case.retry_ranks)
    problems = []
    if job.code != 0:
        return job, [f"the retry ended with {job.code}: {job.err}"]
    begins = "  resume  step" if newest is None else f"  resume  step {newest},"
    if (begins in job.out) != (newest is not None):
        problems.append(f"the retry did not begin at {newest}: {job.out}")
    if job.err or set_aside(output) or "damaged" in job.out:
        problems.append(f"the retry met a checkpoint that was not sound: {job.out}{job.err}")
    if job.seen.commits and (left := list((output / "checkpoints").glob("*tmp*"))):
        problems.append(f"remains of a save that was cut off: {', '.join(p.name for p in left)}")
    problems += retention(job, output, steps)
    compare = differences if case.retry_ranks == case.ranks else distances
    return job, problems + compare(output, truth)


def describe(case: Case) -> str:
    """All that was drawn."""
    strike = case.plan.strike
    start = f"resumed (cut off at step {CUT})" if case.plan.resumed else "fresh"
    what = [f"{case.fault}; {case.ranks} rank(s), {start}, retry on {case.retry_ranks}"]
    if case.plan.second is not None:
        what.append(f"the second after {case.plan.second:.3f} s")
    if strike.ranks:
        call = f"{strike.call.name.lower()} of {strike.pattern}, number {strike.at}"
        sent = f"signal {strike.signal} to {strike.whom.name}" if strike.signal else ""
        error = os.strerror(strike.error) + " from there on" * bool(strike.lasting)
        when = call if strike.at else f"{strike.seconds:.3f} s"
        what.append(f"ranks {sorted(strike.ranks)}, {when}: {sent or error}")
    return "; ".join([*what, *map(str, case.plan.damages)])
