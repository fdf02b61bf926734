"""Files that were changed are accepted or refused, and nothing else; `python -m tests.fuzz` reads
as many as one likes."""

import pytest

from tests.fuzz.__main__ import FAULTS, fuzz
from tests.fuzz.kinds import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_changed_files(kind):
    faults = [one for one in fuzz(kind, 8, first=1000) if one.outcome in FAULTS]
    assert not faults


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files(kind):
    found = fuzz(kind, 120, first=5000)
    assert len(found) == 120
    assert not [one for one in found if one.outcome in FAULTS]


def test_a_sound_file_is_accepted(tmp_path):
    for kind in KINDS.values():
        path = tmp_path / kind.name
        path.write_bytes(kind.make())
        kind.read(path)
        path.unlink()
        for left in tmp_path.iterdir():
            left.unlink() if left.is_file() else None
