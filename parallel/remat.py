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
again. selective: results of matrix products and attention are kept, the cheap rest runs again."""

PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def _keep_products(keep: frozenset[Any], _context: Any, op: Any, *_: Any, **__: Any):
    return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE


def remat(
    block: Callable[..., Any], mode: Remat, keep: frozenset[Any] = frozenset()
) -> Callable[..., Any]:
    """`block` with the given memory policy; its values and gradients do not change.

    `keep` names further operators whose results the selective mode keeps (a custom attention).
    The block must not draw random numbers from a hidden generator.
    """
    if mode == "none":
        return block
    if mode == "full":
        return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    if mode != "selective":
        raise ValueError(f"remat mode {mode!r} is not one of none, selective, full")
    kept = PRODUCTS | keep
    contexts = partial(create_selective_checkpoint_contexts, partial(_keep_products, kept))
    # what the compiler's disk cache tells this policy from another by
    contexts.cache_hash = f"selective {sorted(map(str, kept))}"  # pyright: ignore
    return partial(
        checkpoint, block, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
