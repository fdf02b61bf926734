"""One step on one of many ranks, pretended or real: what it sends, what it holds."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import torch
from attrs import frozen

from omnistep.core import optim, param, rng
from omnistep.core.batch import Batch
from omnistep.core.step import init_state, make_train_step
from omnistep.core.tree import tree_leaves
from omnistep.models import decoder
from omnistep.parallel.layout import to_local
from omnistep.parallel.mesh import Mesh
from omnistep.parallel.traffic import Traffic, counted
from tests.parallel.hollow import Ledger, Memory, hollow_kernels
from tests.parallel.paper import Setting


def batch_of(s: Setting) -> Batch:
    shape = (s.rows, s.seq) if s.accumulate == 1 else (s.accumulate, s.rows, s.seq)
    tokens = torch.zeros(shape, dtype=torch.int64)
    positions = torch.arange(s.seq).expand(shape).contiguous()
    return Batch(tokens, tokens, torch.ones(shape), positions=positions)


def make_step(
    s: Setting, mesh: Mesh, *, compile: bool = True, passed: Callable[[], Any] = lambda: None
):
    """(step, state, batch). passed is called after a stage's layers have run forward."""
    tree = decoder.params(s.cfg)
    layout = param.make_layout(tree, mesh, s.strategy, s.compute, bucket=s.bucket)
    weights = param.initialize(tree, rng.key(0), s.weights, torch.device("cpu"), layout)
    optimizer = optim.adamw(learned=param.learned_mask(tree))
    stages = decoder.make_stages(s.cfg, layout, mode=s.mode, dispatch=s.dispatch, compile=compile)

    def middle(*args: Any) -> Any:
        x = stages.middle(*args)
        passed()
        return x

    step = make_train_step(
        attrs.evolve(stages, middle=middle),
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


@frozen
class Held:
    """By one rank, in bytes, without the batch."""

    state: int
    kept: int
    """What the layers' forward pass leaves for the backward pass, of all micro-batches that are on
    their way."""
    peak: int
    """The most at one time, the state included."""


def held(s: Setting, mesh: Mesh, memory: Memory, restart: Callable[[], Any] = lambda: None) -> Held:
    """In the second step: the first one compiles. restart is called before it."""
    passed: list[int] = []
    step, state, batch = make_step(s, mesh, passed=lambda: passed.append(memory.live))
    state = step(state, batch)[0]
    own = sum(to_local(x).nbytes for x in tree_leaves(state))
    before = memory.live
    memory.restart()
    restart()
    step(state, batch)
    return Held(own, passed[-1] - before, memory.peak - before + own)


def pretended(s: Setting, rank: int = 0) -> tuple[Held, Traffic]:
    """Of a compiled step on `rank`, without arithmetic and without memory."""
    with counted(dict(s.sizes), rank) as (mesh, links), hollow_kernels(), Ledger(mesh) as ledger:

        def restart() -> None:
            ledger.traffic.clear()
            links.clear()

        found = held(s, mesh, ledger.memory, restart)
        return found, ledger.traffic + Counter(links)
