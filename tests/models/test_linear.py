"""Products by oneDNN against torch's own, forward and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from omnistep.core import products
from omnistep.models import linear as wide
from omnistep.models.linear import linear

needs_avx512 = pytest.mark.skipif(not products.HAS_WIDE_PRODUCTS, reason="no AVX-512 or no oneDNN")


def results(function, x, weight, bias, grad):
    """The output and the gradients of x, weight and bias."""
    leaves = [t for t in (x, weight, bias) if t is not None]
    leaves = [t.detach().to(grad.dtype).requires_grad_() for t in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def assert_close(got, expected, tolerance=1e-5):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, i
        assert float((a - b).norm()) <= tolerance * float(b.norm()), i


compiled = torch.compile(linear, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("function", [linear, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [(2, 20), (40,), (3,)])
def test_as_torch(function, with_bias, rows):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(*rows, 24), torch.randn(40, 24), torch.randn(*rows, 40)
    bias = torch.randn(40) if with_bias else None
    exact = results(F.linear, x, weight, bias, grad.double())
    assert_close(results(function, x, weight, bias, grad), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype):
    x, weight = torch.randn(40, 24, dtype=dtype), torch.randn(16, 24, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:1].expand_as(x),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x.T, x.T], 1)[:, : x.shape[0]].T,
    ],
    ids=["transposed", "spaced", "expanded", "cut", "transposed and cut"],
)
def test_any_strides(strided):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(40, 24), torch.randn(16, 24), torch.randn(40, 16)
    for a, b, g in (
        (strided(x), weight, grad),
        (x, strided(weight), grad),
        (x, weight, strided(grad)),
    ):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        got = torch.autograd.grad(linear(a, b), (a, b), g)
        assert_close((linear(a, b), *got), (a @ b.T, g @ b, g.T @ a))


@needs_avx512
def test_onednn_computes_it_and_remat_can_keep_it():
    x, weight = torch.randn(40, 24), torch.randn(16, 24)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(x, weight)
    names = {event.name for event in profile.events() or ()}
    assert "mkldnn::_linear_pointwise" in names
    assert {str(op) for op in wide.SAVED_OPS} == {"omnistep.linear.default"}
    torch.library.opcheck(torch.ops.omnistep.linear.default, (x.requires_grad_(), weight))


def test_no_gradients_and_fake_tensors():
    with torch.no_grad():
        x, weight = torch.randn(40, 24), torch.randn(16, 24, requires_grad=True)
        torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    with FakeTensorMode():
        y = linear(torch.empty(2, 40, 24), torch.empty(16, 24))
        assert y.shape == (2, 40, 16)
