"""Whether a checkpoint holds what is asked of it, and how a part becomes a leaf again."""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omnistep.core.checkpoint.protocol import CheckpointError
from omnistep.core.checkpoint.shards import as_dtensor

MISFITS_SHOWN = 8


def check_fit(wanted: Mapping[str, Any], held: Mapping[str, Any], place: str) -> None:
    """Both by name: tensors (meta or real), str and int as examples of what is wanted, what is
    held. Raises CheckpointError naming all that is missing or differs."""

    def find(name: str) -> str:
        if name in held:
            return describe(name, held[name])
        near = difflib.get_close_matches(name, held, n=1)
        return "nothing" + "".join(
            f" (the nearest name is {n}: {describe(n, held[n])})" for n in near
        )

    pairs = [(name, describe(name, leaf), find(name)) for name, leaf in wanted.items()]
    misfits = [f"{name}: asked for {a}, stored is {s}" for name, a, s in pairs if a != s]
    if misfits:
        more = len(misfits) - MISFITS_SHOWN
        shown = misfits[:MISFITS_SHOWN] + [f"… and {more} more"] * (more > 0)
        raise CheckpointError(
            f"the checkpoint {place} does not hold what is to be restored:\n  " + "\n  ".join(shown)
        )


def describe(name: str, leaf: Any) -> str:
    """`float32[4, 8]`, `str`, `int`. Raises ValueError for what cannot be stored."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    if isinstance(leaf, str | int) and not isinstance(leaf, bool):
        return "str" if isinstance(leaf, str) else "int"
    raise ValueError(
        f"{name} is a {type(leaf).__name__}; a tensor, an int or a str can be restored"
    )


def put(local: Tensor, like: Tensor, device: torch.device | str) -> Tensor:
    """A leaf like `like` of which this rank's part is `local`; `device`: where meta tensors go."""
    if (whole := as_dtensor(like)) is None:
        return local.to(device if like.device.type == "meta" else like.device)
    return type(whole).from_local(
        local.to(whole.device_mesh.device_type),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
