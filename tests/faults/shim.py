"""Strikes at one call of a process on its files, its data or its console; shim.c does it.

`build` compiles it; a process that has it in LD_PRELOAD calls `arm` with a control file that
`make_control` made, and is watched and struck from there on.
"""

import ctypes
import enum
import os
import re
import shutil
import subprocess
from pathlib import Path

from attrs import frozen

SOURCE = Path(__file__).with_name("shim.c")
PATH_MAX = 4096


class Call(enum.IntEnum):
    """The order of shim.c's enum."""

    OPEN = 0
    """For reading."""
    CREATE = 1
    """Opened for writing, or made."""
    READ = 2
    WRITE = 3
    """Or cut."""
    MKDIR = 4
    RENAME = 5
    UNLINK = 6
    """Of a file or a directory."""
    SYNC = 7


class Whom(enum.IntEnum):
    """Who gets the signal. Of a job of one rank, all but SELF are that rank."""

    SELF = 0
    RANKS = 1
    LAUNCHER = 2
    EVERYONE = 3


@frozen
class Made:
    """A call that was made."""

    rank: int
    call: Call
    seconds: float
    """After the rank was armed."""
    place: str
    """Of its file, below the directory; of a rename the new one. Or data/..., or console."""

    @property
    def pattern(self) -> str:
        return pattern_of(self.place)


def area_of(place: str) -> str:
    """`console`, `data`, or `run`: that of a Made's place, or of a Strike's pattern."""
    if place == "console":
        return place
    return "data" if place.startswith("data/") else "run"


def pattern_of(place: str) -> str:
    """The place, whatever names tensorstore draws for its files."""
    return re.sub(r"[0-9a-f]{32}", "?" * 32, place)


@frozen
class Strike:
    """One fault: `error` or `signal`, after `seconds` or at a call.

    The call is the `at`-th (from 1) of kind `call` on a file like `pattern` that any of the `ranks`
    makes. An error is that of all calls of the kinds `lasting` from there on.
    """

    ranks: frozenset[int]
    call: Call = Call.OPEN
    pattern: str = ""
    at: int = 0
    error: int = 0
    lasting: frozenset[Call] = frozenset()
    signal: int = 0
    whom: Whom = Whom.SELF
    seconds: float = 0.0
    workers: bool = False
    """Not the ranks are struck but the processes that they started, which read data."""


NOTHING = Strike(frozenset())


class _Control(ctypes.Structure):
    """shim.c's `struct control`."""

    _fields_ = (
        ("ranks", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("at", ctypes.c_int64),
        ("error", ctypes.c_int64),
        ("lasting", ctypes.c_int64),
        ("signal", ctypes.c_int64),
        ("whom", ctypes.c_int64),
        ("microseconds", ctypes.c_int64),
        ("workers", ctypes.c_int64),
        ("counted", ctypes.c_int64),
        ("struck", ctypes.c_int64),
        ("committed", ctypes.c_int64),
        ("commits", ctypes.c_int64 * 64),
        ("directory", ctypes.c_char * PATH_MAX),
        ("data", ctypes.c_char * PATH_MAX),
        ("pattern", ctypes.c_char * PATH_MAX),
        ("place", ctypes.c_char * PATH_MAX),
        ("trace", ctypes.c_char * PATH_MAX),
    )


@frozen
class Seen:
    """What the shim has seen of a job."""

    calls: tuple[Made, ...]
    """In order, if it was traced."""
    commits: tuple[int, ...]
    """The numbers that became the name of a directory which had none, in order."""
    struck: str
    """`rename checkpoints/4`, `a moment`, or nothing."""


def make_control(
    path: Path, directory: Path, data: Path, strike: Strike, trace: Path | None
) -> None:
    """Writes the control file of a job whose calls on its standard output and on paths below
    `directory` and `data` are watched."""
    control = _Control(
        ranks=sum(1 << rank for rank in strike.ranks),
        kind=strike.call,
        at=strike.at,
        error=strike.error,
        lasting=sum(1 << call for call in strike.lasting),
        signal=strike.signal,
        whom=strike.whom,
        microseconds=round(strike.seconds * 1e6),
        workers=int(strike.workers),
        directory=os.fsencode(directory),
        data=os.fsencode(data),
        pattern=os.fsencode(strike.pattern),
        trace=b"" if trace is None else os.fsencode(trace),
    )
    path.write_bytes(bytes(control))


def read_control(path: Path, trace: Path | None) -> Seen:
    control = _Control.from_buffer_copy(path.read_bytes())
    struck = control.place.decode()
    kinds = [call.name.lower() for call in Call]
    how = f"{kinds[control.struck - 1]} {struck}" if control.struck <= len(Call) else struck
    lines = [] if trace is None else trace.read_text().splitlines()
    calls = (line.split(" ", 3) for line in lines)
    return Seen(
        tuple(Made(int(r), Call(int(call)), int(us) / 1e6, place) for r, call, us, place in calls),
        tuple(control.commits[: control.committed]),
        how if control.struck else "",
    )


def build(directory: Path) -> Path:
    """Compiles shim.c into `directory`; the library's path."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang", "g++")
    compiler = next(filter(None, map(shutil.which, filter(None, compilers))), None)
    if compiler is None:
        raise RuntimeError("no C compiler is found (cc, gcc, clang); $CC may name one")
    library = directory / "faults.so"
    language = ["-x", "c", str(SOURCE), "-ldl", "-lpthread"]
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([compiler, *options, *language], check=True)
    return library


def arm(control: str, rank: int, launcher: int) -> None:
    """In a process that has the library loaded. `launcher`: its process id, or 0."""
    if ctypes.CDLL(None).faults_arm(control.encode(), rank, launcher) != 0:
        raise RuntimeError(f"the shim cannot be armed with {control}")
