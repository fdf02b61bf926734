"""Worker processes: they change nothing, and neither they nor the main process hang or stay."""

import multiprocessing
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch

from omnistep.data.errors import DataError
from omnistep.data.transform import Tokens
from omnistep.data.workers import start_context
from tests.data.made import LENGTHS, PACKED, PAD, loader_of, pieces_of, same, take


@pytest.mark.parametrize("runtime", ["worker", "main"])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, runtime):
    want = take(loader_of(LENGTHS, **PACKED), 30)
    loader = loader_of(LENGTHS, **PACKED, num_workers=workers, dyn_bsz_runtime=runtime)
    got = take(loader, 30)
    assert [state for _, state in got] == [state for _, state in want]
    assert all(same(a, b) for (a, _), (b, _) in zip(got, want, strict=True))
    # The same workers serve again, from elsewhere, and what was read ahead is forgotten.
    again = take(loader, 5, want[9][1])
    assert all(same(a, b) for (a, _), (b, _) in zip(again, want[10:15], strict=True))
    assert loader.count_pieces() == 180
    assert sum(int((b.tokens != PAD).sum()) for b in loader.eval_batches()) == sum(
        map(sum, LENGTHS)
    )
    loader.close()


def test_a_jax_process_forks_no_worker(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert start_context().get_start_method() == "forkserver"
    monkeypatch.delitem(sys.modules, "jax")
    assert start_context().get_start_method() == "fork"


def test_the_global_generator_is_not_touched():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    loader = loader_of(LENGTHS, **PACKED, num_workers=1)
    take(loader, 2)
    assert torch.equal(torch.rand(3), want)


def group(record):
    return [Tokens(np.array([os.getpgrp()], np.int32))]


def test_signals_to_the_group_do_not_reach_workers():
    """Ctrl-C and a scheduler's SIGTERM are for the main process to act on."""
    loader = loader_of(LENGTHS, max_seq_len=4, num_workers=1, transform=group)
    (batch, _), *_ = take(loader, 1)
    assert batch.tokens[0, 0] != os.getpgrp()


def main_process(pipe):
    loader = loader_of(LENGTHS * 20, **{**PACKED, "block_samples": 900}, num_workers=2)
    take(loader, 1)
    pipe.send([process.pid for process in multiprocessing.active_children()])
    time.sleep(60)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_workers_end_with_a_killed_main_process(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax", raising=False)  # fork, which starts at once
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=main_process, args=(theirs,))
    process.start()
    workers = ours.recv()
    try:
        assert len(workers) == 2
        assert all(alive(pid) for pid in workers)
        process.kill()
        process.join()
        end = time.monotonic() + 5
        while any(alive(pid) for pid in workers) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(alive(pid) for pid in workers)
    finally:
        for pid in filter(alive, workers):
            os.kill(pid, signal.SIGKILL)


def bad(record):
    if record.where == "sample 33":
        raise DataError("corpus.jsonl, line 34: not JSON")
    return pieces_of(record)


def killed(record):
    os.kill(os.getpid(), signal.SIGKILL)
    return pieces_of(record)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_ends_the_run_with_its_own_message(workers):
    loader = loader_of(LENGTHS, **PACKED, num_workers=workers, transform=bad)
    with pytest.raises(DataError, match=r"^corpus\.jsonl, line 34: not JSON$"):
        take(loader, 100)


def test_a_killed_worker_ends_the_run():
    loader = loader_of(LENGTHS, **PACKED, num_workers=1, transform=killed)
    with pytest.raises(
        DataError, match=r"DataLoader worker .*(killed|exited).* where memory lacks"
    ):
        take(loader, 1)
