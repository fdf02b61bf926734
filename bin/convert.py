"""bin/convert: weights from one form into another, tensor by tensor.

An Origin (origin.py) gives tensors by their Hugging Face names; a directory of Hugging Face files
or the first checkpoint of a run is made of them.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor

from omnistep.bin import build
from omnistep.bin.export import export
from omnistep.bin.model import (
    DTYPES,
    Model,
    RunError,
    make_model,
    param_dtype,
    read_model,
    read_preprocessors,
    with_frozen,
)
from omnistep.bin.origin import PARAMS, Origin, kind_of, open_origin
from omnistep.bin.position import first, first_key
from omnistep.core import param, rng
from omnistep.core.checkpoint.pieces import LazyTensor
from omnistep.core.checkpoint.place import Bucket, Place, committed, is_url, open_place
from omnistep.core.checkpoint.protocol import CheckpointError
from omnistep.core.checkpoint.ranks import ALONE
from omnistep.core.checkpoint.safetensors import INDEX, SINGLE
from omnistep.core.checkpoint.shards import Streamed, chunk_shape
from omnistep.core.checkpoint.store import open_store
from omnistep.core.config import Arguments, Command
from omnistep.core.config_errors import ConfigError
from omnistep.core.config_help import help_text
from omnistep.core.config_io import COMMAND_LINE, collect, parse, read_command_line, wants_help
from omnistep.core.config_rules import resolve
from omnistep.core.param import is_param
from omnistep.core.screen import show, show_error, visible, write_all_characters
from omnistep.core.step import init_state
from omnistep.core.tree import leaves_with_names, map_with_name
from omnistep.data.chat import Template
from omnistep.data.errors import DataError
from omnistep.data.tokenizer import Tokenizer
from omnistep.models import hf
from omnistep.models.hf_config import ConfigJsonError
from omnistep.parallel.mesh import Mesh

CONVERT = Command(
    "omnistep-convert",
    """Converts weights, one tensor at a time: memory does not grow with the model.

SOURCE is what it looks like:
  checkpoint   outputs/run, outputs/run/checkpoints (their newest step), .../checkpoints/40
  hf           a Hugging Face directory, or a .safetensors file
  dcp          a torch.distributed.checkpoint whose tensors have the model's Hugging Face names,
               perhaps behind one prefix

TARGET is written completely or not at all. It must not exist, save as an older export.
  --to hf          config, weights and tokenizer, as training exports them (the default, but for a
                   SOURCE hf)
  --to checkpoint  step 0 of a new run, for --train.load_checkpoint_path: these weights, all else
                   as at the start. Give it the recipe of that run
  --dtype NAME     of the weights in a TARGET hf: float32, bfloat16, float16, float64 (default:
                   as they are)
  --prefix NAME    of the tensors in a SOURCE dcp (default: the one there is)

