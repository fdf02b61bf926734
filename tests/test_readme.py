"""What the README shows works as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from omnistep.core.config_io import parse
from omnistep.data.sources import read_weighted

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_research_snippet_learns_outside_of_the_checkout(tmp_path):
    (snippet,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"loss ([\d.]+)", done.stdout)[-1]) < 0.02


def test_the_recipe_is_one(tmp_path):
    recipe, _ = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert parse([str(tmp_path / "recipe.yaml")]).train.lr == 2e-5


def test_the_list_of_sources_is_one(tmp_path):
    _, sources = blocks("yaml")
    (tmp_path / "sources.yaml").write_text(sources)
    found = read_weighted(tmp_path / "sources.yaml", "data.train_path")
    assert [(source.name, source.weight) for source in found] == [
        ("chats", 3),
        ("books.parquet", 1),
    ]


def test_no_figure_is_missing():
    assert not re.findall(r"@[A-Z]+@", README)
