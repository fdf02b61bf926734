"""Keys and random tensors: jax.random is the reference."""

import math

import jax
import numpy as np
import pytest
import torch

from omnistep.core import rng
from omnistep.core.rng import Block

SHAPES = [(), (7,), (2, 3, 4), (33, 0), (129, 257)]


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """The largest distance in units of the last place."""
    i, j = (x.view(np.int32).astype(np.int64) for x in (a, b))  # of one sign, but for errors
    return int(np.abs(i - j).max(initial=0))


@pytest.fixture
def pieces(monkeypatch):
    """Pieces so small that most tests have many, shared by three threads."""
    monkeypatch.setattr(rng, "_CPU_PIECE", 251)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.mark.parametrize("seed", [0, 42, 2**31 + 7, 2**40 + 3, -1])
def test_seed_split_and_fold_in_equal_jax(seed):
    with jax.enable_x64(True):
        theirs = jax.random.key(seed)
        ours = rng.key(seed)
        assert (jax.random.key_data(theirs) == ours.numpy()).all()
        assert (rng.key(torch.tensor(seed)) == ours).all()
        many = jax.random.key_data(jax.random.split(theirs, 5))
        assert (many == rng.split(ours, 5).numpy()).all()
        for data in (0, 1, 2**31, 2**32 - 1):
            folded = jax.random.key_data(jax.random.fold_in(theirs, np.uint32(data)))
            assert (folded == rng.fold_in(ours, data).numpy()).all()
            assert (folded == rng.fold_in(ours, torch.tensor(data)).numpy()).all()


def test_names_give_different_keys():
    key = rng.key(1)
    names = ["layers.wq", "layers.wk", "embed"]
    keys = {tuple(rng.name_key(key, name).tolist()) for name in names}
    assert len(keys) == 3
    assert (rng.name_key(key, "abc") == rng.fold_in(key, 0x352441C2)).all()  # CRC-32 of "abc"


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_equal_jax(shape, pieces):
    ours, theirs = rng.key(9), jax.random.key(9)
    assert (rng.bits(ours, shape).numpy() == jax.random.bits(theirs, shape)).all()
    for low, high in ((0.0, 1.0), (-0.7, 1.9)):
        expected = np.asarray(jax.random.uniform(theirs, shape, minval=low, maxval=high))
        assert (rng.uniform(ours, shape, minval=low, maxval=high).numpy() == expected).all()
    assert ulps(rng.normal(ours, shape).numpy(), np.asarray(jax.random.normal(theirs, shape))) <= 4


def test_wide_samples_equal_jax(pieces):
    ours, shape = rng.key(9), (65, 31)
    with jax.enable_x64(True):
        theirs = jax.random.key(9)
        expected = np.asarray(jax.random.bits(theirs, shape, np.uint64))
        assert (rng.bits(ours, shape, 64).numpy().view(np.uint64) == expected).all()
        expected = np.asarray(jax.random.uniform(theirs, shape, np.float64))
        assert (rng.uniform(ours, shape, torch.float64).numpy() == expected).all()
        expected = np.asarray(jax.random.normal(theirs, shape, np.float64))
        np.testing.assert_allclose(rng.normal(ours, shape, torch.float64), expected, rtol=1e-12)


