"""Attention with a sink: a score of each head that takes weight and gives nothing."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from omnistep.models.attention import attention, decode_attention, ring_attention
from omnistep.parallel.mesh import make_mesh
from omnistep.parallel.ring import take_local
from tests.models.test_attention import TOLERANCE, random_inputs, random_starts


def with_sinks(q, k, v, starts, sinks, scale, window):
    """All scores and one more, in one softmax."""
    index, heads = torch.arange(q.shape[1]), q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    first = starts.long()[:, :, None]
    if window is not None:
        first = torch.maximum(first, index[:, None] - window + 1)
    seen = (index <= index[:, None]) & (index >= first)
    scores = torch.einsum("rihd,rjhd->rhij", q, k) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    sink = sinks[:, None, None].expand(q.shape[0], -1, q.shape[1], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return torch.einsum("rhij,rjhd->rihd", weights, v)


def inputs(dtype, seq=40):
    torch.manual_seed(0)
    q, k, v, grad = random_inputs(2, seq, 4, 2, 16, dtype)
    starts = random_starts(2, seq, 0.1)
    return q, k, v, torch.randn(4, dtype=dtype), grad, starts


def gradients(function, operands, grad):
    operands = [x.detach().requires_grad_() for x in operands]
    out = function(*operands)
    return out.detach(), *torch.autograd.grad(out, operands, grad)


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_output_and_every_gradient(dtype, window, compiled):
    *operands, grad, starts = inputs(dtype)

    def ours(q, k, v, sinks):
        return attention(q, k, v, starts, scale=0.3, window=window, sinks=sinks)

    function = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    exact = gradients(
        lambda q, k, v, sinks: with_sinks(q, k, v, starts, sinks, 0.3, window),
        [x.double() for x in operands],
        grad.double(),
    )
    assert_close(gradients(function, operands, grad), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 9])
def test_decoding_is_the_last_row(window):
    q, k, v, sinks, _, _ = inputs(torch.float64)
    starts = torch.zeros(2, 40, dtype=torch.int32)
    expected = with_sinks(q, k, v, starts, sinks, 0.3, window)
    first, last = torch.zeros(2, dtype=torch.int64), torch.tensor(39)
    got = decode_attention(q[:, -1:], k, v, first, last, scale=0.3, window=window, sinks=sinks)
    torch.testing.assert_close(got, expected[:, -1:])


def run_rank(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    try:
        group = make_mesh({"cp": 2}, torch.device("cpu")).group("cp")
        q, k, v, sinks, grad, starts = inputs(torch.float64)
        exact = gradients(
            lambda q, k, v, s: with_sinks(q, k, v, starts, s, 0.3, 11), (q, k, v, sinks), grad
        )
        *local, mine = (take_local(x, group) for x in (q, k, v, grad))
        got = gradients(
            lambda q, k, v, s: ring_attention(
                q, k, v, starts, group, scale=0.3, window=11, sinks=s
            ),
            (*local, sinks),
            mine,
        )
        dist.all_reduce(got[-1])
        wanted = [*(take_local(x, group) for x in exact[:-1]), exact[-1]]
        assert_close(got, wanted, 1e-10)
    finally:
        dist.destroy_process_group()


def test_in_a_ring(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [context.Process(target=run_rank, args=(r, tmp_path / "store")) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
