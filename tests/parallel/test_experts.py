"""Which rows go to experts, how many at a time, and back."""

import pytest
import torch

from omnistep.parallel.experts import (
    choose,
    collect,
    rounds_of,
    rows_at_a_time,
    sort_pairs,
    spread,
    window,
)


@pytest.mark.parametrize("dispatch", ["gather", "all_to_all"])
@pytest.mark.parametrize("tokens", [1, 24, 1000])
@pytest.mark.parametrize(("top_k", "experts", "ranks"), [(1, 8, 8), (2, 8, 4), (8, 256, 64)])
def test_rows_at_a_time(dispatch, tokens, top_k, experts, ranks):
    rows, bound = rows_at_a_time(dispatch, tokens, top_k, experts, ranks)
    share = tokens * top_k / (ranks if dispatch == "all_to_all" else 1)
    senders = 1 if dispatch == "all_to_all" else ranks
    assert bound == senders * tokens * min(top_k, experts // ranks)
    assert rows == bound or 1.25 * share <= rows < 1.25 * share + 8
    assert rows <= bound
    assert rows == bound or rows % 8 == 0


def test_the_rule_sends_fewer_bytes():
    for tokens, top_k, ranks in [(4096, k, n) for k in (1, 2, 4, 8) for n in (2, 4, 8, 16, 32, 64)]:
        rows, _ = rows_at_a_time("all_to_all", tokens, top_k, 64, ranks)
        sent = {"gather": tokens * (ranks - 1), "all_to_all": rows * (ranks - 1)}
        chosen = choose(tokens, top_k, 64, ranks)
        assert sent[chosen] == min(sent.values())
        assert chosen == ("all_to_all" if ranks > 1.25 * top_k else "gather")


def test_experts_that_cannot_be_shared():
    with pytest.raises(ValueError, match="9 experts can't be shared evenly by ep = 2 ranks"):
        choose(16, 2, 9, 2)


@pytest.mark.parametrize("kind", ["random", "all to one", "none here"])
def test_sorted_pairs(kind):
    torch.manual_seed(0)
    expert = torch.randint(0, 6, (50,))  # 5: an expert of another rank
    if kind != "random":
        expert[:] = 2 if kind == "all to one" else 5
    order, place, ends = sort_pairs(expert, 5)
    assert order.tolist() == sorted(range(50), key=lambda pair: int(expert[pair]))
    assert place[order].tolist() == list(range(50))
    assert ends.tolist() == [int((expert <= e).sum()) for e in range(5)]


@pytest.mark.parametrize("rows", [1, 7, 8, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("skewed", [False, True])
def test_windows_give_every_pair_once(rows, ranks, skewed):
    torch.manual_seed(rows + ranks)
    experts, count = 4 * ranks, 60
    expert = torch.randint(0, experts + 1, (count,))
    if skewed:
        expert[torch.rand(count) < 0.8] = experts - 1
    pairs, given = sort_pairs(expert, experts), []
    rounds = int(rounds_of(pairs, ranks, rows))
    for round in range(rounds):
        w = window(pairs, ranks, rows, round)
        assert w.index.shape == (ranks * rows,)
        for slot, pair in enumerate(w.index.tolist()):
            rank, row = divmod(slot, rows)
            ends = w.ends[rank].tolist()
            if pair < 0:
                assert row >= ends[-1]
                continue
            given.append(pair)
            assert w.back[pair] == slot
            assert expert[pair] == 4 * rank + sum(row >= end for end in ends)
        assert (w.back >= 0).sum() == (w.index >= 0).sum()
    assert sorted(given) == (expert < experts).nonzero().flatten().tolist()
    assert len(given) < count or not (expert == experts).any()
    # no more rounds than it takes
    assert rounds == max(-(-int((expert // 4 == rank).sum()) // rows) for rank in range(ranks))
    assert (window(pairs, ranks, rows, rounds).index == -1).all()


def lists(tokens=20, top_k=3, experts=6, rows=30):
    """(index, back) of a window that has no room for all pairs."""
    torch.manual_seed(1)
    pairs = sort_pairs(torch.rand(tokens, experts).topk(top_k).indices.flatten(), experts - 1)
    w = window(pairs, 1, rows, 0)
    return torch.div(w.index, top_k, rounding_mode="floor"), w.back.view(tokens, top_k)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("compile", [False, True])
def test_spread_and_collect_are_transposes(shape, compile):
    index, back = lists()
    x = torch.randn(20, *shape, dtype=torch.float64)
    y = torch.randn(30, *shape, dtype=torch.float64)
    matrix = (index.unsqueeze(1) == torch.arange(20)).double()
    there, home = spread, collect
    if compile:
        there, home = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (there, home))

    def product(m, z):
        return (m @ z.flatten(1) if shape else m @ z).view(len(m), *shape)

    for inputs, function, m, weight in (
        ((x, index, back), there, matrix, y),
        ((y, back, index), home, matrix.T, x),
    ):
        leaf = inputs[0].requires_grad_()
        out = function(leaf, *inputs[1:])
        torch.testing.assert_close(out, product(m, leaf))
        with torch.no_grad():
            assert torch.equal(function(leaf, *inputs[1:]), out)
        (grad,) = torch.autograd.grad(out, leaf, weight)
        torch.testing.assert_close(grad, product(m.T, weight))
    torch._dynamo.reset()


def test_what_nobody_asks_for_is_not_read():
    index, back = lists(rows=64)  # there are empty slots
    x, y = torch.randn(20, 4), torch.randn(64, 4)
    assert (index < 0).any()
    y[index < 0] = torch.nan
    assert collect(y, back, index).isfinite().all()
    used = torch.zeros(20, dtype=torch.bool)
    used[index[index >= 0]] = True
    few = torch.where(index == 0, -1, index)
    x[0] = torch.nan
    assert used[0]
    assert spread(x, few, torch.where(few[back] < 0, -1, back)).isfinite().all()


def test_sums_of_half_precision_are_rounded_once():
    y = torch.randn(64, 16).bfloat16()
    back = torch.randperm(64).view(8, 8)
    got = collect(y, back, torch.argsort(back.flatten()) // 8)
    assert torch.equal(got, y[back].float().sum(1).bfloat16())
