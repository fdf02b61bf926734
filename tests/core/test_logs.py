"""Logs: the metrics file over kills and resumes, the bar, wandb's failures, the picture."""

import io
import json
import math
import sys
import threading
import types
from pathlib import Path

import pytest
from rich.console import Console

from omnistep.core import logs, plot
from omnistep.core.logs import (
    Logger,
    Wandb,
    WandbConfig,
    offline_reason,
    read_metrics,
    status,
)
from omnistep.core.plot import plot_losses

METRICS = {
    "loss": 2.5,
    "lr": 1e-3,
    "tokens_per_second": 12_345.0,
    "mfu": 0.451,
    "eta_seconds": 3_754.2,
    "data_wait_share": 0.012,
}


def silent() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(directory, steps: range, wandb: WandbConfig | None = None, **options) -> list[int]:
    """Logs the steps; the steps then in the file."""
    options = {"console": silent(), "total_steps": 10} | options
    with Logger(directory, **options) as logger:
        if wandb is not None:
            logger.wandb = Wandb(wandb, logger.say)
        for step in steps:
            logger.log(step, {"loss": step / 2})
    return [row["step"] for row in read_metrics(directory / "metrics.jsonl")]


def test_a_resumed_run_holds_each_step_once(tmp_path):
    assert run(tmp_path, range(1, 8)) == [1, 2, 3, 4, 5, 6, 7]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while it wrote
    assert run(tmp_path, range(5, 10), resumed_step=4) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert run(tmp_path, range(1, 3)) == [1, 2]  # from the start again


def test_each_line_is_on_disk_at_once(tmp_path):
    logger = Logger(tmp_path, total_steps=2, console=silent())
    logger.log(1, {"loss": 0.5, "grad_norm": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": 0.5, "grad_norm": null}\n'
    )
    logger.close()


def test_status_line():
    assert status(METRICS) == (
        "loss 2.5000 · 12.3k tokens/s · MFU 45.1% · ETA 1:02:34 · data wait 1.2%"
    )
    assert status({"grad_norm": 1.0}) == ""


def test_without_a_terminal_a_line_every_few_seconds(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 5.5, 6.0, 6.5])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    console = silent()
    run(tmp_path, range(6, 11), console=console)
    lines = printed(console).splitlines()
    assert [line.split()[1] for line in lines] == ["6/10", "8/10", "10/10"]
    assert lines[0] == "step 6/10  loss 3.0000"


def test_on_a_terminal_a_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with Logger(tmp_path, total_steps=10, resumed_step=6, console=console) as logger:
        logger.log(7, METRICS)
        logger.say("a [message]")
    text = printed(console)
    for part in (" 7/10", "loss 2.5000", "MFU 45.1%", "ETA 1:02:34", "a [message]"):
        assert part in text


