"""bin/train: trains a model as a recipe says. The loop is `run`; read it first."""

import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from omnistep.bin import build
from omnistep.bin.export import export
from omnistep.bin.launch import Launch, LaunchError, fail, join, leave, read_launch, take_nproc
from omnistep.bin.model import Model, RunError, param_dtype, read_model, read_weights, with_frozen
from omnistep.bin.output_lock import lock_output, make_place
from omnistep.bin.passes import with_date
from omnistep.bin.position import Position, fitted, start
from omnistep.bin.report import Dispatched, Meters, Say, report
from omnistep.bin.spawn import spawn
from omnistep.bin.stop import RESUME_ME, Stop
from omnistep.core import rng
from omnistep.core.allocator import keep_freed_memory
from omnistep.core.batch import Batch
from omnistep.core.cache import keep_compiled_code_private
from omnistep.core.checkpoint.protocol import CheckpointError, CheckpointStore
from omnistep.core.checkpoint.ranks import all_ranks
from omnistep.core.checkpoint.store import open_store
from omnistep.core.config import TRAIN, Arguments
from omnistep.core.config_errors import ConfigError
from omnistep.core.config_help import help_text
from omnistep.core.config_io import changes, dump, load, wants_help
from omnistep.core.logs import (
    METRICS_FILE,
    Logger,
    Wandb,
    WandbConfig,
    read_metrics,
)
from omnistep.core.meters import peak_flops
from omnistep.core.plot import plot_losses
from omnistep.core.profile import ProfileConfig, Profiler
from omnistep.core.screen import show, write_all_characters
from omnistep.core.step import make_eval_step, make_train_step
from omnistep.core.tree import Tree, tree_map
from omnistep.data.errors import DataError
from omnistep.data.loader import Loader
from omnistep.data.patches import ImageRules
from omnistep.models import decoder
from omnistep.models.hf import export_weights
from omnistep.models.hf_config import ConfigJsonError
from omnistep.parallel.mesh import Mesh

EXPECTED = (
    *(ConfigError, LaunchError, RunError, DataError, ConfigJsonError, CheckpointError, OSError),
)
"""Errors that say all there is to say; others need a traceback."""


ALONE = (CheckpointError, RunError)
"""Errors after which nothing is saved: of saving, or of a run that made nothing worth it."""


def main(argv: list[str] | None = None) -> int:
    write_all_characters()
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        print(help_text(TRAIN))
        return 0
    launch = Launch()
    try:
        launch = read_launch(os.environ)
        argv, nproc = take_nproc(argv, launch)
        keep_compiled_code_private()
        ranks, cuda = max(nproc, launch.world_size), torch.cuda.is_available()
        args = load(argv, world_size=ranks, cuda=cuda, command=TRAIN)
        if nproc > 1:
            command = [sys.executable, "-m", "omnistep.bin.train", *argv]
            return spawn(command, nproc, rank_timeout=args.train.rank_timeout)
        device_kind = "cuda" if cuda and args.train.init_device != "cpu" else "cpu"
        join(launch, device_kind, args.train.rank_timeout)
        with Stop(silent=launch.rank > 0) as stop:
            return leave(run(args, stop, launch.world_size))
    except EXPECTED as error:
        return fail(launch, error, expected=True)
    except MemoryError as error:
        return fail(launch, RunError(f"memory has run out {error}".strip()), expected=True)
    except Exception as error:
        if launch.world_size == 1:
            raise
        return fail(launch, error, expected=False)


