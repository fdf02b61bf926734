"""The step: against torch's own loop, and against itself under every switch that may not matter."""

import pytest
import torch
import torch.nn.functional as F

from omnistep.core import optim, rng
from omnistep.core.grad import LossOutput
from omnistep.core.step import TrainState, init_state, make_train_step
from omnistep.core.tree import leaves_with_names, tree_map
from tests.tracing import EAGER_AND_COMPILED

LR = 0.05


def make_params(dtype: torch.dtype = torch.float64) -> dict:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return {"in": {"weight": draw(6, 4), "bias": draw(6)}, "out": draw(3, 6)}


def make_batch(count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(count, 4, generator=g, dtype=torch.float64).to(dtype),
        "y": torch.randint(3, (count,), generator=g),
        "weight": torch.randint(2, (count,), generator=g).to(dtype),
    }


def forward(params: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(
        torch.tanh(F.linear(x, params["in"]["weight"], params["in"]["bias"])), params["out"]
    )


def loss_fn(params: dict, batch: dict, key: torch.Tensor) -> LossOutput:
    losses = F.cross_entropy(forward(params, batch["x"]), batch["y"], reduction="none")
    hits = (forward(params, batch["x"]).argmax(-1) == batch["y"]) * batch["weight"]
    return LossOutput(
        (losses * batch["weight"]).sum(), batch["weight"].sum(), {"accuracy": hits.sum()}
    )


def schedule(step: torch.Tensor) -> torch.Tensor:
    return LR / (1 + step.float())


def run(batches: list, *, loss=loss_fn, params=None, **options) -> tuple[TrainState, list[dict]]:
    optimizer = optim.adamw(weight_decay=0.1)
    options = {"compile": False, **options}
    train_step = make_train_step(loss, optimizer, schedule, **options)
    state = init_state(params or make_params(), optimizer, rng.key(7))
    metrics = []
    for batch in batches:
        state, m = train_step(state, batch)
        metrics.append(m)
    return state, metrics


def assert_same(a: TrainState, b: TrainState, *, tolerance: float = 0.0) -> None:
    ours, theirs = leaves_with_names(a), leaves_with_names(b)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_matches_a_torch_loop(max_grad_norm):
    batches = [make_batch(8, seed) for seed in range(4)]
    leaves = [p.requires_grad_() for p in leaves_with_names(make_params()).values()]
    params = {"in": {"weight": leaves[0], "bias": leaves[1]}, "out": leaves[2]}
    theirs = torch.optim.AdamW(leaves, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    norms, losses = [], []
    for i, batch in enumerate(batches):
        out = loss_fn(params, batch, torch.zeros(2))
        loss = out.total / out.weight
        theirs.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(leaves, max_grad_norm or float("inf")))
        theirs.param_groups[0]["lr"] = float(schedule(torch.tensor(i)))
        theirs.step()
        losses.append(loss.detach())
    state, metrics = run(batches, max_grad_norm=max_grad_norm)
    for ours, norm, loss in zip(metrics, norms, losses, strict=True):
        torch.testing.assert_close(ours["grad_norm"], norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours["loss"], loss, rtol=1e-12, atol=0)
    for ours, leaf in zip(leaves_with_names(state.params).values(), leaves, strict=True):
        torch.testing.assert_close(ours, leaf.detach(), rtol=1e-10, atol=1e-12)
    assert state.step == 4


def test_accumulation_is_the_same_step_whatever_each_part_weighs():
    whole = [make_batch(12, seed) for seed in range(3)]
    parts = [tree_map(lambda t: t.reshape(3, 4, *t.shape[1:]), batch) for batch in whole]
    one, m1 = run(whole)
    three, m3 = run(parts, accumulate=3)
    assert_same(three, one, tolerance=1e-12)
    for a, b in zip(m1, m3, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_compiled_equals_eager_and_compiles_once(accumulate):
    batches = [make_batch(8, seed) for seed in range(3)]
    if accumulate > 1:
        batches = [tree_map(lambda t: t.reshape(2, 4, *t.shape[1:]), b) for b in batches]
    eager, _ = run(batches, accumulate=accumulate)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled, _ = run(batches, accumulate=accumulate, compile=True)
    assert_same(compiled, eager, tolerance=1e-12)


@pytest.mark.parametrize("compile", EAGER_AND_COMPILED)
def test_donation_writes_into_the_old_buffers(compile):
    params = make_params()
    before = tree_map(torch.clone, params)
    state, _ = run([make_batch(8)], params=params, compile=compile)
    old, new = leaves_with_names(params), leaves_with_names(state.params)
    assert all(old[name].data_ptr() == new[name].data_ptr() for name in old)
    params = tree_map(torch.clone, before)
    kept, _ = run([make_batch(8)], params=params, donate=False, compile=compile)
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    torch.testing.assert_close(kept.params, state.params, rtol=0, atol=0)


@pytest.mark.parametrize("compile", EAGER_AND_COMPILED)
def test_a_non_finite_norm_changes_nothing_but_the_step(compile):
    bad = make_batch(8)
    bad["x"][3, 2] = float("inf")
    bad["weight"][3] = 1.0
    good, _ = run([make_batch(8)], compile=compile)
    state, metrics = run([make_batch(8), bad], compile=compile)
    assert metrics[0]["skipped"] == 0
    assert metrics[1]["skipped"] == 1
    assert not torch.isfinite(metrics[1]["grad_norm"])
    assert state.step == 2
    torch.testing.assert_close(
        (state.params, state.opt_state), (good.params, good.opt_state), rtol=0, atol=0
    )


def test_a_batch_without_targets_is_harmless():
    batch = make_batch(8)
    batch["weight"].zero_()
    _, metrics = run([batch])
    assert metrics[0]["loss"] == 0
    assert metrics[0]["skipped"] == 0


def test_metrics_are_means_over_the_global_weight():
    batch = make_batch(12)
    _, (metrics,) = run([tree_map(lambda t: t.reshape(3, 4, *t.shape[1:]), batch)], accumulate=3)
    out = loss_fn(make_params(), batch, torch.zeros(2))
    torch.testing.assert_close(metrics["accuracy"], out.metrics["accuracy"] / out.weight)
    assert metrics["weight"] == batch["weight"].sum()


def test_each_step_and_micro_batch_has_its_own_key():
    seen = []

    def loss(params, batch, key):
        seen.append(tuple(key.tolist()))
        return loss_fn(params, batch, key)

    batches = [tree_map(lambda t: t.reshape(2, 4, *t.shape[1:]), make_batch(8)) for _ in range(3)]
    run(batches, loss=loss, accumulate=2)
    assert len(set(seen)) == 6
    again = list(seen)
    seen.clear()
    run(batches, loss=loss, accumulate=2)
    assert seen == again


def test_a_parameter_without_gradient_gets_zeros():
    params = {**make_params(), "unused": torch.ones(2, dtype=torch.float64)}
    state, metrics = run([make_batch(8)], params=params)
    assert torch.isfinite(metrics[0]["grad_norm"])
    assert (state.opt_state["mu"]["unused"] == 0).all()


def test_a_wrong_accumulation_axis_is_named():
    with pytest.raises(ValueError, match=r"accumulate=3 needs .* leading axis of 3; .* \[8\]"):
        run([make_batch(8)], accumulate=3)
