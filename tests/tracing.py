"""torch.compile without its slow part: what is traced, and into which graphs it is divided."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

EAGER_AND_COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]
"""Of a parameter that says whether inductor compiles."""


def capturing(graphs: list[Any]) -> Any:
    """A backend that runs the graphs as they are and keeps them: forward, backward. What is kept
    between the two, and what runs again, is decided as it is for inductor."""

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )


def without_inductor() -> AbstractContextManager[object]:
    """Inside, torch.compile runs its graphs operator by operator: for tests of what is compiled,
    how often, and what it sends, in a fraction of the time."""
    return patch.object(torch, "compile", partial(torch.compile, backend=capturing([])))
