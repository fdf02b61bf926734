"""Routing against transformers' routers; experts against a dense loop, on one rank and on many."""

import multiprocessing
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from omnistep.core.compile import compile_graph
from omnistep.models.config import Experts
from omnistep.models.moe import SAVED_OPS, Routing, work_on_experts
from omnistep.parallel.mesh import Group, destroy_groups, make_mesh
from omnistep.parallel.remat import remat

ALONE = Group()
TOKENS, EMBED, MLP, COUNT = 24, 8, 6, 16
CONFIGS = {top_k: Experts(COUNT, top_k, MLP) for top_k in (1, 2, 4, COUNT)}


@pytest.fixture(autouse=True)
def one_thread():
    """Cases are small: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_close(got, expected, tolerance=1e-12):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm(), (i, ((a - b).norm() / b.norm()).item())


def choices(kind: str, tokens: int, top_k: int, ranks: int) -> Tensor:
    """Each token's experts. random; one expert: the first choice of all is the same; one rank: all
    choose the last rank's experts, as far as it has so many."""
    preference = torch.rand(tokens, COUNT)
    if kind == "one expert":
        preference[:, 3] += 1
    if kind == "one rank":
        preference[:, -COUNT // ranks :] += 1
    return preference.topk(top_k).indices


def inputs(kind: str, top_k: int, ranks: int, dtype=torch.float64) -> tuple[Tensor, list[Tensor]]:
    """ids, [x, weights, gate, up, down, the gradient of y] of all ranks together."""
    torch.manual_seed(top_k + 10 * ranks)
    tokens = TOKENS * ranks
    shapes = [(tokens, EMBED), (tokens, top_k)]
    shapes += [(COUNT, MLP, EMBED), (COUNT, MLP, EMBED), (COUNT, EMBED, MLP), (tokens, EMBED)]
    ids = choices(kind, tokens, top_k, ranks)
    return ids, [torch.randn(shape, dtype=dtype) for shape in shapes]


def run(function, ids, x, weights, gate, up, down, grad):
    """y, served, and the gradients of all five."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weights, gate, up, down)]
    y, served = function(ids, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)], served


def dense(ids, x, weights, gate, up, down):
    """All experts on all tokens."""
    y = torch.zeros_like(x)
    for e in range(len(gate)):
        h = F.silu(F.linear(x, gate[e])) * F.linear(x, up[e])
        y = y + F.linear(h, down[e]) * (weights * (ids == e)).sum(-1, keepdim=True)
    return y, ids.numel()


def ours(ids, x, weights, gate, up, down, ep=ALONE, dispatch=None):
    routing = Routing(ids, weights, weights)
    return work_on_experts(x, routing, gate, up, down, CONFIGS[ids.shape[1]], ep, dispatch)


KINDS = ["random", "one expert", "one rank"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2, 4, COUNT])
def test_one_rank_equals_a_dense_loop(kind, top_k):
    ids, tensors = inputs(kind, top_k, 2)
    expected, pairs = run(dense, ids, *tensors)
    got, served = run(ours, ids, *tensors)
    assert_close(got, expected)
    assert served == pairs


# On real ranks


def my_part(tensors: list[Tensor], ep: Group) -> list[Tensor]:
    """Tokens, or experts, are the first dimension of all."""
    return [x.chunk(ep.size)[ep.index] for x in tensors]


def case_of(kind, top_k, ep):
    """This rank's inputs, and what it must return."""
    ids, tensors = inputs(kind, top_k, ep.size)
    expected, _ = run(ours, ids, *tensors)
    return my_part([ids, *tensors], ep), my_part(expected, ep)


def check(function, here, expected, ep):
    got, served = run(function, *here)
    assert_close(got, expected)
    dist.all_reduce(served)
    assert served == here[0].numel() * ep.size


def check_case(dispatch, kind, top_k, ep):
    here, expected = case_of(kind, top_k, ep)
    check(partial(ours, ep=ep, dispatch=dispatch), here, expected, ep)


def check_compiled(dispatch, kind, top_k, ep):
    """In one graph, for each way of recomputation; also as an evaluation does."""
    here, expected = case_of(kind, top_k, ep)
    function = partial(ours, ep=ep, dispatch=dispatch)

    def block(ids, x, *rest):
        y, served = function(ids, x * 2, *rest)
        return y * 3, served

    halved = [here[0], here[1] / 2, *here[2:-1], here[-1] / 3]
    leaves = [expected[0] * 3, expected[1] * 2, *expected[2:]]
    for mode in ("none", "selective", "full"):
        kept = remat(block, mode, SAVED_OPS)
        check(kept, halved, leaves, ep)
        check(compile_graph(kept), halved, leaves, ep)
        torch._dynamo.reset()
    with torch.no_grad():
        assert_close(compile_graph(block)(*halved[:-1])[:1], leaves[:1])
    torch._dynamo.reset()


def run_rank(rank, size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    ep = make_mesh({"dp_shard": size}, torch.device("cpu")).group("dp_shard")
    for case in product(["gather", "all_to_all"], KINDS, [1, 2, 4]):
        check_case(*case, ep)
    if size == 4:
        check_compiled("gather", "one rank", 2, ep)
        check_compiled("all_to_all", "one rank", 2, ep)
    destroy_groups()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_equal_one_rank(size, tmp_path):
    # forked from a server that has imported this module once, and started no thread
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [
        context.Process(target=run_rank, args=(rank, size, tmp_path / "store"), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * size
