"""A seeded few of the struck runs, every kind of fault among them: `python -m tests.faults` plays
hundreds, and writes docs/faults.md."""

import errno
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnistep.core.checkpoint.store import open_store
from tests.faults.cases import FAULTS, FETCHES, Case, Damage, Plan, calls_on, make_case
from tests.faults.play import Outcome, describe, play
from tests.faults.shim import Call, Strike
from tests.faults.truth import STEPS, World, differences, unlike

pytestmark = pytest.mark.slow

SEED = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World.make(tmp_path_factory.mktemp("faults") / "world")
    yield world
    world.close()


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=list(FAULTS))
def test_every_fault_on_one_rank_or_two(number: int, world: World) -> None:
    check(world, make_case(world, SEED, number, (1, 2)))


@pytest.mark.parametrize(
    "fault",
    [
        "SIGKILL of one rank at a call",
        "newest checkpoint truncated",
        pytest.param("disk full on one rank", marks=pytest.mark.exhaustive),
    ],
)
def test_some_faults_on_four_ranks(fault: str, world: World) -> None:
    check(world, make_case(world, SEED, list(FAULTS).index(fault), (4,)))


def test_a_kill_while_a_step_is_deleted(world: World) -> None:
    """Half way through the files of the first of the two steps that retention deletes."""
    run = world.truth(1).fresh.seen.calls
    calls = [m for m in run if m.call == Call.UNLINK and re.search(r"/\d+/state/", m.place)]
    chosen = calls[len(calls) // 4].pattern
    strike = Strike(frozenset({0}), Call.UNLINK, chosen, 1, signal=signal.SIGKILL)
    check(world, Case(100, "a kill", 1, 1, Plan(strike=strike)))


def test_a_flipped_bit_of_a_weight(world: World) -> None:
    """In the middle of the largest file, which holds arrays: no JSON, no index."""
    half = world.truth(1).half
    files = (path for path in (half / "checkpoints/6").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size).relative_to(half)
    plan = Plan(resumed=True, damages=(Damage(largest, "flipped", 0.5, 3),))
    assert check(world, Case(101, "a flip", 1, 1, plan)).fell_back


def test_data_that_goes_in_the_middle_of_a_run(world: World) -> None:
    """The third block cannot be read: steps were made, and must be saved."""
    opened = [m for m in calls_on("data", world.truth(1).fresh) if m.call == Call.OPEN]
    at = 3 * len(opened) // 4
    strike = Strike(frozenset({0}), Call.OPEN, opened[at].pattern, at, errno.EIO, FETCHES)
    outcome = check(world, Case(102, "data goes", 1, 1, Plan(strike=strike)))
    assert outcome.verdict == "retried"
    assert "the data can't be read" in outcome.how


def check(world: World, case: Case) -> Outcome:
    outcome = play(world, case)
    assert not outcome.problems, f"{describe(case)}\n{outcome.how}\n" + "\n".join(outcome.problems)
    return outcome


def test_the_shim_sees_every_file_that_a_run_leaves(world: World, tmp_path: Path) -> None:
    """What is written past it (mapped, by io_uring, by stdio) could not be struck."""
    job = world.run(tmp_path / "run", 2, traced=True)
    written = {made.place for made in job.seen.calls if made.call in (Call.WRITE, Call.RENAME)}
    renamed = {place.replace(".orbax-checkpoint-tmp", "") for place in written}
    files = [
        path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.stat().st_size
    ]
    assert len(files) > 20
    assert {str(path.relative_to(tmp_path / "run")) for path in files} <= renamed
    assert {made.rank for made in job.seen.calls if made.call == Call.WRITE} == {0, 1}


def test_a_strike_is_exact(world: World, tmp_path: Path) -> None:
    """The disk is full from the second write of metrics.jsonl on, half of which is still made."""
    full = frozenset({Call.WRITE})
    strike = Strike(frozenset({0}), Call.WRITE, "metrics.jsonl", 2, errno.ENOSPC, full)
    job = world.run(tmp_path / "run", 1, strike)
    assert (job.code, job.seen.struck) == (1, "write metrics.jsonl")
    assert "No space left on device" in job.err
    first, second = (tmp_path / "run/metrics.jsonl").read_text().split("\n")
    assert json.loads(first)["step"] == 1
    assert second.startswith('{"step": 2')
    assert len(second) > len(first) / 3


def test_the_checks_see_what_is_wrong(world: World, tmp_path: Path) -> None:
    """Another seed's run has other losses and another checkpoint; a damaged one is not restored."""
    truth = world.truth(1)
    world.run(tmp_path / "run", 1, train_seed=7)
    found = differences(tmp_path / "run", truth)
    assert "losses differ" in found[0]
    assert f"checkpoint {STEPS} differs in" in found[1]
    store = open_store(tmp_path / "run/checkpoints")
    manifest = Path(tmp_path, "run/checkpoints", str(store.latest()), "state/manifest.ocdbt")
    manifest.write_bytes(manifest.read_bytes()[:-1])
    assert "cannot be restored" in unlike(tmp_path / "run", STEPS, truth)[0]
