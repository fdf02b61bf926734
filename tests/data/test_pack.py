"""Packing plans, and the batches made of them against a slow reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistep.core.batch import segment_starts
from omnistep.data.assemble import assemble, most_pieces
from omnistep.data.pack import PackLimits, first_fit, pack, prefix
from omnistep.data.steps import packed_steps, padded_steps
from omnistep.data.transform import Tokens

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), max_size=60)


def text(lengths):
    return [(length, 0) for length in lengths]


@given(SIZES, st.integers(1, 60), st.integers(30, 50), st.integers(1, 9))
def test_rows_within_limits_and_every_piece_once(sizes, budget, patches, most):
    rows = first_fit(sizes, PackLimits(budget, most, patches))
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    for row in rows:
        assert row == sorted(row)
        assert len(row) <= most
        assert len(row) == 1 or sum(sizes[i][0] for i in row) <= budget
        assert sum(sizes[i][1] for i in row) <= patches
    assert rows == sorted(rows)


@given(SIZES, st.integers(40, 60), st.integers(30, 50), st.integers(1, 9), st.integers(0, 60))
def test_given_and_waiting(sizes, budget, patches, most, due):
    rows, left = pack(sizes, PackLimits(budget, most, patches), due)
    assert sorted([i for row in rows for i in row] + left) == list(range(len(sizes)))
    assert left == sorted(left)
    assert all(i >= due for i in left)
    for row in rows:
        tokens, images = (sum(sizes[i][kind] for i in row) for kind in (0, 1))
        full = tokens >= budget - budget / 64 or images >= patches - patches / 64
        assert full or len(row) == most or row[0] < due
    if most == 1:
        assert rows == [[i] for i in range(len(sizes))]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 200))
def test_prefix(lengths, budget):
    fit = prefix(lengths, budget)
    assert fit == 1 or sum(lengths[:fit]) <= budget
    assert fit == len(lengths) or sum(lengths[: fit + 1]) > budget


def test_full_rows_do_not_wait():
    limits = PackLimits(64, 8)
    assert pack(text([64, 40, 63, 24, 9]), limits) == ([[0], [1, 3], [2]], [4])
    assert pack(text([64, 40, 63, 24, 9]), limits, due=5)[1] == []
    limits = PackLimits(64, 8, patches=10)
    assert pack([(9, 10), (8, 9), (7, 0), (6, 1)], limits) == ([[0, 2], [1, 3]], [])
    assert pack([(9, 9), (8, 9)], limits) == ([], [0, 1])


def test_rows_are_filled():
    """Long-tailed lengths, 512 pieces: 98 % of the tokens of the rows are used."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 0.9, 512), 8, 2048).astype(int).tolist()
    rows = first_fit(text(lengths), PackLimits(2048, 256))
    assert sum(lengths) > 0.98 * 2048 * (len(rows) - 1)


def test_text_fills_up_the_rows_that_images_have_filled():
    """Short texts with many patches beside long ones with none: rows are within 4 % of the fewest
    there can be by either count."""
    rng = np.random.default_rng(0)
    seen = [(int(p) // 4 + 30, int(p)) for p in 4 * rng.integers(60, 250, 256)]
    read = [(int(n), 0) for n in rng.integers(100, 900, 256)]
    sizes = [size for pair in zip(seen, read, strict=True) for size in pair]
    patches = 2048
    budget = int(patches * sum(n for n, _ in sizes) / sum(p for _, p in sizes))
    rows = first_fit(sizes, PackLimits(budget, 256, patches))
    fewest = max(sum(n for n, _ in sizes) / budget, sum(p for _, p in sizes) / patches)
    assert len(rows) <= 1.04 * fewest


@st.composite
def rows_of_pieces(draw):
    seq = draw(st.integers(8, 64))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row, room = [], seq
        while room and len(row) < most_pieces(seq) and draw(st.booleans()):
            length = draw(st.integers(1, room))
            ids = np.array(draw(st.lists(st.integers(5, 99), min_size=length, max_size=length)))
            learn = draw(st.none() | st.just(ids % 3 > 0))
            row.append(Tokens(ids.astype(np.int32), learn))
            room -= length
        rows.append(row)
    return seq, rows


@settings(deadline=None)
@given(rows_of_pieces())
def test_batches_against_a_slow_reference(drawn):
    seq, rows = drawn
    by_positions = assemble(rows, seq, 3, "positions")
    by_boundaries = assemble(rows, seq, 3, "cu_seqlens")
    assert by_positions.cu_seqlens is None
    assert by_boundaries.positions is None
    assert by_positions.positions is not None
    assert by_boundaries.cu_seqlens is not None
    assert by_boundaries.cu_seqlens.dtype == torch.int32
    assert by_boundaries.cu_seqlens.shape == (len(rows), most_pieces(seq) + 2)
    starts = [segment_starts(batch).tolist() for batch in (by_positions, by_boundaries)]
    for batch in (by_positions, by_boundaries):
        assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
        assert batch.weights.dtype == torch.float32
    for r, row in enumerate(rows):
        expected = []  # (token, target, weight, position) of each place
        begins = []
        for piece in row:
            begin = len(expected)
            for i, token in enumerate(piece.ids.tolist()):
                begins.append(begin)
                if i + 1 == len(piece.ids):
                    expected.append((token, 0, 0.0, i))
                else:
                    learnt = piece.learn is None or piece.learn[i + 1]
                    expected.append((token, int(piece.ids[i + 1]), float(learnt), i))
        used = len(expected)
        expected += [(3, 0, 0.0, 0)] * (seq - used)
        for batch in (by_positions, by_boundaries):
            got = zip(batch.tokens[r].tolist(), batch.targets[r].tolist(), strict=True)
            assert list(got) == [(token, target) for token, target, _, _ in expected]
            assert batch.weights[r].tolist() == [weight for _, _, weight, _ in expected]
        assert by_positions.positions[r].tolist() == [at for _, _, _, at in expected]
        assert starts[0][r] == begins + list(range(used, seq))
        assert starts[1][r] == begins + [used] * (seq - used)


def test_steps_of_packed_data():
    shape = {"global_batch_size": 8, "micro_batch_size": 2, "max_seq_len": 100}
    assert packed_steps(8000, **shape) == 10
    assert packed_steps(8001, **shape) == 11
    assert packed_steps(8000, **shape, dyn_bsz_margin=100) == 20
    assert packed_steps(8000, **shape, bsz_warmup_ratio=0.2) == 11
    # 0.1 is no binary fraction: in floats this would be 12.
    assert packed_steps(8000 * 10, **shape, bsz_warmup_ratio=0.1) == 105
    with pytest.raises(ValueError, match=r"dyn_bsz_margin is 200; allowed is 0 to 199"):
        packed_steps(8000, **shape, dyn_bsz_margin=200)


def test_steps_of_padded_data():
    assert padded_steps(17, global_batch_size=8, drop_last=True) == 2
    assert padded_steps(17, global_batch_size=8, drop_last=False) == 3
    assert padded_steps(16, global_batch_size=8, drop_last=False) == 2
