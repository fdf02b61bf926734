"""Layers as pure functions on local tensors. Axis names are those of the layouts."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(
    x: Float[Tensor, "... embed"], weight: Float[Tensor, " embed"], eps: float
) -> Float[Tensor, "... embed"]:
    """Root-mean-square norm (arXiv 1910.07467), reduced in fp32 or better."""
    y = at_least_fp32(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def layer_norm(
    x: Float[Tensor, "... embed"],
    weight: Float[Tensor, " embed"],
    bias: Float[Tensor, " embed"],
    eps: float,
) -> Float[Tensor, "... embed"]:
    """Layer norm (arXiv 1607.06450), computed in fp32 or better."""
    y, w, b = (at_least_fp32(t) for t in (x, weight, bias))
    return F.layer_norm(y, w.shape, w, b, eps).to(x.dtype)


def activation(name: str, x: Tensor) -> Tensor:
    """Raises ValueError for a name that is not known."""
    match name:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "silu":
            return F.silu(x)
    raise ValueError(f"activation {name!r} is not one of gelu, gelu_tanh, quick_gelu, silu")


def interpolated(
    table: Float[Tensor, "side*side embed"],
    at: Int[Tensor, "... 2"],
    size: Int[Tensor, "... 2"],
    side: int,
) -> Float[Tensor, "... embed"]:
    """The vectors of a grid of `side` x `side` at other grids' places, between its own linearly in
    both directions; corners are corners (align_corners of torch.nn.functional.interpolate).

    at: row and column in a grid of `size` rows and columns.
    """
    exact = at_least_fp32(table)
    source = at.to(exact.dtype) * (side - 1) / (size - 1).clamp(min=1)
    low = source.floor()
    part = source - low
    low = low.to(torch.int32)
    taps = torch.stack([low, (low + 1).clamp(max=side - 1)], -1)
    shares = torch.stack([1 - part, part], -1)
    index = taps[..., 0, :, None] * side + taps[..., 1, None, :]
    share = shares[..., 0, :, None] * shares[..., 1, None, :]
    found = F.embedding(index.flatten(-2), exact) * share.flatten(-2).unsqueeze(-1)
    return found.sum(-2)


def rotary(
    x: Float[Tensor, "rows seq heads head_dim"],
    cos: Float[Tensor, "rows seq head_dim//2"],
    sin: Float[Tensor, "rows seq head_dim//2"],
) -> Float[Tensor, "rows seq heads head_dim"]:
    """Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face:
    element i is paired with element i + head_dim/2."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any], device: torch.device | None = None
) -> tuple[Tensor, float]:
    """(inverse frequencies [head_dim//2] in fp64, factor on cos and sin), made on `device`: a copy
    from the host would wait for what runs there.

    `scaling` is a Hugging Face rope_parameters dict; the formulas are those of
    transformers/modeling_rope_utils.py. Raises ValueError for a type that is not known.
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    inverse = theta ** -(even / head_dim)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return inverse, 1.0
    factor = float(scaling["factor"]) if kind in ("linear", "llama3", "yarn") else 1.0
    if kind == "linear":
        return inverse / factor, 1.0
    if kind == "llama3":
        return _llama3(inverse, factor, scaling), 1.0
    if kind == "yarn":
        return _yarn(inverse, head_dim, theta, factor, scaling)
    raise ValueError(f"rope_type {kind!r} is not one of default, linear, llama3, yarn")


def _llama3(inverse: Tensor, factor: float, scaling: Mapping[str, Any]) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, with a smooth passage between."""
    old = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = old * inverse / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (smooth + (1 - smooth) / factor)


def _yarn(
    inverse: Tensor, head_dim: int, theta: float, factor: float, scaling: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """arXiv 2309.00071."""
    old = scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return head_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=inverse.dtype, device=inverse.device)
    ramp = (index - low) / max(high - low, 1e-3)
    interpolated = ramp.clamp(0, 1)
    inverse = inverse * (1 - interpolated) + inverse / factor * interpolated

    attention = scaling.get("attention_factor")
    if attention is None:
        m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = (
            yarn_magnitude(factor, m) / yarn_magnitude(factor, m_all)
            if m and m_all
            else yarn_magnitude(factor)
        )
    return inverse, float(attention)


def yarn_magnitude(factor: float, share: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by when positions are stretched by `factor`."""
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_angles(
    positions: Int[Tensor, "... #half"],
    frequencies: Float[Tensor, " half"],
    factor: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "... half"], Float[Tensor, "... half"]]:
    """cos and sin of position × frequency, computed in fp32 (fp64 when `dtype` is), then cast."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = frequencies.to(device=positions.device, dtype=exact)
    angles = positions.to(exact) * frequencies
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
