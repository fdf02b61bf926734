"""Sequences cut over the ranks of a ring, and a ring in which keys and values travel.

A row is cut into 2 * size equal chunks; rank i holds chunks i and 2 * size - 1 - i, one after the
other. Under a causal mask a late chunk sees much and an early one little, so every rank has the
same number of pairs (chunk of queries, chunk of keys) to compute: two at each hop, whoever's keys
are passing. (The order is that of Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2;
the ring is that of Liu et al. 2023, arXiv 2310.01889.)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from omnistep.parallel.mesh import Group

Chunks = tuple[tuple[int, int], tuple[int, int]]
"""(begin, end) in the row of the two chunks of a rank, in the order in which it holds them."""

_c10d = torch.ops._c10d_functional
_wait = _c10d.wait_tensor


def chunks_of(seq: int, size: int, index: int) -> Chunks:
    """What rank `index` of `size` holds of a row of `seq` tokens. One rank holds all, in order.

    Raises ValueError where the row does not divide into 2 * size chunks.
    """
    if size == 1:
        return (0, seq // 2), (seq // 2, seq)
    chunk = seq // (2 * size)
    if seq % (2 * size) or not chunk:
        lengths = [n * 2 * size for n in (chunk, chunk + 1) if n]
        raise ValueError(
            f"a row of {seq} tokens cannot be cut into 2 x {size} equal chunks for {size} ranks; "
            f"its length must be a multiple of {2 * size}, such as "
            f"{' or '.join(map(str, lengths))}"
        )
    mirrored = 2 * size - 1 - index
    return (index * chunk, (index + 1) * chunk), (mirrored * chunk, (mirrored + 1) * chunk)


def local_chunks(seq: int, group: Group) -> Chunks:
    """What this rank holds of a row of `seq` tokens; see `chunks_of`."""
    return chunks_of(seq, group.size, group.index)


def take_local(x: Tensor, group: Group, dim: int = 1) -> Tensor:
    """This rank's tokens of whole rows, whose tokens lie along `dim`."""
    if group.size == 1:
        return x
    return torch.cat([x.narrow(dim, b, e - b) for b, e in local_chunks(x.shape[dim], group)], dim)


def tokens_before(position: Tensor, chunks: Chunks) -> Tensor:
    """How many of the chunks' tokens lie before each position of the row.

    As chunks are held in the order of the row, that is also where in them the first token at or
    after the position lies: what bounds in the row become in the local order of a rank.
    """
    first, second = ((position - begin).clamp(0, end - begin) for begin, end in chunks)
    return first + second


def holder(hop: int, size: int, index: int) -> int:
    """Whose keys and values rank `index` has at hop 0 .. size - 1: blocks move to the next rank."""
    return (index - hop) % size


State = tuple[Tensor, Tensor]
"""Attention over the keys that have passed, not yet in q's dtype, and its logsumexp."""
Part = Callable[[Tensor, Tensor, Tensor, Tensor, State | None, list[Tensor]], State]
"""(q, k, v, seen, state, in_flight) -> the state after these keys too."""
PartBackward = Callable[..., tuple[Tensor, Tensor]]
"""(grad, q, k, v, out, lse, seen, in_flight) -> (gradient of q, those of k and v stacked), from
these keys only; out and lse are those over all keys."""


def ring(
    part: Part,
    part_backward: PartBackward,
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: tuple[Tensor, ...],
    sinks: Tensor | None = None,
) -> Tensor:
    """What `part` gives when it has gone over the keys of all ranks. Differentiable.

    k and v travel together, a hop forward while the keys that are here are computed: size - 1
    messages. In the backward pass they travel again, and the sums of their gradients, in the dtype
    of `part_backward`, set out where they first arrive, travel with them and one hop further, home,
    where the owner's part waits: size - 1 messages each. A rank holds its own keys, one passing
    block, and one that is on its way.

    The compiler moves operators as far as their operands let it, and would wait for a message
    before computing. So `part` and `part_backward` are given, and must make operands of an opaque
    operator, the messages `in_flight`, which they do not read: an operator that has them as
    operands stays between the operator that sends them and the one that waits for them.

    Args:
        k, v: of one shape and dtype, the same on all ranks.
        seen: for each hop, what `part` must know of the queries here and the keys of `holder`.
        sinks: [heads]; a score that each query of a head has besides, of a key without a value.
    """
    place = (group.size, group.index, group.name)
    if not torch.is_grad_enabled():  # dynamo loses the context of a Function that needs none
        return _around(part, *place, q, k, v, sinks, seen)[0].to(q.dtype)
    return _Ring.apply(part, part_backward, *place, q, k, v, sinks, *seen)  # pyright: ignore