def test_a_silent_one_leaves_no_trace(tmp_path):
    """Neither the file nor the bar; not even of an earlier run is a line dropped."""
    run(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    for directory in (tmp_path, tmp_path / "new"):
        options = {"total_steps": 3, "resumed_step": 1, "console": console}
        with Logger(directory, silent=True, **options) as logger:
            logger.log(3, METRICS)
            logger.say("a message")
    assert printed(console) == ""
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- wandb


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def fake_wandb(monkeypatch, init) -> None:
    module = types.ModuleType("wandb")
    module.init, module.Settings = init, lambda **settings: settings  # pyright: ignore
    monkeypatch.setitem(sys.modules, "wandb", module)


def config(tmp_path, **options) -> WandbConfig:
    return WandbConfig("project", "name", tmp_path / "run", {"lr": 1}, **options)


def test_wandb_without_a_key_is_offline_and_says_so(tmp_path, monkeypatch, no_key):
    calls = []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(
            log=lambda metrics, step: calls.append((step, metrics)),
            finish=lambda: calls.append("finished"),
        )

    fake_wandb(monkeypatch, init)
    console = silent()
    run(tmp_path / "run", range(1, 3), console=console, wandb=config(tmp_path))
    shown = [calls[0][name] for name in ("mode", "project", "name")]
    assert shown == ["offline", "project", "name"]
    assert calls[1:] == [(1, {"loss": 0.5}), (2, {"loss": 1.0}), "finished"]
    assert printed(console).count("no API key") == 1
    run(tmp_path / "run", range(3, 3), resumed_step=2, wandb=config(tmp_path))
    assert calls[-2]["id"] == calls[0]["id"]  # a resumed run is the same run


def test_wandb_that_fails_is_turned_off_with_one_line(tmp_path, monkeypatch, no_key):
    monkeypatch.setenv("WANDB_MODE", "online")

    def init(**_):
        raise RuntimeError("server said no")

    fake_wandb(monkeypatch, init)
    console = silent()
    run(tmp_path / "run", range(1, 3), console=console, wandb=config(tmp_path))
    assert printed(console).count("turned off") == 1
    assert "server said no" in printed(console)


def test_wandb_that_hangs_holds_up_nothing(tmp_path, monkeypatch, no_key):
    monkeypatch.setenv("WANDB_MODE", "online")
    forever, console = threading.Event(), silent()
    fake_wandb(monkeypatch, lambda **_: forever.wait())
    wandb = config(tmp_path, timeout=0.05)
    assert run(tmp_path / "run", range(1, 4), console=console, wandb=wandb) == [1, 2, 3]
    assert printed(console).count("did not finish") == 1
    forever.set()


def test_offline_reasons(tmp_path, monkeypatch, no_key):
    assert "no API key" in str(logs.offline_reason())
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login user password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert "no connection to localhost" in str(logs.offline_reason())
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert logs.offline_reason() is None


# ---- the picture


def test_plot_draws_losses_rate_and_held_out_points(tmp_path):
    path, png = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    rows = [{"step": s, "loss": 5 / s**0.3, "lr": 1e-3 * s} for s in range(1, 100)]
    rows[40]["loss"] = None
    rows += [{"step": 50, "eval_loss": 2.1}, {"step": 99, "eval_loss": 1.9}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses(path, png)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 20_000


def test_plot_of_an_empty_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    plot_losses(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_smoothing_is_a_centred_mean_that_skips_gaps():
    assert plot._smooth([1.0, 2.0, 6.0, math.nan, 8.0], 1) == [1.0, 3.0, 4.0, 7.0, 8.0]
    assert plot._smooth([3.0, 1.0], 0) == [3.0, 1.0]


def test_bytes_that_are_no_text_are_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\xff": 1}\n\xff\xfe\n{"step": 3}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    with Logger(tmp_path, 5, resumed_step=3) as logger:
        logger.log(4, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 4]


def test_rows_wait_for_room_on_the_disk(tmp_path, capsys):
    """And a run goes on meanwhile."""
    full = True

    class Disk:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            if not full:
                return self.file.write(content)
            if content.startswith(b"{"):
                return self.file.write(content[:7])  # as much as there was room for
            raise OSError(28, "No space left on device")

        def close(self):
            self.file.close()

    with Logger(tmp_path, 5) as logger:
        assert logger._rows is not None
        logger._rows._file = Disk(logger._rows._file)  # pyright: ignore[reportAttributeAccessIssue]
        logger.log(1, {"loss": 1.0})
        logger.log(2, {"loss": 2.0})
        full = False
        logger.log(3, {"loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl can't be written (No space left on device)") == 1


def test_a_console_that_breaks_does_not_end_a_run(tmp_path, capsys):
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    with Logger(tmp_path, 5, console=Console(file=Gone()), interval=0) as logger:
        for step in range(1, 4):
            logger.log(step, {"loss": 1.0})
            logger.say("\x1b[2J")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().err.count("standard output can't be written") == 1


def test_without_a_home_wandb_is_offline(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert offline_reason() == "no API key (WANDB_API_KEY or `wandb login`)"
