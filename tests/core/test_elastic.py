"""What was saved on one mesh is restored on any other, up or down, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MESHES, FORMATS = 13, 2


def test_every_mesh_restores_what_every_other_saved(tmp_path: Path) -> None:
    """Parameters, both moments, counts, key, data position and meters; in elastic_ranks.py."""
    command = [sys.executable, str(ROOT / "tests/core/elastic_ranks.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = {path.name: int(path.read_text()) for path in tmp_path.glob("count*")}
    assert len(counts) == 1 + 2 + 4
    pairs = sum(count for name, count in counts.items() if name.endswith(".0"))
    assert pairs == MESHES * (MESHES - 1) * FORMATS
