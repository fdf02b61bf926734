"""What does not learn, and leaves with a learning rate of their own: torch's AdamW has the same."""

import pytest
import torch

from omnistep.core import optim, rng
from omnistep.core.grad import value_and_grad
from omnistep.core.step import init_state, make_train_step
from omnistep.core.tree import leaves_with_names, tree_map
from tests.core.test_step import LR, forward, loss_fn, make_batch, make_params

LEARNED = {"in": {"weight": True, "bias": False}, "out": True}
SCALE = {"in": {"weight": 0.1, "bias": 5.0}, "out": 1.0}


def trained(optimizer: optim.Optimizer, steps: int = 3, **options):
    step = make_train_step(
        loss_fn,
        optimizer,
        lambda step: torch.full((), LR, dtype=torch.float64),
        **{"compile": False, **options},
    )
    state = init_state(make_params(), optimizer, rng.key(0))
    for i in range(steps):
        state, _ = step(state, make_batch(8, i))
    return state


def torch_trained(groups: dict[str, float], steps: int = 3) -> dict[str, torch.Tensor]:
    """AdamW on these leaves, each with its learning rate."""
    params = tree_map(lambda p: p.requires_grad_(), make_params())
    named = leaves_with_names(params)
    moved = [{"params": [named[name]], "lr": lr} for name, lr in groups.items()]
    theirs = torch.optim.AdamW(moved, betas=(0.9, 0.95), weight_decay=0.1)
    for i in range(steps):
        batch = make_batch(8, i)
        losses = torch.nn.functional.cross_entropy(
            forward(params, batch["x"]), batch["y"], reduction="none"
        )
        theirs.zero_grad()
        ((losses * batch["weight"]).sum() / batch["weight"].sum()).backward()
        torch.nn.utils.clip_grad_norm_([named[name] for name in groups], 1.0)
        theirs.step()
    return {name: p.detach() for name, p in named.items()}


COMPILED = pytest.param({"compile": True}, marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [{}, {"donate": False}, COMPILED], ids=str)
def test_what_does_not_learn_stays_and_has_no_state(options):
    state = trained(optim.adamw(weight_decay=0.1, learned=LEARNED), **options)
    found = leaves_with_names(state.params)
    wanted = torch_trained({"in.weight": LR, "out": LR})
    assert torch.equal(found["in.bias"], make_params()["in"]["bias"])
    for name, leaf in wanted.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-9, atol=1e-12)
    assert set(leaves_with_names(state.opt_state["mu"])) == {"in.weight", "out"}


def test_each_leaf_has_its_learning_rate():
    state = trained(optim.adamw(weight_decay=0.1, lr_scale=SCALE))
    rates = {"in.weight": 0.1 * LR, "in.bias": 5.0 * LR, "out": LR}
    wanted = torch_trained(rates)
    for name, leaf in leaves_with_names(state.params).items():
        torch.testing.assert_close(leaf, wanted[name], rtol=1e-9, atol=1e-12)


def test_nothing_is_differentiated_below_the_first_leaf_that_learns():
    """What is frozen costs no backward pass."""
    seen = {}

    def loss(params, batch, key):
        hidden = torch.nn.functional.linear(batch["x"], params["in"]["weight"])
        seen["hidden"], seen["weight"] = hidden.requires_grad, params["in"]["weight"].requires_grad
        return loss_fn(params, batch, key)

    learned = {"in": {"weight": False, "bias": False}, "out": True}
    gradients = value_and_grad(loss, learned)
    _, grads = gradients(make_params(), [make_batch(4)], [rng.key(0)])
    assert seen == {"hidden": False, "weight": False}
    assert set(leaves_with_names(grads)) == {"out"}
