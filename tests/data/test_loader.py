"""The stream of batches: nothing lost, nothing twice, one stream whatever the ranks."""

import itertools
import json
from collections import Counter
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistep.core.batch import segment_starts
from omnistep.data.blocks import Task
from omnistep.data.errors import DataError, NothingToLearn
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.state import DataState
from tests.data.made import (
    LENGTHS,
    PACKED,
    PAD,
    cases,
    check_rows,
    loader_of,
    micro_batches,
    pieces_of,
    same,
    take,
)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_piece_once_per_epoch(case):
    """The plan of two epochs of blocks: every piece of both, once."""
    samples, config = case
    loader = loader_of(samples, **config)
    blocks = loader.reader.blocks or 0
    tasks = [Task(epoch, 0, block) for epoch in range(2) for block in range(blocks)]
    rows = [row for arrival in loader._arrivals(tasks, ()) for row in arrival.rows]
    given_ids = [(p.at[0] // blocks, p.at[1], p.at[2]) for row in rows for p in row]
    wanted = [
        (epoch, sample, piece)
        for epoch in range(2)
        for sample in range(len(samples))
        for piece in range(len(samples[sample]))
    ]
    assert sorted(given_ids) == wanted


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_stream_of_batches(case):
    """What batches give, with the pieces still held, is all that was read: once each."""
    samples, config = case
    loader = loader_of(samples, **config)
    setting = loader.config
    total = sum(len(sample) for sample in samples)
    stream = take(loader, 12)
    seen = Counter()
    longest = max(max(sample) for sample in samples)
    for step, (batch, state) in enumerate(stream):
        assert state.step == step + 1
        lead = (setting.accumulate,) if setting.accumulate > 1 else ()
        assert batch.tokens.shape == (*lead, setting.micro_rows, setting.row_tokens)
        for micro in micro_batches(batch, setting.accumulate):
            seen.update(check_rows(micro, max(setting.budget(step), longest)))
    last = stream[-1][1]
    if setting.packed:
        # No piece is an epoch and the waiting time ahead of another.
        waits = 2 + -(-8 // (loader.reader.blocks or 1))
        counts = [seen[number] for number in range(1, total + 1)]
        assert max(counts) - min(counts) <= waits
    elif not setting.drop_last and last.epoch > 0:
        for number in range(1, total + 1):
            assert seen[number] in (last.epoch, last.epoch + 1)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 9))
def test_going_on_from_any_state(case, stop):
    """Through JSON, with packing in the main process: the identical continuation."""
    samples, config = case
    stream = take(loader_of(samples, **config), stop + 4)
    state = stream[stop][1]
    again = type(state).from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    loader = loader_of(samples, **{**config, "dyn_bsz_runtime": "main"})
    for (batch, after), (got, got_after) in zip(
        stream[stop + 1 :], take(loader, 3, again), strict=True
    ):
        assert same(batch, got)
        assert after == got_after


@settings(max_examples=30, deadline=None)
@given(cases(), st.sampled_from([2, 3]))
def test_ranks_share_the_stream(case, ranks):
    """Ranks' batches, one after another, are one rank's; and a state of one goes on on several."""
    samples, config = case
    per_rank = config["accumulate"]
    whole = loader_of(samples, **{**config, "accumulate": per_rank * ranks, "drop_last": False})
    stream = take(whole, 4)
    parts = [
        take(
            loader_of(samples, **{**config, "drop_last": False}, data_rank=rank, data_ranks=ranks),
            2,
            stream[1][1],
        )
        for rank in range(ranks)
    ]
    for step in range(2):
        batch, after = stream[2 + step]
        assert all(part[step][1] == after for part in parts)
        tokens = [part[step][0].tokens for part in parts]
        rows = torch.cat([t.reshape(-1, t.shape[-1]) for t in tokens])
        assert torch.equal(rows, batch.tokens.reshape(rows.shape))


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(1, 2))
def test_both_kinds_of_packing_are_one(case, accumulate):
    samples, config = case
    config = {k: v for k, v in config.items() if k not in ("rmpad", "rmpad_with_pos_ids")}
    config["accumulate"] = accumulate
    one = take(loader_of(samples, **config, rmpad=True), 5)
    two = take(loader_of(samples, **config, rmpad_with_pos_ids=True), 5)
    for (a, after_a), (b, after_b) in zip(one, two, strict=True):
        assert after_a == after_b
        for x, y in zip(micro_batches(a, accumulate), micro_batches(b, accumulate), strict=True):
            assert torch.equal(x.tokens, y.tokens)
            assert torch.equal(x.targets, y.targets)
            assert torch.equal(x.weights, y.weights)
            used = x.tokens != PAD
            assert torch.equal(segment_starts(x)[used], segment_starts(y)[used])


