"""What was saved on one mesh is restored on others, up or down, to the bit."""

from pathlib import Path

import pytest

from tests.forkserver.client import ForkServer

pytestmark = pytest.mark.slow

MESHES, FORMATS = 13, 2


@pytest.mark.parametrize(
    ("which", "others"), [("some", 2), pytest.param("all", 12, marks=pytest.mark.exhaustive)]
)
def test_meshes_restore_what_others_saved(
    which: str, others: int, tmp_path: Path, server: ForkServer
) -> None:
    """Parameters, both moments, counts, key, data position and meters; in elastic_ranks.py."""
    done = server.run("tests.core.elastic_ranks:main", [tmp_path, which])
    assert done.code == 0, done.err
    counts = {path.name: int(path.read_text()) for path in tmp_path.glob("count*")}
    assert len(counts) == 1 + 2 + 4
    pairs = sum(count for name, count in counts.items() if name.endswith(".0"))
    assert pairs == MESHES * others * FORMATS
