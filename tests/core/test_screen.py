"""Foreign text is shown, not sent; a stream that fails ends nothing."""

import io
import sys

import pytest

from omnistep.core import screen


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢字 🏳️‍🌈\n\ttext", "plain é 漢字 🏳️‍🌈\n\ttext"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\x08", "over\\rwritten\\x08"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("a\u202eb\u2066c\u2028d", "a\\u202eb\\u2066c\\u2028d"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_visible(text, shown):
    assert screen.visible(text) == shown


class Fails(io.StringIO):
    def write(self, _):
        raise BrokenPipeError(32, "Broken pipe")


def test_what_only_informs_ends_nothing(monkeypatch, capsys):
    gone = Fails()
    monkeypatch.setattr(sys, "stdout", gone)
    for _ in range(3):
        screen.show("hello")
    assert capsys.readouterr().err.count("standard output can't be written (") == 1

    def exits():
        raise SystemExit(1)  # rich's answer to a broken pipe

    assert not screen.informs(exits, gone)
    assert screen.informs(lambda: None, gone)
