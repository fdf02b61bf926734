"""The whole step of a vision-language model: one compilation for every mix of images, and for none;
what is frozen stays as it was."""

import itertools

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
from tests.parallel.matrix import Case, train, tree_of

CPU = torch.device("cpu")
ONE = Mesh(CPU)


def case_of(model: str) -> Case:
    return Case("", "ddp", model)


def initial(case: Case) -> Tree:
    return param.initialize(tree_of(case), rng.key(3), torch.float64, CPU)


def test_another_mix_of_images_compiles_nothing(without_inductor, monkeypatch):
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
    train(Case("", "ddp", "qwen3_vl", run="compiled", dtype="fp32"), ONE)
    counts.append(counters["stats"]["unique_graphs"])
    first, *others = [b - a for a, b in itertools.pairwise(counts)]
    assert first > 0
    assert others == [0] * (matrix.STEPS - 1)


def test_only_the_projector_learns():
    case = case_of("projector only")
    before, trained = initial(case), train(case, ONE)
    for name, leaf in leaves_with_names({"params": before}).items():
        moved = not torch.equal(leaf, trained.leaves[name])
        assert moved == name.startswith("params.projector."), name
    assert {name.split(".")[1] for name in trained.leaves if name.startswith("mu.")} == {
        "projector"
    }


def test_a_batch_without_patches_is_refused():
    case = case_of("llava")
    cfg, weights = case.cfg, initial(case)
    logits = decoder.make_logits(cfg, dtype=torch.float64)
    assert weights.keys() == params(cfg).keys()
    batch = global_batch(0, True, torch.float64)
    with pytest.raises(ValueError, match="has a tower, but the batch no patches"):
        logits(weights, batch)
    case = case_of("qwen2_vl")
    cfg, weights = case.cfg, initial(case)
    batch = global_batch(0, True, torch.float64, cfg.tower)
    without = Batch(
        batch.tokens, batch.targets, batch.weights, batch.positions, patches=batch.patches
    )
    with pytest.raises(ValueError, match="three positions, but the batch has no `rope`"):
        decoder.make_logits(cfg, dtype=torch.float64)(weights, without)
