"""Runs whose checkpoints lie in a bucket."""

import os
import signal

import pytest

from omnistep.bin import train
from omnistep.core.checkpoint.place import Bucket, committed
from tests.bin.runs import call, losses, settings, succeeded, wait_until, words
from tests.core import buckets

pytestmark = pytest.mark.slow

STEPS = 24
LONG = {"data_train_size": 10_000, "train_max_steps": STEPS, "train_save_steps": 3}
AUTO = "--train.load_checkpoint_path=auto"


@pytest.mark.parametrize("scheme", ["gs", pytest.param("s3", marks=pytest.mark.exhaustive)])
def test_a_run_is_killed_and_goes_on_from_the_bucket(scheme, files, tmp_path, monkeypatch, server):
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    succeeded(call(train.main, words(settings(files, undisturbed, **LONG))))
    with buckets.served(monkeypatch):
        url = f"{scheme}://bucket/run"
        place = Bucket(url)
        chosen = settings(files, output, **LONG, train_checkpoint_dir=url)
        # of the environment of now: it says where the bucket is
        run = server.start("train", [*words(chosen), AUTO], environ=os.environ)
        wait_until(lambda: len(committed(place)) >= 2)
        run.kill(signal.SIGKILL)
        assert run.wait().code == -signal.SIGKILL
        first = committed(place)[-1]
        assert first < STEPS

        refused = call(train.main, words(chosen))
        assert refused.code == 1
        assert f"{url} holds a run's checkpoints, the last of step {first}" in refused.err
        assert "choose another train.checkpoint_dir" in refused.err

        result = succeeded(call(train.main, [*words(chosen), AUTO]))
        assert f"resume  step {first}, from auto" in result.out
        assert f"checkpoints  {url}\n" in result.out
        assert losses(output) == losses(undisturbed)
        assert committed(place) == [18, 21, 24]  # of which 3 are kept
        assert not (output / "checkpoints").exists()

        # another run goes on from one of them, and from the newest
        for path, step in ((f"{url}/21", 21), (url, 24)):
            other = settings(
                files, tmp_path / str(step), **LONG | {"train_load_checkpoint_path": path}
            )
            result = succeeded(call(train.main, words(other)))
            assert f"resume  step {step}, from {path}" in result.out


def test_a_bucket_that_cannot_be_written_to_is_told_at_once(files, tmp_path, monkeypatch):
    with buckets.served(monkeypatch) as objects:
        objects.changes_left = 0
        chosen = settings(files, tmp_path / "run", train_checkpoint_dir="gs://bucket/run")
        result = call(train.main, words(chosen))
    assert result.code == 1
    assert "train.checkpoint_dir: nothing can be written to gs://bucket/run" in result.err
    assert "PERMISSION_DENIED" in result.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_output_dir": "gs://bucket/run"}, "train.checkpoint_dir may be in a bucket"),
        ({"train_checkpoint_dir": "hf://me/run"}, "must be a local path, gs://bucket/path or s3"),
        ({"train_load_checkpoint_path": "https://x/y"}, "must be a local path, gs://bucket/path"),
    ],
)
def test_urls_that_are_no_use_are_refused(changes, message, files, tmp_path):
    result = call(train.main, words(settings(files, tmp_path / "run", **changes)))
    assert result.code == 2
    assert message in result.err
    assert not list(tmp_path.iterdir())
