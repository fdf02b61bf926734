"""What a run tells the world: metrics.jsonl, a progress bar, wandb. (A picture: core/plot.py.)

Everything here takes plain floats by name; metrics.jsonl also lists of them. These names are shown
on the bar: loss, expert_imbalance, tokens_per_second, mfu, eta_seconds, data_wait_share.
"""

import json
import math
import netrc
import os
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from attrs import define, field, frozen
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from omnistep.core.screen import informs, show, visible

Metrics = Mapping[str, float | list[float]]
METRICS_FILE = "metrics.jsonl"


@define
class Logger:
    """One per rank; `log` once a step, `close` (or leave `with`) at the end.

    `resumed_step`: the updates the restored state had done; later steps in metrics.jsonl are
    of a run that was cut off, will be done again, and are dropped. On a terminal there is a
    bar, elsewhere a line every `interval` seconds. A `silent` one, for all ranks but the first,
    writes and shows nothing. None of it ends a run: what can't be shown is said once on standard
    error, and rows that can't be written wait for the next one.
    """

    output_dir: Path
    total_steps: int
    resumed_step: int = 0
    interval: float = 5.0
    silent: bool = False
    console: Console = field(factory=Console)
    _bar: "_Bar | None" = field(default=None, init=False)
    _said: float = field(default=-math.inf, init=False)
    _rows: "_Rows | None" = field(default=None, init=False)
    wandb: "Wandb | None" = field(default=None, init=False)
    """Set by whoever wants one, unless silent: `logger.wandb = Wandb(config, logger.say)`."""

    def __attrs_post_init__(self) -> None:
        if self.silent:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / METRICS_FILE
        drop_steps_after(path, self.resumed_step)
        self._rows = _Rows(path)
        if self.console.is_terminal:
            self._bar = _Bar(self.console, self.total_steps, self.resumed_step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Records what step `step` (1 is the run's first) measured."""
        if self.silent:
            return
        if self._rows is not None:
            self._rows.write(json.dumps({"step": step, **_finite(metrics)}) + "\n")
        numbers = {name: x for name, x in metrics.items() if not isinstance(x, list)}
        if self.wandb is not None:
            self.wandb.log(step, numbers)
        line, now = status(numbers), time.monotonic()
        if self._bar is not None:
            self._inform(partial(self._bar.show, step, line))
        elif line and (now - self._said >= self.interval or step >= self.total_steps):
            self._said = now
            self._print(f"step {step}/{self.total_steps}  {line}")

    def say(self, text: str) -> None:
        """A line for whoever watches; a bar stays below it."""
        if not self.silent:
            self._print(text)

    def _print(self, text: str) -> None:
        self._inform(partial(self.console.print, visible(text), **_PLAIN))

    def _inform(self, action: Callable[[], object]) -> None:
        informs(action, self.console.file)  # pyright: ignore[reportArgumentType]

    def close(self) -> None:
        if self._bar is not None:
            self._inform(self._bar.stop)
        if self._rows is not None:
            self._rows.close()
        if self.wandb is not None:
            self.wandb.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_PLAIN: Any = {"markup": False, "highlight": False, "soft_wrap": True}


def status(metrics: Mapping[str, float]) -> str:
    """`loss 2.3456 · 12.3k tokens/s · MFU 45.1% · ETA 0:12:34 · data wait 1.2%`, what is there."""
    shown = {
        "loss": lambda x: f"loss {x:.4f}",
        "eval_loss": lambda x: f"eval loss {x:.4f}",
        "expert_imbalance": lambda x: f"expert imbalance {x:.2f}",
        "tokens_per_second": lambda x: f"{_short(x)} tokens/s",
        "mfu": lambda x: f"MFU {x:.1%}",
        "eta_seconds": lambda x: f"ETA {_clock(x)}",
        "data_wait_share": lambda x: f"data wait {x:.1%}",
    }
    return " · ".join(text(metrics[name]) for name, text in shown.items() if name in metrics)


def _short(x: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.1f}{unit}"
    return f"{x:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class _Rows:
    """The end of metrics.jsonl. Rows that can't be written (the disk is full) are kept and written
    with the next one; that is said once."""

    MOST = 100_000

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._told = path, b"", False
        self._file = path.open("ab", buffering=0)

    def write(self, row: str) -> None:
        self._waiting = (self._waiting + row.encode())[-self.MOST * 1000 :]
        try:
            while self._waiting:
                written = self._file.write(self._waiting) or 0
                self._waiting = self._waiting[written:]
        except OSError as error:
            if not self._told:
                self._told = True
                reason = error.strerror or error
                show(f"{self._path} can't be written ({reason}): the run goes on", sys.stderr)

    def close(self) -> None:
        if self._waiting:
            self.write("")
        with suppress(OSError):
            self._file.close()


class _Bar:
    """rich's progress bar with our figures behind it. Drawn as steps end, by no thread of its own:
    that one's errors would be nobody's."""

    EVERY = 0.25
    """Seconds between two drawings."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        columns = BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}")
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task = self._progress.add_task("", total=total, completed=done)
        self._drawn = -math.inf
        self._progress.start()

    def show(self, step: int, line: str) -> None:
        self._progress.update(self._task, completed=step, description=line)
        if (now := time.monotonic()) - self._drawn >= self.EVERY:
            self._drawn = now
            self._progress.refresh()

    def stop(self) -> None:
        self._progress.stop()


# ---- metrics.jsonl


def drop_steps_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; also drops a line that a killed run left unfinished."""
    if not path.exists():
        return
    kept = "".join(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step)
    if kept.encode() == path.read_bytes():
        return
    # replaced, not rewritten: whoever kills us meanwhile finds the old file or the new one
    draft = path.with_suffix(".tmp")
    draft.write_text(kept, encoding="utf-8")
    os.replace(draft, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; a value that was not finite reads None. Lines that are
    no rows (a kill cut them off, a disk changed them) are left out."""
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _finite(metrics: Metrics) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null stands for them."""

    def one(x: float) -> float | None:
        return x if math.isfinite(x) else None

    return {n: list(map(one, x)) if isinstance(x, list) else one(x) for n, x in metrics.items()}


# ---- wandb


@frozen
class WandbConfig:
    project: str
    name: str | None
    directory: Path
    config: Mapping[str, Any]
    """The run's resolved configuration, shown on its page."""
    timeout: float = 60.0
    """Seconds `close` waits at most for what is still to be sent."""


class Wandb:
    """A wandb run that lives on its own thread, so that nothing of it can hold up training.

    Importing wandb (a second), starting and sending happen there. Without a key or a network
    the run is recorded offline; whatever else goes wrong turns it off; either way one line
    says so through `say`. A run that resumes in the same directory continues the same run.
    """

    _CAPACITY = 100_000  # steps that may wait for a slow start before the rest is left out

    def __init__(self, config: WandbConfig, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(self._CAPACITY)
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._off.is_set():
            return
        try:
            self._queue.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._turn_off(f"has not taken {self._CAPACITY} steps")

    def close(self) -> None:
        """Ends the run; gives up, saying so, after the configured timeout."""
        if self._off.is_set():
            return
        self._queue.put(None)
        self._thread.join(self._config.timeout)
        if self._thread.is_alive():
            self._turn_off(f"did not finish within {self._config.timeout:.0f} s")

    def _run(self) -> None:
        try:
            run = self._start()
            while (item := self._queue.get()) is not None and not self._off.is_set():
                step, metrics = item
                run.log(metrics, step=step)
            run.finish()
        except BaseException as error:  # wandb raises SystemExit and KeyboardInterrupt too
            self._turn_off(f"failed ({type(error).__name__}: {error})")

    def _start(self) -> Any:
        mode = os.environ.get("WANDB_MODE")
        if mode is None:
            reason = offline_reason()
            mode = "offline" if reason else "online"
            if reason:
                where = self._config.directory / "wandb"
                self._say(f"wandb: {reason}, so the run is recorded offline under {where}")
        import wandb

        self._config.directory.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=self._config.project,
            name=self._config.name,
            dir=str(self._config.directory),
            config=dict(self._config.config),
            id=_run_id(self._config.directory),
            resume="allow" if mode == "online" else None,
            mode=mode,  # pyright: ignore[reportArgumentType]
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=mode != "online"),
        )

    def _turn_off(self, why: str) -> None:
        if not self._off.is_set():
            self._off.set()
            self._say(f"wandb {why} and is turned off; training goes on without it")


def offline_reason(timeout: float = 3.0) -> str | None:
    """Why wandb's server cannot be used, in words; None where it can."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = url.hostname or "api.wandb.ai"
    if not os.environ.get("WANDB_API_KEY") and not _netrc_knows(host):
        return "no API key (WANDB_API_KEY or `wandb login`)"
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None  # only the proxy can tell
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((host, port), timeout).close()
    except OSError as error:
        return f"no connection to {host} ({error})"
    return None


def _netrc_knows(host: str) -> bool:
    paths: list[Any] = [os.environ.get("NETRC")]
    with suppress(RuntimeError):  # a user without a home
        paths += [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in paths:
        try:
            if path and netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _run_id(directory: Path) -> str:
    path = directory / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
