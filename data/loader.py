"""The stream of batches: an infinite, seeded, resumable function of a DataState."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import attrs
import torch
from attrs import define, field
from torch.utils.data import DataLoader

from omnistep.core.batch import Batch
from omnistep.core.checkpoint.ranks import ALONE, Ranks
from omnistep.core.tree import tree_map
from omnistep.data.assemble import assemble
from omnistep.data.blocks import Failure, Losses, Piece, Reader, Task
from omnistep.data.errors import DataError
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.pack import prefix
from omnistep.data.state import DataState, PieceId, check_made_with
from omnistep.data.stream import Arrival, arrivals
from omnistep.data.tokenizer import Tokenizer
from omnistep.data.workers import no_errors_by_signal, start_context, start_worker

SHOWN = 10
"""Of so many skipped records the user is told why; further ones are only counted."""

NOTHING = "the data is empty: no sample gave a single token"

Row = list[Piece]


@define
class _Tasks:
    """The DataLoader's sampler: whatever is to be read next. Set before each iteration."""

    pending: Iterable[Task | None] = ()

    def __iter__(self) -> Iterator[Task | None]:
        return iter(self.pending)


@define(eq=False)
class Loader:
    """Batches of what a reader reads. Holds worker processes, started at once: they end with the
    object.

    One iteration at a time: starting another ends the one before. For training and evaluation
    side by side, make two loaders.

    Several ranks read together: each tokenises every ranks-th block and gives it to the others.
    So all of them plan the same rows, and each takes its own; they must iterate in step.
    """

    config: LoaderConfig
    reader: Reader
    pad_id: int
    ranks: Ranks = ALONE
    warn: Callable[[str], None] = print
    """Is told of records that are skipped."""
    _tasks: _Tasks = field(init=False, repr=False, factory=_Tasks)
    _blocks: Any = field(init=False, repr=False)
    _iteration: int = field(init=False, repr=False, default=0)
    _ended: set[tuple[int | None, int]] = field(init=False, repr=False, factory=set)
    """Shards (epoch, shard) the last block of which has arrived."""
    _shown: int = field(init=False, repr=False, default=0)
    _unlearnt: str = field(init=False, repr=False, default="")
    """Of the first record of which nothing is to be learnt."""
    _told: bool = field(init=False, repr=False, default=False)
    """The user was told of it."""

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
            multiprocessing_context=start_context() if workers > 0 else None,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else it draws from torch's global generator
        )
        if workers > 0:
            with no_errors_by_signal():
                iter(self._blocks)  # starts the workers, with nothing to do yet

    def batches(self, state: DataState | None = None) -> Iterator[tuple[Batch, DataState]]:
        """The batches from `state` on, without end; with each the state after it.

        A batch holds this rank's share of the step's rows: leaves are [rows, seq, …], or
        [accumulate, rows, seq, …] where accumulate > 1. Packed: rows = 1, seq =
        micro_batch_size * max_seq_len; padded: rows = micro_batch_size, seq = max_seq_len. With
        `images` it always has patches, as many a row as images.max_patches says in the same way.
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
        pieces = 0
        for answer in self._answers(self._one_pass(count=True)):
            pieces += answer.pieces
            self._unlearnt = self._unlearnt or answer.losses.why_unlearnt
            self._show(answer.losses)
        if not pieces:
            raise self._nothing()
        return pieces

    def made_with(self) -> dict[str, int | float | str]:
        """What the stream of rows depends on, besides the content of the samples."""
        return {
            **self.reader.made_of(),
            "train.seed": self.config.seed,
            "data.max_seq_len": self.config.max_seq_len,
            "tokens of a row": self.config.limits.budget,
            "pieces of a row": self.config.limits.most,
            **self._images(),
        }

    def _images(self) -> dict[str, int | float | str]:
        images = self.config.images
        if images is None:
            return {}
        rest = attrs.asdict(images, filter=lambda a, _: a.name != "max_patches")
        return {
            "data.max_patches": images.max_patches,
            "the preprocessing of images": " ".join(f"{k}={v}" for k, v in rest.items()),
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
        # whether this epoch is read from its start
        whole = state.shard == state.block == state.row == state.piece == 0
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
        first_row, first_piece, rows_given = state.row, state.piece, 0
        given = [list(counts) for counts in state.given or [(0, 0)] * len(self.reader.names)]
        skipped, unlearnt, cut = state.skipped, state.unlearnt, state.cut
        known = state.row > 0 or state.piece > 0  # the first block's losses are counted in `state`
        held = self._read_again(state.held)
        for arrival in self._arrivals(self._forever(state), held, state.arrival):
            if first_row > len(arrival.rows):
                raise DataError(
                    f"the data position is row {first_row} of a block that now has "
                    f"{len(arrival.rows)}: the data or the tokenizer changed since the checkpoint"
                )
            if not known:
                skipped, cut = skipped + arrival.losses.skipped, cut + arrival.losses.cut
                unlearnt += arrival.losses.unlearnt
                self._show(arrival.losses)
            known = False
            waiting = tuple(piece.at for piece in arrival.held)
            for number in range(first_row, len(arrival.rows)):
                rest, taken = arrival.rows[number][first_piece:], first_piece
                while rest:
                    budget = self.config.budget(state.step + rows_given // self._step_rows)
                    fit = prefix([len(piece.ids) for piece in rest], budget)
                    row, rest = rest[:fit], rest[fit:]
                    taken, rows_given = taken + fit, rows_given + 1
                    self._count(row, given)
                    yield (
                        row,
                        attrs.evolve(
                            state,
                            epoch=arrival.epoch,
                            shard=arrival.shard,
                            block=arrival.block,
                            arrival=arrival.number,
                            row=number if rest else number + 1,
                            piece=taken if rest else 0,
                            held=waiting,
                            given=tuple((samples, tokens) for samples, tokens in given),
                            skipped=skipped,
                            unlearnt=unlearnt,
                            cut=cut,
                        ),
                    )
                first_piece = 0
            first_row = 0

    def _count(self, row: Row, given: list[list[int]]) -> None:
        for piece in row:
            _, sample, number = piece.at
            counts = given[self.reader.part_of(sample)]
            counts[0] += number == 0
            counts[1] += len(piece.ids)

    def _show(self, losses: Losses) -> None:
        if losses.why_unlearnt and not self._told:
            self._told = True
            self.warn(f"left out: {losses.why_unlearnt}; further ones are only counted")
        for reason in losses.reasons[: SHOWN - self._shown]:
            self._shown += 1
            self.warn(f"skipped (data.bad_records): {reason}")
            if self._shown == SHOWN:
                self.warn("further records that are skipped are only counted")

    def _read_again(self, held: Sequence[PieceId]) -> list[Piece]:
        """The pieces of these ids, from the source."""
        made = self.reader.pieces_of([sample for _, sample, _ in held])
        pieces = []
        for at in held:
            _, sample, number = at
            if number >= len(made.get(sample, ())):
                raise DataError(
                    f"the data position holds piece {number} of sample {sample}, which now has "
                    f"{len(made.get(sample, ()))}: the data or the tokenizer changed since the "
                    "checkpoint"
                )
            tokens = made[sample][number]
            pieces.append(Piece(tokens.ids, tokens.learn, vision=tokens.vision, at=at))
        return pieces

    def _one_pass(self, count: bool = False) -> Iterator[Task]:
        for shard in range(self.reader.shards):
            for task in self._shard(None, shard, 0):
                yield attrs.evolve(task, count=count)

    def _forever(self, state: DataState) -> Iterator[Task]:
        epoch, shard, block = state.epoch, state.shard, state.block
        while True:
            for number in range(shard, self.reader.shards):
                yield from self._shard(epoch, number, block)
                block = 0
            epoch, shard = epoch + 1, 0

    def _shard(self, epoch: int | None, shard: int, block: int) -> Iterator[Task]:
        """From a block on. Where a shard's length is not known, tasks go on until its end has
        arrived."""
        blocks = self.reader.blocks
        while (block < blocks) if blocks is not None else ((epoch, shard) not in self._ended):
            yield Task(epoch, shard, block)
            block += 1

    def _arrivals(
        self, tasks: Iterable[Task], held: Iterable[Piece], number: int = 0
    ) -> Iterator[Arrival]:
        epoch, found = None, False
        for arrival in arrivals(self._answers(tasks), list(held), self.config.limits, number):
            self._unlearnt = self._unlearnt or arrival.losses.why_unlearnt
            if epoch not in (None, arrival.epoch) and not found:
                break
            found = found or arrival.pieces > 0 or bool(arrival.rows)
            epoch = arrival.epoch
            yield arrival
        if not found:
            raise self._nothing()

    def _nothing(self) -> DataError:
        return DataError(f"{NOTHING}. The first: {self._unlearnt}" if self._unlearnt else NOTHING)

    def _answers(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """What the workers of all ranks return, in the order of the tasks."""
        if self._blocks is None:
            raise RuntimeError("the loader was closed; make another")
        self._iteration += 1
        mine = self._iteration
        self._ended.clear()
        self._tasks.pending = self._share(tasks)
        for own in self._own(iter(self._blocks)):
            for answer in self.ranks.gather(own):
                if isinstance(answer, Failure):
                    raise DataError(answer.message)
                if answer is None or (answer.task.epoch, answer.task.shard) in self._ended:
                    continue
                if answer.last:
                    self._ended.add((answer.task.epoch, answer.task.shard))
                yield answer
                if mine != self._iteration:
                    raise RuntimeError(
                        "this iteration over the loader has ended: another was started, or the "
                        "loader was closed. Make a second loader to read side by side"
                    )

    def _own(self, blocks: Iterator[Any]) -> Iterator[Any]:
        """What this rank's workers return. What goes wrong here alone, such as a worker that was
        killed, becomes an answer, so that all ranks meet it together."""
        while True:
            try:
                yield next(blocks)
            except StopIteration:
                return
            except (OSError, MemoryError) as error:  # with a worker's traceback before it
                reason = str(error).strip().split("\n")[-1] or type(error).__name__
                yield Failure(f"the data can't be read: {reason}")
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                which = str(error).split("\n")[0]
                yield Failure(
                    f"{which}. The system kills processes where memory lacks: try fewer "
                    "data.num_workers, or a machine with more memory"
                )

    def _share(self, tasks: Iterable[Task]) -> Iterator[Task | None]:
        """This rank's part of each round of tasks, one a rank; None where a round is not full."""
        tasks = iter(tasks)
        while batch := list(islice(tasks, self.ranks.size)):
            yield batch[self.ranks.rank] if self.ranks.rank < len(batch) else None

    def _batch(self, step: list[Row]) -> Batch:
        """This rank's rows of a step; rows that are missing are padding."""
        config = self.config
        start = config.data_rank * config.rank_rows
        rows: list[Row] = (step + [[]] * self._step_rows)[start : start + config.rank_rows]
        boundaries = "cu_seqlens" if config.rmpad else "positions"
        sizes = (config.row_tokens, self.pad_id, boundaries, config.images, config.row_patches)
        batch = assemble(rows, *sizes)
        if config.accumulate > 1:
            axes = (config.accumulate, config.micro_rows)
            batch = tree_map(lambda leaf: leaf.reshape(*axes, *leaf.shape[1:]), batch)
        if config.pin_memory and torch.cuda.is_available():
            batch = tree_map(lambda leaf: leaf.pin_memory(), batch)
        return batch


def make_loader(
    reader: Reader,
    tokenizer: Tokenizer,
    config: LoaderConfig,
    ranks: Ranks = ALONE,
    warn: Callable[[str], None] = print,
) -> Loader:
    """A loader of what `reader` reads, with `config`'s rules.

    Make it before anything imports jax (orbax does) or touches CUDA: its workers are then forked
    in milliseconds; after that they come from a clean fork server, which takes seconds.
    """
    pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    return Loader(config, reader, pad_id, ranks, warn)


def _identity(result: Any) -> Any:
    return result
