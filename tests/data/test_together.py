"""Streams, mixes and shared reading: the same batches whatever the ranks, workers, crash points."""

import itertools
import json
from collections import Counter
from functools import partial
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistep.core.checkpoint.ranks import ALONE
from omnistep.data import blocks
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.loader import make_loader
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.mapping import MappingReader, Part
from omnistep.data.order import Shuffled, mix
from omnistep.data.state import DataState
from omnistep.data.streaming import StreamReader
from tests.data.made import (
    LENGTHS,
    PACKED,
    PAD,
    SPAN,
    TOKENIZER,
    Made,
    cases,
    check_rows,
    loader_of,
    micro_batches,
    pieces_of,
    same,
    take,
)
from tests.data.together import together


@attrs.frozen
class MadeFiles:
    """A Stream of files of samples; some of them are bad."""

    lengths: tuple[tuple[tuple[int, ...], ...], ...]
    bad: frozenset[int] = frozenset()
    opened: list = attrs.field(factory=list)

    @property
    def files(self):
        return len(self.lengths)

    def open(self, file):
        self.opened.append(file)
        first = 1 + sum(len(sample) for other in self.lengths[:file] for sample in other)
        for number, sample in enumerate(self.lengths[file]):
            yield lambda first=first, s=sample, n=number: self.record(file, n, first, s)
            first += len(sample)

    def record(self, file, number, first, sample):
        if 100 * file + number in self.bad:
            raise DataError(f"file {file}, record {number}: bad")
        return Record({"pieces": [[first + i, n] for i, n in enumerate(sample)]}, f"file {file}")


def stream_of(stream, ranks=ALONE, block_samples=4, **config):
    config = LoaderConfig(**config)
    reader = StreamReader(stream, pieces_of, block_samples, config.seed, config.rules)
    return make_loader(reader, TOKENIZER, config, ranks, warn=lambda text: None)


@st.composite
def streams(draw):
    samples, config = draw(cases())
    cuts = sorted(draw(st.lists(st.integers(0, len(samples)), max_size=4)))
    parts = itertools.pairwise([0, *cuts, len(samples)])
    return tuple(samples[a:b] for a, b in parts), {**config, "drop_last": False}


