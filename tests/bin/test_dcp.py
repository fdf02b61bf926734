"""Runs whose checkpoints have the format of torch.distributed.checkpoint."""

import signal

import pytest

from omnistep.bin import train
from omnistep.core.checkpoint.store import held_format
from tests.bin.runs import (
    call,
    content,
    losses,
    saved_steps,
    settings,
    succeeded,
    wait_until,
    words,
)

pytestmark = pytest.mark.slow

STEPS = 12
DCP = {
    "data_train_size": 10_000,
    "train_max_steps": STEPS,
    "train_save_steps": 3,
    "train_checkpoint_format": "dcp",
}
RANKS = {1: {}, 2: {"train_data_parallel_mode": "fsdp2", "train_global_batch_size": 4}}
KILLS = {1: ("3*", "6"), 2: ("6*",)}
"""What lies there when a run is killed: a save under way (3.tmp), which on a busy machine may be
over when it is seen; a committed step."""


@pytest.mark.parametrize("ranks", RANKS)
def test_a_killed_run_goes_on_bit_for_bit(ranks, files, tmp_path, server):
    def command(output, **changes):
        return words(settings(files, output, **DCP, **RANKS[ranks], **changes))

    succeeded(server.run("train", command(tmp_path / "whole"), ranks=ranks))
    output = tmp_path / "run"
    again = command(output, train_load_checkpoint_path="auto")
    for pattern in KILLS[ranks]:
        run = server.start("train", again, ranks=ranks)
        wait_until(lambda pattern=pattern: any((output / "checkpoints").glob(pattern)))
        run.kill(signal.SIGKILL)  # its ranks end with it
        assert run.wait().code == -signal.SIGKILL
    done = succeeded(server.run("train", again, ranks=ranks))
    assert "resume  step " in done.out
    assert losses(output) == losses(tmp_path / "whole")
    assert held_format(output / "checkpoints") == "dcp"
    places = [path / "checkpoints" / str(STEPS) for path in (output, tmp_path / "whole")]
    ours, theirs = (content(place) for place in places)
    for held in (ours, theirs):
        # it names the directory, and each save by a random id
        del held[".metadata"], held[".metadata.crc32"]
    assert ours == theirs


def test_a_run_starts_from_a_checkpoint_of_the_other_format(files, tmp_path):
    """And does not go on with one format where the other was saved."""
    first, second = tmp_path / "first", tmp_path / "second"
    succeeded(call(train.main, words(settings(files, first, **DCP | {"train_max_steps": 3}))))
    more = {**DCP, "train_checkpoint_format": "orbax", "train_load_checkpoint_path": first}
    result = succeeded(call(train.main, words(settings(files, second, **more))))
    assert "resume  step 3" in result.out
    assert saved_steps(second) == [6, 9, 12]
    assert held_format(second / "checkpoints") == "orbax"
    before = content(second)
    changes = {**DCP, "train_load_checkpoint_path": "auto"}
    result = call(train.main, words(settings(files, second, **changes)))
    assert result.code == 1
    assert "holds checkpoints of the format orbax; dcp cannot be saved beside them" in result.err
    assert content(second) == before
