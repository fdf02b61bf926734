"""What the forward pass keeps for the backward pass, and what is computed again there."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Remat = Literal["none", "selective", "full"]
"""none: all that autograd asks for is kept. full: only a block's input is kept, the block runs
again. selective: results of matrix products, attention and communication are kept, the cheap rest
runs again."""

PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
_MESSAGES = frozenset(
    {
        _GATHER,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        torch.ops._c10d_functional.all_to_all_single.default,
    }
)
_REARRANGE = frozenset(
    {
        torch.ops.aten._to_copy.default,
        torch.ops.aten.cat.default,
        torch.ops.aten.clone.default,
        torch.ops._c10d_functional.wait_tensor.default,
    }
)


def _policy(
    kept: frozenset[Any] | None, regather: frozenset[str], _context: Any, op: Any, *args: Any, **_
) -> CheckpointPolicy:
    if op is _GATHER and args[2] in regather:
        return CheckpointPolicy.MUST_RECOMPUTE
    if kept is not None:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
    # What only casts or rearranges a weight, before or after it is gathered, must not be kept in
    # its place.
    if op.is_view or op in _REARRANGE:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.PREFER_SAVE


def remat(
    block: Callable[..., Any],
    mode: Remat,
    keep: frozenset[Any] = frozenset(),
    regather: frozenset[str] = frozenset(),
) -> Callable[..., Any]:
    """`block` with the given memory policy; its values and gradients do not change.

    keep: further operators whose results the selective mode keeps (a custom attention).
    regather: names of groups over which the block gathers its weights; what it gathered is
        dropped after use and gathered again in the backward pass, in every mode (zero3).

    The block must not draw random numbers from a hidden generator.
    """
    if mode not in ("none", "selective", "full"):
        raise ValueError(f"remat mode {mode!r} is not one of none, selective, full")
    if mode == "none" and not regather:
        return block
    if mode == "full":
        return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    kept = PRODUCTS | _MESSAGES | keep if mode == "selective" else None
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept, regather))
    # what the compiler's disk cache tells this policy from another by
    names = sorted(map(str, _REARRANGE if kept is None else kept))
    contexts.cache_hash = f"{mode} {names} {sorted(regather)}"  # pyright: ignore
    return partial(
        checkpoint, block, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
