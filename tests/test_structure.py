"""The house's rules: imports run one way, files stay small, everything is formatted and typed."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("parallel", "core", "models", "data", "bin")
MAY_IMPORT = {
    "parallel": set(),
    "core": {"parallel"},
    "models": {"core", "parallel"},
    "data": {"core"},
    "bin": {"models", "data", "core", "parallel"},
}
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_folders(source: str) -> set[str]:
    """The omnistep folders that a module imports, wherever in it the import stands."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("omnistep.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    folder = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = imported_folders(path.read_text()) - allowed
    assert not wrong, f"{folder} may import {sorted(allowed)}, not {sorted(wrong)}"


def test_a_backward_import_is_seen():
    assert imported_folders("def f():\n    from omnistep.bin import train") == {"bin"}
    assert imported_folders("import omnistep.models.decoder as d") == {"models"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_room(path):
    assert len(path.read_text().splitlines()) <= 400


def test_every_package_is_installed():
    """A folder with modules that pyproject does not name would be missing from a wheel."""
    named = set(
        __import__("tomllib").loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
            "packages"
        ]
    )
    folders = {"omnistep." + ".".join(p.parent.relative_to(ROOT).parts) for p in SOURCES}
    assert named == folders


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pyright(tmp_path):
    """pyright does not follow an editable install's mapping of folders: it sees them as links."""
    (tmp_path / "omnistep").mkdir()
    for folder in FOLDERS:
        (tmp_path / "omnistep" / folder).symlink_to(ROOT / folder)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "-p", str(tmp_path), "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
