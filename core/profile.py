"""Traces of chosen steps: torch.profiler, and on GPU the allocator's history."""

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from attrs import define, field, frozen
from torch.profiler import ProfilerActivity, profile


@frozen
class ProfileConfig:
    """Profiles the steps [start_step, end_step), counted as the loop counts them."""

    start_step: int
    end_step: int
    trace_dir: Path
    record_shapes: bool = True
    profile_memory: bool = True
    with_stack: bool = True

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.start_step < self.end_step:
            raise ValueError(
                f"profile_start_step is {self.start_step} and profile_end_step is "
                f"{self.end_step}; the steps [start, end) must hold at least one"
            )


@define
class Profiler:
    """`step(n)` before each step n; `close()`, or leaving the `with` block, after the last.

    Without a configuration it does nothing, so that the loop need not ask. Written into
    `trace_dir`: `steps_<first>-<last>_rank_<rank>.json.gz`, a Chrome trace (chrome://tracing,
    ui.perfetto.dev), and on GPU `..._memory.pickle` for pytorch.org/memory_viz.
    """

    config: ProfileConfig | None = None
    rank: int = 0
    written: list[Path] = field(factory=list, init=False)
    _running: profile | None = field(default=None, init=False)
    _first: int = field(default=0, init=False)
    _next: int = field(default=0, init=False)

    def step(self, n: int) -> None:
        """Starts or stops the profile where step `n`, about to run, says so."""
        if self.config is None:
            return
        if self._running is not None and n >= self.config.end_step:
            self.close()
        elif self._running is None and self.config.start_step <= n < self.config.end_step:
            self._start(self.config, n)
        self._next = n + 1

    def close(self) -> None:
        """Stops a running profile and writes its files."""
        if self.config is None or self._running is None:
            return
        if on_gpu := torch.cuda.is_available():
            torch.cuda.synchronize()  # what was launched within the steps belongs to them
        running, self._running = self._running, None
        running.stop()
        self.config.trace_dir.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self._first}-{self._next - 1}_rank_{self.rank}"
        self.written.append(self.config.trace_dir / f"{name}.json.gz")
        running.export_chrome_trace(str(self.written[-1]))
        if on_gpu and self.config.profile_memory:
            self.written.append(self.config.trace_dir / f"{name}_memory.pickle")
            torch.cuda.memory._dump_snapshot(str(self.written[-1]))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self, config: ProfileConfig, n: int) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            activities.append(ProfilerActivity.CUDA)
            if config.profile_memory:
                torch.cuda.memory._record_memory_history(
                    stacks="python" if config.with_stack else "all"
                )
        self._first, self._running = (
            n,
            profile(
                activities=activities,
                record_shapes=config.record_shapes,
                profile_memory=config.profile_memory,
                with_stack=config.with_stack,
            ),
        )
        self._running.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
