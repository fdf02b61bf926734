"""Products of experts against a plain loop over the experts."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from omnistep.models import grouped
from omnistep.models.grouped import SAVED_OPS, grouped_linear, swiglu_experts
from omnistep.parallel.remat import remat

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}
ROWS, EMBED, MLP = 24, 24, 40
COUNTS = {
    "balanced": [6, 6, 6, 6],
    "skewed": [1, 11, 0, 5],
    "ends": [0, 7, 9, 0],
    "one": [0, 0, 24, 0],
    "none": [0, 0, 0, 0],
}


def reference(x, row_weight, gate, up, down, counts):
    """One expert after another, by autograd; rows that belong to none are zeros."""
    out, first = [], 0
    for count, g, u, d in zip(counts, gate, up, down, strict=True):
        rows = slice(first, first + count)
        h = F.silu(x[rows] @ g.T) * (x[rows] @ u.T)
        out.append(h @ d.T * row_weight[rows, None])
        first += count
    return torch.cat([*out, x.new_zeros(x.shape[0] - first, x.shape[1])])


def inputs(counts, dtype):
    """All of one size, so that `compiled` compiles once for each dtype."""
    torch.manual_seed(sum(counts) + len(counts))
    rows, experts = ROWS, len(counts)
    shapes = [(rows, EMBED), (rows,)]
    shapes += [(experts, MLP, EMBED), (experts, MLP, EMBED), (experts, EMBED, MLP)]
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors, torch.tensor(counts).cumsum(0).int(), torch.randn(rows, EMBED, dtype=dtype)


def with_gradients(function, tensors, last, grad):
    out = function(*tensors, last)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def assert_close(got, expected, tolerance):
    for name, a, b in zip(("out", "x", "row", "gate", "up", "down"), got, expected, strict=True):
        assert a.shape == b.shape, name
        assert float((a - b).norm()) <= tolerance * float(b.norm()), name


def check(function, counts, dtype):
    tensors, ends, grad = inputs(counts, dtype)
    got = with_gradients(function, tensors, ends, grad)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    assert_close(got, with_gradients(reference, exact, counts, grad.double()), TOLERANCE[dtype])


compiled = torch.compile(swiglu_experts, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("function", [swiglu_experts, compiled], ids=["eager", "compiled"])
def test_a_loop_over_experts(function, counts, dtype):
    check(function, counts, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", [[301, 129, 0, 127], [0, 640, 1, 3]])
def test_many_rows(counts, dtype):
    """Of which most are multiplied together and the rest apart."""
    torch.manual_seed(0)
    x, y = torch.randn(650, EMBED, dtype=dtype), torch.randn(650, MLP, dtype=dtype)
    weight, ends = torch.randn(4, MLP, EMBED, dtype=dtype), torch.tensor(counts).cumsum(0).int()
    rows = [slice(int(end) - count, int(end)) for end, count in zip(ends, counts, strict=True)]
    got = [grouped.linear_loop(x, weight, ends), grouped.outer_loop(y, x, ends)]
    x, y, weight = x.double(), y.double(), weight.double()
    forward = [x[r] @ w.T for r, w in zip(rows, weight, strict=True)]
    expected = [
        torch.cat([*forward, x.new_zeros(650 - sum(counts), MLP)]),
        torch.stack([y[r].T @ x[r] for r in rows]),
    ]
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= TOLERANCE[dtype] * float(b.norm())


def test_one_graph_serves_every_routing():
    check(compiled, COUNTS["balanced"], torch.float64)
    with torch.compiler.set_stance("fail_on_recompile"):
        for counts in COUNTS.values():
            check(compiled, counts, torch.float64)


@pytest.mark.parametrize("function", [swiglu_experts, compiled], ids=["eager", "compiled"])
def test_rows_of_no_expert_are_zeros_and_give_nothing(function):
    """Whatever lies in them and in their gradient."""
    tensors, ends, grad = inputs([2, 6, 0, 4], torch.float64)
    expected = with_gradients(reference, tensors, [2, 6, 0, 4], grad)
    x = tensors[0].detach()
    x[12:] = float("nan")
    grad[12:] = float("inf")
    got = with_gradients(function, [x.requires_grad_(), *tensors[1:]], ends, grad)
    assert not any(rows[12:].any() for rows in (*got[:3], *expected[:3]))
    assert_close(got, expected, 1e-10)


@pytest.mark.slow
def test_gradients_of_what_asks_for_them_only():
    tensors, ends, grad = inputs([4, 9, 0, 2], torch.float64)
    expected = with_gradients(swiglu_experts, tensors, ends, grad)

    @torch.compile(fullgraph=True, dynamic=False)
    def function(*arguments):
        return swiglu_experts(*arguments)

    for i in range(5):
        some = [t if j == i else t.detach() for j, t in enumerate(tensors)]
        (got,) = torch.autograd.grad(function(*some, ends), some[i], grad)
        torch.testing.assert_close(got, expected[1 + i])


def test_gradients_with_other_strides():
    tensors, ends, _ = inputs([4, 9, 0, 2], torch.float64)
    x, w = tensors[0], tensors[4]
    out = grouped_linear(x.T.contiguous().T, w.mT, ends)
    plain = torch.cat([x[:4] @ w[0], x[4:13] @ w[1], x[13:15] @ w[3]])
    got = torch.autograd.grad(out.sum(), (x, w))
    for a, b in zip(got, torch.autograd.grad(plain.sum(), (x, w)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [swiglu_experts, compiled], ids=["eager", "compiled"])
def test_without_gradients(function):
    tensors, ends, _ = inputs([4, 9, 0, 2], torch.float64)
    with torch.no_grad():
        got = function(*tensors, ends)
    x, row_weight, gate, up, down = tensors
    expected = reference(x, row_weight, gate, up, down, [4, 9, 0, 2])
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_under_remat(mode):
    """`selective` runs no product a second time."""
    counts = [3, 0, 9]
    tensors, ends, grad = inputs(counts, torch.float64)
    block = remat(lambda x, *rest: swiglu_experts(x * 2, *rest) * 3, mode, SAVED_OPS)
    block = torch.compile(block, fullgraph=True, dynamic=False)
    with_gradients(block, tensors, ends, grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = with_gradients(block, tensors, ends, grad)
    names = [event.name for event in profile.events() or ()]
    assert names.count("omnistep::grouped_outer") == 3
    # Forward and gradients of x; `full` needs gate and up once more (the output of down is not
    # needed, so the compiler leaves it out).
    assert names.count("omnistep::grouped_linear") == (8 if mode == "full" else 6)

    def plain(x, *rest):
        return reference(x * 2, *rest) * 3

    assert_close(got, with_gradients(plain, tensors, counts, grad), 1e-10)


def test_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(32, 16, requires_grad=True)
        w = torch.empty(4, 8, 16, requires_grad=True)
        out = grouped_linear(x, w, torch.empty(4, dtype=torch.int32))
        assert (out.shape, out.dtype) == ((32, 8), x.dtype)
        grads = torch.autograd.grad(out, (x, w), torch.empty_like(out))
        assert [grad.shape for grad in grads] == [x.shape, w.shape]


def test_the_operators_are_sound():
    tensors, ends, _ = inputs([4, 0, 9], torch.float64)
    torch.library.opcheck(torch.ops.omnistep.grouped_linear.default, (tensors[0], tensors[2], ends))
    y = torch.randn(tensors[0].shape[0], MLP, dtype=torch.float64)
    arguments = (y, tensors[0].detach(), ends)
    torch.library.opcheck(torch.ops.omnistep.grouped_outer.default, arguments)


@pytest.mark.parametrize("counts", [[4, 9, 3], [0, 24, 0], [0, 0, 0]])
def test_what_runs_on_cuda(counts):
    """torch has a CPU kernel of grouped_mm too; on meta it insists on the strides a GPU needs."""
    tensors, ends, _ = inputs(counts, torch.bfloat16)
    x, weight = tensors[0].detach(), tensors[2].detach()
    y = torch.randn(x.shape[0], MLP, dtype=torch.bfloat16)
    last = int(ends[-1])
    for got, expected in (
        (grouped.linear_cuda(x, weight, ends), grouped.linear_loop(x, weight, ends)),
        (grouped.linear_cuda(y, weight.mT, ends), grouped.linear_loop(y, weight.mT, ends)),
    ):
        torch.testing.assert_close(got[:last], expected[:last], rtol=2e-2, atol=1e-2)
    got = grouped.outer_cuda(y, x, ends)
    torch.testing.assert_close(got, grouped.outer_loop(y, x, ends), rtol=2e-2, atol=1e-2)
    x, y, weight, ends = (t.to("meta") for t in (x, y, weight, ends))
    grad = y[:1].expand_as(y)
    assert grouped.linear_cuda(x, weight, ends).is_contiguous()
    assert grouped.linear_cuda(grad, weight.mT, ends).is_contiguous()
    assert grouped.outer_cuda(grad, x, ends).is_contiguous()


def test_cuda_takes_the_loop_where_one_kernel_can_not():
    tensors, ends, _ = inputs([4, 9], torch.float32)
    x, weight = tensors[0].detach(), tensors[2].detach()
    got = grouped.linear_cuda(x, weight, ends)
    torch.testing.assert_close(got, grouped.linear_loop(x, weight, ends))
    odd = weight[:, :-1].bfloat16()
    got = grouped.linear_cuda(x.bfloat16(), odd, ends)
    torch.testing.assert_close(got, grouped.linear_loop(x.bfloat16(), odd, ends))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, e: (x[:, :-1], w, e), "must be"),
        (lambda x, w, e: (x.float(), w, e), "one floating dtype"),
        (lambda x, w, e: (x, w, e.long()), "int32"),
        (lambda x, w, e: (x, w, e[:-1]), "one for each expert"),
        (lambda x, w, e: (x, w, e.flip(0)), "never decrease"),
        (lambda x, w, e: (x, w, e + 19), "from 0 to 24 rows"),
        (lambda x, w, e: (x, w, e - 9), "from 0 to 24 rows"),
    ],
)
def test_errors(change, message):
    tensors, ends, _ = inputs([4, 9, 0, 2], torch.float64)
    with pytest.raises(ValueError, match=message):
        grouped_linear(*change(tensors[0], tensors[2], ends))
