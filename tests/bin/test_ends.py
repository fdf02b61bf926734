"""How runs end: what was trained is saved, one line says why; what only informs ends nothing."""

import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from omnistep.bin import output_lock, programs, train
from omnistep.bin.model import RunError
from omnistep.bin.output_lock import OutputLock
from omnistep.bin.stop import RESUME_ME, Stop
from omnistep.core.checkpoint import DamagedError
from omnistep.core.config import Arguments
from omnistep.core.config_io import dump
from omnistep.core.logs import read_metrics
from tests.bin.runs import (
    call,
    content,
    losses,
    saved_steps,
    settings,
    succeeded,
    wait_until,
    words,
)
from tests.forkserver.client import ENVIRONMENT

SOURCES = """
import os, signal
from omnistep.data.files.records import Record

class Texts:
    def __init__(self, what):
        self.what, self.reads = what, 0
    def __len__(self):
        return 400
    def __getitem__(self, index):
        self.reads += 1
        if self.reads > 1000:
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "gone":
                open("/nowhere/texts.jsonl")
            if self.what == "memory":
                raise MemoryError
        return Record({"content_split": "Now is the winter of our discontent " * 2}, f"{index}")

def killed(*_, **__):
    return Texts("killed")

def gone(*_, **__):
    return Texts("gone")

def memory(*_, **__):
    return Texts("memory")
"""
ONE_LINE = {
    "killed": r"DataLoader worker .*where memory lacks",
    "gone": r"the data can't be read: .*No such file or directory: '/nowhere/texts.jsonl'",
    "memory": r"the data can't be read: MemoryError",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "workers", "ranks"),
    [
        pytest.param("killed", 1, 1, marks=pytest.mark.exhaustive),
        ("killed", 1, 2),
        ("gone", 0, 1),
        pytest.param("gone", 1, 2, marks=pytest.mark.exhaustive),
        pytest.param("memory", 1, 1, marks=pytest.mark.exhaustive),
    ],
)
def test_data_that_fails_ends_a_run_that_saves(what, workers, ranks, files, tmp_path, plain_server):
    """A worker that the system kills, a mount that goes: on all ranks together."""
    (tmp_path / "own_sources.py").write_text(SOURCES)
    chosen = settings(
        files,
        tmp_path / "run",
        data_datasets_type=f"own_sources:{what}",
        data_num_workers=workers,
        data_train_size=10**6,
        train_data_parallel_mode="fsdp2" if ranks > 1 else None,
    )
    result = plain_server.run("train", words(chosen), ranks=ranks, cwd=tmp_path)
    assert result.code == 1, result
    assert "Traceback" not in result.err + result.out
    (line,) = (line for line in result.err.splitlines() if line.startswith("error: "))
    assert re.search(ONE_LINE[what], line), line
    (step,) = saved_steps(tmp_path / "run")
    assert step == max(losses(tmp_path / "run")) > 0


@pytest.mark.slow
def test_whoever_read_the_output_may_go(files, tmp_path):
    """As `| head -1` does; and an encoding that lacks a character is no reason to end."""
    chosen = settings(files, tmp_path / "run", data_train_size=40 * 64)
    command = [sys.executable, "-m", "omnistep.bin.train", *words(chosen)]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        text=True,
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    said = run.stderr.read()
    assert run.wait() == 0, said
    assert said.count("standard output can't be written (") == 1
    assert "Traceback" not in said
    assert max(losses(tmp_path / "run")) == 40
    assert saved_steps(tmp_path / "run") == [40]


@pytest.mark.slow
@pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="the tests run under nohup"
)
def test_a_connection_that_drops_saves(files, tmp_path, server):
    output = tmp_path / "run"
    job = server.start("train", words(settings(files, output, data_train_size=10**6)))
    wait_until(lambda: (output / "metrics.jsonl").exists() and len(losses(output)) > 2)
    job.kill(signal.SIGHUP)
    result = job.wait()
    assert result.code == RESUME_ME, result
    assert saved_steps(output) == [max(losses(output))]


