"""A whole train step without its arithmetic: what it allocates and what it sends, at any size.

`hollow_kernels`: inductor compiles as ever (its graphs, its schedule, the code that allocates, sends
and calls), but the C++ kernels that this code calls are empty, and no C++ compiler runs. What is
sent and allocated does not depend on numbers, so both are exactly those of the real step.

`Ledger`: tensors without memory (torch's FakeTensorMode), and a book of every buffer that lives and
every message that leaves. With both, the compiled step of a 70B model on one of 1,024 ranks runs
on any machine. `Watch` keeps the same book of buffers on tensors that have memory.
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


class Memory:
    """Of the tensors that were shown to it: how many bytes live, and the most there were."""

    def __init__(self):
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def restart(self) -> int:
        """The peak so far; begins anew from what lives."""
        peak, self.peak = self.peak, self.live
        return peak

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


class Ledger(FakeTensorMode):
    """Inside, tensors have no memory: `memory` says how much they would take, `traffic` what was
    sent by what torch dispatches. (Sends between stages arrive at the process group.)"""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.memory = Memory()
        self.traffic: Traffic = Counter()
        self._groups = {group.name: group for group in mesh.groups.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "_c10d_functional":
            self._count(func._schema.name.split("::")[1].removesuffix("_"), args)
        return self.memory.enter(super().__torch_dispatch__(func, types, args, kwargs))

    def _count(self, name: str, args: Any) -> None:
        if name == "wait_tensor":
            return
        x, group, kind = args[0], self._groups[args[-1]], _KINDS[name]
        if kind == "all_to_all" and sum(map(bool, args[2])) == 1:
            kind = "permute"
        dtype = str(x.dtype).removeprefix("torch.")
        self.traffic[Message(kind, group.axes, group.size, x.numel(), dtype)] += 1


class Watch(TorchDispatchMode):
    """Keeps a book of real tensors."""

    def __init__(self):
        super().__init__()
        self.memory = Memory()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else the compiler would leave functions that are called inside alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.memory.enter(func(*args, **(kwargs or {})))


@contextmanager
def visible_buffers() -> Iterator[None]:
    """Compiled code allocates by operators that a mode sees. It must be compiled inside."""

    def empty(shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype)

    _forget()
    try:
        with patch.object(torch._C._dynamo.guards, "_empty_strided_cpu", empty):
            yield
    finally:
        _forget()


@contextmanager
def hollow_kernels() -> Iterator[None]:
    """What is compiled inside must not be called outside, nor the other way round."""

    def reinterpret(x: Tensor, shape: Any, stride: Any, offset: int = 0) -> Tensor:
        return torch.as_strided(x, shape, stride, x.storage_offset() + offset)

    with (
        visible_buffers(),
        patch.object(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None),
        patch.object(torch._C._dynamo.guards, "_reinterpret_tensor", reinterpret),
    ):
        yield


def _forget() -> None:
    torch._dynamo.reset()
    PyCodeCache.cache_clear()
