"""One real step on one of many pretended ranks, and what it sent."""

from collections import Counter

import torch

from omnistep.core import optim, param, rng
from omnistep.core.batch import Batch
from omnistep.core.step import init_state, make_train_step
from omnistep.models import decoder
from omnistep.parallel.mesh import Mesh
from omnistep.parallel.traffic import Traffic, counted
from tests.parallel.paper import Setting


def batch_of(s: Setting) -> Batch:
    shape = (s.rows, s.seq) if s.accumulate == 1 else (s.accumulate, s.rows, s.seq)
    tokens = torch.zeros(shape, dtype=torch.int64)
    positions = torch.arange(s.seq).expand(shape).contiguous()
    return Batch(tokens, tokens, torch.ones(shape), positions=positions)


def make_step(s: Setting, mesh: Mesh, *, compile: bool = True):
    """(step, state, batch)"""
    tree = decoder.params(s.cfg)
    layout = param.make_layout(tree, mesh, s.strategy, s.compute, bucket=s.bucket)
    weights = param.initialize(tree, rng.key(0), s.weights, torch.device("cpu"), layout)
    optimizer = optim.adamw()
    step = make_train_step(
        decoder.make_stages(s.cfg, layout, mode=s.mode, compile=compile),
        optimizer,
        lambda step: torch.full((), 1e-3),
        layout=layout,
        accumulate=s.accumulate,
        compile=compile,
    )
    return step, init_state(weights, optimizer, rng.key(1)), batch_of(s)


def traffic_of(s: Setting, rank: int = 0, *, compile: bool = True) -> Traffic:
    """The messages of one compiled step on `rank`."""
    with counted(dict(s.sizes), rank) as (mesh, messages):
        step, state, batch = make_step(s, mesh, compile=compile)
        assert not messages, "nothing is sent before the first step"
        step(state, batch)
        return Counter(messages)