def test_under_nohup_it_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_evaluation_hears_a_stop(files, tmp_path, monkeypatch):
    """Within a batch; the step is saved, and the run that goes on evaluates it."""
    stops = []

    class Asked(Stop):
        def __init__(self, **options):
            super().__init__(**options)
            stops.append(self)

    make_eval_step, batches = train.make_eval_step, []

    def make(*args, **options):
        eval_step = make_eval_step(*args, **options)

        def step(*words):
            batches.append(1)
            if len(batches) == 3:  # in the second evaluation, that of step 3
                stops[-1].asked = True
            return eval_step(*words)

        return step

    monkeypatch.setattr(train, "Stop", Asked)
    monkeypatch.setattr(train, "make_eval_step", make)
    common = {"data_eval_path": files.held_out, "train_eval_steps": 3}
    chosen = settings(files, tmp_path / "run", **common, train_micro_batch_size=4)
    chosen |= {"data.train_size": 6 * 128}
    result = call(train.main, words(chosen))
    first = len(batches)
    assert result.code == RESUME_ME, result
    assert "stopped and saved at step" in result.out
    (step,) = saved_steps(tmp_path / "run")
    evaluated = [
        r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "eval_loss" in r
    ]
    assert step not in evaluated
    chosen["train.load_checkpoint_path"] = "auto"
    succeeded(call(train.main, words(chosen)))
    assert len(batches) > first
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert {r["step"] for r in rows if "eval_loss" in r} >= {step, 6}


def test_an_error_anywhere_saves_first(files, tmp_path, monkeypatch):
    """Also one that nobody foresaw."""
    report = train.report

    def fails(dispatched, position, *rest):
        if position.step == 4:
            monkeypatch.setattr(train, "report", report)
            raise ZeroDivisionError
        return report(dispatched, position, *rest)

    monkeypatch.setattr(train, "report", fails)
    with pytest.raises(ZeroDivisionError):
        call(train.main, words(settings(files, tmp_path / "run")))
    assert saved_steps(tmp_path / "run") == [4]


# ---- one run at a time -----------------------------------------------------------------------


def test_a_second_run_is_told_who_writes(files, tmp_path):
    output = tmp_path / "run"
    succeeded(call(train.main, words(settings(files, output))))
    with OutputLock(output, print):
        before = content(output)
        for more in ({}, {"train_load_checkpoint_path": "auto"}):
            result = call(train.main, words(settings(files, output, **more)))
            assert result.code == 1
            assert f"another run writes into {output} (process {os.getpid()} on " in result.err
            assert content(output) == before
    more = {"train_load_checkpoint_path": "auto", "data_train_size": 8 * 64}
    succeeded(call(train.main, words(settings(files, output, **more))))


def test_a_lock_of_a_process_that_ended_is_none(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    with OutputLock(tmp_path, print):
        pass
    holder = tmp_path / ".lock.holder"
    holder.write_text(f"{int(done.stdout)} {os.uname().nodename}")
    with OutputLock(tmp_path, print):
        assert holder.read_text().startswith(f"{os.getpid()} ")


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("omnistep.bin.output_lock.FileLock.acquire", refuses)
    said = []
    with OutputLock(tmp_path, said.append):
        assert said == [f"{tmp_path} can't be locked ([Errno 37] No locks available): "
                        "see to it that one run writes"]  # fmt: skip


def test_a_directory_must_be_utf8(files, tmp_path):
    output = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    result = call(train.main, words(settings(files, Path(output))))
    assert result.code == 1
    assert result.err == "error: train.output_dir: the name of a directory must be UTF-8\n"


# ---- what is shown ---------------------------------------------------------------------------


def test_foreign_text_is_shown_not_sent(files, tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text('{"messages": [{"role": "\\u001b]0;title\\u0007\\u202e", "content": "x"}]}\n')
    chosen = settings(files, tmp_path / "run", data_train_path=data, data_data_type="conversation")
    result = call(train.main, words(chosen | {"data.chat_template": "default"}))
    assert result.code == 1
    assert "\\x1b]0;title\\x07\\u202e" in result.err
    assert "\x1b" not in result.err + result.out


def test_ctrl_c_while_a_program_is_imported(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "import_module", interrupted)
    assert programs.train() == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_error_names_the_directory(files, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_lock, "try_to_write", full)
    with pytest.raises(RunError, match=r"nothing can be written to .*run \(No space left"):
        output_lock.make_place("train.output_dir", tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "3", '{"tokens": "x"}'])
def test_texts_of_a_checkpoint_that_are_none(text, trained, monkeypatch):
    """With checksums that fit: whoever wrote them is not us."""
    from omnistep.bin import position
    from omnistep.core.checkpoint.store import open_store

    with closing(open_store(trained / "checkpoints")) as source:
        step = source.steps()[-1]
        held = source.stored(step)
        names = {"data", "meters", "model"}
        state = {n.removeprefix("state."): v for n, v in held.items() if n not in names}
        fake = dict.fromkeys(names, text) | {"state": state}
        monkeypatch.setattr(type(source), "restore", lambda *_, **__: fake)
        monkeypatch.setattr(position, "leaves_with_names", lambda _: held)
        with pytest.raises(DamagedError, match=r"are no position of a run: \w+Error"):
            position.restore(source, step, None, None)  # pyright: ignore


def test_a_full_disk_names_the_recipe(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*recipe\.yaml'"):
        dump(Arguments(), tmp_path / "recipe.yaml")
