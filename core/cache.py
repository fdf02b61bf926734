"""Where what can be made again is kept: compiled code, decompressed data.

Compiled code is loaded without a further look, so it lies where only this user can write; torch's
own place for it, `/tmp/torchinductor_<user>`, can be made by anybody who comes first.
"""

import os
import stat
import tempfile
from pathlib import Path

VARIABLE = "OMNISTEP_CACHE"
INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_directory(name: str) -> Path:
    """Makes a directory of a cache: `$OMNISTEP_CACHE/<name>`, by default `omnistep/<name>` in
    `$XDG_CACHE_HOME` or `~/.cache`; where no such place can be written, one of this user's among
    the temporary files. Raises OSError where $OMNISTEP_CACHE can't be written."""
    if given := os.environ.get(VARIABLE):
        return _made(Path(given).expanduser() / name)
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        place = _made(Path(home) / "omnistep" / name)
        if os.access(place, os.W_OK):
            return place
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        pass
    try:
        return _checked(_made(_checked(_made(_temporary())) / name))
    except OSError:  # somebody else was there first
        return _made(Path(tempfile.mkdtemp(prefix="omnistep-")) / name)


def private_directory(name: str) -> Path:
    """Makes a directory of the cache that only this user can write, for code that is loaded from
    it. Raises OSError where it belongs to somebody else, or others may write into it."""
    return _checked(cache_directory(name))


def check_own(path: Path) -> None:
    """Raises OSError unless a file or directory is this user's (or root's) and nobody else can
    write it."""
    _checked(path)


def keep_compiled_code_private() -> None:
    """Gives torch's compiler a private place, unless the user chose one: for programs, before they
    compile. (torch itself writes its own default into the environment once it is imported.)"""
    torchs_own = os.path.join(tempfile.gettempdir(), "torchinductor_")
    if os.environ.get(INDUCTOR, torchs_own).startswith(torchs_own):
        os.environ[INDUCTOR] = str(private_directory("inductor"))


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"omnistep-{os.geteuid()}"


def _made(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir(mode=0o700, exist_ok=True)
    return place


def _checked(path: Path) -> Path:
    found = path.lstat()
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} belongs to another user (number {found.st_uid})")
    if found.st_mode & OTHERS_MAY_WRITE and not stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{path} can be written by others: chmod go-w {path}")
    return path
