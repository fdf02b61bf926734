"""Attention against a plain masked softmax, on every path that can run on a CPU."""

import logging
import threading
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import omnistep.models.attention_cpu as cpu
import omnistep.models.attention_cuda as cuda
from omnistep.models.attention import SAVED_OPS, attention, decode_attention

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def reference(q, k, v, starts, scale, window):
    seq, heads = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    index = torch.arange(seq)
    first = starts.long()[:, :, None]
    if window is not None:
        first = torch.maximum(first, index[:, None] - window + 1)
    seen = (index <= index[:, None]) & (index >= first)
    scores = torch.einsum("rihd,rjhd->rhij", q, k) * scale
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("rhij,rjhd->rihd", weights, v)


def random_starts(rows, seq, density):
    """Each token begins a sample with probability `density`; the last eighth is padding."""
    begins = torch.rand(rows, seq) < density
    begins[:, 0] = True
    begins[:, seq - seq // 8 :] = True
    return torch.where(begins, torch.arange(seq), 0).cummax(1).values.int()


def random_inputs(rows, seq, heads, kv_heads, head_dim, dtype=torch.float64):
    sizes = (heads, kv_heads, kv_heads, heads)
    q, k, v, grad = (torch.randn(rows, seq, n, head_dim, dtype=dtype) for n in sizes)
    return q, k, v, grad


def with_gradients(function, q, k, v, grad):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def assert_close(got, expected, tolerance):
    """Norm of the difference over the norm of the expected, each leaf on its own."""
    for name, a, b in zip(("out", "q", "k", "v"), got, expected, strict=False):
        # Where all tokens see only themselves, q and k have zero gradients: held to v's scale.
        scale = float(b.norm() if b.any() else expected[-1].norm())
        assert float((a - b).norm()) <= tolerance * scale, name


def check(dtype, heads, kv_heads, head_dim, seq, density, window, function=attention):
    torch.manual_seed(seq * head_dim + heads)
    q, k, v, grad = random_inputs(2, seq, heads, kv_heads, head_dim, dtype)
    starts = random_starts(2, seq, density)
    scale = head_dim**-0.5
    ours = partial(function, starts=starts, scale=scale, window=window)
    plain = partial(reference, starts=starts, scale=scale, window=window)
    got = with_gradients(ours, q, k, v, grad)
    exact = [x.to(dtype) for x in with_gradients(plain, *(x.double() for x in (q, k, v, grad)))]
    assert_close(got, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head_dim", [16, 20, 32, 64, 80, 96, 128, 256])
def test_head_dims(dtype, head_dim):
    check(dtype, 2, 1, head_dim, 130, 0.02, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seq", [1, 7, 65, 300, 1201])
@pytest.mark.parametrize("window", [None, 50])
def test_lengths_and_windows(dtype, seq, window):
    check(dtype, 2, 1, 32, seq, 0.004, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.7])
def test_groups_and_packings(dtype, heads, kv_heads, density):
    check(dtype, heads, kv_heads, 16, 150, density, None)


@pytest.mark.parametrize("window", [1, 2, 16, 64, 97, 1000])
def test_windows(window):
    check(torch.float64, 2, 2, 16, 230, 0.01, window)


def test_scale_of_any_sign():
    q, k, v, grad = random_inputs(1, 70, 1, 1, 16)
    starts = random_starts(1, 70, 0.0)
    for scale in (-0.4, 0.0, 3.0):
        ours = partial(attention, starts=starts, scale=scale, window=None)
        plain = partial(reference, starts=starts, scale=scale, window=None)
        assert_close(
            with_gradients(ours, q, k, v, grad), with_gradients(plain, q, k, v, grad), 1e-10
        )


def test_views_of_one_fused_buffer():
    heads, kv_heads, head_dim, starts = 4, 2, 32, random_starts(2, 100, 0.02)
    fused = torch.randn(2, 100, heads + 2 * kv_heads, head_dim, dtype=torch.float64)
    grad = torch.randn(2, 100, heads, head_dim, dtype=torch.float64)

    def fused_gradient(function, grad):
        leaf = fused.detach().requires_grad_()
        q, k, v = leaf.split([heads, kv_heads, kv_heads], 2)
        return torch.autograd.grad(function(q, k, v, starts, scale=0.2, window=None), leaf, grad)[0]

    torch.testing.assert_close(fused_gradient(attention, grad), fused_gradient(reference, grad))
    # heads before tokens in memory, and a gradient that is one number expanded
    q, k, v, _ = random_inputs(2, 100, heads, kv_heads, head_dim)
    one = torch.ones((), dtype=torch.float64).expand(q.shape)
    ours = partial(attention, starts=starts, scale=0.2, window=None)
    plain = partial(reference, starts=starts, scale=0.2, window=None)
    expected = with_gradients(plain, q, k, v, one)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert_close(with_gradients(ours, q, k, v, one), expected, 1e-10)


@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck(window):
    q, k, v, _ = random_inputs(1, 9, 2, 1, 8)
    starts = torch.tensor([[0, 0, 0, 0, 0, 5, 5, 5, 8]], dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    function = partial(attention, starts=starts, scale=0.4, window=window)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v, grad = random_inputs(2, 100, 4, 2, 32, dtype)
    starts = random_starts(2, 100, 0.02)
    ours = partial(attention, starts=starts, scale=0.2, window=None)
    plain = partial(reference, starts=starts, scale=0.2, window=None)
    got = with_gradients(ours, q, k, v, grad)
    assert all(x.dtype == dtype for x in got)
    exact = with_gradients(plain, *(x.double() for x in (q, k, v, grad)))
    assert_close([x.double() for x in got], exact, 4 * torch.finfo(dtype).eps)


def test_operators_are_what_they_say():
    q, k, v, grad = random_inputs(2, 33, 4, 2, 16)
    starts = random_starts(2, 33, 0.1)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.omnistep.attention_cpu.default, (*leaves, starts, 0.2, 5))
    out, lse = torch.ops.omnistep.attention_cpu(q, k, v, starts, 0.2, 5)
    torch.library.opcheck(
        torch.ops.omnistep.attention_cpu_backward.default,
        (grad, q, k, v, out, lse, starts, 0.2, 5),
    )


def test_logsumexp():
    q, k, v, _ = random_inputs(1, 80, 1, 1, 16)
    _, lse = torch.ops.omnistep.attention_cpu(q, k, v, torch.zeros(1, 80).int(), 0.3, None)
    scores = 0.3 * q[0, :, 0] @ k[0, :, 0].T
    future = torch.ones(80, 80, dtype=torch.bool).triu(1)
    torch.testing.assert_close(lse[0, 0], scores.masked_fill(future, float("-inf")).logsumexp(-1))


def test_large_scores_and_nan():
    q, k, v, _ = random_inputs(1, 100, 1, 1, 16)
    starts = torch.zeros(1, 100, dtype=torch.int32)
    out = attention(100 * q, 100 * k, v, starts, scale=1.0, window=None)
    assert_close([out], [reference(100 * q, 100 * k, v, starts, 1.0, None)], 1e-10)
    q[0, 40] = float("nan")
    out = attention(q, k, v, starts, scale=1.0, window=None)
    assert out[0, 40].isnan().all()
    assert not out[0, :40].isnan().any()


def test_same_bits_for_every_number_of_threads():
    q, k, v, grad = random_inputs(3, 700, 4, 2, 32, torch.float32)
    starts = random_starts(3, 700, 0.004)
    ours = partial(attention, starts=starts, scale=0.2, window=None)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(ours, q, k, v, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def computed_scores(starts, window=None):
    """How many scores the kernel computes for a row, forward and backward."""
    library = cpu.kernel()
    assert library is not None, "these tests need a C++ compiler"
    q, k, v, grad = random_inputs(1, starts.shape[1], 1, 1, 16, torch.float32)
    out, lse, forward = cpu.kernel_forward(library, q, k, v, starts, 0.2, window)
    *_, backward = cpu.kernel_backward(library, grad, q, k, v, out, lse, starts, 0.2, window)
    return forward, backward


def test_masked_blocks_are_not_computed():
    seq = 2048
    index = torch.arange(seq, dtype=torch.int32)[None]
    half = seq * seq / 2
    for scores in computed_scores(index * 0):
        assert half < scores < 1.03 * half
    for length in (64, 256):
        for scores in computed_scores(index // length * length):
            # the diagonal's tiles are whole: 12 x 32 with AVX-512, 6 x 16 with AVX2
            assert scores < seq * (length / 2 + 32)
    for scores in computed_scores(index * 0, window=128):
        assert scores < 1.4 * seq * 128
    padded = torch.where(index < 1024, 0, index)
    for scores, unpadded in zip(
        computed_scores(padded), computed_scores(padded[:, :1024].contiguous()), strict=True
    ):
        assert scores == unpadded


def test_padding_sees_itself():
    q, k, v, grad = random_inputs(1, 60, 4, 2, 16)
    starts = torch.arange(60, dtype=torch.int32)[None].clamp(min=20)
    starts[:, :20] = 0
    ours = partial(attention, starts=starts, scale=0.2, window=None)
    out, q_grad, k_grad, v_grad = with_gradients(ours, q, k, v, grad)
    assert torch.equal(out[:, 20:], v[:, 20:].repeat_interleave(2, 2))
    assert torch.equal(v_grad[:, 20:], grad[:, 20:].unflatten(2, (2, 2)).sum(3))
    assert not q_grad[:, 20:].any()
    assert not k_grad[:, 20:].any()


@pytest.mark.parametrize("region", [False, True])
def test_compiles_into_one_graph_and_is_cached(region):
    q, k, v, grad = random_inputs(2, 40, 2, 1, 16)
    starts = random_starts(2, 40, 0.05)

    def layer(q, k, v):
        return attention(q, k, v, starts, scale=0.2, window=None)

    block = torch.compiler.nested_compile_region(layer) if region else layer
    expected = with_gradients(layer, q, k, v, grad)
    for run in range(2):
        torch._dynamo.reset()
        counters.clear()
        got = with_gradients(torch.compile(block, fullgraph=True), q, k, v, grad)
        assert_close(got, expected, 0)
        if run == 1:
            assert counters["aot_autograd"]["autograd_cache_hit"] == 1
            assert counters["inductor"]["fxgraph_cache_bypass"] == 0


def test_a_policy_can_save_it(monkeypatch):
    calls = []
    forward = cpu.kernel_forward
    monkeypatch.setattr(cpu, "kernel_forward", lambda *a: calls.append(1) or forward(*a))
    q, k, v, grad = random_inputs(1, 20, 2, 1, 16)
    starts = random_starts(1, 20, 0.1)

    def policy(_context, op, *_, **__):
        save = op in SAVED_OPS
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return attention(q * 2, k, v, starts, scale=0.2, window=None)

    def saving(q, k, v):
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, q, k, v, use_reentrant=False, context_fn=contexts)

    assert_close(with_gradients(saving, q, k, v, grad), with_gradients(block, q, k, v, grad), 0)
    assert len(calls) == 2


def test_wrong_inputs():
    q, k, v, _ = random_inputs(1, 6, 4, 2, 16)
    starts = torch.zeros(1, 6, dtype=torch.int32)
    run = partial(attention, scale=1.0, window=None)
    with pytest.raises(ValueError, match=r"k \(1, 5, 2, 16\)"):
        run(q, k[:, :5], v, starts)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        run(q[:, :, :3], k, v, starts)
    with pytest.raises(ValueError, match="one floating dtype"):
        run(q, k.float(), v, starts)
    with pytest.raises(ValueError, match="starts must be int32"):
        run(q, k, v, starts.long())
    with pytest.raises(ValueError, match="window is 0"):
        run(q, k, v, starts, window=0)
    with pytest.raises(ValueError, match=r"starts\[0\] is \[0, 0, 1\] up to token 2"):
        run(q, k, v, torch.tensor([[0, 0, 1, 3, 3, 3]], dtype=torch.int32))


@pytest.mark.parametrize("window", [None, 20])
def test_without_a_compiler(window, monkeypatch, caplog):
    cpu.compilation.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    try:
        with caplog.at_level(logging.WARNING):
            check(torch.float32, 4, 2, 16, 70, 0.03, window)
            check(torch.float64, 4, 2, 16, 70, 0.03, window)
        assert len(caplog.records) == 1
        assert "no C++ compiler" in caplog.text
    finally:
        cpu.compilation.cache_clear()


def test_compilation_begins_before_it_is_asked_for(monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    def slow(compiler):
        begun.set()
        assert may_end.wait(10)
        raise OSError("no such thing")

    monkeypatch.setattr(cpu, "_compiler", lambda: "c++")
    monkeypatch.setattr(cpu, "compile_kernel", slow)
    cpu.compilation.cache_clear()
    try:
        cpu.start_compiling()
        assert begun.wait(10)
        begun.clear()
        cpu.start_compiling()
        may_end.set()
        assert cpu.kernel() is None
        assert not begun.is_set(), "it was compiled a second time"
    finally:
        may_end.set()
        cpu.compilation.cache_clear()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("compiled", [False, True])
def test_decoding_is_the_last_row_of_attention(window, compiled):
    decode = (
        torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
        if compiled
        else decode_attention
    )
    q, k, v, _ = random_inputs(3, 40, 4, 2, 16)
    first = torch.tensor([0, 3, 20])
    index = torch.arange(40)
    starts = torch.where(index < first[:, None], index, first[:, None]).int()
    expected = reference(q, k, v, starts, 0.3, window)
    for last in (20, 39):
        newest = torch.tensor(last)
        got = decode(q[:, last : last + 1], k, v, first, newest, scale=0.3, window=window)
        torch.testing.assert_close(got, expected[:, last : last + 1])


@pytest.mark.parametrize("seq", [1, 100, 128, 500])
@pytest.mark.parametrize("window", [None, 130])
def test_block_mask_and_flex(seq, window):
    starts = random_starts(2, seq, 0.01)
    mask = cuda.band_mask(starts, window)
    built = create_block_mask(mask.mask_mod, 2, None, seq, seq, device="cpu")
    assert torch.equal(mask.to_dense(), built.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(built, name)), name
    q, k, v, _ = random_inputs(2, seq, 4, 2, 16, torch.float32)
    with torch.no_grad():
        expected = reference(q, k, v, starts, 0.2, window)
        for function in (cuda.flex, cuda.dense_attention):
            assert_close([function(q, k, v, starts, 0.2, window)], [expected], 1e-5)


def test_cumulative_lengths():
    #                       two samples of 3 and 2, padding | one of 4, two padding tokens
    starts = torch.tensor([[0, 0, 0, 3, 3, 5], [0, 0, 0, 0, 4, 5]], dtype=torch.int32)
    assert cuda.cumulative_lengths(starts, 4).tolist() == [0, 3, 5, 6, 10, 12, 12, 12, 12]
    assert cuda.cumulative_lengths(starts, 3).tolist() == [0, 3, 5, 6, 10, 12, 12]
    with pytest.raises(RuntimeError, match="more than 2 samples per row"):
        cuda.cumulative_lengths(starts, 2)


def test_varlen_call(monkeypatch):
    """varlen_attn needs a GPU: the shapes are traced, the result is checked with a stand-in."""
    with FakeTensorMode():
        q, k, v, grad = random_inputs(2, 64, 4, 2, 16, torch.bfloat16)
        starts = torch.zeros(2, 64, dtype=torch.int32)
        call = partial(cuda.varlen_attention, starts=starts, scale=0.2, window=5, max_samples=3)
        shapes = [x.shape for x in with_gradients(call, q, k, v, grad)]
        assert shapes == [q.shape, q.shape, k.shape, v.shape]

    def stand_in(q, k, v, lengths, _, longest, __, *, scale, window_size, enable_gqa):
        assert (longest, enable_gqa, window_size[1]) == (60, True, 0)
        begins = torch.zeros(q.shape[0], dtype=torch.long)
        inside = lengths[lengths < q.shape[0]].long()
        begins[inside] = inside
        window = None if window_size[0] < 0 else window_size[0] + 1
        starts = begins.cummax(0).values[None]
        return reference(q[None], k[None], v[None], starts, scale, window)[0]

    monkeypatch.setattr(cuda, "varlen_attn", stand_in)
    q, k, v, grad = random_inputs(2, 60, 4, 2, 16)
    starts = random_starts(2, 60, 0.05)
    for window in (None, 7):
        plain = partial(reference, starts=starts, scale=0.2, window=window)
        ours = partial(
            cuda.varlen_attention, starts=starts, scale=0.2, window=window, max_samples=30
        )
        assert_close(
            with_gradients(ours, q, k, v, grad), with_gradients(plain, q, k, v, grad), 1e-10
        )
