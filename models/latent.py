"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): its queries, keys and
values. Pure functions on local tensors; what is sent between ranks is written out."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from omnistep.models.config import Config
from omnistep.models.layers import rms_norm, rotary
from omnistep.models.linear import linear
from omnistep.parallel.collectives import all_gather, all_to_all
from omnistep.parallel.mesh import Group

NORM_EPS = 1e-6
"""Of the norms of the two small vectors, whatever Config.norm_eps is: transformers,
models/deepseek_v3/modeling_deepseek_v3.py."""


def project_latent(
    x: Float[Tensor, "rows seq/(ulysses*tp) embed"],
    w: Mapping[str, Tensor],
    cos: Float[Tensor, "rows seq/ulysses rope//2"],
    sin: Float[Tensor, "rows seq/ulysses rope//2"],
    cfg: Config,
    tp: Group,
    ulysses: Group,
) -> tuple[
    Float[Tensor, "rows seq heads/(tp*ulysses) head_dim"],
    Float[Tensor, "rows seq heads/(tp*ulysses) head_dim"],
    Float[Tensor, "rows seq heads/(tp*ulysses) value"],
]:
    """Queries, keys and values of the tokens of all ranks of tp and ulysses, for this rank's heads.

    x: normed, this rank's own tokens. w: a layer's weights, whose heads tp has cut.

    The small vectors are made of a rank's own tokens, travel, and are expanded where they arrive.
    Keys and values are expanded for the heads of one rank of ulysses only; queries, whose small
    vector is three times as wide, change places with the sequence as in other attention.
    """
    latent = cfg.latent
    assert latent is not None
    query, expand = x, "q"
    if latent.q is not None:
        query, expand = linear(x, w["q_a"], w.get("q_a_bias")), "q_b"
        query = rms_norm(query, w["q_a_norm"], NORM_EPS)
    small, turned = linear(x, w["kv_a"], w.get("kv_a_bias")).split((latent.kv, latent.rope), -1)
    small = rms_norm(small, w["kv_a_norm"], NORM_EPS)
    if tp.size > 1:
        parts = (query, small, turned)
        arrived = all_gather(torch.cat(parts, -1), tp, 1)  # one message
        query, small, turned = arrived.split([part.shape[-1] for part in parts], -1)

    q = linear(query, w[expand].flatten(0, 1)).unflatten(-1, w[expand].shape[:2])
    q = all_to_all(_rotate(q, cos, sin, cfg), ulysses, 2, 1)
    turned = _rotate(turned.unsqueeze(2), cos, sin, cfg).squeeze(2)
    if ulysses.size > 1:
        arrived = all_gather(torch.cat((small, turned), -1), ulysses, 1)
        small, turned = arrived.split((latent.kv, latent.rope), -1)
    expand_kv = w["kv_b"].unflatten(0, (ulysses.size, -1))[ulysses.index]
    kv = linear(small, expand_kv.flatten(0, 1)).unflatten(-1, expand_kv.shape[:2])
    k, v = kv.split((latent.nope, latent.value), -1)
    turned = turned.unsqueeze(2).expand(-1, -1, k.shape[2], -1)
    return q, torch.cat((k, turned), -1), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, cfg: Config) -> Tensor:
    """Rotates the last `rope` elements of each head. Pairs that are neighbours come out as halves:
    both in queries and keys, so that no product of them changes."""
    latent = cfg.latent
    assert latent is not None
    kept, turned = x.split((x.shape[-1] - latent.rope, latent.rope), -1)
    if latent.interleaved:
        turned = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    turned = rotary(turned, cos, sin)
    return torch.cat((kept, turned), -1) if kept.shape[-1] else turned
