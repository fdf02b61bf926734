"""Which tokens of a row a rank holds: cut over cp (parallel/ring.py says how), then over ulysses,
then over tp."""

from torch import Tensor

from omnistep.parallel.mesh import Group
from omnistep.parallel.ring import take_local


def share(x: Tensor, dim: int, cp: Group, inner: Group) -> Tensor:
    """This rank's tokens of a whole row that lies along `dim`. `inner` is the group of the further
    axes that cut what a cp rank holds: (ulysses, tp) for the residual stream."""
    x = take_local(x, cp, dim)
    if x.shape[dim] % inner.size:
        below = x.shape[dim] - x.shape[dim] % inner.size
        raise ValueError(
            f"{x.shape[dim]} tokens can't be shared by {inner.size} ranks "
            f"({' x '.join(inner.axes)}); {below} and {below + inner.size} can"
        )
    size = x.shape[dim] // inner.size
    return x.narrow(dim, inner.index * size, size)
