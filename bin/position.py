"""Where a run stands, and where it begins: fresh, or at a checkpoint."""

import json
from collections.abc import Callable

from attrs import frozen

from omnistep.bin import build
from omnistep.bin.build import Model, RunError
from omnistep.core import param, rng
from omnistep.core.checkpoint.store import CheckpointStore, open_store
from omnistep.core.config import Arguments
from omnistep.core.optim import Optimizer
from omnistep.core.param import Layout
from omnistep.core.step import TrainState, init_state
from omnistep.core.tree import Tree, leaves_with_names
from omnistep.data.state import DataState


@frozen(eq=False)
class Position:
    """Where a run stands. All of it is in a checkpoint."""

    state: TrainState
    data: DataState
    meters: dict[str, float]
    """tokens: targets trained on so far; skipped: steps without update in a row."""

    @property
    def step(self) -> int:
        return self.data.step

    def tree(self) -> Tree:
        data, meters = json.dumps(self.data.to_json()), json.dumps(self.meters)
        return {"state": self.state, "data": data, "meters": meters}


def start(
    args: Arguments,
    model: Model,
    store: CheckpointStore,
    layout: Layout,
    optimizer: Optimizer,
    say: Callable[[str], None],
) -> Position:
    """The first position: of a new run, or the checkpoint's that train.load_checkpoint_path names.

    A new run does not begin where another one's checkpoints lie: they would be mixed up.
    """
    path, own = args.train.load_checkpoint_path, store.latest()
    if path is None and own is not None:
        raise RunError(
            f"{args.train.output_dir} holds a run's checkpoints, the last of step {own}: go on "
            "with --train.load_checkpoint_path auto, or choose another train.output_dir"
        )
    if path is None or (path == "auto" and own is None):
        key = rng.name_key(rng.key(args.train.seed), "step")
        state = init_state(build.make_params(args, model, layout), optimizer, key)
        return Position(state, DataState(), {"tokens": 0.0, "skipped": 0.0})
    if path == "auto":
        source, step = store, own
    else:
        directory, step = build.checkpoint_place(path)
        source = open_store(directory)
        step = source.latest() if step is None else step
        if own is not None and (source.directory.resolve(), step) != (
            store.directory.resolve(),
            own,
        ):
            raise RunError(
                f"{args.train.output_dir} holds a run's checkpoints, the last of step {own}; what "
                f"follows {path} would be mixed up with them: choose another train.output_dir"
            )
    weights = param.abstract(model.tree, build.param_dtype(args.train, model), layout)
    abstract = init_state(weights, optimizer, rng.key(0, "meta"))
    wanted = {"state": abstract, "data": "", "meters": ""}
    if more := sorted(source.stored(step).keys() - leaves_with_names(wanted).keys()):
        raise RunError(
            f"the checkpoint {path} holds what this run has no place for: {', '.join(more[:8])}"
            f"{', …' if len(more) > 8 else ''}. It is of another model or optimizer: set "
            "model.config_path and train.optimizer as in the recipe.yaml of its run"
        )
    found = source.restore(wanted, step, device=layout.mesh.device)
    position = Position(
        found["state"], DataState.from_json(json.loads(found["data"])), json.loads(found["meters"])
    )
    say(f"  resume  step {position.step}, from {path}")
    return position