def run(args: Arguments, stop: Stop, world_size: int) -> int:
    """Trains from the start, or from a checkpoint, to the last step. Returns the exit code."""
    train, output = args.train, Path(args.train.output_dir)
    if train.enable_full_determinism:
        torch.use_deterministic_algorithms(True)

    # What takes part. The data comes first: its worker processes must start before jax does.
    model = with_frozen(read_model(args.model), train)
    tokenizer = build.read_tokenizer(args.model, model.cfg)
    together = all_ranks()
    recipe = output / "recipe.yaml"
    args = together.broadcast(with_date(args, tokenizer, recipe))
    mesh = build.make_mesh(train, world_size)
    images = build.make_image_rules(args, model, mesh)
    if mesh.device.type == "cpu":
        keep_freed_memory()
    layout = build.make_layout(train, model, mesh)
    first = mesh.rank == 0  # it alone writes logs; checkpoints are written by all
    say = show if first else lambda text: None
    peak = peak_flops(mesh.device, layout.dtype)  # a CPU's is measured: before others take a core
    data = build.open_data(args, tokenizer, images, mesh, together, say)
    held_out = build.open_eval(args, tokenizer, images, together, say)
    optimizer = build.make_optimizer(train, model)
    compiled = not train.enable_manual_eager
    stages = decoder.make_stages(model.cfg, layout, mode=build.remat_mode(train), compile=compiled)
    train_step = make_train_step(
        stages,
        optimizer,
        build.make_lr(train, data.total_steps),
        layout=layout,
        accumulate=data.accumulate,
        max_grad_norm=train.max_grad_norm,
        compile=compiled,
    )
    eval_step = make_eval_step(stages, layout=layout, compile=compiled)
    for note in model.notes:
        say(f"    note  {note}")
    say(build.describe(args, model, data, mesh))

    with ExitStack() as stack:
        stack.callback(data.loader.close)
        lock_output(output, together, stack)
        checkpoints = build.checkpoint_dir(train)
        if train.checkpoint_dir:
            make_place("train.checkpoint_dir", checkpoints)  # on all ranks: each one writes there
        store = open_store(
            checkpoints,
            format=train.checkpoint_format,
            keep=train.keep_checkpoints or None,
            keep_every=train.keep_checkpoint_every or None,
        )
        stack.callback(store.close)
        position = start(args, model, store, layout, optimizer, say)
        position = fitted(position, data.loader, train.restart_data, say)
        batches = data.loader.batches(position.data)
        over = position.step > data.total_steps
        if over:
            say(f"    over  step {position.step} is beyond {data.total_steps}: nothing to train")
        if first and not (over and recipe.exists()):
            for change in changes(args, recipe) if position.step else ():
                say(f" changed  {change}")
            dump(args, recipe)
            if position.step == 0:
                (output / METRICS_FILE).unlink(missing_ok=True)  # of a run that never saved
        logger = stack.enter_context(
            Logger(output, data.total_steps, position.step, silent=not first)
        )
        meter = Meters(data, model, mesh, peak, store, logger.say)
        if train.use_wandb and first:
            config = attrs.asdict(args)
            logger.wandb = Wandb(
                WandbConfig(train.wandb_project, train.wandb_name, output, config), logger.say
            )
        profiler = stack.enter_context(Profiler(_profile(args) if first else None))
        key = rng.name_key(rng.key(train.seed, mesh.device), "eval")

        evaluated = together.broadcast(evaluations(output / METRICS_FILE) if first else None)

        def evaluate(at: Position) -> bool:
            """Whether it came to its end; else the run was asked to stop."""
            if held_out is None:
                return True
            if at.step not in evaluated:
                loss = held_out_loss(eval_step, at.state.params, held_out, key, mesh, stop)
                if loss is None:
                    return False
                logger.log(at.step, {"eval_loss": loss})
                evaluated[at.step] = loss
            else:
                logger.say(f"step {at.step}: held-out loss {evaluated[at.step]:.4f}")
            return True

        dispatched: Dispatched | None = None
        stopping, whole = stop.agreed(mesh.world), True
        try:
            # of a step that was saved, the evaluation may be missing: a kill came in between
            if position.step == 0 or _due(position.step, train.eval_steps):
                stopping = not evaluate(position) or stopping

            while position.step < data.total_steps and not stopping:
                profiler.step(position.step)
                waiting = time.perf_counter()
                batch, data_state = next(batches)
                waited, whole = time.perf_counter() - waiting, False
                state, metrics = train_step(position.state, to_device(batch, mesh.device))
                position = attrs.evolve(position, state=state, data=data_state)
                whole = True
                # the device is busy with this step: time to look at what the last one gave
                position = report(dispatched, position, logger, meter, train.max_skipped_steps)
                dispatched = Dispatched(data_state, metrics, batch, waited)

                stopping = stop.agreed(mesh.world)
                if position.step == data.total_steps or stopping:
                    break
                if _due(position.step, train.save_steps, train.save_epochs * data.epoch_steps):
                    position = report(dispatched, position, logger, meter, train.max_skipped_steps)
                    dispatched = None
                    store.save(position.step, position.tree())
                if _due(position.step, train.eval_steps):
                    stopping = not evaluate(position)
                if _due(position.step, train.empty_cache_steps):
                    empty_cache()

            position = report(dispatched, position, logger, meter, train.max_skipped_steps)
            save(store, position)
        except BaseException as error:
            # Whatever ends a run: what was trained is kept. On several ranks only where all meet
            # the same error at the same step, for they save together; the data's errors are so.
            together_met = world_size == 1 or isinstance(error, DataError)
            if whole and together_met and position.step > 0 and not isinstance(error, ALONE):
                position = report(dispatched, position, logger, meter, train.max_skipped_steps)
                save(store, position)
                logger.say(f"saved at step {position.step}, since the run ends")
            raise
        meter.saves()
        if (stopping and position.step < data.total_steps) or not evaluate(position):
            logger.say(
                f"stopped and saved at step {position.step}; go on with "
                "--train.load_checkpoint_path auto"
            )
            return RESUME_ME
        if train.save_hf_weights:
            template = build.open_chat_template(args.data, tokenizer, images)
            weights = export_weights(model.tree, model.names, position.state.params, layout)
            export(output / "hf", model, weights, tokenizer, template, together)
    if first:
        finish(args, output, model, images, position, mesh, logger.say)
    return 0


