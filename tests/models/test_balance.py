"""How evenly experts are used: the loss, the bias, the counts."""

from typing import Any

import attrs
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from omnistep.core import optim, param, rng
from omnistep.core.batch import Batch, padding
from omnistep.core.grad import LossOutput, value_and_grad
from omnistep.core.step import init_state, make_eval_step, make_train_step
from omnistep.core.tree import tree_map
from omnistep.models import decoder
from omnistep.models.balance import make_balance
from omnistep.models.block import Load
from omnistep.models.config import Config, Experts
from omnistep.parallel.mesh import Mesh

CPU = torch.device("cpu")
CFG = Config(
    vocab=64,
    embed=16,
    layers=3,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp=32,
    init_std=0.2,
    experts=Experts(count=6, top_k=2, mlp=16, aux=0.05, dense=(1,)),
)


def batch_of(rows: int, seq: int = 12, pad: int = 4) -> Batch:
    g = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(64, (2, rows, seq), generator=g)
    real = torch.arange(seq).expand(rows, seq) < seq - pad
    positions = torch.where(real, torch.arange(seq), 0)
    return Batch(tokens, targets, real.double(), positions=positions)


def test_padding_is_what_is_alone():
    batch = attrs.evolve(
        batch_of(1), positions=torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 0, 0, 0, 0]])
    )
    assert padding(batch).tolist() == [[i in (5, 8, 9, 10, 11) for i in range(12)]]


def test_the_loss_is_transformers_for_a_row():
    """Pooled over layers, without padding, gradient included."""
    balance = make_balance(CFG, Mesh(CPU))
    assert balance is not None
    batch, layers = batch_of(1), 2
    real = ~padding(batch)
    logits = torch.randn(layers, 12, 6, dtype=torch.float64, requires_grad=True)
    loads = []
    for one in logits:
        scores = one.softmax(-1)
        hits = (scores.topk(2).indices.unsqueeze(-1) == torch.arange(6)).sum(1)
        chosen = (hits * real.t()).sum(0, dtype=torch.int32)
        loads.append(Load(chosen[None], (scores * real.t()).sum(0)[None], torch.tensor(24)))
    x = torch.zeros(1, 12, 16, dtype=torch.float64)
    carry = balance.add(balance.begin(x), x, loads)
    nothing = torch.zeros((), dtype=torch.float64)
    out = balance.finish(LossOutput(nothing, nothing), carry, batch)
    ours = out.penalties["load_balancing_loss"]
    of_layers: Any = tuple(logits.float())
    theirs = load_balancing_loss_func(of_layers, 6, 2, real.long())
    weight = batch.weights.sum()
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(ours / weight, 0.05 * theirs.double(), rtol=1e-6, atol=0)
    (mine,) = torch.autograd.grad(ours / weight / 0.05, logits)
    (wanted,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-8)
    assert out.sums["served"] == 48
    assert out.sums["routed"] == 48
    assert out.sums["load"].sum() == 2 * 2 * 8  # layers, experts of a token, real tokens


def loss_and_grads(cfg: Config, micros: list[Batch]) -> tuple[LossOutput, dict]:
    tree = decoder.params(cfg)
    weights = param.initialize(tree, rng.key(3), torch.float64, CPU)
    stages = decoder.make_stages(cfg, param.one_rank(tree, torch.float64), compile=False)
    return value_and_grad(stages)(weights, micros, [rng.key(0)] * len(micros))


def test_the_loss_does_not_depend_on_how_rows_are_split():
    batch = batch_of(4)
    whole = loss_and_grads(CFG, [batch])
    halves = [tree_map(lambda x: x[:2], batch), tree_map(lambda x: x[2:], batch)]
    split = loss_and_grads(CFG, halves)
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-12)
    assert whole[0].penalties["load_balancing_loss"] > 0


def test_it_moves_the_router_and_an_evaluation_leaves_it_out():
    assert CFG.experts is not None
    without = attrs.evolve(CFG, experts=attrs.evolve(CFG.experts, aux=0.0))
    batch = batch_of(2)
    (out, grads), (plain, others) = (loss_and_grads(cfg, [batch]) for cfg in (CFG, without))
    assert out.total == plain.total
    assert not plain.penalties
    assert (grads["layers"]["router"] - others["layers"]["router"]).norm() > 1e-6
    tree = decoder.params(CFG)
    weights = param.initialize(tree, rng.key(3), torch.float64, CPU)
    stages = decoder.make_stages(CFG, param.one_rank(tree, torch.float64), compile=False)
    assert make_eval_step(stages, compile=False)(weights, batch, rng.key(0))[0] == plain.total


BIASED = attrs.evolve(
    CFG,
    experts=Experts(6, 2, 16, scoring="sigmoid", normalize=True, bias=True, bias_rate=0.25),
)


@pytest.mark.parametrize("donate", [True, False])
def test_the_bias_follows_the_load(donate):
    """One step moves each bias by its rate towards an even load; nothing else touches it."""
    tree = decoder.params(BIASED)
    weights = param.initialize(tree, rng.key(3), torch.bfloat16, CPU)
    assert weights["router_bias"].dtype == torch.float32
    mask = param.decay_mask(tree)
    adamw = optim.adamw(weight_decay=0.5, decay_mask=mask)
    stages = decoder.make_stages(BIASED, param.one_rank(tree, torch.bfloat16), compile=False)
    step = make_train_step(
        stages, adamw, lambda step: torch.full((), 1e-3), compile=False, donate=donate
    )
    state = init_state(weights, adamw, rng.key(0))
    before = weights["router_bias"].clone()
    state, metrics = step(state, batch_of(2))
    load = metrics["tokens_per_expert"]
    assert load.shape == (3, 6)
    assert load.sum() == 3 * 2 * 16
    wanted = before + 0.25 * (load.sum(1, keepdim=True) / 6 - load).sign()
    assert torch.equal(state.params["router_bias"], wanted)
    assert torch.equal(weights["router_bias"], wanted if donate else before)
    assert metrics["dropped_tokens"] == 0
    most = load.amax(1) / (load.sum(1) / 6)
    torch.testing.assert_close(metrics["expert_imbalance"], most.mean())
    torch.testing.assert_close(metrics["worst_expert_imbalance"], most.amax())


def test_a_step_without_an_update_does_not_move_it():
    tree = decoder.params(BIASED)
    weights = param.initialize(tree, rng.key(3), torch.float32, CPU)
    weights["final_norm"].fill_(float("nan"))
    stages = decoder.make_stages(BIASED, param.one_rank(tree, torch.float32), compile=False)
    adamw = optim.adamw()
    step = make_train_step(stages, adamw, lambda step: torch.full((), 1e-3), compile=False)
    state, metrics = step(init_state(weights, adamw, rng.key(0)), batch_of(2))
    assert metrics["skipped"] == 1
    assert not state.params["router_bias"].any()
