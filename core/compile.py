"""torch.compile as Omnistep uses it."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch._dynamo
import torch._functorch.config as functorch_config
from torch import Tensor

F = TypeVar("F", bound=Callable)


def compile_graph(function: F) -> F:
    """`function` compiled as one graph of static shapes; it fails where it would break in two.

    Two functions made from one definition (two train steps in a notebook) do not count as
    recompilations of each other.

    The compiled code is cached on disk across processes. By default torch leaves graphs with an
    autograd.Function out of that cache; ours are pure and traced into the graph, so that the
    graph's hash covers them.
    """
    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    return torch.compile(function, fullgraph=True, dynamic=False, isolate_recompiles=True)


def any_length(x: Tensor) -> Tensor:
    """`x`, one-dimensional; a compiled function that it is given to serves every length."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x
