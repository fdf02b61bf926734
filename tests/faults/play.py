"""One case from the fault to the end of the retry, and what is wrong with it."""

import os
import shutil
import signal
from pathlib import Path
from typing import Literal

from attrs import frozen

from omnistep.bin.stop import ASKED, RESUME_ME
from tests.bin.runs import saved_steps
from tests.faults.cases import Case
from tests.faults.jobs import PATIENCE, Job
from tests.faults.truth import CUT, Truth, World, differences, distances, kept, unlike

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
    seconds: float


def play(world: World, case: Case) -> Outcome:
    truth, output = world.truth(case.ranks), world.directory / f"runs/{case.number}"
    shutil.rmtree(output, ignore_errors=True)
    if case.plan.resumed:
        shutil.copytree(truth.half, output)
    for damage in case.plan.damages:
        damage.apply(output)
    job = world.run(output, case.ranks, case.plan.strike)
    where = "; ".join(map(str, case.plan.damages)) or job.seen.struck or "not struck"
    problems = [*ending(case, job), *harm(case, job, output, truth)]
    verdict: Verdict = "finished" if where != "not struck" else "missed"
    seconds = job.seconds
    if job.code == 0:
        problems += differences(output, truth)
    elif job.code is not None:
        verdict = "retried" if case.retry_ranks == case.ranks else "elsewhere"
        for damage in case.plan.damages:  # all were: whole again, nothing else may be lost
            shutil.copy(truth.half / damage.file, output / damage.file)
        retry, more = go_on(world, case, output, truth)
        problems += more
        seconds += retry.seconds
        where += f"; ended with {job.code}, {said(job)}"
    if problems:
        verdict = "failed"
    else:
        shutil.rmtree(output)
    return Outcome(case, verdict, tuple(problems), where, seconds)


def said(job: Job) -> str:
    lines = job.err.strip().splitlines()
    return lines[-1] if lines else "in silence"


def ending(case: Case, job: Job) -> list[str]:
    """What is wrong with the way in which a struck run ended."""
    strike, text = case.plan.strike, f"exit {job.code}; stderr: {job.err.strip() or 'empty'}"
    if job.code is None:
        return [f"hung for {PATIENCE:.0f} s; stderr: {job.err.strip()}"]
    if "Traceback" in job.err or "terminate called" in job.err:
        return [f"not a clear error; {text}"]
    if job.code == 0:
        return []
    if not job.seen.struck and not case.plan.damages:
        return [f"failed without a fault; {text}"]
    if strike.signal == signal.SIGKILL:
        told = job.code == 128 + signal.SIGKILL and "was killed by SIGKILL" in job.err
        return [] if job.code == -signal.SIGKILL or told else [f"after a SIGKILL: {text}"]
    if strike.signal == signal.SIGTERM:
        if job.code == RESUME_ME:
            told = ASKED.decode() in job.err or case.ranks > 1
            return [] if told and "stopped and saved at step" in job.out else [text]
        early = job.code in (-signal.SIGTERM, 128 + signal.SIGTERM)
        return [] if early and "step" not in job.out else [f"after a SIGTERM: {text}"]
    reason = os.strerror(strike.error).lower() if strike.error else "damaged"
    if job.code != 1 or not said(job).startswith("error: ") or reason not in job.err.lower():
        return [f"the error does not tell `{reason}`; {text}"]
    return []


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
    newest = max(saved_steps(output), default=None)
    job = world.run(output, case.retry_ranks)
    problems = []
    if job.code != 0:
        return job, [f"the retry ended with {job.code}: {job.err}"]
    begins = "  resume  step" if newest is None else f"  resume  step {newest},"
    if (begins in job.out) != (newest is not None):
        problems.append(f"the retry did not begin at {newest}: {job.out}")
    if job.err or "damaged" in job.out:
        problems.append(f"the retry met a checkpoint that was not sound: {job.out}{job.err}")
    if job.seen.commits and (left := list((output / "checkpoints").glob("*tmp*"))):
        problems.append(f"remains of a save that was cut off: {', '.join(p.name for p in left)}")
    compare = differences if case.retry_ranks == case.ranks else distances
    return job, problems + compare(output, truth)


def describe(case: Case) -> str:
    strike = case.plan.strike
    start = f"resumed (cut off at step {CUT})" if case.plan.resumed else "fresh"
    what = [f"{case.fault} on {case.ranks} ranks, {start}, retry on {case.retry_ranks}"]
    if strike.ranks:
        calls = ", ".join(sorted(call.name for call in strike.calls))
        at = f"call {strike.at} of {calls}" if strike.at else f"{strike.seconds:.3f} s"
        lasting = ", lasting" if strike.lasting else ""
        sent = f"signal {strike.signal} to {strike.whom.name}" if strike.signal else ""
        error = os.strerror(strike.error) if strike.error else ""
        what.append(f"ranks {sorted(strike.ranks)} at {at}: {sent}{error}{lasting}")
    return "; ".join([*what, *map(str, case.plan.damages)])
