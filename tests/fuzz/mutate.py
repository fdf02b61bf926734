"""Changed copies of a file's bytes, by a seed: what disks, networks and attackers make of files."""

import random
import re

VALUES = (
    *(
        b"-1",
        b"0",
        b"1e400",
        b"NaN",
        b"null",
        b"true",
        b'"x"',
        b"[]",
        b"{}",
        b"99999999999999999999",
    ),
    *(b"1.5", b'"\\ud800"', b'"\\u001b[2J"', b"[" * 50 + b"]" * 50),
)
"""What a number or a word of JSON is replaced by."""


def mutated(content: bytes, seed: int) -> bytes:
    """One to four changes of a kind that the seed draws."""
    draw = random.Random(seed)
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        draw.choice((_flip, _flip, _truncate, _insert, _double, _fill, _number, _word))(
            changed, draw
        )
        if not changed:
            break
    return bytes(changed)


def _at(changed: bytearray, draw: random.Random) -> int:
    # heads are small and decide much
    return draw.randrange(min(len(changed), 200) if draw.random() < 0.5 else len(changed))


def _flip(changed: bytearray, draw: random.Random) -> None:
    changed[_at(changed, draw)] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))


def _truncate(changed: bytearray, draw: random.Random) -> None:
    del changed[_at(changed, draw) :]


def _insert(changed: bytearray, draw: random.Random) -> None:
    at = _at(changed, draw)
    changed[at:at] = draw.randbytes(draw.choice((1, 4, 64)))


def _double(changed: bytearray, draw: random.Random) -> None:
    at = _at(changed, draw)
    changed[at:at] = changed[at : at + draw.choice((1, 16, 300))]


def _fill(changed: bytearray, draw: random.Random) -> None:
    at, count = _at(changed, draw), draw.choice((2, 4, 8))
    changed[at : at + count] = bytes([draw.choice((0, 255))]) * count


def _number(changed: bytearray, draw: random.Random) -> None:
    _replace(changed, draw, rb"-?\d+(\.\d+)?")


def _word(changed: bytearray, draw: random.Random) -> None:
    _replace(changed, draw, rb'"[^"]{0,40}"|true|false|null')


def _replace(changed: bytearray, draw: random.Random, pattern: bytes) -> None:
    found = list(re.finditer(pattern, bytes(changed[:20_000])))
    if found:
        one = draw.choice(found)
        changed[one.start() : one.end()] = draw.choice(VALUES)


WAYS = (_flip, _flip, _truncate, _insert, _double, _fill, _number, _word)
