"""`--help` names every argument, and loads nothing that only a run needs."""

import subprocess
import sys

import pytest

from omnistep.bin import sample, train
from omnistep.core.config import ARGUMENTS
from tests.bin.runs import ENVIRONMENT, ROOT, call, succeeded

SECTIONS = {"train": ("model", "data", "train", "infer"), "sample": ("infer",)}


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("program", ["train", "sample"])
def test_every_argument_is_named(program, word):
    main = {"train": train.main, "sample": sample.main}[program]
    out = succeeded(call(main, ["--train.lr=nonsense", word])).out
    for name in ARGUMENTS:
        is_read = name.split(".")[0] in SECTIONS[program]
        assert (f"--{name} " in out) == is_read
    assert f"usage: omnistep-{program}" in out


SCRIPT = """
import runpy, sys
for name in ("train", "sample"):
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(f"bin/{name}", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0
from omnistep.bin import train
assert train.main([]) == 2
slow = {"jax", "orbax", "transformers", "matplotlib", "wandb", "pyarrow"} & sys.modules.keys()
assert not slow, slow
"""


def test_help_and_mistakes_load_nothing_slow():
    """From the scripts of the checkout. torch takes its seconds; the rest waits for its use."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout.count("usage: omnistep-") == 2
