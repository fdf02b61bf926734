"""The deliberate breaks find the places that they break."""

import pytest

from tests.breaks import BREAKS, ROOT, Break


@pytest.mark.parametrize("found", BREAKS, ids=lambda found: found.what)
def test_a_break_finds_its_place(found: Break) -> None:
    assert (ROOT / found.file).read_text().count(found.right) == 1
    assert found.wrong != found.right
