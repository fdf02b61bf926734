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


def test_help_and_mistakes_load_nothing_slow():
    """torch alone takes its second or two; the rest waits until it is needed."""
    code = (
        "import sys\nfrom omnistep.bin import train, sample\n"
        "train.main(['--help']), sample.main(['--help']), train.main([])\n"
        "slow = {'jax', 'orbax', 'transformers', 'matplotlib', 'wandb', 'torch._dynamo', "
        "'torch._inductor', 'pyarrow'} & sys.modules.keys()\n"
        "sys.exit(f'loaded: {sorted(slow)}' if slow else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert "loaded" not in done.stderr, done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("program", ["train", "sample"])
def test_the_script_of_the_checkout(program):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bin" / program), "--help"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT.parent,
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: omnistep-{program}" in done.stdout
