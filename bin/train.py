"""bin/train: trains a model as a recipe says. The loop is `run`; read it first."""

import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor

from omnistep.bin import build
from omnistep.bin.build import Data, Model, RunError
from omnistep.bin.export import export
from omnistep.bin.launch import Launch, LaunchError, fail, join, leave, read_launch, take_nproc
from omnistep.bin.spawn import spawn
from omnistep.bin.stop import RESUME_ME, Stop
from omnistep.core import param, rng
from omnistep.core.batch import Batch
from omnistep.core.checkpoint.shards import CheckpointError
from omnistep.core.checkpoint.store import CheckpointStore, open_store
from omnistep.core.config import TRAIN, Arguments, ConfigError
from omnistep.core.config_help import help_text
from omnistep.core.config_io import dump, load, wants_help
from omnistep.core.logs import (
    METRICS_FILE,
    Logger,
    Wandb,
    WandbConfig,
    plot_losses,
    read_metrics,
)
from omnistep.core.meters import Meter, peak_flops, rates, tick
from omnistep.core.profile import ProfileConfig, Profiler
from omnistep.core.step import TrainState, init_state, make_eval_step, make_train_step
from omnistep.core.tree import Tree, leaves_with_names, tree_map
from omnistep.data.errors import DataError
from omnistep.data.loader import Loader
from omnistep.data.state import DataState
from omnistep.models import decoder
from omnistep.models.hf import ConfigJsonError

EXPECTED = (
    *(ConfigError, LaunchError, RunError, DataError, ConfigJsonError, CheckpointError, OSError),
)
"""Errors that say all there is to say; others need a traceback."""

Say = Callable[[str], None]
Metrics = dict[str, Tensor]


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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        print(help_text(TRAIN))
        return 0
    launch = Launch()
    try:
        launch = read_launch(os.environ)
        argv, nproc = take_nproc(argv, launch)
        ranks, cuda = max(nproc, launch.world_size), torch.cuda.is_available()
        args = load(argv, world_size=ranks, cuda=cuda, command=TRAIN)
        if nproc > 1:
            return spawn([sys.executable, "-m", "omnistep.bin.train", *argv], nproc)
        join(launch, "cuda" if cuda and args.train.init_device != "cpu" else "cpu")
        with Stop(silent=launch.rank > 0) as stop:
            code = run(args, stop)
            leave()
        return code
    except EXPECTED as error:
        return fail(launch, error, expected=True)
    except Exception as error:
        if launch.world_size == 1:
            raise
        return fail(launch, error, expected=False)


