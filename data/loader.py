"""The stream of batches: an infinite, seeded, resumable function of a DataState."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import attrs
import torch
from attrs import define, field
from torch.utils.data import DataLoader

from omnistep.core.batch import Batch
from omnistep.core.tree import tree_map
from omnistep.data.assemble import assemble
from omnistep.data.blocks import BlockReader, Failure, Piece, Task
from omnistep.data.errors import DataError
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.pack import prefix
from omnistep.data.source import BLOCK_SAMPLES, Source
from omnistep.data.state import DataState, PieceId, check_made_with
from omnistep.data.stream import Arrival, arrivals
from omnistep.data.tokenizer import Tokenizer
from omnistep.data.transform import Plaintext, Transform

Row = list[Piece]


@define
class _Tasks:
    """The DataLoader's sampler: whatever is to be read next. Set before each iteration."""

    pending: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.pending)


@define(eq=False)
class Loader:
    """Batches of a source. Holds worker processes, started at once: they end with the object.

    One iteration at a time: starting another ends the one before. For training and evaluation
    side by side, make two loaders.
    """

    config: LoaderConfig
    reader: BlockReader
    pad_id: int
    _tasks: _Tasks = field(init=False, repr=False, factory=_Tasks)
    _blocks: Any = field(init=False, repr=False)
    _iteration: int = field(init=False, repr=False, default=0)

    def __attrs_post_init__(self) -> None:
        workers = self.config.num_workers
        self._blocks = DataLoader(
            self.reader,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=self._tasks,  # pyright: ignore[reportArgumentType]
            num_workers=workers,
            collate_fn=_identity,
            persistent_workers=workers > 0,
            prefetch_factor=self.config.prefetch_factor if workers > 0 else None,
            multiprocessing_context=_start_context() if workers > 0 else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else it draws from torch's global generator
        )
        if workers > 0:
            iter(self._blocks)  # starts the workers, with nothing to do yet

    def batches(self, state: DataState | None = None) -> Iterator[tuple[Batch, DataState]]:
        """The batches from `state` on, without end; with each the state after it.

        A batch holds this rank's share of the step's rows: leaves are [rows, seq], or
        [accumulate, rows, seq] where accumulate > 1. Packed: rows = 1, seq =
        micro_batch_size * max_seq_len; padded: rows = micro_batch_size, seq = max_seq_len.
        Raises DataError when `state` was made with other data or arguments.
        """
        state = state or DataState()
        made_with = self.made_with()
        check_made_with(state, made_with)
        return self._batches(attrs.evolve(state, made_with=made_with))

    def eval_batches(self) -> Iterator[Batch]:
        """Every sample once, in the source's order (packing moves pieces by a few blocks).

        The last batch is filled with rows of weight 0. The shapes of `batches`.
        """
        step: list[Row] = []
        for arrival in self._arrivals(self._one_pass(), ()):
            for row in arrival.rows:
                step.append(row)
                if len(step) == self._step_rows:
                    yield self._batch(step)
                    step = []
        if step:
            yield self._batch(step)

    def count_pieces(self) -> int:
        """Pieces of an epoch, by one pass through the workers: the length of padded data."""
        return sum(self._results(self._one_pass(count_only=True)))

    def made_with(self) -> dict[str, int]:
        """What the stream of rows depends on, besides the content of the samples."""
        return {
            "the number of samples": len(self.reader.source),
            "train.seed": self.config.seed,
            "block_samples": self.reader.samples,
            "data.max_seq_len": self.config.max_seq_len,
            "tokens of a row": self.config.limits.budget,
            "pieces of a row": self.config.limits.most,
        }

    def close(self) -> None:
        """Lets the workers go; the loader cannot be iterated any more."""
        self._iteration += 1
        self._blocks = None

    @property
    def _step_rows(self) -> int:
        return self.config.rank_rows * self.config.data_ranks

    def _batches(self, state: DataState) -> Iterator[tuple[Batch, DataState]]:
        """Gathers rows into steps. A padded step does not reach over the end of an epoch."""
        step: list[Row] = []
        number, at = state.step, state
        whole = state.block == state.row == state.piece == 0  # this epoch is read from its start
        nothing_yet = True
        for row, after in self._rows(state):
            if not self.config.packed and after.epoch != at.epoch:
                if step and not self.config.drop_last:
                    number += 1
                    yield self._batch(step), attrs.evolve(at, step=number)
                elif whole and nothing_yet:
                    raise DataError(
                        f"an epoch has {len(step)} sequences, fewer than the "
                        f"{self._step_rows} of a step: set data.drop_last false, a smaller "
                        "train.global_batch_size, or give more data"
                    )
                step, whole, nothing_yet = [], True, True
            step.append(row)
            at = after
            if len(step) == self._step_rows:
                number += 1
                yield self._batch(step), attrs.evolve(at, step=number)
                step, nothing_yet = [], False

    def _rows(self, state: DataState) -> Iterator[tuple[Row, DataState]]:
        """The rows from `state` on; each with the position after it (but not the step)."""
        first_row, first_piece, given = state.row, state.piece, 0
        held = self._read_again(state.held)
        for arrival in self._arrivals(self._forever(state.epoch, state.block), held):
            if first_row > len(arrival.rows):
                raise DataError(
                    f"the data position is row {first_row} of a block that now has "
                    f"{len(arrival.rows)}: the data or the tokenizer changed since the checkpoint"
                )
            waiting = tuple(piece.at for piece in arrival.held)
            for number in range(first_row, len(arrival.rows)):
                rest, taken = arrival.rows[number][first_piece:], first_piece
                while rest:
                    budget = self.config.budget(state.step + given // self._step_rows)
                    fit = prefix([len(piece.ids) for piece in rest], budget)
                    row, rest = rest[:fit], rest[fit:]
                    taken, given = taken + fit, given + 1
                    yield (
                        row,
                        attrs.evolve(
                            state,
                            epoch=arrival.epoch,
                            block=arrival.block,
                            row=number if rest else number + 1,
                            piece=taken if rest else 0,
                            held=waiting,
                        ),
                    )
                first_piece = 0
            first_row = 0

    def _read_again(self, held: Iterable[PieceId]) -> list[Piece]:
        """The pieces of these ids, from the source."""
        made: dict[int, list[Any]] = {}
        pieces = []
        for at in held:
            _, _, sample, number = at
            if sample not in made:
                made[sample] = self.reader.pieces_of(sample)
            if number >= len(made[sample]):
                raise DataError(
                    f"the data position holds piece {number} of sample {sample}, which now has "
                    f"{len(made[sample])}: the data or the tokenizer changed since the checkpoint"
                )
            tokens = made[sample][number]
            pieces.append(Piece(tokens.ids, tokens.learn, at=at))
        return pieces

    def _one_pass(self, count_only: bool = False) -> Iterator[Task]:
        return (Task(None, block, count_only) for block in range(len(self.reader)))

    def _forever(self, epoch: int, block: int) -> Iterator[Task]:
        blocks = len(self.reader)
        return (Task(at // blocks, at % blocks) for at in count(epoch * blocks + block))

    def _arrivals(self, tasks: Iterable[Task], held: Iterable[Piece]) -> Iterator[Arrival]:
        blocks, barren = len(self.reader), 0
        for arrival in arrivals(self._results(tasks), list(held), self.config.limits, blocks):
            barren = 0 if arrival.pieces or arrival.rows else barren + 1
            if barren == blocks:
                raise DataError("the data is empty: no sample gave a single token")
            yield arrival

    def _results(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """What the workers return, in the order of the tasks."""
        if self._blocks is None:
            raise RuntimeError("the loader was closed; make another")
        self._iteration += 1
        mine = self._iteration
        self._tasks.pending = tasks
        for result in self._blocks:
            if isinstance(result, Failure):
                raise DataError(result.message)
            yield result
            if mine != self._iteration:
                raise RuntimeError(
                    "this iteration over the loader has ended: another was started, or the "
                    "loader was closed. Make a second loader to read side by side"
                )

    def _batch(self, step: list[Row]) -> Batch:
        """This rank's rows of a step; rows that are missing are padding."""
        config = self.config
        start = config.data_rank * config.rank_rows
        rows: list[Row] = (step + [[]] * self._step_rows)[start : start + config.rank_rows]
        boundaries = "cu_seqlens" if config.rmpad else "positions"
        batch = assemble(rows, config.row_tokens, self.pad_id, boundaries)
        if config.accumulate > 1:
            axes = (config.accumulate, config.micro_rows)
            batch = tree_map(lambda leaf: leaf.reshape(*axes, leaf.shape[-1]), batch)
        if config.pin_memory and torch.cuda.is_available():
            batch = tree_map(lambda leaf: leaf.pin_memory(), batch)
        return batch


def make_loader(
    source: Source,
    tokenizer: Tokenizer,
    config: LoaderConfig,
    transform: Transform | None = None,
) -> Loader:
    """A loader of `source`; by default plaintext. `transform` makes pieces of at most
    `config.longest_piece` tokens.

    Make it before anything imports jax (orbax does) or touches CUDA: its workers are then forked
    in milliseconds; after that they come from a clean fork server, which takes seconds.
    """
    transform = transform or Plaintext(tokenizer, config.longest_piece, config.text_keys)
    reader = BlockReader(
        source=source,
        transform=transform,
        samples=config.block_samples or getattr(source, "block_samples", BLOCK_SAMPLES),
        seed=config.seed,
        limits=config.limits,
        packs=config.dyn_bsz_runtime == "worker",
        longest=config.longest_piece,
    )
    pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    return Loader(config, reader, pad_id)


def _identity(result: Any) -> Any:
    return result


def _start_worker(_: int) -> None:
    """Runs first in a worker."""
    # Ctrl-C and a scheduler's SIGTERM go to the whole group. The main process decides what is
    # to happen then (save, and end its workers), so workers must not die before it.
    os.setpgrp()
    # When the main process is killed, a worker that is sending a block waits for ever: the pipe
    # is full and the other workers keep it open. The DataLoader's own watch does not cover that.
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _start_context() -> Any:
    """How workers start.

    fork is fast, and scripts need no `if __name__ == "__main__"`. It is safe while the process
    has no threads that hold locks; jax starts such threads, and a CUDA context does not survive
    it. Then workers come from a server process that has imported nothing but this folder.
    """
    if "jax" not in sys.modules and not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["omnistep.data.blocks", "torch.utils.data"])
    return context
