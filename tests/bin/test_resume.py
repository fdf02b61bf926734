"""Runs that are killed, stopped and started again give the bits of a run that was not."""

import json
import random
import shutil
import signal
import time

import pytest

from omnistep.bin import train
from omnistep.bin.stop import ASKED
from omnistep.core.logs import read_metrics
from tests.bin.runs import (
    CONFIG,
    PADDED,
    call,
    content,
    losses,
    saved_steps,
    settings,
    succeeded,
    wait_until,
    words,
)

pytestmark = pytest.mark.slow

STEPS = 24
AUTO = "--train.load_checkpoint_path=auto"
MODES = {"packed": {"data_train_size": 10_000, "train_bsz_warmup_ratio": 0.5}, "padded": PADDED}
LONG = {name: m | {"train_max_steps": STEPS, "train_save_steps": 3} for name, m in MODES.items()}


@pytest.fixture(scope="package")
def uninterrupted(files, tmp_path_factory):
    """Losses by step of runs that nobody disturbs."""
    found = {}
    for name, changes in LONG.items():
        output = tmp_path_factory.mktemp("uninterrupted") / name
        succeeded(call(train.main, words(settings(files, output, **changes))))
        found[name] = losses(output)
        assert len(found[name]) == STEPS
    return found


@pytest.mark.parametrize(
    ("mode", "workers", "seed"),
    [
        ("packed", 1, 2),
        ("padded", 0, 3),
        pytest.param("packed", 0, 1, marks=pytest.mark.exhaustive),
        pytest.param("padded", 1, 4, marks=pytest.mark.exhaustive),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    mode, workers, seed, files, tmp_path, plain_server, uninterrupted
):
    """Killed at random moments; the next start gets further."""
    draw, output = random.Random(seed), tmp_path / "run"
    argv = [*words(settings(files, output, **LONG[mode], data_num_workers=workers)), AUTO]
    for goal in (draw.randrange(1, 8), draw.randrange(10, 18)):
        run = plain_server.start("train", argv)
        wait_until(lambda goal=goal: lines(output / "metrics.jsonl") >= goal)
        time.sleep(draw.uniform(0, 0.03))
        run.kill(signal.SIGKILL)
        assert run.wait().code == -signal.SIGKILL
    succeeded(plain_server.run("train", argv))
    assert losses(output) == uninterrupted[mode]
    assert saved_steps(output)[-1] == STEPS


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_kill_during_a_save(files, tmp_path, plain_server, uninterrupted):
    """Killed when a save has made its temporary directory, and when files are in it."""
    output = tmp_path / "run"
    argv = [*words(settings(files, output, **LONG["packed"])), AUTO]
    for parts in (1, 3):
        run = plain_server.start("train", argv)
        seen = set()

        def changed(seen=seen, parts=parts):
            seen.update(path.relative_to(output) for path in output.glob("checkpoints/*tmp*/**/*"))
            return len(seen) >= parts

        wait_until(changed)
        run.kill(signal.SIGKILL)
        assert run.wait().code == -signal.SIGKILL
    succeeded(plain_server.run("train", argv))
    assert losses(output) == uninterrupted["packed"]
    assert not list((output / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize(
    ("workers", "wish"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (0, signal.SIGUSR1)]
)
def test_sigterm_saves_and_says_how_to_go_on(
    workers, wish, files, tmp_path, plain_server, uninterrupted
):
    output = tmp_path / "run"
    changes = LONG["packed"] | {"train_save_steps": 0, "data_num_workers": workers}
    argv = words(settings(files, output, **changes))
    run = plain_server.start("train", argv)
    wait_until(lambda: lines(output / "metrics.jsonl") >= 5)
    run.kill(wish)
    result = run.wait()
    assert result.code == train.RESUME_ME == 75
    assert result.err == ASKED.decode()
    done = losses(output)
    assert 5 <= len(done) < STEPS
    assert saved_steps(output) == [len(done)]
    assert f"stopped and saved at step {len(done)}; go on with" in result.out
    assert not (output / "hf").exists()
    again = succeeded(plain_server.run("train", [*argv, AUTO]))
    assert f"resume  step {len(done)}" in again.out
    assert losses(output) == uninterrupted["packed"]


def like_source(files, output, **changes):
    saved = {"train_save_steps": 2, "data_eval_path": files.held_out, "train_eval_steps": 2}
    return settings(files, output, **saved | changes)


@pytest.fixture(scope="package")
def source(files, tmp_path_factory):
    """A run of 6 steps with checkpoints 2, 4 and 6."""
    output = tmp_path_factory.mktemp("source") / "run"
    chosen = like_source(files, output)
    succeeded(call(train.main, words(chosen)))
    return output


@pytest.mark.parametrize(("place", "step"), [("checkpoints/2", 2), ("checkpoints", 4), ("", 4)])
def test_a_checkpoint_is_named_in_three_ways(place, step, source, files, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(source, half)
    shutil.rmtree(half / "checkpoints/6")
    chosen = settings(files, tmp_path / "run", train_load_checkpoint_path=half / place)
    result = succeeded(call(train.main, words(chosen)))
    assert f"resume  step {step}" in result.out
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    expected = losses(source)
    assert {r["step"]: r["loss"] for r in rows} == {s: expected[s] for s in range(step + 1, 7)}
    assert saved_steps(tmp_path / "run") == [6]


def test_a_run_does_not_start_over_another(source, files):
    before = content(source)
    result = call(train.main, words(settings(files, source)))
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert "checkpoints, the last of step 6" in result.err
    assert "--train.load_checkpoint_path auto" in result.err
    assert content(source) == before


@pytest.mark.parametrize("other", [False, True])
def test_a_run_does_not_go_back_among_its_own_later_checkpoints(other, source, files, tmp_path):
    """They would be in the way of the new ones, and be mixed up with them."""
    output = tmp_path / "run"
    shutil.copytree(source, output)
    place = (source if other else output) / "checkpoints/2"
    before = content(output)
    result = call(train.main, words(settings(files, output, train_load_checkpoint_path=place)))
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert "choose another train.output_dir" in result.err
    assert content(output) == before


def test_a_finished_run_only_reports(source, files, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(source, output)
    before = content(output)
    chosen = like_source(files, output, train_load_checkpoint_path="auto")
    result = succeeded(call(train.main, words(chosen)))
    assert "held-out loss" in result.out
    assert str(output / "checkpoints") in result.out
    after = content(output)
    for part in (before, after):
        del part["recipe.yaml"], part["loss.png"]
    assert after == before


def test_a_checkpoint_past_the_end_is_only_exported(source, files, tmp_path):
    chosen = settings(
        files,
        tmp_path / "run",
        data_train_size=2 * 64,
        train_load_checkpoint_path=source,
        train_save_hf_weights=True,
    )
    succeeded(call(train.main, words(chosen)))
    assert read_metrics(tmp_path / "run/metrics.jsonl") == []
    assert saved_steps(tmp_path / "run") == [6]
    assert (tmp_path / "run/hf/model.safetensors").is_file()


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(source, files, tmp_path):
    """The step was saved, its held-out loss not yet written."""
    output = tmp_path / "run"
    shutil.copytree(source, output)
    shutil.rmtree(output / "checkpoints/6")
    rows = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, row in enumerate(rows) if '"step": 4' in row and "eval_loss" in row)
    (output / "metrics.jsonl").write_text("".join(rows[:at]) + rows[at][:7])
    chosen = like_source(files, output, train_load_checkpoint_path="auto")
    succeeded(call(train.main, words(chosen)))
    names = ("step", "loss", "eval_loss")

    def pick(path):
        rows = read_metrics(path / "metrics.jsonl")
        return [{name: row[name] for name in names if name in row} for row in rows]

    assert pick(output) == pick(source)


def test_the_worker_processes_end_with_a_killed_run(files, tmp_path, plain_server):
    output = tmp_path / "run"
    argv = words(settings(files, output, data_num_workers=1, data_train_size=10**8))
    run = plain_server.start("train", argv)
    wait_until(lambda: lines(output / "metrics.jsonl") >= 2)
    children = [int(pid) for pid in _children(run.pid)]
    assert children
    run.kill(signal.SIGKILL)
    assert run.wait().code == -signal.SIGKILL
    wait_until(lambda: not any(_alive(pid) for pid in children), 30)


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def damage(output, step):
    """One bit of the largest file of a checkpoint is turned."""
    files = [p for p in (output / f"checkpoints/{step}").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)


def test_auto_falls_back_to_the_newest_sound_checkpoint(source, files, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(source, output)
    damage(output, 6)
    shutil.rmtree(output / "checkpoints/4/state/d")
    chosen = like_source(files, output, train_load_checkpoint_path="auto")
    result = succeeded(call(train.main, words(chosen)))
    told = [line for line in result.out.splitlines() if "damaged" in line or "resume" in line]
    for line, step in zip(told, (6, 4), strict=False):
        assert f"step {step}, now {output}/checkpoints/{step}.damaged: 'state." in line
    assert told[2:] == ["  resume  step 2, from auto"]
    assert losses(output) == losses(source)
    assert saved_steps(output) == [2, 4, 6]


def test_where_no_checkpoint_is_sound_nothing_is_touched(source, files, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(source, output)
    for step in (2, 4, 6):
        damage(output, step)
    before = content(output)
    chosen = settings(files, output, train_load_checkpoint_path="auto")
    for _ in range(2):
        result = call(train.main, words(chosen))
        assert result.code == 1
        assert "none of the run's checkpoints can be read" in result.err
        assert all(f"step {step}: 'state." in result.err for step in (2, 4, 6))
        assert content(output) == before


def test_a_damaged_checkpoint_that_was_named_is_an_error(source, files, tmp_path):
    shutil.copytree(source, tmp_path / "other")
    damage(tmp_path / "other", 4)
    place = tmp_path / "other/checkpoints/4"
    chosen = settings(files, tmp_path / "run", train_load_checkpoint_path=place)
    result = call(train.main, words(chosen))
    assert result.code == 1
    assert "is damaged" in result.err
    assert "also holds step 2, 6" in result.err


def test_saves_are_reported(files, tmp_path):
    result = succeeded(call(train.main, words(like_source(files, tmp_path / "run"))))
    lines = [line for line in result.out.splitlines() if "training waited" in line]
    assert [line.split(" saved 0.00")[0] for line in lines] == ["step 2:", "step 4:", "step 6:"]
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    told = [row for row in rows if "saved_step" in row]
    # a row has the last save that ended before it: 2 or 4 may be missing, 6 ends after all rows
    assert [row["saved_step"] for row in told] in ([2, 4], [2], [4])
    for row in told:
        assert 0 < row["save_stall_seconds"] < row["save_seconds"]
        assert row["saved_bytes"] > 4096 * 32 * 3 * 4


def test_another_model_config_of_the_same_shape_is_told(source, files, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-5}))
    changes = {"model_config_path": config, "train_load_checkpoint_path": source}
    chosen = settings(files, tmp_path / "run", data_train_size=2 * 64, **changes)
    result = succeeded(call(train.main, words(chosen)))
    assert " changed  rms_norm_eps of the model: 1e-05, was 1e-06" in result.out


def test_saving_too_often_never_saves_a_step_twice(files, tmp_path):
    """Steps and epochs fall together, and the last step with both; in padded data too."""
    for name, changes in (("packed", {"data_train_size": 128}), ("padded", PADDED)):
        chosen = settings(
            files,
            tmp_path / name,
            **changes | {"train_max_steps": 2},
            train_num_train_epochs=2,
            train_save_steps=1,
            train_save_epochs=1,
            train_keep_checkpoints=0,
        )
        succeeded(call(train.main, words(chosen)))
        assert saved_steps(tmp_path / name) == [1, 2, 3, 4]
