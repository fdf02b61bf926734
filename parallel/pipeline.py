"""Pipelines: which stage does what when, and the links between stages.

Every stage runs its own list of actions; sends do not wait, receives do.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from omnistep.parallel.mesh import Group, process_group

Action = tuple[Literal["forward", "backward"], int]


def one_forward_one_backward(stages: int, micros: int, stage: int) -> list[Action]:
    """The actions of a stage, in order, for micro-batches 0 .. micros-1 (1F1B, arXiv 2006.09503):
    it runs ahead by one micro-batch for each stage after it, then a backward follows each
    forward. A share (stages - 1) / (micros + stages - 1) of the time is idle."""
    ahead = min(stages - 1 - stage, micros)
    actions: list[Action] = [("forward", i) for i in range(ahead)]
    for i in range(micros):
        if ahead + i < micros:
            actions.append(("forward", ahead + i))
        actions.append(("backward", i))
    return actions


class Link:
    """A stage's connections: activations go to the next stage, their gradients to the one before.

    The two directions use different groups: on one NCCL stream, two neighbours that both send
    first would wait for each other. Made collectively by the ranks of `group`.
    """

    def __init__(self, group: Group):
        self.group = group
        self._forward = process_group(group)
        members = dist.get_process_group_ranks(self._forward)
        self._backward = dist.new_group(members, use_local_synchronization=True)
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def send(self, x: Tensor) -> None:
        self._send(x, self.group.index + 1, self._forward)

    def receive(self, like: Tensor, device: torch.device) -> Tensor:
        """An activation from the stage before, of the shape and dtype of `like`."""
        return self._receive(like, device, self.group.index - 1, self._forward)

    def send_back(self, grad: Tensor) -> None:
        self._send(grad, self.group.index - 1, self._backward)

    def receive_back(self, like: Tensor, device: torch.device) -> Tensor:
        return self._receive(like, device, self.group.index + 1, self._backward)

    def finish(self) -> None:
        """Returns when all that was sent has left."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _send(self, x: Tensor, to: int, group: dist.ProcessGroup) -> None:
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        x = x.contiguous()
        work = dist.isend(x, group=group, group_dst=to)
        assert work is not None
        self._sending.append((work, x))  # it must live until it has left

    def _receive(
        self, like: Tensor, device: torch.device, source: int, group: dist.ProcessGroup
    ) -> Tensor:
        x = torch.empty(like.shape, dtype=like.dtype, device=device)
        work = dist.irecv(x, group=group, group_src=source)
        assert work is not None
        work.wait()
        return x