def run(args: Arguments, stop: Stop) -> int:
    """Trains from the start, or from a checkpoint, to the last step. Returns the exit code."""
    train, output = args.train, Path(args.train.output_dir)
    if train.enable_full_determinism:
        torch.use_deterministic_algorithms(True)

    # What takes part. The data comes first: its worker processes must start before jax does.
    model = build.read_model(args.model)
    tokenizer = build.read_tokenizer(args.model, model.cfg)
    mesh = build.make_mesh(train)
    data = build.open_data(args, tokenizer, mesh)
    held_out = build.open_eval(args, tokenizer)
    optimizer = build.make_optimizer(train, model)
    dtype = build.compute_dtype(train, model)
    loss_fn = decoder.make_loss(model.cfg, dtype=dtype, mode=build.remat_mode(train))
    train_step = make_train_step(
        loss_fn,
        optimizer,
        build.make_lr(train, data.total_steps),
        accumulate=data.accumulate,
        max_grad_norm=train.max_grad_norm,
        compile=not train.enable_manual_eager,
    )
    eval_step = make_eval_step(loss_fn, compile=not train.enable_manual_eager)
    print(build.describe(args, model, data, mesh), flush=True)

    with ExitStack() as stack:
        make_output_dir(output)
        store = open_store(output / "checkpoints", keep=train.keep_checkpoints or None)
        stack.callback(store.close)
        position = start(args, model, store, lambda: init_state(
            build.make_params(args, model, mesh),
            optimizer,
            rng.name_key(rng.key(train.seed), "step"),
        ), mesh.device, optimizer)  # fmt: skip
        batches = data.loader.batches(position.data)  # refuses a checkpoint made with other data
        dump(args, output / "recipe.yaml")
        if position.step == 0:
            (output / METRICS_FILE).unlink(missing_ok=True)  # of a run that never saved
        logger = stack.enter_context(Logger(output, data.total_steps, position.step))
        # a CPU's peak is measured: before wandb's thread takes a core
        meter = _Meters(data, model, peak_flops(mesh.device, dtype))
        if train.use_wandb:
            config = attrs.asdict(args)
            logger.wandb = Wandb(
                WandbConfig(train.wandb_project, train.wandb_name, output, config), logger.say
            )
        profiler = stack.enter_context(Profiler(_profile(args)))
        key = rng.name_key(rng.key(train.seed, mesh.device), "eval")

        evaluated = evaluations(output / METRICS_FILE)

        def evaluate(at: Position) -> None:
            if held_out is None:
                return
            if at.step not in evaluated:
                loss = held_out_loss(eval_step, at.state.params, held_out, key, mesh.device)
                logger.log(at.step, {"eval_loss": loss})
                evaluated[at.step] = loss
            logger.say(f"step {at.step}: held-out loss {evaluated[at.step]:.4f}")

        # of a step that was saved, the evaluation may be missing: a kill came in between
        if position.step == 0 or _due(position.step, train.eval_steps):
            evaluate(position)
        dispatched: _Dispatched | None = None

        while position.step < data.total_steps and not stop.asked:
            profiler.step(position.step)
            waiting = time.perf_counter()
            batch, data_state = next(batches)
            waited = time.perf_counter() - waiting
            state, metrics = train_step(position.state, to_device(batch, mesh.device))
            position = attrs.evolve(position, state=state, data=data_state)
            # the device is busy with this step: time to look at what the last one gave
            position = report(dispatched, position, logger, meter, train.max_skipped_steps)
            dispatched = _Dispatched(position.step, metrics, batch, waited)

            if position.step == data.total_steps or stop.asked:
                break
            if _due(position.step, train.save_steps, train.save_epochs * data.epoch_steps):
                position = report(dispatched, position, logger, meter, train.max_skipped_steps)
                dispatched = None
                store.save(position.step, position.tree())
            if _due(position.step, train.eval_steps):
                evaluate(position)
            if _due(position.step, train.empty_cache_steps):
                empty_cache()

        position = report(dispatched, position, logger, meter, train.max_skipped_steps)
        if position.step not in store.steps():
            store.save(position.step, position.tree())
        store.wait()
        if stop.asked and position.step < data.total_steps:
            logger.say(
                f"stopped and saved at step {position.step}; go on with "
                "--train.load_checkpoint_path auto"
            )
            return RESUME_ME
        evaluate(position)
        if train.save_hf_weights:
            export(output / "hf", model, position.state.params, tokenizer)
    finish(args, output, model, position, logger.say)
    return 0


