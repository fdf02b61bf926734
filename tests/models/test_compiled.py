"""Compiled, a decoder gives the gradients it gives eagerly: every leaf, several layers."""

import pytest
import torch

from omnistep.core import param, rng
from omnistep.core.compile import compile_graph
from omnistep.core.grad import value_and_grad
from omnistep.core.tree import leaves_with_names
from omnistep.models import decoder
from omnistep.models.config import Config
from omnistep.parallel.remat import Remat
from tests.models import test_families
from tests.models.reference import make_batch
from tests.models.test_decoder import reference

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("mode", "whole"), [("none", False), ("selective", True)])
def test_every_gradient(mode, whole):
    """Layers of two windows, so that neither equal nor different layers may be mixed up. Compiled
    layer by layer, as bin/train does, and as one graph, as a researcher's own loss may be."""
    _, cfg = reference("qwen2-window", torch.float64)
    assert len(set(cfg.windows)) == 2
    check(cfg, mode, whole)


def test_every_gradient_with_experts_and_latent_attention(without_inductor):
    """Layers with experts and without, with a bias and groups. (tests/parallel/test_matrix.py
    compiles experts by inductor, too.)"""
    _, cfg = test_families.reference("deepseek_v3", torch.float64)
    assert len(cfg.dense_layers) == 2
    check(cfg, "selective", whole=False)


def check(cfg: Config, mode: Remat, whole: bool) -> None:
    tree = decoder.params(cfg)
    weights = param.initialize(tree, rng.key(3), torch.float64, torch.device("cpu"))
    batch, key = make_batch(packed=True), rng.key(0)
    layout = param.one_rank(tree, torch.float64)
    stages = decoder.make_stages(cfg, layout, mode=mode, compile=False)
    loss = decoder.make_stages(cfg, layout, mode=mode)
    eager_out, eager = value_and_grad(stages)(weights, [batch], [key])
    if whole:
        loss = compile_graph(stages.__call__)
    out, compiled = value_and_grad(loss)(weights, [batch], [key])
    torch.testing.assert_close(out, eager_out, rtol=1e-12, atol=0)
    theirs = leaves_with_names(eager)
    for name, ours in leaves_with_names(compiled).items():
        assert (ours - theirs[name]).norm() <= 1e-10 * theirs[name].norm(), name


@pytest.mark.parametrize(
    ("mode", "whole"), [("none", True), ("selective", False), ("full", False), ("full", True)]
)
def test_every_traced_gradient(mode, whole, without_inductor):
    """The rest of the pairs: what dynamo traces and autograd makes of it."""
    check(reference("qwen2-window", torch.float64)[1], mode, whole)
