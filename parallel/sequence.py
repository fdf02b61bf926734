"""Which tokens of a row a rank holds.

A row is cut over cp, then over ulysses, then over tp. For cp it is cut into 2 cp chunks, of which
rank c holds chunks c and 2 cp - 1 - c: under a causal mask the first has little to look at where
the last has much, so all ranks have the same work.
"""

import torch
from torch import Tensor

from omnistep.parallel.mesh import Group


def cp_chunks(seq: int, cp: Group) -> tuple[tuple[int, int], ...]:
    """(begin, end) in the row of the chunks that this rank holds, in the order it holds them."""
    if cp.size == 1:
        return ((0, seq),)
    if seq % (2 * cp.size):
        below = seq - seq % (2 * cp.size)
        raise ValueError(
            f"a row of {seq} tokens can't be cut into {2 * cp.size} equal chunks for cp = "
            f"{cp.size}; {below} and {below + 2 * cp.size} can"
        )
    size = seq // (2 * cp.size)
    return tuple((i * size, (i + 1) * size) for i in (cp.index, 2 * cp.size - 1 - cp.index))


def share(x: Tensor, dim: int, cp: Group, inner: Group) -> Tensor:
    """This rank's tokens of a whole row that lies along `dim`. `inner` is the group of the further
    axes that cut what a cp rank holds: (ulysses, tp) for the residual stream."""
    pieces = [x.narrow(dim, begin, end - begin) for begin, end in cp_chunks(x.shape[dim], cp)]
    x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    if x.shape[dim] % inner.size:
        below = x.shape[dim] - x.shape[dim] % inner.size
        raise ValueError(
            f"{x.shape[dim]} tokens can't be shared by {inner.size} ranks "
            f"({' x '.join(inner.axes)}); {below} and {below + inner.size} can"
        )
    size = x.shape[dim] // inner.size
    return x.narrow(dim, inner.index * size, size)
