"""What a rank holds falls with the number of ranks, and gathered weights are dropped.

`python -m tests.benchmarks.mesh_memory` prints the whole table.
"""

import functools
import math

import attrs
import pytest
import torch

from omnistep.models import decoder
from omnistep.parallel.layout import Strategy
from tests.benchmarks.mesh_memory import MODEL, measured, peak_bytes, setting, state_bytes
from tests.parallel.counting import Footprint, footprint

MODES = ["none", "selective", "full"]


@functools.cache
def found(ranks, mode, strategy: Strategy = "zero3", compute=torch.float32) -> Footprint:
    return footprint(attrs.evolve(setting(ranks, mode, compute), strategy=strategy))


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_state_is_shared_by_all_ranks(ranks):
    assert found(ranks, "full").state == state_bytes(setting(ranks, "full"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 8])
def test_peak_is_what_was_computed(mode, ranks):
    """At most a fifth of the formula is room for what it leaves out."""
    formula = peak_bytes(setting(ranks, mode), found(1, mode).kept, found(1, "none").kept)
    assert 0.8 * formula <= found(ranks, mode).peak <= formula


@pytest.mark.parametrize("ranks", [1, 2])
def test_measured_on_running_ranks(ranks):
    """What the pretended rank holds is what a real one does."""
    for peak in measured(ranks, "none"):
        assert math.isclose(peak, found(ranks, "none").peak, rel_tol=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_zero3_drops_and_zero2_keeps_gathered_weights(mode):
    """Between forward and backward pass zero3 holds what one rank does, to the byte, and zero2 the
    whole weights of all layers besides."""
    layers = decoder.params(MODEL)["layers"].values()
    weights = sum(4 * math.prod(p.shape) for p in layers if len(p.shape) > 2)
    assert found(2, mode).kept == found(1, mode).kept
    assert found(2, mode, "zero2").kept == found(1, mode).kept + weights


@pytest.mark.parametrize("mode", ["none", "full"])
def test_nor_are_casts_of_weights_kept(mode):
    """What a layer keeps in bf16 does not depend on the size of this rank's pieces."""
    kept = {found(ranks, mode, compute=torch.bfloat16).kept for ranks in (2, 8)}
    assert len(kept) == 1
    assert kept.pop() < found(1, mode).kept
