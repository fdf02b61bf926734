"""Rows that go to experts and come back: where each lies, how many at a time, by which messages.

A token that goes to `top_k` experts is `top_k` pairs (token, expert). Pairs are sorted by expert
once; everything else is index lists. Rows move by two functions that are each other's transpose, so
that forward and backward both only read rows: nothing is ever added to where others add too.
"""

import functools
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Dispatch = Literal["gather", "all_to_all"]
"""How tokens meet experts of other ranks. gather: every rank gets the tokens of all, and the sums
of what its experts make of them are scattered back. all_to_all: a token is sent to the ranks of its
experts only, and what they make of it is sent back."""

HEADROOM = 1.25
"""How many rows are worked on at a time: this often what a rank would have if all had equally
many. What is left over is worked on in further rounds."""


def rows_at_a_time(
    dispatch: Dispatch, tokens: int, top_k: int, experts: int, ranks: int
) -> tuple[int, int]:
    """(rows, bound): how many rows a round has room for, and how many there can be at most.

    gather: rows that this rank's experts work on. all_to_all: rows for each other rank. Where rows
    is bound, one round is enough whatever the routing.

    Args:
        tokens: of one rank.
        experts: of all ranks together; raises ValueError where they can't be shared evenly.
    """
    if experts % ranks:
        raise ValueError(f"{experts} experts can't be shared evenly by ep = {ranks} ranks")
    # a token goes to an expert once
    bound = tokens * min(top_k, experts // ranks)
    balanced = tokens * top_k
    if dispatch == "gather":
        bound *= ranks
    else:
        balanced /= ranks
    rows = -8 * (-HEADROOM * balanced // 8)
    return min(int(rows), bound), bound


def choose(tokens: int, top_k: int, experts: int, ranks: int) -> Dispatch:
    """The strategy that sends fewer bytes.

    With gather a rank sends each of its tokens to each of the ranks - 1 others, and as many rows
    come back. With all_to_all it sends to each of them as many rows as a round has room for, about
    1.25 * tokens * top_k / ranks, and as many come back. So all_to_all is the better one where that
    is less than `tokens`: from about 1.25 * top_k ranks on.
    """
    rows, _ = rows_at_a_time("all_to_all", tokens, top_k, experts, ranks)
    return "all_to_all" if rows < tokens else "gather"


class Pairs(NamedTuple):
    """Pairs sorted by expert."""

    order: Int[Tensor, " pairs"]
    """Which pair stands at each place."""
    place: Int[Tensor, " pairs"]
    """At which place each pair stands."""
    ends: Int[Tensor, " experts"]
    """How many pairs belong to this expert or an earlier one. What is at later places belongs to
    none of them."""


def sort_pairs(expert: Int[Tensor, " pairs"], experts: int) -> Pairs:
    """Pairs of equal experts keep their order. An expert that is not 0 .. experts - 1 must be
    `experts`."""
    ascending, order = torch.sort(expert, stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    every = torch.arange(experts, dtype=expert.dtype, device=expert.device)
    return Pairs(order, place, torch.searchsorted(ascending, every, right=True))


class Window(NamedTuple):
    """The pairs of one round, `rows` slots for each rank."""

    index: Int[Tensor, " slots"]
    """The pair in each slot, -1 where there is none. Slots are filled from the front."""
    back: Int[Tensor, " pairs"]
    """The slot of each pair, -1 if it is in none."""
    ends: Int[Tensor, "ranks experts"]
    """How many of a rank's slots belong to this expert of it or an earlier one."""


def window(pairs: Pairs, ranks: int, rows: int, round: int) -> Window:
    """Of the pairs of each of `ranks` equal shares of the experts, those at round * rows on."""
    ends = pairs.ends.unflatten(0, (ranks, -1))
    last = ends[:, -1].contiguous()
    first = torch.cat([last.new_zeros(1), last[:-1]]) + round * rows
    slot = torch.arange(rows, device=last.device)
    at = first.unsqueeze(1) + slot
    pair = pairs.order[at.clamp(max=len(pairs.order) - 1)]
    index = torch.where(at < last.unsqueeze(1), pair, -1)
    rank = torch.searchsorted(last, pairs.place, right=True)
    within = pairs.place - first[rank.clamp(max=ranks - 1)]
    here = (rank < ranks) & (within >= 0) & (within < rows)
    back = torch.where(here, rank * rows + within, -1)
    return Window(index.flatten(), back, (ends - first.unsqueeze(1)).clamp(0, rows))


def rounds_of(pairs: Pairs, ranks: int, rows: int) -> Int[Tensor, ""]:
    """How many rounds it takes until `window` has given every pair."""
    last = pairs.ends.unflatten(0, (ranks, -1))[:, -1]
    most = last.diff(prepend=last.new_zeros(1)).max()
    return (most + rows - 1) // rows


def spread(
    x: Float[Tensor, "n *rest"], index: Int[Tensor, " m"], back: Int[Tensor, "n j"]
) -> Float[Tensor, "m *rest"]:
    """Row m is x[index[m]], zeros where index[m] is -1. A row that no index names is not read.

    back: which rows come from row n; -1 fills up. index and back must say the same.
    """
    # dynamo loses the context of a Function that needs none
    if torch.is_grad_enabled() and x.requires_grad:
        return _Spread.apply(x, index, back)  # pyright: ignore
    return _rows(x, index)


def collect(
    y: Float[Tensor, "m *rest"], back: Int[Tensor, "n j"], index: Int[Tensor, " m"]
) -> Float[Tensor, "n *rest"]:
    """Row n is the sum of y[back[n, j]] over j, without those that are -1: the transpose of
    `spread`. A row that is not named in `back` is not read."""
    if torch.is_grad_enabled() and y.requires_grad:
        return _Collect.apply(y, back, index)  # pyright: ignore
    return _sums(y, back)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    empty = (index < 0).view(-1, *[1] * (x.dim() - 1))
    return x[index.clamp(min=0)].masked_fill(empty, 0)


def _sums(y: Tensor, back: Tensor) -> Tensor:
    """Added one by one: the code that inductor makes of a sum over 8 and more, inside of rows that
    are looked up, is slow. In fp32 or better, which costs nothing where it is compiled."""
    exact = y.dtype if y.element_size() >= 4 else torch.float32
    parts = [_rows(y, index).to(exact) for index in back.unbind(1)]
    return functools.reduce(torch.add, parts).to(y.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, back):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(back)
        return _rows(x, index)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sums(grad, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, back, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(index)
        return _sums(y, back)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _rows(grad, *ctx.saved_tensors), None, None