def test_a_million_normals_are_jax_s_and_are_normal():
    x = rng.normal(rng.key(0), (1_000_000,)).numpy()
    assert ulps(x, np.asarray(jax.random.normal(jax.random.key(0), x.shape))) <= 4
    assert abs(x.mean()) < 3e-3
    assert abs(x.std() - 1) < 3e-3
    assert abs((np.abs(x) < 1).mean() - math.erf(0.5**0.5)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_float32_rounded(dtype):
    key = rng.key(5)
    assert torch.equal(rng.normal(key, (50,), dtype), rng.normal(key, (50,)).to(dtype))
    assert torch.equal(rng.uniform(key, (50,), dtype), rng.uniform(key, (50,)).to(dtype))


BLOCKS = [
    ((64,), (10,), (13,)),
    ((8, 40), (2, 0), (4, 40)),
    ((8, 40), (0, 10), (8, 20)),
    ((6, 5, 70), (2, 1, 0), (3, 2, 70)),
    ((6, 5, 70), (0, 0, 35), (6, 5, 35)),
    ((6, 5, 70), (1, 2, 3), (2, 0, 4)),
    ((3, 5000), (1, 17), (2, 4000)),
]


@pytest.mark.parametrize(("shape", "offset", "size"), BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_is_the_slice_of_the_whole(shape, offset, size, dtype, pieces):
    key, block = rng.key(11), Block(offset, size)
    where = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
    assert torch.equal(rng.bits(key, shape, block=block), rng.bits(key, shape)[where])
    for sample in (rng.uniform, rng.normal):
        assert torch.equal(sample(key, shape, dtype, block=block), sample(key, shape, dtype)[where])


def test_bits_do_not_depend_on_pieces_and_threads(monkeypatch):
    key = rng.key(2)
    whole = rng.normal(key, (10_001,), torch.float64), rng.normal(key, (10_001,))
    monkeypatch.setattr(rng, "_CPU_PIECE", 101)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        with torch.inference_mode():
            again = rng.normal(key, (10_001,), torch.float64), rng.normal(key, (10_001,))
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = rng.normal(rng.fold_in(rng.key(1), 2), (1 << 20, 1 << 12))
    assert x.shape == (1 << 20, 1 << 12)


def test_beyond_two_to_the_32_elements():
    """The counter's high word: a block of a tensor nobody could hold, against jax's hash."""
    from jax._src.random.threefry2x32 import threefry2x32_p

    shape, offset = (3, 2**33), (1, 2**32 - 4)
    ours = rng.bits(rng.key(7), shape, block=Block(offset, (1, 8)))[0]
    index = np.uint64(2**33 + 2**32 - 4) + np.arange(8, dtype=np.uint64)
    high, low = (index >> np.uint64(32)).astype(np.uint32), index.astype(np.uint32)
    k0, k1 = np.asarray(jax.random.key_data(jax.random.key(7)))
    h, l = threefry2x32_p.bind(*(jax.numpy.asarray(x) for x in (k0, k1, high, low)))
    assert (ours.numpy() == np.asarray(h ^ l)).all()


@pytest.mark.slow
def test_compiled_equals_eager():
    """The hash; what makes normal numbers of it takes the compiler much longer."""
    block = Block((1, 8), (30, 50))

    def sample(key):
        return rng.uniform(key, (31, 64), minval=-0.3, maxval=0.9, block=block)

    key = rng.key(3)
    assert torch.equal(torch.compile(sample, fullgraph=True)(key), sample(key))


@pytest.mark.exhaustive
def test_compiled_normals_equal_eager_ones():
    key = rng.key(4)
    compiled = torch.compile(lambda key: rng.normal(key, (1000,)), fullgraph=True)
    assert torch.equal(compiled(key), rng.normal(key, (1000,)))


def test_meta_keys_give_shapes_only():
    x = rng.normal(rng.key(0, device="meta"), (5, 4), torch.bfloat16)
    assert (x.device.type, x.shape, x.dtype) == ("meta", (5, 4), torch.bfloat16)


def test_errors_name_what_is_allowed():
    key = rng.key(0)
    with pytest.raises(ValueError, match="32 or 64"):
        rng.bits(key, (2,), 16)
    with pytest.raises(ValueError, match="float64, float32"):
        rng.normal(key, (2,), torch.int64)
    with pytest.raises(ValueError, match="does not lie inside"):
        rng.normal(key, (4, 4), block=Block((2, 0), (3, 4)))
    with pytest.raises(ValueError, match=r"\[0, 2\*\*32\)"):
        rng.fold_in(key, -1)
