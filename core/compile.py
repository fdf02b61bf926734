"""torch.compile as Omnistep uses it."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

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
    compiled = torch.compile(function, fullgraph=True, dynamic=False, isolate_recompiles=True)
    probe = _probe_of_the_cpu()

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        probe.result()
        return compiled(*args, **options)

    return cast(F, call)


@functools.cache
def _probe_of_the_cpu() -> Future[Any]:
    """Which vector instructions compiled code may use, in the making on a thread of its own.

    torch asks once in a process, by starting another one that loads its libraries: most of a
    second in which weights can be made or read.
    """
    from torch._inductor import cpu_vec_isa  # not on the thread: two that import meet halfway

    with_one_thread = ThreadPoolExecutor(1, thread_name_prefix="probe")
    future = with_one_thread.submit(cpu_vec_isa.valid_vec_isa_list)
    with_one_thread.shutdown(wait=False)
    return future


def any_length(x: Tensor) -> Tensor:
    """`x`, one-dimensional; a compiled function that it is given to serves every length."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x
