"""Vision towers against transformers', and against themselves."""

import functools

import pytest
import torch

from omnistep.core.param import abstract, one_rank
from omnistep.core.tree import leaves_with_names, tree_map
from omnistep.models.config import Config
from omnistep.models.params import params
from omnistep.models.tower import make_tower
from tests.models.reference_vision import (
    TOWERS,
    VISION,
    Images,
    make_images,
    make_vision,
    our_tree,
    their_features,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
QWEN_ROWS = ([(1, 4, 6), (2, 6, 10), (1, 2, 2)], [(1, 12, 8), (1, 8, 8)])
"""Of the window's 4 x 4 patches multiples and others; a video; the smallest image there is."""
ROWS = {
    "siglip": ([(1, 3, 3)], [(1, 3, 3), (1, 3, 3)]),
    "clip": ([(1, 3, 3)], [(1, 3, 3), (1, 3, 3)]),
}
BUDGET = {"siglip": 20, "clip": 24}


def config(family: str) -> Config:
    return Config(
        vocab=8, embed=24, layers=1, heads=2, kv_heads=2, head_dim=12, mlp=8, tower=TOWERS[family]
    )


def images_of(family: str, dtype: torch.dtype) -> Images:
    rows = ROWS.get(family, QWEN_ROWS)
    return make_images(TOWERS[family], rows, BUDGET.get(family, 168), dtype)


@functools.cache
def theirs(family: str, dtype: torch.dtype):
    """Weights, outputs, the projections of these that are differentiated, and all gradients."""
    model = make_vision(family, dtype)
    outputs, deepstack = their_features(model, family, images_of(family, dtype))
    outputs = [outputs, *deepstack]
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in outputs]
    torch.autograd.backward(outputs, along)
    tower = TOWERS[family]
    weights = our_tree({n: p.detach() for n, p in model.named_parameters()}, tower)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return weights, [x.detach() for x in outputs], along, our_tree(grads, tower)


def ours(family, weights, images, along, run):
    """The same of ours: outputs in transformers' order, and all gradients."""
    leaves = tree_map(lambda w: w.clone().requires_grad_(), weights)
    units, deepstack = run(leaves, images.patches)
    outputs = [units, *([] if deepstack is None else deepstack)]
    found = [
        torch.cat([x[row, list(order)] for row, order in enumerate(images.order)]) for x in outputs
    ]
    torch.autograd.backward(found, along)
    return [x.detach() for x in found], tree_map(lambda w: w.grad, leaves)


def assert_equal(found, wanted, tolerance):
    names = [f"output {i}" for i in range(len(wanted[0]))]
    pairs = dict(zip(names, zip(found[0], wanted[0], strict=True), strict=True))
    of_ours, of_theirs = (leaves_with_names(x[1]) for x in (found, wanted))
    assert of_ours.keys() == of_theirs.keys()
    pairs |= {name: (of_ours[name], of_theirs[name]) for name in of_theirs}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape, name
        error = ((a - b).norm() / b.norm()).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", VISION)
def test_parity(family, dtype):
    weights, outputs, along, grads = theirs(family, dtype)
    tree = params(config(family))
    shapes = {n: p.shape for n, p in leaves_with_names(abstract(tree, dtype)).items()}
    given = {n: w.shape for n, w in leaves_with_names(weights).items()}
    assert given == {n: s for n, s in shapes.items() if n.startswith(("encoder", "projector"))}
    run = make_tower(TOWERS[family], one_rank(tree, dtype), "none", compile=False)
    found = ours(family, weights, images_of(family, dtype), along, run)
    assert_equal(found, (outputs, grads), TOLERANCE[dtype])