def save(store: CheckpointStore, position: Position) -> None:
    """Waits until it is done; a step is not saved twice."""
    if position.step not in store.steps():
        store.save(position.step, position.tree())
    store.wait()


def evaluations(metrics: Path) -> dict[int, float]:
    """The held-out losses that metrics.jsonl holds, by step."""
    rows = [row for row in read_metrics(metrics) if "eval_loss" in row]
    return {r["step"]: math.nan if r["eval_loss"] is None else r["eval_loss"] for r in rows}


def held_out_loss(
    eval_step: Callable[..., Any],
    params: Tree,
    loader: Loader,
    key: Tensor,
    mesh: Mesh,
    stop: Stop,
) -> float | None:
    """Mean loss per target over the whole set, in nats; None where the run was asked to stop
    meanwhile. Data ranks take the batches in turn; where they run out, some take the last one again
    at no weight."""
    total, weight, me = 0.0, 0.0, mesh.index("dp_replicate", "dp_shard")
    batches = loader.eval_batches()
    while some := list(itertools.islice(batches, mesh.data_ranks)):
        batch = some[min(me, len(some) - 1)]
        if me >= len(some):
            batch = attrs.evolve(batch, weights=torch.zeros_like(batch.weights))
        sums = eval_step(params, to_device(batch, mesh.device), key)
        total, weight = total + float(sums[0]), weight + float(sums[1])
        if stop.agreed(mesh.world):
            return None
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


def finish(
    args: Arguments,
    output: Path,
    model: Model,
    images: ImageRules | None,
    position: Position,
    mesh: Mesh,
    say: Say,
) -> None:
    """The picture, a sample of what was learned, and where everything is."""
    try:
        plot_losses(output / METRICS_FILE, output / "loss.png")
    except Exception as error:  # a picture: matplotlib, its fonts, the disk
        say(f"no loss.png: {error}")
    params, hf = position.state.params, output / "hf"
    if args.infer.prompt is not None and mesh.world.size > 1 and not args.train.save_hf_weights:
        say("no sample of text: with several ranks it needs train.save_hf_weights")
    elif args.infer.prompt is not None:
        from omnistep.bin.ask import Ask
        from omnistep.bin.sample import continuation

        if mesh.world.size > 1:  # this rank holds a piece of them
            dtype = param_dtype(args.train, model)
            params = read_weights(str(hf), model, dtype, mesh.device)
        tokenizer = build.read_tokenizer(args.model, model.cfg)
        template = None
        if args.infer.chat:
            template = build.open_chat_template(args.data, tokenizer, images)
        ask = Ask(tokenizer, images, template)
        text = continuation(args.infer, model, params, ask)
        say(f"\n{args.infer.prompt}{text}\n")
    places = {
        "checkpoints": args.train.checkpoint_dir or output / "checkpoints",
        "metrics": output / METRICS_FILE,
        "loss curve": output / "loss.png",
        "recipe": output / "recipe.yaml",
    }
    if args.train.save_hf_weights:
        places["weights"] = hf
    for name, place in places.items():
        say(f"{name:>12}  {place}")
    data = position.data
    read = {
        "records skipped": data.skipped,
        "records left out (nothing to learn)": data.unlearnt,
        "samples cut to data.max_seq_len": data.cut,
    }
    if any(read.values()):
        say(f"{'read':>12}  " + ", ".join(f"{n} {what}" for what, n in read.items() if n))


if __name__ == "__main__":
    sys.exit(main())
