"""Where a run stands, and where it begins: fresh, or at a checkpoint."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor

from omnistep.bin import build
from omnistep.bin.model import Model, RunError, make_params, param_dtype
from omnistep.core import param, rng
from omnistep.core.checkpoint.protocol import CheckpointStore, DamagedError
from omnistep.core.checkpoint.store import open_store
from omnistep.core.config import Arguments
from omnistep.core.optim import Optimizer
from omnistep.core.param import Layout
from omnistep.core.step import TrainState, init_state
from omnistep.core.tree import Tree, leaves_with_names
from omnistep.data.errors import DataError
from omnistep.data.loader import Loader
from omnistep.data.state import DataState, check_made_with

MOMENTS = "state.opt_state.mu."
"""How the names of a checkpoint's first moments begin; every optimizer has them."""


@frozen(eq=False)
class Position:
    """Where a run stands. All of it is in a checkpoint."""

    state: TrainState
    data: DataState
    meters: dict[str, float]
    """tokens: targets trained on so far; skipped: steps without update in a row."""
    model: Mapping[str, Any]
    """The model's config.json, so that a checkpoint says by itself what it is of."""

    @property
    def step(self) -> int:
        return self.data.step

    def tree(self) -> Tree:
        texts = {"data": self.data.to_json(), "meters": self.meters, "model": dict(self.model)}
        return {"state": self.state, **{name: json.dumps(text) for name, text in texts.items()}}


def first(state: TrainState, model: Model) -> Position:
    """Of a new run, which has seen no data yet."""
    return Position(state, DataState(), {"tokens": 0.0, "skipped": 0.0}, model.raw)


def first_key(args: Arguments) -> Tensor:
    """The key of the state that a new run begins with."""
    return rng.name_key(rng.key(args.train.seed), "step")


def start(
    args: Arguments,
    model: Model,
    store: CheckpointStore,
    layout: Layout,
    optimizer: Optimizer,
    say: Callable[[str], None],
) -> Position:
    """The first position: of a new run, or the checkpoint's that train.load_checkpoint_path names.

    `auto` is the newest step of the run's own that can be read; newer ones are set aside. A new
    run does not begin where another one's checkpoints lie: they would be mixed up.
    """
    path, own = args.train.load_checkpoint_path, store.latest()
    argument = "train.checkpoint_dir" if args.train.checkpoint_dir else "train.output_dir"
    if path is None and own is not None:
        raise RunError(
            f"{store.directory} holds a run's checkpoints, the last of step {own}: go on with "
            f"--train.load_checkpoint_path auto, or choose another {argument}"
        )
    if path is None or (path == "auto" and own is None):
        params = make_params(args, model, layout)
        return first(init_state(params, optimizer, first_key(args)), model)
    weights = param.abstract(model.tree, param_dtype(args.train, model), layout)
    abstract = init_state(weights, optimizer, rng.key(0, "meta"))

    def read(source: CheckpointStore, step: int) -> Position:
        return restore(source, step, abstract, layout.mesh.device)

    if path == "auto":
        position = newest_sound(store, read, argument, say)
    else:
        position = named(path, store, own, read, argument)
    say(f"  resume  step {position.step}, from {path}")
    for change in model_changes(position.model, model.raw):
        say(f" changed  {change}")
    return attrs.evolve(position, model=model.raw)


Read = Callable[[CheckpointStore, int], Position]


def newest_sound(
    store: CheckpointStore, read: Read, argument: str, say: Callable[[str], None]
) -> Position:
    """The newest step that can be read. Those after it are set aside, for they would be in the way
    of the steps to come; where none can be read nothing is touched. Raises RunError then."""
    damaged: dict[int, DamagedError] = {}
    for step in reversed(store.steps()):
        try:
            position = read(store, step)
        except DamagedError as error:
            damaged[step] = error
            continue
        for other, error in damaged.items():
            say(f" damaged  step {other}, now {store.set_aside(other)}: {error}")
        return position
    reasons = "".join(f"\n  step {step}: {error}" for step, error in damaged.items())
    raise RunError(
        "none of the run's checkpoints can be read, and nothing was changed; to begin anew choose "
        f"another {argument}:{reasons}"
    )


def named(
    path: str, store: CheckpointStore, own: int | None, read: Read, argument: str
) -> Position:
    """The position of the checkpoint at `path`. `argument` says where the run's own lie."""
    directory, step = build.checkpoint_place(path)
    source = open_store(directory)
    step = source.latest() if step is None else step
    if own is not None and (source.directory, step) != (store.directory, own):
        raise RunError(
            f"{store.directory} holds a run's checkpoints, the last of step {own}; what follows "
            f"{path} would be mixed up with them: choose another {argument}"
        )
    if step is None:
        raise RunError(f"train.load_checkpoint_path: {path} holds no complete checkpoint")
    try:
        return read(source, step)
    except DamagedError as error:
        others = ", ".join(str(other) for other in source.steps() if other != step)
        also = f"; {directory} also holds step {others}" if others else ""
        raise DamagedError(f"{error}{also}") from error
    finally:
        source.close()


def restore(
    source: CheckpointStore, step: int, abstract: TrainState, device: torch.device
) -> Position:
    """Raises RunError where the checkpoint holds more than `abstract`, or lacks moments of what was
    frozen, CheckpointError where it lacks other things or is damaged."""
    wanted = {"state": abstract, "data": "", "meters": "", "model": ""}
    held, names = source.stored(step).keys(), leaves_with_names(wanted).keys()
    lacking = {n.removeprefix(MOMENTS) for n in names - held if n.startswith(MOMENTS)}
    if frozen := sorted(name for name in lacking if f"state.params.{name}" in held):
        raise RunError(
            f"the checkpoint {source.directory}/{step} has no optimizer state of "
            f"{', '.join(frozen[:4])}{', …' if len(frozen) > 4 else ''}, which were frozen "
            "(train.freeze) when it was written. To train them start a new run from its weights: "
            "model.model_path"
        )
    if more := sorted(held - names):
        raise RunError(
            f"the checkpoint {source.directory}/{step} holds what this run has no place for: "
            f"{', '.join(more[:8])}{', …' if len(more) > 8 else ''}. It is of another model or "
            "optimizer, or fewer parts were frozen: set model.config_path, train.optimizer and "
            "train.freeze as in the recipe.yaml of its run"
        )
    found = source.restore(wanted, step, device=device)
    try:
        data, meters, config = (json.loads(found[name]) for name in ("data", "meters", "model"))
        counts = {"tokens": float(meters["tokens"]), "skipped": float(meters["skipped"])}
        return Position(found["state"], DataState.from_json(data), counts, dict(config))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(
            f"the texts of the checkpoint {source.directory}/{step} are no position of a run: "
            f"{type(error).__name__}: {error}"
        ) from error


def model_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two config.json, `rope_theta: 10000.0, was 500000.0`."""
    names = sorted(before.keys() | now.keys())
    return [
        f"{name} of the model: {now.get(name)}, was {before.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def fitted(
    position: Position, loader: Loader, restart: bool, say: Callable[[str], None]
) -> Position:
    """The position; with its data from the start, where it is of other data and `restart` says so.
    Raises DataError: it is of other data."""
    try:
        check_made_with(position.data, loader.made_with())
    except DataError as error:
        if not restart:
            raise
        say(f" restart  the data from its start (train.restart_data): {error}")
        return attrs.evolve(position, data=DataState(step=position.step))
    return position