@settings(max_examples=60, deadline=None)
@given(streams(), st.integers(1, 4))
def test_a_stream_gives_every_piece_once_an_epoch(case, epochs):
    """What was given before an epoch begins, with what waits then, is all of those before it."""
    files, config = case
    loader = stream_of(MadeFiles(files), **config)
    total = sum(len(sample) for file in files for sample in file)
    pieces = []
    for arrival in loader._arrivals(loader._forever(DataState()), ()):
        if arrival.epoch == epochs:
            pieces += arrival.held
            break
        pieces += [piece for row in arrival.rows for piece in row]
    seen = Counter(int(piece.ids[0]) // SPAN for piece in pieces)
    assert seen == dict.fromkeys(range(1, total + 1), epochs)


@settings(max_examples=40, deadline=None)
@given(streams(), st.integers(0, 9), st.sampled_from([2, 3]))
def test_a_stream_goes_on_on_other_ranks(case, stop, size):
    """From any step, through JSON: one rank's continuation, on several that share the reading."""
    files, config = case
    config["accumulate"] *= size
    stream = take(stream_of(MadeFiles(files), **config), stop + 4)
    state = DataState.from_json(json.loads(json.dumps(stream[stop][1].to_json())))
    assert state == stream[stop][1]

    def act(ranks):
        own = {**config, "accumulate": config["accumulate"] // size}
        own |= {"data_rank": ranks.rank, "data_ranks": size}
        return take(stream_of(MadeFiles(files), ranks, **own), 3, state)

    assert_shares(together(size, act), stream[stop + 1 :])


def assert_shares(parts, whole):
    """The ranks' batches, one after another, are one rank's; the states are equal."""
    for step, (batch, after) in enumerate(whole):
        assert all(part[step][1] == after for part in parts)
        shares = [part[step][0].tokens for part in parts]
        rows = torch.cat([share.reshape(-1, share.shape[-1]) for share in shares])
        assert torch.equal(rows, batch.tokens.reshape(rows.shape))


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([2, 3, 5]), st.integers(0, 9))
def test_ranks_that_read_together_read_as_one(case, size, stop):
    """By random access: also ranks along tensor parallelism, who take the same rows."""
    samples, config = case
    config["drop_last"] = False
    stream = take(loader_of(samples, **config), stop + 4)
    state = stream[stop][1]
    parts = together(size, lambda ranks: take(loader_of(samples, ranks=ranks, **config), 3, state))
    for part in parts:
        for (batch, after), (got, got_after) in zip(stream[stop + 1 :], part, strict=True):
            assert same(batch, got)
            assert after == got_after


def test_each_rank_reads_its_part_only():
    """Of 20 blocks by 4 ranks, each makes five and what it had prefetched."""
    made = []

    def counting(record):
        made.append(record.where)
        return pieces_of(record)

    def act(ranks):
        loader = loader_of(LENGTHS[:80], ranks=ranks, transform=counting, block_samples=4, **BARE)
        return sum(1 for _ in loader.eval_batches())

    counts = together(4, act)
    assert len(set(counts)) == 1
    assert sorted(made) == sorted(f"sample {i}" for i in range(80))  # each once, by one rank


BARE = {name: value for name, value in PACKED.items() if name != "block_samples"}


def test_an_evaluation_is_the_same_on_more_ranks():
    """Also of a stream, in padded and packed rows."""
    files = (LENGTHS[:30], LENGTHS[30:31], LENGTHS[31:])
    padded: dict[str, Any] = {"max_seq_len": 16, "micro_batch_size": 4}
    for config in (BARE, padded):
        whole = list(stream_of(MadeFiles(files), **config).eval_batches())
        numbers = [n for batch in whole for n in check_rows(batch, 64)]
        assert sorted(numbers) == list(range(1, 181))
        read = partial(evaluated, files, config)
        for part in together(3, read):
            assert all(same(a, b) for a, b in zip(whole, part, strict=True))


def evaluated(files, config, ranks):
    return list(stream_of(MadeFiles(files), ranks, **config).eval_batches())


def test_a_failure_on_one_rank_is_raised_on_all():
    bad = MadeFiles((LENGTHS[:30],), bad=frozenset([17]))

    def act(ranks):
        with pytest.raises(DataError, match="file 0, record 17: bad"):
            take(stream_of(bad, ranks, **BARE), 30)
        return True

    assert together(2, act) == [True, True]


@settings(max_examples=30, deadline=None)
@given(streams(), st.sets(st.integers(0, 19), min_size=1), st.integers(0, 9), st.booleans())
def test_bad_records_are_skipped_and_counted(case, bad, stop, goes_on):
    """Each once an epoch, the others all stay; counted the same after going on."""
    files, config = case
    stream = MadeFiles((files[0] + ((3,),) * 25, *files[1:]), frozenset(bad))
    config["bad_records"] = "skip"
    whole = take(stream_of(stream, **config), stop + 6)
    found = whole
    if goes_on:
        found = whole[: stop + 1] + take(stream_of(stream, **config), 5, whole[stop][1])
    assert [state.skipped for _, state in found] == [state.skipped for _, state in whole]
    state = whole[-1][1]
    assert state.skipped >= len(bad) * state.epoch
    gone = {
        1 + sum(len(sample) for sample in stream.lengths[0][:number]) + i
        for number in bad
        if number < len(stream.lengths[0])
        for i in range(len(stream.lengths[0][number]))
    }
    accumulate = config["accumulate"]
    seen = {
        n
        for batch, _ in found
        for micro in micro_batches(batch, accumulate)
        for n in check_rows(micro, 10**6)
    }
    assert seen.isdisjoint(gone)
    assert seen


def test_reasons_are_told_but_not_without_end():
    stream, told = MadeFiles((((3,),) * 60,), frozenset(range(40))), []
    config = LoaderConfig(**{**BARE, "bad_records": "skip"})
    reader = StreamReader(stream, pieces_of, 4, 0, config.rules)
    loader = make_loader(reader, TOKENIZER, config, warn=told.append)
    (_, state), *_ = take(loader, 1)
    assert state.skipped <= 40
    take(loader, 40)
    assert told[0].startswith("skipped (data.bad_records): file 0, record ")
    assert len(told) == 11
    assert told[-1] == "further records that are skipped are only counted"


def test_a_stream_of_bad_records_only_ends():
    stream = MadeFiles((((3,),) * 9, ((2,),) * 3), frozenset([*range(9), *range(100, 103)]))
    with pytest.raises(DataError, match="no sample gave a single token"):
        take(stream_of(stream, bad_records="skip", **BARE), 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_in_a_stream(workers):
    files = (LENGTHS[:30], (), LENGTHS[30:31], LENGTHS[31:])
    want = take(stream_of(MadeFiles(files), **BARE), 40)
    loader = stream_of(MadeFiles(files), num_workers=workers, **BARE)
    got = take(loader, 40)
    assert [state for _, state in got] == [state for _, state in want]
    assert all(same(a, b) for (a, _), (b, _) in zip(got, want, strict=True))
    again = take(loader, 5, want[20][1])
    assert all(same(a, b) for (a, _), (b, _) in zip(again, want[21:26], strict=True))
    loader.close()


def test_going_on_reads_one_file_to_its_place():
    """A stated bounded replay: the file at hand from its front, and those of held pieces."""
    files = tuple(LENGTHS[i : i + 10] for i in range(0, 90, 10))
    *_, (_, state) = take(stream_of(MadeFiles(files), **BARE), 12)
    again = MadeFiles(files)
    take(stream_of(again, **BARE), 1, state)
    assert len(again.opened) <= 3 + len({sample >> 40 for _, sample, _ in state.held})


# ---- mixes ---------------------------------------------------------------------------------


def mixed(weights, sizes=(30, 50, 10), **config):
    config = LoaderConfig(**config)
    parts, first = [], 0
    for number, size in enumerate(sizes):
        part = Made(tuple((1 + (first + i) % 9,) for i in range(size)))
        parts.append(Part(f"source {number}", part, tagged(number)))
        first += size
    order = mix(sizes, weights, config.seed)
    reader = MappingReader(tuple(parts), order, 8, config.rules)
    return make_loader(reader, TOKENIZER, config)


def tagged(number):
    def transform(record):
        (piece,) = pieces_of(record)
        return [attrs.evolve(piece, ids=piece.ids + np.int32(64_000 * number))]

    return transform


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5).flatmap(
        lambda sizes: st.tuples(
            st.just(sizes),
            st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)),
        )
    ),
    st.integers(0, 5),
)
def test_a_mix_has_its_shares_and_spares_nobody(case, seed):
    sizes, weights = case
    order = mix(sizes, weights, seed)
    ends = np.cumsum(sizes)
    total = sum(sizes)
    assert sum(order.counts) == max(total, sum(order.counts))
    for count, weight in zip(order.counts, weights, strict=True):
        assert count == 1 or abs(count - total * weight / sum(weights)) <= len(sizes)
    given_ = np.concatenate([order(epoch, 0, len(order)) for epoch in range(4)])
    for number, size in enumerate(sizes):
        here = given_[(given_ >= ends[number] - size) & (given_ < ends[number])]
        assert len(here) == 4 * order.counts[number]
        times = np.bincount(here - (ends[number] - size), minlength=size)
        assert times.max() - times.min() <= 1
    part = order(2, len(order) // 3, len(order))
    assert (part == given_[2 * len(order) + len(order) // 3 : 3 * len(order)]).all()


def test_equal_weights_by_size_are_every_sample_once():
    order = mix((30, 50, 10), (3, 5, 1), 0)
    assert sorted(order(1, 0, 90).tolist()) == list(range(90))


def test_what_each_source_gave_is_counted():
    """Also after going on; the shares are those asked for, over whole epochs."""
    loader = mixed((1, 1, 2), **BARE)
    stream = take(loader, 40)
    seen = Counter()
    for batch, state in stream:
        seen.update((batch.tokens[batch.tokens != PAD] // 64_000).tolist())
        assert [tokens for _, tokens in state.given] == [seen[number] for number in range(3)]
    going_on = take(mixed((1, 1, 2), **BARE), 5, stream[34][1])
    assert [state for _, state in going_on] == [state for _, state in stream[35:]]
    samples = [count for count, _ in stream[-1][1].given]
    assert samples[2] / sum(samples) == pytest.approx(0.5, abs=0.05)


def test_other_shares_are_another_stream():
    (_, state), *_ = take(mixed((1, 1, 2), **BARE), 1)
    with pytest.raises(DataError, match=r"the shares of the sources was .*, is "):
        mixed((1, 2, 2), **BARE).batches(state)


def test_a_broken_transform_is_no_bad_record():
    config = LoaderConfig(**{**BARE, "bad_records": "skip"})
    order = Shuffled(2, 0)
    reader = MappingReader((Part("x", Made(((3,), (40,))), pieces_of),), order, 8, config.rules)
    with pytest.raises(ValueError, match="a piece of 40 tokens"):
        reader[blocks.Task(0, 0, 0)]