def start(
    args: Arguments,
    model: Model,
    store: CheckpointStore,
    fresh: Callable[[], TrainState],
    device: torch.device,
    optimizer: Any,
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
        return Position(fresh(), DataState(), {"tokens": 0.0, "skipped": 0.0})
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
    weights = param.abstract(model.tree, build.param_dtype(args.train, model))
    abstract = init_state(weights, optimizer, rng.key(0, "meta"))
    wanted = {"state": abstract, "data": "", "meters": ""}
    if more := sorted(source.stored(step).keys() - leaves_with_names(wanted).keys()):
        raise RunError(
            f"the checkpoint {path} holds what this run has no place for: {', '.join(more[:8])}"
            f"{', …' if len(more) > 8 else ''}. It is of another model or optimizer: set "
            "model.config_path and train.optimizer as in the recipe.yaml of its run"
        )
    found = source.restore(wanted, step, device=device)
    position = Position(
        found["state"], DataState.from_json(json.loads(found["data"])), json.loads(found["meters"])
    )
    print(f"  resume  step {position.step}, from {path}", flush=True)
    return position


@frozen(eq=False)
class _Dispatched:
    """A step whose metrics nobody has read yet."""

    step: int
    metrics: Metrics
    batch: Batch
    waited: float


@define
class _Meters:
    data: Data
    model: Model
    peak: float | None
    meter: Meter = field(factory=Meter)

    def read(self, step: int, tokens: float, batch: Batch, waited: float) -> dict[str, float]:
        cfg = self.model.cfg
        flops = decoder.flops(cfg, tokens, decoder.visible_pairs(batch, cfg))
        now = time.perf_counter()
        self.meter = tick(self.meter, now, tokens=tokens, flops=flops, waited=waited)
        return rates(self.meter, steps_left=self.data.total_steps - step, peak=self.peak)


def report(
    done: _Dispatched | None, position: Position, logger: Logger, meter: _Meters, most_skipped: int
) -> Position:
    """Reads a step's metrics (which waits for it), logs them, counts; stops a run gone wrong."""
    if done is None:
        return position
    values = {name: float(value) for name, value in done.metrics.items()}
    skipped = position.meters["skipped"] + 1 if values["skipped"] else 0.0
    meters = {"tokens": position.meters["tokens"] + values["weight"], "skipped": skipped}
    speed = meter.read(done.step, values["weight"], done.batch, done.waited)
    logger.log(done.step, {**values, **speed, "tokens": meters["tokens"]})
    if not meters["tokens"] and done.step >= min(most_skipped, meter.data.total_steps):
        raise RunError(
            f"{done.step} steps had no token to learn: the samples of data.train_path are empty"
        )
    if skipped:
        logger.say(f"step {done.step}: the gradient is not finite; the update is skipped")
    if skipped >= most_skipped:
        raise RunError(
            f"{skipped:.0f} steps in a row had a non-finite gradient (train.max_skipped_steps): "
            "the run stops. Try a smaller train.lr, or go back to an earlier checkpoint"
        )
    return attrs.evolve(position, meters=meters)


def evaluations(metrics: Path) -> dict[int, float]:
    """The held-out losses that metrics.jsonl holds, by step."""
    rows = [row for row in read_metrics(metrics) if "eval_loss" in row]
    return {r["step"]: math.nan if r["eval_loss"] is None else r["eval_loss"] for r in rows}


def make_output_dir(output: Path) -> None:
    """Raises RunError where nothing can be written: now, not when the first checkpoint is due."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise RunError(
            f"train.output_dir: nothing can be written to {output} ({error.strerror}); "
            "choose another directory"
        ) from None


def held_out_loss(
    eval_step: Callable[..., Any], params: Tree, loader: Loader, key: Tensor, device: torch.device
) -> float:
    """Mean loss per target over the whole set, in nats."""
    total, weight = 0.0, 0.0
    for batch in loader.eval_batches():
        sums = eval_step(params, to_device(batch, device), key)
        total, weight = total + float(sums[0]), weight + float(sums[1])
    return total / max(weight, 1.0)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True), batch)


def _due(step: int, *every: int) -> bool:
    return any(n > 0 and step % n == 0 for n in every)


def empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _profile(args: Arguments) -> ProfileConfig | None:
    train = args.train
    if not train.enable_profiling:
        return None
    return ProfileConfig(
        train.profile_start_step,
        train.profile_end_step,
        Path(train.profile_trace_dir),
        record_shapes=train.profile_record_shapes,
        profile_memory=train.profile_profile_memory,
        with_stack=train.profile_with_stack,
    )


def finish(args: Arguments, output: Path, model: Model, position: Position, say: Say) -> None:
    """The picture, a sample of what was learned, and where everything is."""
    plot_losses(output / METRICS_FILE, output / "loss.png")
    if args.infer.prompt is not None:
        from omnistep.bin.sample import continuation

        tokenizer = build.read_tokenizer(args.model, model.cfg)
        text = continuation(args.infer, model, position.state.params, tokenizer, args.infer.prompt)
        say(f"\n{args.infer.prompt}{text}\n")
    places = {
        "checkpoints": output / "checkpoints",
        "metrics": output / METRICS_FILE,
        "loss curve": output / "loss.png",
        "recipe": output / "recipe.yaml",
    }
    if args.train.save_hf_weights:
        places["weights"] = output / "hf"
    for name, place in places.items():
        say(f"{name:>12}  {place}")


if __name__ == "__main__":
    sys.exit(main())