def _around(
    part: Part,
    size: int,
    index: int,
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    seen: tuple[Tensor, ...],
) -> State:
    state, kv = None if sinks is None else _only_sinks(q, sinks), torch.stack([k, v])
    for hop in range(size):
        coming = _send(kv, size, index, name) if hop < size - 1 else None
        state = part(q, kv[0], kv[1], seen[hop], state, [] if coming is None else [coming])
        if coming is not None:
            kv = _wait(coming).view(kv.shape)
    assert state is not None
    return state


def _only_sinks(q: Tensor, sinks: Tensor) -> State:
    """The state before any key: what q attends to adds nothing to its output."""
    rows, queries, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = sinks.to(dtype)[:, None].expand(rows, heads, queries).contiguous()
    return torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format), lse


def _sinks_grad(sinks: Tensor, grad: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient by a score that has no value: minus its share of the weight times grad . out."""
    along = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    share = (sinks.to(lse.dtype)[:, None] - lse).exp()
    return -(share * along).sum((0, 2)).to(sinks.dtype)


def _send(x: Tensor, size: int, index: int, name: str) -> Tensor:
    """Starts to send x to the next rank; what comes from the one before may be read after _wait."""
    sends, receives = [0] * size, [0] * size
    sends[(index + 1) % size] = receives[(index - 1) % size] = x.numel()
    return _c10d.all_to_all_single(x.view(-1), receives, sends, name)


@torch.library.custom_op("omnistep::ring_message", mutates_args=())
def _message(k: Tensor, v: Tensor, grad: Tensor) -> Tensor:
    """k and v stacked, once `grad` is there.

    Without this operand the compiler would find that what travels in the backward pass has already
    travelled in the forward pass, and keep every block until then, as an all-gather would.
    """
    return torch.stack([k, v])


@_message.register_fake
def _(k, v, grad):
    return k.new_empty((2, *k.shape))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, part_backward, size, index, name, q, k, v, sinks, *seen):  # pyright: ignore[reportIncompatibleMethodOverride]
        out, lse = _around(part, size, index, name, q, k, v, sinks, seen)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse, *seen)
        ctx.ring = (part_backward, size, index, name)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        part_backward, *ring = ctx.ring
        size = ring[0]
        q, k, v, sinks, out, lse, *seen = ctx.saved_tensors
        q_grad, mine, kv_grad, kv = None, None, None, _message(k, v, grad)
        for hop in range(size):
            coming = _send(kv, *ring) if hop < size - 1 else None
            in_flight = [x for x in (coming, kv_grad) if x is not None]
            of_q, of_kv = part_backward(grad, q, kv[0], kv[1], out, lse, seen[hop], in_flight)
            q_grad = of_q if q_grad is None else q_grad + of_q
            if kv_grad is not None:  # set out one hop ago, while these were computed
                of_kv = _wait(kv_grad).view(of_kv.shape) + of_kv
            if hop == 0:
                mine = of_kv
            else:
                kv_grad = _send(of_kv, *ring)
            if coming is not None:
                kv = _wait(coming).view(kv.shape)
        assert mine is not None
        if kv_grad is not None:
            mine = _wait(kv_grad).view(kv.shape) + mine
        k_grad, v_grad = mine.to(k.dtype).unbind(0)
        sinks_grad = None if sinks is None else _sinks_grad(sinks, grad, out, lse)
        return (*[None] * 5, q_grad.to(q.dtype), k_grad, v_grad, sinks_grad, *[None] * size)  # pyright: ignore
