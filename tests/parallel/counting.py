"""One step on one of many pretended ranks: what it sends, what it holds."""

import time
from collections import Counter

import attrs
import torch
from attrs import frozen

from omnistep.core import optim, param, rng
from omnistep.core.batch import Batch
from omnistep.core.grad import Stages
from omnistep.core.step import TrainState, init_state, make_train_step
from omnistep.models import decoder
from omnistep.parallel.mesh import Mesh
from omnistep.parallel.traffic import Traffic, counted
from tests.parallel.hollow import Ledger, Memory, hollow_kernels
from tests.parallel.paper import Setting


def batch_of(s: Setting) -> Batch:
    shape = (s.rows, s.seq) if s.accumulate == 1 else (s.accumulate, s.rows, s.seq)
    tokens = torch.zeros(shape, dtype=torch.int64)
    positions = torch.arange(s.seq).expand(shape).contiguous()
    return Batch(tokens, tokens, torch.ones(shape), positions=positions)


def make_state(s: Setting, mesh: Mesh) -> TrainState:
    tree = decoder.params(s.cfg)
    layout = param.make_layout(tree, mesh, s.strategy, s.compute, bucket=s.bucket)
    weights = param.initialize(tree, rng.key(0), s.weights, torch.device("cpu"), layout)
    return init_state(weights, optim.adamw(), rng.key(1))


def make_step(s: Setting, mesh: Mesh, *, compile: bool = True, marks: "Marks | None" = None):
    layout = param.make_layout(
        decoder.params(s.cfg), mesh, s.strategy, s.compute, bucket=s.bucket
    )
    stages = decoder.make_stages(s.cfg, layout, mode=s.mode, compile=compile)
    return make_train_step(
        stages if marks is None else marks.around(stages),
        optim.adamw(),
        lambda step: torch.full((), 1e-3),
        layout=layout,
        accumulate=s.accumulate,
        compile=compile,
    )


@frozen
class Marks:
    """Notes the memory before and after the loss: what a forward pass keeps, and the peaks of the
    parts of a step. (On one stage; of the last micro-batch.)"""

    memory: Memory
    seen: dict[str, int] = attrs.field(factory=dict)

    def around(self, stages: Stages) -> Stages:
        def last(*args):
            self.seen["kept"] = self.memory.live
            self.seen["layers forward"] = self.memory.restart()
            out = stages.last(*args)
            self.seen["embedding and loss"] = self.memory.restart()
            return out

        return attrs.evolve(stages, last=last)


@frozen
class Footprint:
    """Of one step on one rank, in bytes."""

    state: int
    """Weights, moments, and a few scalars."""
    kept: int
    """What the forward pass of the layers leaves for the backward pass."""
    peaks: dict[str, int]
    """Of each part of the step, with the state."""
    traffic: Traffic
    compiling: float
    """Seconds; of the first step."""
    stepping: float

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def measure(s: Setting, mesh: Mesh, memory: Memory) -> tuple[int, Marks, dict[str, int], list]:
    """(bytes of the state, marks, peaks, seconds) of the second step; the first one compiles."""
    marks = Marks(memory)
    step, batch = make_step(s, mesh, marks=marks), batch_of(s)
    before = memory.live
    state, seconds = make_state(s, mesh), []
    held = memory.live - before
    for _ in range(2):
        begin = time.perf_counter()
        marks.seen.clear()
        memory.restart()
        state, _ = step(state, batch)
        seconds.append(time.perf_counter() - begin)
    peaks = {name: peak for name, peak in marks.seen.items() if name != "kept"}
    peaks["backward and update"] = memory.restart()
    return held, marks, {name: peak - before for name, peak in peaks.items()}, seconds


def footprint(s: Setting, rank: int = 0) -> Footprint:
    """Of the compiled step, without its arithmetic and without memory."""
    with counted(dict(s.sizes), rank) as (mesh, messages), hollow_kernels(), Ledger(mesh) as ledger:
        state, marks, peaks, seconds = measure(s, mesh, ledger.memory)
        traffic = ledger.traffic + Counter(messages)
    assert all(count % 2 == 0 for count in traffic.values()), "two steps do not send the same"
    traffic = Counter({message: count // 2 for message, count in traffic.items()})
    kept = marks.seen.get("kept", state) - state
    return Footprint(state, kept, peaks, traffic, *seconds)


def eager_traffic(s: Setting, rank: int = 0) -> Traffic:
    """The messages of one step that is not compiled, with its arithmetic."""
    with counted(dict(s.sizes), rank) as (mesh, messages):
        step, state, batch = make_step(s, mesh, compile=False), make_state(s, mesh), batch_of(s)
        assert not messages, "nothing is sent before the first step"
        step(state, batch)
        return Counter(messages)