A checkpoint's model and tokenizer are those of its run: its own config.json, and the recipe.yaml
beside the checkpoints. What is given here wins.""",
    reads=(
        "model.config_path",
        "model.tokenizer_path",
        "data.data_type",
        "data.chat_template",
        "train.optimizer",
        "train.enable_mixed_precision",
        "train.compute_dtype",
        "train.seed",
    ),
    needs=(),
    words="SOURCE TARGET [recipe.yaml]",
)

WRITTEN = {**DTYPES, "float16": torch.float16}
TARGETS = ("hf", "checkpoint")
READ_FOR = {
    "hf": ("model.config_path", "model.tokenizer_path", "data."),
    "checkpoint": ("model.config_path", "train."),
}
"""What begins the names of the arguments that mean something for a target."""

EXPECTED = (RunError, DataError, ConfigJsonError, CheckpointError, OSError)


def main(argv: list[str] | None = None) -> int:
    write_all_characters()
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        print(help_text(CONVERT))
        return 0
    try:
        run(read_job(argv))
    except ConfigError as error:
        show_error(error)
        return 2
    except EXPECTED as error:
        show_error(error)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    return 0


# ---- what is asked for -----------------------------------------------------------------------


@frozen
class Job:
    source: str
    target: Place
    to: str
    dtype: torch.dtype | None
    prefix: str | None
    argv: tuple[str, ...]
    """The recipe, if one was given, and arguments."""


def read_job(argv: Sequence[str]) -> Job:
    """The command line. Raises ConfigError for what it does not allow."""
    words, texts = read_command_line(argv)
    if len(words) not in (2, 3):
        raise ConfigError([f"expected {CONVERT.words}; given: {' '.join(words) or 'nothing'}"])
    to, dtype = _option(texts, "to", TARGETS), _option(texts, "dtype", WRITTEN)
    prefix = _option(texts, "prefix")
    to = to or ("checkpoint" if kind_of(words[0]) == "hf" else "hf")
    if dtype is not None and to == "checkpoint":
        text = "train.enable_mixed_precision, train.compute_dtype and train.optimizer"
        raise ConfigError([f"--dtype is for a TARGET hf; that of a checkpoint follows from {text}"])
    options = (f"--{name}" if text is None else f"--{name}={text}" for name, text in texts.items())
    given = collect(rest := (*words[2:], *options), CONVERT)
    idle = [name for name in given.origins if not name.startswith(READ_FOR[to])]
    idle = [name for name in idle if given.origins[name] == COMMAND_LINE]
    if given.errors or idle:
        problems = [f"{name} ({COMMAND_LINE}): means nothing for a TARGET {to}" for name in idle]
        raise ConfigError([*given.errors, *([] if given.errors else problems)])
    try:
        target = open_place(words[1]) if is_url(words[1]) else Path(words[1]).expanduser()
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if to == "hf" and not isinstance(target, Path):
        raise ConfigError(
            [f"{target}: a TARGET hf is a local directory; only checkpoints may be in a bucket"]
        )
    return Job(words[0], target, to, None if dtype is None else WRITTEN[dtype], prefix, rest)


def _option(texts: dict[str, str | None], name: str, allowed: Collection[str] = ()) -> str | None:
    """Takes `--name value` out of the command line; None where it is not there."""
    if name not in texts:
        return None
    value = texts.pop(name)
    if value is None or (allowed and value not in allowed):
        choice = f"one of {', '.join(allowed)}" if allowed else "a value"
        raise ConfigError([f"--{name}{'' if value is None else f' {value}'}: expected {choice}"])
    return value


def arguments(job: Job, origin: Origin) -> Arguments:
    """Those of the recipe and the command line, or of the run that wrote the checkpoint; derived
    as for training."""
    has_recipe = len(job.argv) > 0 and not job.argv[0].startswith("-")
    recipe = [] if has_recipe or origin.recipe is None else [str(origin.recipe)]
    args = parse([*recipe, *job.argv], CONVERT)
    if origin.kind == "hf":
        args = attrs.evolve(args, model=attrs.evolve(args.model, model_path=job.source))
    return resolve(args, world_size=1, cuda=False, command=CONVERT)


def model_of(job: Job, origin: Origin, args: Arguments) -> Model:
    """By the config.json that was given, else the source's own, else the recipe's."""
    given = parse(job.argv, CONVERT).model.config_path
    if given is None and origin.config is not None:
        return with_frozen(make_model(origin.config, read_preprocessors(args.model)), args.train)
    if args.model.config_path is None or (given is None and origin.kind == "hf"):
        raise RunError(f"{job.source} has no config.json of the model: give --model.config_path")
    return with_frozen(read_model(args.model), args.train)


# ---- the target ------------------------------------------------------------------------------


def run(job: Job) -> None:
    check_target(job)
    origin = open_origin(job.source, job.prefix)
    args = arguments(job, origin)
    model = model_of(job, origin, args)
    try:
        source = origin.weights(model)
        # looks at all names and shapes
        weights = hf.relayed_weights(model.tree, model.names, source, job.dtype)
    except ValueError as error:
        raise RunError(str(error)) from error
    if job.to == "hf":
        size = to_hf(job, origin, args, model, weights)
    else:
        size = to_checkpoint(job, args, model, source)
    text = f"{size / 1e9:.2f} GB" if size > 1e9 else f"{size / 1e6:.2f} MB"
    show(f"{origin.text} -> {job.to} {job.target}, {text}")
    if job.to == "checkpoint":
        show(f"train from it with --train.load_checkpoint_path {job.target}")


def check_target(job: Job) -> None:
    """Raises RunError where something stands that must not be overwritten."""
    target = job.target
    if isinstance(target, Bucket):
        if steps := committed(target):
            raise RunError(
                f"{target} holds checkpoints, as of step {steps[-1]}: choose another TARGET"
            )
        return
    if not target.exists():
        return
    if target.resolve() == Path(job.source).expanduser().resolve():
        raise RunError(f"source and target are one: {target}")
    held = sorted(path.name for path in target.iterdir()) if target.is_dir() else [target.name]
    if job.to == "checkpoint":  # what a killed save leaves behind, the next one deletes
        held = [name for name in held if ".orbax-checkpoint-tmp" not in name]
    elif _is_export(target):
        return
    if held:
        raise RunError(
            f"{target} holds {held[0]}{' and more' * (len(held) > 1)}, which would be mixed up "
            "with what is written: choose another TARGET, or remove it"
        )


def _is_export(target: Path) -> bool:
    has_weights = (target / SINGLE).is_file() or (target / INDEX).is_file()
    return has_weights and (target / "config.json").is_file()


def to_hf(
    job: Job, origin: Origin, args: Arguments, model: Model, weights: Mapping[str, LazyTensor]
) -> int:
    """Aside, then by one rename, where there is nothing yet; an older export's files are replaced
    as training does it. Returns the bytes of the weights."""
    assert isinstance(job.target, Path)
    tokenizer, template = speech(job, origin, args, model)
    size = sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in weights.values())
    target, is_new = job.target.resolve(), not _is_export(job.target)
    place = target.with_name(f".{target.name}.unfinished") if is_new else target
    try:
        if is_new:
            shutil.rmtree(place, ignore_errors=True)  # of a killed conversion
        with Progress(size) as progress:
            watched = {
                name: attrs.evolve(tensor, read=partial(progress.watch, name, tensor.read))
                for name, tensor in weights.items()
            }
            export(place, model, watched, tokenizer, template, ALONE)
        if is_new:
            place.rename(target)
    finally:
        if is_new:
            shutil.rmtree(place, ignore_errors=True)
    return size


def speech(
    job: Job, origin: Origin, args: Arguments, model: Model
) -> tuple[Tokenizer | None, Template | None]:
    """The tokenizer, and the template of a run on conversations. Where none was asked for and there
    is none, it is left out, and said so."""
    given = collect(job.argv, CONVERT)
    # without a recipe nothing is known of the data: the tokenizer's own template stays
    has_data = origin.recipe is not None or any(n.startswith("data.") for n in given.origins)
    try:
        if args.model.tokenizer_path is None:
            raise DataError("none is known")
        tokenizer = build.read_tokenizer(args.model, model.cfg)
        if not has_data:
            return tokenizer, None
        images = build.make_image_rules(args, model, Mesh(torch.device("cpu")))
        return tokenizer, build.open_chat_template(args.data, tokenizer, images)
    except (DataError, RunError) as error:
        if given.args.model.tokenizer_path is not None:
            raise
        show(f"no tokenizer is written: {error}; --model.tokenizer_path names one")
        return None, None


def to_checkpoint(job: Job, args: Arguments, model: Model, source: hf.Source) -> int:
    """Step 0 of a run, as bin/position.py starts one from the same weights. Returns its bytes."""
    optimizer, dtype = build.make_optimizer(args.train, model), param_dtype(args.train, model)
    weights = param.abstract(model.tree, dtype)
    state = init_state(weights, optimizer, rng.key(0, "meta"))
    tree = first(attrs.evolve(state, key=first_key(args)), model).tree()
    size = sum(t.nbytes for t in leaves_with_names(tree).values() if isinstance(t, Tensor))
    params = leaves_with_names(model.tree, is_leaf=is_param)
    is_new = isinstance(job.target, Path) and not job.target.exists()

    def stream(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.device.type != "meta":
            return leaf
        blocks = partial(zero_blocks, leaf)
        if name.startswith(PARAMS):
            ours = name.removeprefix(PARAMS)
            blocks = partial(hf.import_blocks, ours, params[ours], model.names, source, dtype)
        return Streamed(tuple(leaf.shape), leaf.dtype, partial(progress.each, name, blocks))

    store = open_store(str(job.target))
    try:
        with Progress(size) as progress:
            store.save(0, map_with_name(stream, tree))
            store.wait()
    except BaseException:
        with contextlib.suppress(CheckpointError):
            store.wait()  # in the background it ends soon: there are no more blocks
        if is_new:
            shutil.rmtree(str(job.target), ignore_errors=True)
        raise
    finally:
        store.close()
    return size


Block = tuple[tuple[int, ...], Tensor]


def zero_blocks(like: Tensor) -> Iterator[Block]:
    """(offset, zeros) pairs that cover a tensor like this, in as many rows as a chunk has."""
    if like.ndim == 0:
        yield (), torch.zeros((), dtype=like.dtype)
        return
    rows = chunk_shape(like.shape, [[] for _ in like.shape], like.itemsize)[0]
    for start in range(0, like.shape[0], rows):
        shape = (min(rows, like.shape[0] - start), *like.shape[1:])
        yield (start, *(0,) * (like.ndim - 1)), torch.zeros(shape, dtype=like.dtype)


@define
class Progress:
    """A line on the terminal while large weights are on their way: how much, how fast, which."""

    total: int
    """Bytes."""
    stream: TextIO = field(factory=lambda: sys.stderr)
    done: int = 0
    began: float = field(factory=time.monotonic)
    shown: float = field(factory=time.monotonic)
    """When; at first, when it began: what takes less than a second shows nothing."""
    is_over: bool = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.is_over = True
        if self.shown > self.began and self.stream.isatty():
            print("\r\033[K", end="", file=self.stream, flush=True)

    def watch(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        value = read()
        self._add(name, value)
        return value

    def each(self, name: str, blocks: Callable[[], Iterable[Block]]) -> Iterator[Block]:
        for offset, values in blocks():
            if self.is_over:
                raise InterruptedError("stopped")
            self._add(name, values)
            yield offset, values

    def _add(self, name: str, value: Tensor) -> None:
        self.done += value.nbytes
        now = time.monotonic()
        if now - self.shown < 1 or not self.stream.isatty():
            return
        self.shown = now
        rate = self.done / (now - self.began)
        line = f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s  {name}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{visible(line)[:width]}", end="", file=self.stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
