"""Layers whose weights are stacked, one leaf [layers, ...] per weight: how one of them is run."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from omnistep.core.compile import compile_graph
from omnistep.core.param import Layout
from omnistep.parallel.layout import Place
from omnistep.parallel.remat import Remat, remat
from omnistep.parallel.unshard import unshard


def unstack(stacked: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each layer's own weights."""
    per_weight = {name: weight.unbind(0) for name, weight in stacked.items()}
    count = len(next(iter(per_weight.values())))
    return [{name: layers[i] for name, layers in per_weight.items()} for i in range(count)]


def unstacked(places: Mapping[str, Place]) -> dict[str, Place]:
    """Where each layer's own weights lie."""
    return {name: place.unstacked() for name, place in places.items()}


def with_weights(
    function: Callable[..., Any],
    places: Mapping[str, Place],
    layout: Layout,
    mode: Remat,
    saved: frozenset[Any],
    *,
    compile: bool,
) -> Callable[..., Any]:
    """`function` (x, weights, *rest) for weights as they lie at rest: gathered for use in the
    compute dtype, under a memory policy.

    It is compiled by itself and called for each layer, so that any number of layers compiles once.
    (A torch.compiler.nested_compile_region in a graph of all layers would do the same, but in
    torch 2.13 the gradients of a region that is called twice are wrong.)

    places: of `weights`, by the same names.
    saved: operators whose results the selective mode keeps, besides those of parallel/remat.py.
    """
    use = partial(unshard, places=places, dtype=layout.dtype, bucket=layout.bucket)
    again = layout.strategy == "zero3"

    def run(x: Any, w: Mapping[str, Tensor], *rest: Any) -> Any:
        return function(x, use(w) if again else w, *rest)

    groups = {at.gather.name for at in places.values() if at.inside}
    kept = remat(run, mode, saved, frozenset(groups if again else ()))

    def layer(x: Any, w: Mapping[str, Tensor], *rest: Any) -> Any:
        return kept(x, w if again else use(w), *rest)

    return compile_graph(layer) if compile else layer
