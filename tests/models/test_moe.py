"""Routing against transformers' routers; experts against a dense loop, on one rank and on many."""

import inspect
import multiprocessing
import re
from functools import partial
from itertools import product
from types import SimpleNamespace

import attrs
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from omnistep.models.config import Experts
from omnistep.models.moe import SAVED_OPS, Routing, _in_rounds, route, work_on_experts
from omnistep.parallel.experts import rounds_of, sort_pairs
from omnistep.parallel.mesh import Group, destroy_groups, make_mesh
from omnistep.parallel.remat import remat
from tests.models.test_ring import operators
from tests.tracing import capturing

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
    choose the last rank's experts, as far as it has so many; one sender: only the first rank's
    tokens do, so that ranks differ in how many rounds they need."""
    preference = torch.rand(tokens, COUNT)
    if kind == "one expert":
        preference[:, 3] += 1
    if kind == "one rank":
        preference[:, -COUNT // ranks :] += 1
    if kind == "one sender":
        preference[: tokens // ranks, -COUNT // ranks :] += 1
    return preference.topk(top_k).indices


def inputs(kind: str, top_k: int, ranks: int, dtype=torch.float64) -> tuple[Tensor, list[Tensor]]:
    """ids, [x, weights, gate, up, down, the gradient of y] of all ranks together."""
    torch.manual_seed(top_k + 10 * ranks)
    tokens = TOKENS * ranks
    shapes = [(tokens, EMBED), (tokens, top_k)]
    shapes += [(COUNT, MLP, EMBED), (COUNT, MLP, EMBED), (COUNT, EMBED, MLP), (tokens, EMBED)]
    ids = choices(kind, tokens, top_k, ranks)
    return ids, [torch.randn(shape, dtype=dtype) for shape in shapes]


def run(function, ids, *tensors):
    """[y, the gradients of all but the last tensor, which is that of y], served."""
    *leaves, grad = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
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
    return work_on_experts(x, routing, (gate, up, down), CONFIGS[ids.shape[1]], ep, dispatch)


# Routing

FAMILIES = {
    "mixtral": (mixtral.MixtralTopKRouter, {}, {"normalize": True}),
    "qwen2": (qwen2.Qwen2MoeTopKRouter, {"norm_topk_prob": False}, {}),
    "qwen3": (qwen3.Qwen3MoeTopKRouter, {"norm_topk_prob": True}, {"normalize": True}),
    "deepseek-v2": (
        v2.DeepseekV2TopkRouter,
        {"topk_method": "greedy", "routed_scaling_factor": 1.5},
        {"exact_logits": True, "scale": 1.5},
    ),
    "deepseek-v2 groups": (
        v2.DeepseekV2TopkRouter,
        {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        {"exact_logits": True, "scale": 16.0, "groups": 4, "top_groups": 2},
    ),
    "deepseek-v3": (
        v3.DeepseekV3TopkRouter,
        {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
        {"exact_logits": True, "scoring": "sigmoid", "bias": True, "normalize": True, "scale": 2.5}
        | {"groups": 4, "top_groups": 2, "group_score": "top2"},
    ),
    "deepseek-v3 as it is": (
        v3.DeepseekV3TopkRouter,
        {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        {"exact_logits": True, "scoring": "sigmoid", "bias": True}
        | {"groups": 2, "top_groups": 1, "group_score": "top2"},
    ),
}


def exact(router: type) -> type:
    """The class with fp64 where its source has fp32."""
    source = inspect.getsource(router)
    for fp32 in ("torch.float32", "torch.float"):
        source = re.sub(rf"{fp32}\b", "torch.double", source)
    names = dict(vars(inspect.getmodule(router)))
    exec(source.replace(".float()", ".double()"), names)
    return names[router.__name__]


def routers(family: str, dtype: torch.dtype):
    """transformers' router, and (x, router, bias, cfg) for ours."""
    torch.manual_seed(0)
    router, theirs, ours = FAMILIES[family]
    cfg = Experts(COUNT, 4, MLP, **ours)
    common = {"num_experts_per_tok": cfg.top_k, "hidden_size": EMBED, "n_group": cfg.groups}
    counts = {"num_experts": COUNT, "num_local_experts": COUNT, "topk_group": cfg.top_groups}
    module = (exact(router) if dtype == torch.float64 else router)(
        SimpleNamespace(**common, **counts, **theirs)
    ).to(dtype)
    torch.nn.init.normal_(module.weight)
    bias = None
    if cfg.bias:
        bias = torch.randn(COUNT, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        module.e_score_correction_bias = bias
    x = torch.randn(200, EMBED, dtype=dtype)
    return module, (x, module.weight.detach().clone(), bias, cfg)


def spread_out(ids: Tensor, weights: Tensor) -> Tensor:
    """[tokens, experts]: the order of a token's experts has no meaning."""
    return torch.zeros(len(ids), COUNT, dtype=weights.dtype).scatter(1, ids, weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compile", [False, True])
def test_routing_is_that_of_transformers(family, compile):
    module, (x, router, bias, cfg) = routers(family, torch.float64)
    target = torch.randn(len(x), COUNT, dtype=torch.float64)
    x.requires_grad_()
    logits, weights, ids = module(x)
    expected = spread_out(ids, weights)
    expected_grads = torch.autograd.grad(
        (expected * target).sum(), (x, module.weight), retain_graph=True
    )
    ours = partial(route, cfg=cfg)
    if compile:
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = ours(x, router.requires_grad_(), bias)
    total = (spread_out(got.ids, got.weights) * target).sum()
    assert_close([spread_out(got.ids, got.weights)], [expected])
    assert_close(torch.autograd.grad(total, (x, router), retain_graph=True), expected_grads)
    scores = logits.sigmoid() if cfg.scoring == "sigmoid" else logits.softmax(-1)
    assert_close([got.scores], [scores])
    assert_close(
        torch.autograd.grad((got.scores * target).sum(), (x, router)),
        torch.autograd.grad((scores * target).sum(), (x, module.weight)),
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v2", "deepseek-v3"])
def test_logits_are_as_exact_as_those_of_transformers(family):
    """In half precision, the dtype in which logits are computed shows."""
    module, (x, router, bias, cfg) = routers(family, torch.bfloat16)
    _, weights, ids = module(x)
    got = route(x, router, bias, cfg)
    expected = spread_out(ids, weights)
    assert got.weights.dtype == got.scores.dtype == torch.float32
    assert_close([spread_out(got.ids, got.weights)], [expected], 1e-6)
    other = route(x, router, bias, attrs.evolve(cfg, exact_logits=not cfg.exact_logits))
    assert (spread_out(other.ids, other.weights) - expected).norm() > 1e-4 * expected.norm()


def test_a_bias_chooses_and_does_not_weigh():
    _, (x, router, _, cfg) = routers("deepseek-v3 as it is", torch.float64)
    bias = torch.zeros(COUNT, dtype=torch.float64)
    bias[5] = 100
    got = route(x.requires_grad_(), router, bias.requires_grad_(), cfg)
    assert (got.ids == 5).any(1).all()
    assert_close([got.weights], [got.scores.gather(1, got.ids)])
    (grad,) = torch.autograd.grad(got.weights.sum(), bias, allow_unused=True)
    assert grad is None


def test_scores_that_are_all_zero():
    """Sigmoids may be, and are normalised: no NaN."""
    _, (x, router, bias, cfg) = routers("deepseek-v3", torch.float64)
    assert not route(torch.full_like(x, 1e4), -router.abs(), bias, cfg).weights.any()


# Experts

KINDS = ["random", "one expert", "one rank", "one sender"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2, 4, COUNT])
def test_one_rank_equals_a_dense_loop(kind, top_k):
    ids, tensors = inputs(kind, top_k, 2)
    expected, pairs = run(dense, ids, *tensors)
    got, served = run(ours, ids, *tensors)
    assert_close(got, expected)
    assert served == pairs


def in_rounds(ids, x, weights, gate, up, down, rows=8):
    pairs = sort_pairs(ids.flatten().int(), COUNT)
    experts = (gate, up, down)
    return _in_rounds(x, weights.flatten(), pairs, experts, rows, ids.numel(), ALONE, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [8, 40, 95, 96])
def test_many_rounds_on_one_rank(kind, rows):
    """As with gather, where rounds need no messages."""
    ids, tensors = inputs(kind, 2, 2)
    expected, pairs = run(dense, ids, *tensors)
    got, served = run(partial(in_rounds, rows=rows), ids, *tensors)
    assert_close(got, expected)
    assert served == pairs


def test_operators_are_what_they_say():
    ids, (x, weights, gate, up, down, grad) = inputs("one expert", 2, 2)
    pairs, served = sort_pairs(ids.flatten(), COUNT), torch.zeros((), dtype=torch.int64)
    rounds, operands = rounds_of(pairs, 1, 8), [x, weights.flatten(), gate, up, down]
    assert rounds > 2
    rest = (rounds, *pairs, operands, 8, 1, 0, "", None)
    sums, ops = [torch.zeros_like(x) for x in operands], torch.ops.omnistep
    torch.library.opcheck(ops.further_rounds.default, (grad, served, *rest))
    torch.library.opcheck(ops.further_rounds_backward.default, (sums, grad, *rest))


def test_selective_recomputation_chooses_once():
    ids, (x, _, *experts, grad) = inputs("random", 2, 1)
    router, graphs = torch.randn(COUNT, EMBED, dtype=torch.float64), []

    def block(_, x, router, *experts):
        routing = route(x, router, None, CONFIGS[2])
        y, served = ours(routing.ids, x, routing.weights, *experts)
        return y * 2, served

    kept = remat(block, "selective", SAVED_OPS)
    compiled = torch.compile(kept, fullgraph=True, dynamic=False, backend=capturing(graphs))
    expected, _ = run(block, ids, x, router, *experts, grad)
    got, _ = run(compiled, ids, x, router, *experts, grad)
    torch._dynamo.reset()
    assert_close(got, expected)
    assert operators(graphs[0]).count("topk") == operators(graphs[0]).count("sort") == 1
    assert not {"topk", "sort"} & {*operators(graphs[1])}
    assert operators(graphs[1]).count("grouped_linear") == 3


@pytest.mark.slow
def test_compiled_by_inductor():
    """The gradients of further rounds are added to those of the first in place: for each operand
    there is one buffer, and no zeros or copies."""
    ids, tensors = inputs("random", 2, 2)
    expected, pairs = run(dense, ids, *tensors)
    with inductor_config.patch(force_disable_caches=True):
        compiled = torch.compile(in_rounds, fullgraph=True, dynamic=False)
        (got, served), codes = run_and_get_code(run, compiled, ids, *tensors)
    torch._dynamo.reset()
    assert_close(got, expected)
    assert served == pairs
    call = codes[1][codes[1].index("def call") :]
    of_weights = set(re.findall(r"(buf\d+) = torch.ops.omnistep.grouped_outer", call))
    names = dict(re.findall(r"(buf\d+) = (buf\d+)\n", call))
    (sums,) = re.findall(r"further_rounds_backward.default\(\[(.*?)\]", call)
    assert {names[name] for name in sums.split(", ")[2:]} == of_weights
    assert len(of_weights) == 3


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


MESSAGES = {
    "gather": (["all_gather_into_tensor"] * 3 + ["reduce_scatter_tensor"],
               ["all_gather_into_tensor"] + ["reduce_scatter_tensor"] * 2),
    "all_to_all": (["all_reduce"] + ["all_to_all_single"] * 4, ["all_to_all_single"] * 3),
}  # fmt: skip
"""Forward: the choice (gather: which experts; all_to_all: how many rows of each, and how many
rounds), weights and tokens, and what comes back. Backward: the last three."""


def messages(graph) -> list[str]:
    return sorted(name for name in operators(graph) if name.startswith(("all_", "reduce_")))


def check_graphs(dispatch, mode, graphs):
    """Nothing is sent, sorted or worked on twice, but by full recomputation what comes before the
    last product."""
    (forward, backward), again = MESSAGES[dispatch], mode == "full"
    assert messages(graphs[0]) == sorted(forward)
    assert messages(graphs[1]) == sorted(backward + forward[:-1] * again)
    ops = operators(graphs[1])
    # a product's gradient of its input is that operator, too
    assert ops.count("grouped_linear") == 3 + 2 * again
    assert ops.count("sort") == MESSAGES[dispatch][0].count("all_reduce") * again + again
    assert "further_rounds" not in ops


def check_compiled(dispatch, kind, top_k, ep):
    """In one graph, for each way of recomputation; also as an evaluation does."""
    here, expected = case_of(kind, top_k, ep)

    def block(ids, x, *rest):
        y, served = ours(ids, x * 2, *rest, ep=ep, dispatch=dispatch)
        return y * 3, served

    halved = [here[0], here[1] / 2, *here[2:-1], here[-1] / 3]
    leaves = [expected[0] * 3, expected[1] * 2, *expected[2:]]
    for mode in ("none", "selective", "full"):
        kept, graphs = remat(block, mode, SAVED_OPS), []
        check(kept, halved, leaves, ep)
        options = {"fullgraph": True, "dynamic": False, "backend": capturing(graphs)}
        check(torch.compile(kept, **options), halved, leaves, ep)
        check_graphs(dispatch, mode, graphs)
        torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, dynamic=False, backend="eager")
        assert_close(compiled(*halved[:-1])[:1], leaves[:1])
    torch._dynamo.reset()


def run_rank(rank, size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    ep = make_mesh({"dp_shard": size}, torch.device("cpu")).group("dp_shard")
    for case in product(["gather", "all_to_all"], KINDS, [1, 2, 4]):
        check_case(*case, ep)
    if size == 2:
        for dispatch in ("gather", "all_to_all"):
            check_compiled(dispatch, "one sender", 2, ep)
    destroy_groups()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
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
