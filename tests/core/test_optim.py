"""Optimizers against torch.optim and a written-out reference."""

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from omnistep.core.compile import any_length
from omnistep.core.optim import adamw, anyprecision_adamw
from omnistep.core.tree import tree_leaves, tree_map
from tests.tracing import EAGER_AND_COMPILED

SHAPES = {"embed": (33, 8), "block": {"w": (3, 8, 5), "norm": (8,)}, "scale": ()}
DECAY = {"embed": True, "block": {"w": True, "norm": False}, "scale": False}
STEPS = 50


def tree(dtype: torch.dtype, seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return tree_map(
        lambda shape: scale * torch.randn(shape, generator=generator, dtype=dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def rate(step: int) -> float:
    return 1e-2 * (1 + math.cos(step / 7))


def run(optimizer, params, grads, update=None):
    update, opt_state = update or optimizer.update, optimizer.init(params)
    for step, g in enumerate(grads):
        params, opt_state = update(g, opt_state, params, torch.tensor(rate(step)))
    return params, opt_state


def error(a, b) -> float:
    """The worst leaf's relative error."""
    return max(
        float((x.double() - y.double()).norm() / y.double().norm())
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)
    )


def torch_adamw(params, grads, weight_decay: float):
    params = tree_map(lambda p: p.clone().requires_grad_(), params)
    leaves, decays = tree_leaves(params), tree_leaves(DECAY)
    groups = [
        {
            "params": [p for p, d in zip(leaves, decays, strict=True) if d is decay],
            "weight_decay": w,
        }
        for decay, w in ((True, weight_decay), (False, 0.0))
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step, g in enumerate(grads):
        for group in theirs.param_groups:
            group["lr"] = torch.tensor(rate(step)).item()
        for p, leaf in zip(leaves, tree_leaves(g), strict=True):
            p.grad = leaf
        theirs.step()
    return tree_map(lambda p: p.detach(), params)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("compiled", EAGER_AND_COMPILED)
def test_adamw_equals_torch(dtype, tolerance, compiled):
    params, grads = tree(dtype, 0), [tree(dtype, 1 + step) for step in range(STEPS)]
    optimizer = adamw(weight_decay=0.1, decay_mask=DECAY)
    torch._dynamo.reset()
    counters.clear()
    update = torch.compile(optimizer.update, fullgraph=True) if compiled else None
    ours, opt_state = run(optimizer, params, grads, update)
    assert counters["stats"]["unique_graphs"] == compiled  # one graph for all steps
    assert error(ours, torch_adamw(params, grads, 0.1)) < tolerance
    assert opt_state["count"].item() == STEPS


def test_without_a_mask_every_leaf_decays():
    params, grads = tree(torch.float64, 0), [tree(torch.float64, 1)]
    plain, _ = run(adamw(), params, grads)
    decayed, _ = run(adamw(weight_decay=0.5), params, grads)
    lr = torch.tensor(rate(0)).item()
    expected = tree_map(lambda new, old: new - 0.5 * lr * old, plain, params)
    assert error(decayed, expected) < 1e-12


def test_update_is_pure():
    params, grads, optimizer = tree(torch.float32, 0), tree(torch.float32, 1), adamw()
    opt_state = optimizer.init(params)
    before = tree_map(torch.clone, (params, grads, opt_state))
    optimizer.update(grads, opt_state, params, torch.tensor(0.1))
    for a, b in zip(tree_leaves(before), tree_leaves((params, grads, opt_state)), strict=True):
        assert torch.equal(a, b)


def kahan_reference(params: Tensor, grads: list[Tensor], weight_decay: float) -> Tensor:
    """One leaf, written out: bfloat16 between steps, float32 within."""
    p, mu, nu, c = params, *(torch.zeros_like(params) for _ in range(3))
    for step, g in enumerate(grads):
        t, lr = step + 1, torch.tensor(rate(step)).item()
        m32 = 0.9 * mu.float() + 0.1 * g.float()
        v32 = 0.95 * nu.float() + 0.05 * g.float() ** 2
        direction = (m32 / (1 - 0.9**t)) / ((v32 / (1 - 0.95**t)).sqrt() + 1e-8)
        change = c.float() - lr * (direction + weight_decay * p.float())
        new = (p.float() + change).bfloat16()
        c = (change - (new.float() - p.float())).bfloat16()
        p, mu, nu = new, m32.bfloat16(), v32.bfloat16()
    return p.float() + c.float()


@pytest.mark.parametrize("compiled", EAGER_AND_COMPILED)
def test_anyprecision_equals_its_reference(compiled):
    params = tree(torch.bfloat16, 0)
    grads = [tree(torch.bfloat16, 1 + step) for step in range(STEPS)]
    optimizer = anyprecision_adamw(weight_decay=0.1)
    torch._dynamo.reset()
    update = torch.compile(optimizer.update, fullgraph=True) if compiled else None
    ours, opt_state = run(optimizer, params, grads, update)
    floating = tree_leaves((ours, {k: v for k, v in opt_state.items() if k != "count"}))
    assert {leaf.dtype for leaf in floating} == {torch.bfloat16}
    summed = tree_map(lambda p, c: p.float() + c.float(), ours, opt_state["compensation"])
    leaves = [tree_leaves(g) for g in grads]
    for i, (p, result) in enumerate(zip(tree_leaves(params), tree_leaves(summed), strict=True)):
        expected = kahan_reference(p, [g[i] for g in leaves], 0.1)
        # a moment on the edge between two bfloat16 numbers may be stored as either
        assert float((result - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("compiled", EAGER_AND_COMPILED)
def test_compensation_follows_float32_where_plain_bfloat16_stalls(compiled):
    """Small steps on large parameters: most vanish in bfloat16's 8 bits."""
    start = tree(torch.bfloat16, 0, scale=4.0)
    grads = [tree(torch.bfloat16, 1 + step % 3) for step in range(STEPS)]

    def moved(optimizer, dtype):
        """How far the parameters went, with what the compensation still holds."""
        params = tree_map(lambda p: p.to(dtype), start)
        opt_state = optimizer.init(params)
        update = torch.compile(optimizer.update, fullgraph=True) if compiled else optimizer.update
        for g in grads:
            g = tree_map(lambda leaf: leaf.to(dtype), g)
            params, opt_state = update(g, opt_state, params, torch.tensor(3e-4))
        held = opt_state.get("compensation", tree_map(torch.zeros_like, params))
        return torch.cat(
            [
                (p.double() + c.double() - s.double()).flatten()
                for p, c, s in zip(*map(tree_leaves, (params, held, start)), strict=True)
            ]
        )

    torch._dynamo.reset()
    exact = moved(adamw(), torch.float32)
    assert error(moved(anyprecision_adamw(), torch.bfloat16), exact) < 0.02
    assert error(moved(adamw(), torch.bfloat16), exact) > 0.5


def test_a_compiled_rule_is_one_loop_for_leaves_of_any_size():
    optimizer, lr = adamw(weight_decay=0.1), torch.tensor(1e-3)
    torch._dynamo.reset()
    counters.clear()
    rule, codes = torch.compile(optimizer.rule, fullgraph=True, dynamic=False), []
    for size in (640, 77, 3000):
        leaves = [any_length(torch.randn(size).abs()) for _ in range(4)]
        scalars = optimizer.scalars(torch.tensor(1), lr, torch.float32, True)
        if not codes:
            _, codes = run_and_get_code(rule, *leaves, scalars)
        rule(*leaves, scalars)
    assert counters["stats"]["unique_graphs"] == len(codes) == 1
    assert codes[0].count("for(int64_t") <= 2  # the loop, and perhaps its tail
    assert codes[0].count("empty_strided_cpu((") == 3  # the new parameter and two moments


def test_anyprecision_refuses_float16():
    params = {"w": torch.ones(3, dtype=torch.float16)}
    optimizer = anyprecision_adamw()
    with pytest.raises(ValueError, match="bfloat16, float32 or float64"):
        optimizer.update(params, optimizer.init(params), params, torch.tensor(0.1))
