"""What goes to the screen: foreign text is shown, not sent, and a screen that fails ends nothing.

Names of files, of roles and sources, what a template or a checkpoint says: whatever others wrote
may hold sequences that move the cursor, set the title or hide text. All of it goes through here.
"""

import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

_SENT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # line separators, directions
    "\ud800-\udfff]"  # bytes of a file's name that are no UTF-8
)
_told: set[int] = set()
"""The streams whose failure was told."""


def visible(text: str) -> str:
    """Replaces what a terminal would obey by how Python writes it: ESC becomes `\\x1b`."""
    return _SENT.sub(lambda found: ascii(found[0])[1:-1], text)


def show(text: str, stream: TextIO | None = None) -> None:
    """Prints a line, visibly. Where it can't be printed, that is said once on standard error."""
    stream = sys.stdout if stream is None else stream
    informs(lambda: print(visible(text), file=stream, flush=True), stream)


def show_error(error: object) -> None:
    """Prints `error: …` on standard error."""
    show(f"error: {error}", sys.stderr)


def informs(action: Callable[[], object], stream: TextIO | None = None) -> bool:
    """Does what only informs: whether it could be done. Nothing that it raises gets out (rich
    raises SystemExit where a pipe is broken); the stream's failure is said once on standard error,
    and what is written to it from then on goes nowhere."""
    stream = sys.stdout if stream is None else stream
    try:
        action()
    except (Exception, SystemExit) as error:
        if stream is not None and id(stream) not in _told:
            _told.add(id(stream))
            _to_nowhere(stream)
            if stream is not sys.stderr:
                what = str(error) or type(error).__name__
                show(f"standard output can't be written ({what}): the run goes on", sys.stderr)
        return False
    return True


def write_all_characters() -> None:
    """Has characters that a stream's encoding lacks written as escapes, not refused: for programs,
    at their start."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def _to_nowhere(stream: TextIO) -> None:
    """So that the interpreter's own last flush does not fail either."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no file, or closed
        pass
