"""Attention in torch's own operators, where no kernel of ours can be had."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

PLAIN_QUERIES = 256
"""So many queries' scores are in memory at a time."""


def compute_dtype(q: Tensor) -> torch.dtype:
    """What attention is computed in, and logsumexps are: float32, or float64 for float64."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def torch_forward(
    q: Float[Tensor, "rows seq heads head_dim"],
    k: Float[Tensor, "rows seq kv_heads head_dim"],
    v: Float[Tensor, "rows seq kv_heads head_dim"],
    starts: Int[Tensor, "rows seq"],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp from torch's own CPU attention, one sample at a time."""
    rows, seq, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((rows, heads, seq), dtype=compute_dtype(q))
    for row, first, last in _samples(starts):
        part = (slice(row, row + 1), slice(first, last))
        one_out, one_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[part].transpose(1, 2),
            *_repeated(heads, k[part], v[part]),
            **_masking(q, last - first, window),
            scale=scale,
        )
        out[part] = one_out.transpose(1, 2)
        lse[row, :, first:last] = one_lse[0]
    return out, lse


def torch_backward(
    grad: Float[Tensor, "rows seq heads head_dim"],
    q: Float[Tensor, "rows seq heads head_dim"],
    k: Float[Tensor, "rows seq kv_heads head_dim"],
    v: Float[Tensor, "rows seq kv_heads head_dim"],
    out: Float[Tensor, "rows seq heads head_dim"],
    lse: Float[Tensor, "rows heads seq"],
    starts: Int[Tensor, "rows seq"],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from torch's own CPU attention, one sample at a time."""
    heads = q.shape[2]
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    for row, first, last in _samples(starts):
        part = (slice(row, row + 1), slice(first, last))
        masking = _masking(q, last - first, window)
        q_grad, *of_heads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[part].transpose(1, 2),
            q[part].transpose(1, 2),
            *_repeated(heads, k[part], v[part]),
            out[part].transpose(1, 2),
            # laid out [rows, seq, heads] in memory, which is how the forward pass returns it
            lse[row : row + 1, :, first:last].transpose(1, 2).contiguous().transpose(1, 2),
            0.0,
            masking.pop("is_causal"),
            **masking,
            scale=scale,
        )
        grads[0][part] = q_grad.transpose(1, 2)
        for whole, repeated in zip(grads[1:], of_heads, strict=True):
            shared = repeated.unflatten(1, (k.shape[2], heads // k.shape[2])).sum(2)
            whole[part] = shared.transpose(1, 2)
    return grads


def _samples(starts: Tensor) -> list[tuple[int, int, int]]:
    """(row, first token, end) of every sample."""
    found = []
    for row, line in enumerate(starts.tolist()):
        begins = [index for index, start in enumerate(line) if start == index]
        found += [(row, *ends) for ends in zip(begins, [*begins[1:], len(line)], strict=True)]
    return found


def _repeated(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[rows, seq, kv_heads, head_dim] to [rows, heads, seq, head_dim]."""
    return tuple(x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in tensors)


def _masking(q: Tensor, length: int, window: int | None) -> dict:
    if window is None or window >= length:
        return {"is_causal": True, "attn_mask": None}
    seen = q.new_ones((length, length), dtype=torch.bool).tril().triu(1 - window)
    bias = q.new_zeros((length, length)).masked_fill(~seen, float("-inf"))
    return {"is_causal": False, "attn_mask": bias}


def plain_part(
    out: Float[Tensor, "rows queries heads head_dim"],
    lse: Float[Tensor, "rows heads queries"],
    q: Float[Tensor, "rows queries heads head_dim"],
    k: Float[Tensor, "rows keys kv_heads head_dim"],
    v: Float[Tensor, "rows keys kv_heads head_dim"],
    seen: Int[Tensor, "2 rows queries"],
    scale: float,
) -> None:
    """`omnistep.models.attention_ring.attention_part`, written over its earlier `out` and `lse`.

    Every score is computed, those that are not seen too: on any device, without waiting for it.
    """
    k, v = k.to(out.dtype), v.to(out.dtype)
    for block in torch.arange(q.shape[1]).split(PLAIN_QUERIES):
        at = slice(int(block[0]), int(block[-1]) + 1)
        scores = _scores(q[:, at], k, seen[:, :, at], scale)
        before = lse[:, :, at]
        after = torch.logaddexp(before, scores.logsumexp(-1).flatten(1, 2))
        # A query that has seen no key yet: subtracting 0 keeps it free of NaN.
        shift = after.masked_fill(after == float("-inf"), 0.0)
        weights = (scores - shift.unflatten(1, scores.shape[1:3])[..., None]).exp()
        kept = (before - shift).exp().transpose(1, 2)[..., None]
        added = torch.einsum("rhgij,rjhd->rihgd", weights, v).flatten(2, 3)
        out[:, at] = out[:, at] * kept + added
        lse[:, :, at] = after


def plain_part_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad: Float[Tensor, "rows queries heads head_dim"],
    q: Float[Tensor, "rows queries heads head_dim"],
    k: Float[Tensor, "rows keys kv_heads head_dim"],
    v: Float[Tensor, "rows keys kv_heads head_dim"],
    out: Float[Tensor, "rows queries heads head_dim"],
    lse: Float[Tensor, "rows heads queries"],
    seen: Int[Tensor, "2 rows queries"],
    scale: float,
) -> None:
    """`omnistep.models.attention_ring.attention_part_backward`, added to `grads` of q, k and v."""
    q_grad, k_grad, v_grad = grads
    q, k, v, out, grad = (x.to(q_grad.dtype) for x in (q, k, v, out, grad))
    delta = (out * grad).sum(-1).transpose(1, 2)
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    for block in torch.arange(q.shape[1]).split(PLAIN_QUERIES):
        at = slice(int(block[0]), int(block[-1]) + 1)
        scores = _scores(q[:, at], k, seen[:, :, at], scale)
        statistics = torch.stack([lse[:, :, at], delta[:, :, at]])[..., None]
        lse_at, delta_at = statistics.unflatten(2, (kv_heads, group))
        weights = (scores - lse_at).exp()
        q_at, grad_at = (x[:, at].unflatten(2, (kv_heads, group)) for x in (q, grad))
        v_grad += torch.einsum("rhgij,rihgd->rjhd", weights, grad_at)
        of_scores = weights * (torch.einsum("rihgd,rjhd->rhgij", grad_at, v) - delta_at) * scale
        q_grad[:, at] += torch.einsum("rhgij,rjhd->rihgd", of_scores, k).flatten(2, 3)
        k_grad += torch.einsum("rhgij,rihgd->rjhd", of_scores, q_at)


def _scores(
    q: Float[Tensor, "rows queries heads head_dim"],
    k: Float[Tensor, "rows keys kv_heads head_dim"],
    seen: Int[Tensor, "2 rows queries"],
    scale: float,
) -> Float[Tensor, "rows kv_heads group queries keys"]:
    """In k's dtype; -inf for keys that are not seen."""
    key = torch.arange(k.shape[1], device=k.device)
    first, end = seen[..., None]
    hidden = ((key < first) | (key >= end))[:, None, None]
    grouped = q.to(k.dtype).unflatten(2, (k.shape[2], q.shape[2] // k.shape[2]))
    scores = torch.einsum("rihgd,rjhd->rhgij", grouped, k) * scale
    return scores.masked_fill(hidden, float("-inf"))
