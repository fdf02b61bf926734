"""The whole step of a vision-language model: one compilation for every mix of images, and for none;
what is frozen stays as it was."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from omnistep.core import param, rng
from omnistep.core.batch import Batch
from omnistep.core.tree import Tree, leaves_with_names
from omnistep.models import decoder
from omnistep.models.params import params
from omnistep.parallel.mesh import Mesh
from tests.parallel import matrix
from tests.parallel.batches import ROWS, global_batch
from tests.parallel.matrix import MODELS, Case, train, tree_of

CPU = torch.device("cpu")
ONE = Mesh(CPU)


def initial(model: str) -> Tree:
    return param.initialize(tree_of(model), rng.key(3), torch.float64, CPU)


@pytest.fixture
def traced(monkeypatch):
    """Without inductor: what dynamo and autograd trace."""
    torch_compile: Any = torch.compile
    compile_graph = partial(
        torch_compile, fullgraph=True, dynamic=False, backend="aot_eager", isolate_recompiles=True
    )
    for module in ("models.stack", "models.loss", "core.step"):
        monkeypatch.setattr(f"omnistep.{module}.compile_graph", compile_graph)


def test_another_mix_of_images_compiles_nothing(traced, monkeypatch):
    """The batches of the steps have other images in other places; the last has none at all."""
    counts = []

    def batch(step: int, *rest) -> Batch:
        counts.append(counters["stats"]["unique_graphs"])
        whole = global_batch(step, *rest)
        if step < matrix.STEPS - 1:
            return whole
        none = global_batch(step, *rest, without=ROWS)
        assert none.patches is not None
        assert (none.patches.units < 0).all()
        return none

    monkeypatch.setattr(matrix, "global_batch", batch)
    train(Case("", "ddp", "qwen3_vl", compile=True, dtype="fp32"), ONE)
    counts.append(counters["stats"]["unique_graphs"])
    first, *others = [b - a for a, b in itertools.pairwise(counts)]
    assert first > 0
    assert others == [0] * (matrix.STEPS - 1)


def test_only_the_projector_learns():
    before = initial("projector only")
    trained = train(Case("", "ddp", "projector only"), ONE)
    for name, leaf in leaves_with_names({"params": before}).items():
        moved = not torch.equal(leaf, trained.leaves[name])
        assert moved == name.startswith("params.projector."), name
    assert {name.split(".")[1] for name in trained.leaves if name.startswith("mu.")} == {
        "projector"
    }


def test_a_batch_without_patches_is_refused():
    cfg = MODELS["llava"]
    logits = decoder.make_logits(cfg, dtype=torch.float64)
    weights = initial("llava")
    assert weights.keys() == params(cfg).keys()
    batch = global_batch(0, True, torch.float64)
    with pytest.raises(ValueError, match="has a tower, but the batch no patches"):
        logits(weights, batch)
    cfg = MODELS["qwen2_vl"]
    batch = global_batch(0, True, torch.float64, cfg.tower)
    without = Batch(
        batch.tokens, batch.targets, batch.weights, batch.positions, patches=batch.patches
    )
    weights = initial("qwen2_vl")
    with pytest.raises(ValueError, match="three positions, but the batch has no `rope`"):
        decoder.make_logits(cfg, dtype=torch.float64)(weights, without)