@settings(max_examples=40, deadline=None)
@given(cases())
def test_an_evaluation_set_is_read_once(case):
    samples, config = case
    config = {k: v for k, v in config.items() if k != "bsz_warmup_steps"}
    loader = loader_of(samples, **config)
    total = sum(len(sample) for sample in samples)
    for _ in range(2):
        batches = list(loader.eval_batches())
        seen = []
        for batch in batches:
            assert batch.tokens.shape == batches[0].tokens.shape
            for micro in micro_batches(batch, loader.config.accumulate):
                seen += check_rows(micro, loader.config.limits.budget)
        assert sorted(seen) == list(range(1, total + 1))
        if not loader.config.packed:
            assert seen == sorted(seen)  # in order
    assert loader.count_pieces() == total


def test_warmup_grows_linearly():
    """Pieces of 8 tokens in rows of 64: the tokens of a row follow the step, then it is full."""
    config = {"max_seq_len": 16, "micro_batch_size": 4, "rmpad_with_pos_ids": True}
    loader = loader_of(((8,),) * 400, **config, bsz_warmup_steps=4, block_samples=40)
    used = [int((batch.tokens != PAD).sum()) for batch, _ in take(loader, 40)]
    assert [loader.config.budget(step) for step in range(6)] == [16, 32, 48, 64, 64, 64]
    assert used[:2] == [16, 32]
    assert all(tokens <= loader.config.budget(step) for step, tokens in enumerate(used))
    assert used[5:] == [64] * 35


@settings(max_examples=40, deadline=None)
@given(cases())
def test_warmup_gives_the_same_pieces_in_the_same_order(case):
    samples, config = case
    warm = loader_of(samples, **config)
    cold = loader_of(samples, **{**config, "bsz_warmup_steps": 0})
    streams = []
    for loader in (warm, cold):
        rows = (row for row, _ in loader._rows(DataState()))
        pieces = (piece.at for row in rows for piece in row)
        streams.append(list(itertools.islice(pieces, 50)))
    assert streams[0] == streams[1]
    assert len(set(streams[0])) == 50


def test_padded_epochs_end():
    samples = ((3,),) * 10
    kept = loader_of(samples, max_seq_len=4, micro_batch_size=4, drop_last=False)
    stream = take(kept, 6)
    rows = [int((batch.tokens != PAD).any(-1).sum()) for batch, _ in stream]
    assert rows == [4, 4, 2, 4, 4, 2]
    assert [state.epoch for _, state in stream] == [0, 0, 0, 1, 1, 1]
    dropped = loader_of(samples, max_seq_len=4, micro_batch_size=4)
    stream = take(dropped, 4)
    assert [state.epoch for _, state in stream] == [0, 0, 1, 1]
    assert all((batch.tokens != PAD).any(-1).all() for batch, _ in stream)


