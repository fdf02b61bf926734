"""A whole train step without its arithmetic: what it allocates and what it sends, at any size.

`hollow_kernels`: inductor compiles as ever (its graphs, its schedule, the code that allocates,
sends and calls), but the C++ kernels that this code calls are empty, and no C++ compiler runs. What
is sent and allocated does not depend on numbers, so both are exactly those of the real step.

`Ledger`: tensors without memory (torch's FakeTensorMode), and a book of every buffer that lives and
every message that leaves. With both, the compiled step of a 70B model on one of 1,024 ranks runs
on any machine. `Watch` keeps the same book of the buffers of a step that is really run.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omnistep.parallel.mesh import Mesh
from omnistep.parallel.traffic import Kind, Message, Traffic

_KINDS: dict[str, Kind] = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}


@contextmanager
def visible_buffers() -> Iterator[None]:
    """Compiled code allocates by an operator that a mode sees. What is compiled inside must not be
    called outside, nor the other way round."""

    def empty(shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype)

    def forget() -> None:
        torch._dynamo.reset()
        PyCodeCache.cache_clear()

    forget()
    try:
        with patch.object(torch._C._dynamo.guards, "_empty_strided_cpu", empty):  # pyright: ignore
            yield
    finally:
        forget()


@contextmanager
def hollow_kernels() -> Iterator[None]:
    """Like `visible_buffers`, and kernels do nothing."""

    def reinterpret(x: Tensor, shape: Any, stride: Any, offset: int = 0) -> Tensor:
        return torch.as_strided(x, shape, stride, x.storage_offset() + offset)

    guards: Any = torch._C._dynamo.guards  # pyright: ignore
    with (
        visible_buffers(),
        patch.object(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None),
        patch.object(guards, "_reinterpret_tensor", reinterpret),
    ):
        yield


class Memory:
    """Of the tensors it was shown: `live` is the bytes they take, `peak` the most there were."""

    def __init__(self):
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def restart(self) -> None:
        """The peak begins anew from what lives."""
        self.peak = self.live

    def enter(self, tree: Any) -> Any:
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and not isinstance(x, DTensor):  # it holds another tensor
                self._enter(x.untyped_storage())
        return tree

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def leave(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, leave)
        self.live += size
        self.peak = max(self.peak, self.live)


class Watch(TorchDispatchMode):
    """`memory` is that of the tensors made inside."""

    def __init__(self):
        super().__init__()
        self.memory = Memory()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else the compiler would leave functions that are called inside alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.memory.enter(func(*args, **(kwargs or {})))


class Ledger(FakeTensorMode):
    """Inside, tensors have no memory; `memory` is what they would take, `traffic` what was sent (by
    collectives: sends between stages arrive at the process group). Operators that read numbers to
    decide what to send (further rounds of experts) decide nothing here, and send nothing."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.memory = Memory()
        self.traffic: Traffic = Counter()
        self._groups = {
            known.name: known
            for group in mesh.groups.values()
            for known in (group, group.for_weights())
        }

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):  # only in graphs that nobody lowers
            run: Any = func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]
            with self:
                return run(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") == "_c10d_functional":
            self._count(func, args)
        return self.memory.enter(super().__torch_dispatch__(func, types, args, kwargs))

    def _count(self, func: Any, args: Any) -> None:
        name = func._schema.name.split("::")[1].removesuffix("_")
        if name == "wait_tensor":
            return
        x, group = args[0], self._groups[args[-1]]
        kind = _KINDS[name]
        if kind == "all_to_all" and sum(map(bool, args[2])) == 1:
            kind = "permute"
        dtype = str(x.dtype).removeprefix("torch.")
        self.traffic[Message(kind, group.axes, group.size, x.numel(), dtype)] += 1
