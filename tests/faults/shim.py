"""Strikes at the k-th call of a process on the files below a directory; shim.c does it.

`build` compiles it; a process that has it in LD_PRELOAD calls `arm` with a control file that
`Control.create` made, and is counted and struck from there on.
"""

import ctypes
import enum
import mmap
import os
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


ANY = frozenset(Call)


@frozen
class Strike:
    """One fault: `error` or `signal`, at the call of number `at` or after `seconds`.

    `ranks` are counted together, and struck; `calls` are the kinds that count. A `lasting` error
    is that of all counted calls from there on.
    """

    ranks: frozenset[int]
    calls: frozenset[Call] = ANY
    at: int = 0
    error: int = 0
    lasting: bool = False
    signal: int = 0
    whom: Whom = Whom.SELF
    seconds: float = 0.0


NOTHING = Strike(frozenset())


class _Control(ctypes.Structure):
    """shim.c's `struct control`."""

    _fields_ = (
        ("ranks", ctypes.c_int64),
        ("kinds", ctypes.c_int64),
        ("at", ctypes.c_int64),
        ("error", ctypes.c_int64),
        ("lasting", ctypes.c_int64),
        ("signal", ctypes.c_int64),
        ("whom", ctypes.c_int64),
        ("microseconds", ctypes.c_int64),
        ("counted", ctypes.c_int64),
        ("struck", ctypes.c_int64),
        ("counts", ctypes.c_int64 * len(Call) * 64),
        ("committed", ctypes.c_int64),
        ("commits", ctypes.c_int64 * 64),
        ("directory", ctypes.c_char * PATH_MAX),
        ("place", ctypes.c_char * PATH_MAX),
        ("trace", ctypes.c_char * PATH_MAX),
    )


@frozen
class Seen:
    """What the shim has seen of a job."""

    counts: tuple[dict[Call, int], ...]
    """Of each rank."""
    commits: tuple[int, ...]
    """The numbers to which a directory was renamed, in order."""
    struck: str
    """`rename checkpoints/4`, `a moment`, or nothing."""

    def count(self, ranks: frozenset[int], calls: frozenset[Call]) -> int:
        return sum(self.counts[rank][call] for rank in ranks for call in calls)


def make_control(path: Path, directory: Path, strike: Strike, trace: Path | None = None) -> None:
    """Writes the control file of a job whose calls on paths below `directory` count."""
    control = _Control(
        ranks=sum(1 << rank for rank in strike.ranks),
        kinds=sum(1 << call for call in strike.calls),
        at=strike.at,
        error=strike.error,
        lasting=strike.lasting,
        signal=strike.signal,
        whom=strike.whom,
        microseconds=round(strike.seconds * 1e6),
        directory=os.fsencode(directory),
        trace=b"" if trace is None else os.fsencode(trace),
    )
    path.write_bytes(bytes(control))


def read_control(path: Path, nproc: int) -> Seen:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        control = _Control.from_buffer_copy(shared)
    place = control.place.decode().removeprefix(control.directory.decode() + "/")
    kinds = [call.name.lower() for call in Call]
    how = f"{kinds[control.struck - 1]} {place}" if control.struck <= len(Call) else place
    return Seen(
        tuple({call: control.counts[rank][call] for call in Call} for rank in range(nproc)),
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