def test_errors():
    with pytest.raises(DataError, match=r"an epoch has 3 sequences, fewer than the 4 of a step"):
        take(loader_of(((3,),) * 3, max_seq_len=4, micro_batch_size=4), 1)
    with pytest.raises(DataError, match="no sample gave a single token"):
        take(loader_of(((),) * 3, max_seq_len=4), 1)
    with pytest.raises(ValueError, match=r"sample 1: a piece of 5 tokens; .* pieces of 1 to 4"):
        take(loader_of(((3,), (5,)), max_seq_len=4), 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size is 0; it must be at least 1"),
        ({"rmpad": True, "rmpad_with_pos_ids": True}, "both true"),
        ({"rmpad": True, "dyn_bsz_margin": 8}, r"dyn_bsz_margin is 8; allowed is 0 to 7"),
        ({"bsz_warmup_steps": 2}, "shape packed rows"),
        ({"data_rank": 2, "data_ranks": 2}, "data_rank 2 is not one of 2 ranks"),
    ],
)
def test_impossible_configurations(wrong: dict[str, Any], message):
    with pytest.raises(ValueError, match=message):
        LoaderConfig(max_seq_len=8, **wrong)


def test_a_state_of_another_stream():
    (_, state), *_ = take(loader_of(LENGTHS, **PACKED), 1)
    with pytest.raises(DataError, match=r"tokens of a row was 64, is 32"):
        loader_of(LENGTHS, **{**PACKED, "micro_batch_size": 2}).batches(state)
    with pytest.raises(DataError, match=r"the number of samples was 90, is 89"):
        loader_of(LENGTHS[1:], **PACKED).batches(state)
    shorter = tuple((1,) for _ in LENGTHS)  # the same number of samples, other content
    (_, late), *_ = take(loader_of(LENGTHS, **PACKED), 9)[-1:]
    with pytest.raises(DataError, match="changed since the checkpoint"):
        take(loader_of(shorter, **PACKED), 1, attrs.evolve(late, row=9))
    held = attrs.evolve(late, held=((0, 3, 1),))
    with pytest.raises(DataError, match=r"holds piece 1 of sample 3, which now has 1: .*changed"):
        take(loader_of(shorter, **PACKED), 1, held)
    broken = {**state.to_json(), "extra": 1}
    with pytest.raises(DataError, match="a data position has the fields"):
        type(state).from_json(broken)


def test_one_iteration_at_a_time():
    loader = loader_of(LENGTHS, **PACKED)
    first = loader.batches()
    next(first)
    take(loader, 1)
    with pytest.raises(RuntimeError, match="another was started"):
        list(itertools.islice(first, 100))
    loader.close()
    with pytest.raises(RuntimeError, match="was closed"):
        take(loader, 1)


def teaches_nothing(*samples):
    """A transform of which records of these numbers are to teach nothing."""

    def transform(record):
        if int(record.where.split()[1]) in samples:
            raise NothingToLearn(f"{record.where}: nothing to learn")
        return pieces_of(record)

    return transform


@pytest.mark.parametrize("bad_records", ["stop", "skip"])
def test_records_with_nothing_to_learn_are_left_out_and_counted(bad_records):
    """They are no broken records: `stop` does not stop, one is told of."""
    told: list[str] = []
    config = {**PACKED, "bad_records": bad_records}
    loader = loader_of(((5,),) * 20, transform=teaches_nothing(3, 4, 17), **config)
    loader.warn = told.append
    seen = take(loader, 12)
    _, state = seen[-1]
    assert state.epoch > 0
    assert state.unlearnt >= 3 * state.epoch
    assert state.skipped == 0
    assert len(told) == 1
    assert told[0].startswith("left out: sample ")
    assert told[0].endswith("; further ones are only counted")


def test_data_with_nothing_to_learn_is_an_error():
    loader = loader_of(((5,),) * 20, transform=teaches_nothing(*range(20)), **PACKED)
    with pytest.raises(DataError, match=r"the data is empty.* The first: sample \d+: nothing to l"):
        take(loader, 1)
