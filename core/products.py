"""Matrix products in fp32 on CPU by oneDNN, where that is faster than torch.mm.

torch.mm in fp32 is MKL's, which on AMD processors makes half of what they can: 110 GFLOP/s on a
core of a Zen 5, where oneDNN's AVX-512 kernels, exact fp32 too, make 240. In bf16 torch.mm is
oneDNN already.
"""

import torch
from jaxtyping import Float
from torch import Tensor

HAS_WIDE_PRODUCTS = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()


def goes_wide(x: Tensor) -> bool:
    """Whether products of x are oneDNN's."""
    return HAS_WIDE_PRODUCTS and x.device.type == "cpu" and x.dtype == torch.float32


def wide_product(
    a: Float[Tensor, "rows in"], b: Float[Tensor, "out in"]
) -> Float[Tensor, "rows out"]:
    """a @ b.T in fp32 by oneDNN; not differentiable. The first product of a shape takes up to 1 ms
    more; 1024 shapes are remembered. Both must be contiguous or the transpose of what is."""
    if a.shape[0] > b.shape[0] and not a.is_contiguous() and not b.is_contiguous():
        # Of `a` it makes a copy whose rows are dense: better one of the smaller of the two.
        return wide_product(b, a).T.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
