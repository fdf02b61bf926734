"""What the arguments mean together: what is not available yet, what is impossible, what follows.

`resolve` is the one door: it fills in every value that depends on others and raises
`ConfigError` where the result cannot be run.
"""

import datetime
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

import attrs

from omnistep.core.config import (
    ARGUMENTS,
    TRAIN,
    Arguments,
    Command,
    DataArguments,
    InferArguments,
    ModelArguments,
    Names,
    TrainArguments,
    value_of,
)
from omnistep.core.config_errors import ConfigError, Problem
from omnistep.core.config_mesh import data_ranks, mesh_problems, split_names
from omnistep.core.config_types import nearest, shown

NOT_YET: Mapping[str, tuple[Any, ...]] = {
    "model.decoders": ({},),
    "model.input_encoder": ("encoder",),
    "model.output_encoder": ("decoder",),
    "model.encode_target": (False,),
    "train.enable_fsdp_offload": (False,),
    "train.enable_activation_offload": (False,),
    "train.activation_gpu_limit": (0.0,),
}
"""Arguments not every value of which is available yet, and the values that are."""

PARTS: tuple[str, ...] = ("encoder", "projector", "language_model")
"""What a model with a tower in front is made of, in the order in which they run; others are a
language model alone."""

ENCODER_PATHS = ("config_path", "model_path")
"""The keys of an encoder (model.encoders) that are not of its configuration."""

TEXT_KEYS: Mapping[str, Names] = {
    "plaintext": ("content_split", "text"),
    "conversation": "messages",
}
"""Where a record's text is, unless data.text_keys says so."""
DATASETS = "omnistep.datasets"
"""The group of entry points under which an installed package registers datasets by name."""
SHIPPED = "omnistep:"
"""How a path into the installed package begins."""


def _is_date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


# ---- what follows from what ----------------------------------------------------------------


def expand_path(path: str) -> str:
    """`omnistep:data/x.txt` to the file x.txt inside the installed package omnistep.data.

    Every other path is returned as it is, relative to the current directory; so is one whose
    first folder is no package of omnistep (`problems` reports it).
    """
    folder, *parts = path.removeprefix(SHIPPED).split("/")
    if not path.startswith(SHIPPED) or not folder.isidentifier():
        return path
    try:
        package = importlib.resources.files(f"omnistep.{folder}")
    except ModuleNotFoundError:
        return path
    return str(package.joinpath(*parts))


def expand_paths(paths: str) -> str:
    """`expand_path` on each part of a comma-separated list."""
    if SHIPPED not in paths:
        return paths
    return ",".join(expand_path(part.strip()) for part in paths.split(","))


def derive(args: Arguments, *, world_size: int, cuda: bool) -> Arguments:
    """Fills in what depends on other arguments. Pure; applied twice it changes nothing more.

    - every path to read: `omnistep:` is expanded
    - model.config_path: model.model_path; model.tokenizer_path: model_path, then config_path
    - data.text_keys: content_split, then text, for plaintext; messages for conversation
    - train.global_batch_size: micro_batch_size * data ranks
    - train.init_device: cuda becomes cpu without a CUDA device
    - train.compute_dtype: bfloat16 on CUDA, float32 on CPU; without mixed precision it stays None
      (the model config's dtype), save that anyprecision_adamw makes it bfloat16
    - infer.tokenizer_path: infer.model_path; infer.compute_dtype: as train.compute_dtype
    """
    args = _expand_all(args)
    by_device = "bfloat16" if cuda else "float32"
    return attrs.evolve(
        args,
        model=_derive_model(args.model),
        data=_derive_data(args.data),
        train=_derive_train(args.train, world_size, cuda, by_device),
        infer=attrs.evolve(
            args.infer,
            tokenizer_path=args.infer.tokenizer_path or args.infer.model_path or None,
            compute_dtype=args.infer.compute_dtype or by_device,
        ),
    )


def _expand_all(args: Arguments) -> Arguments:
    changes: dict[str, dict[str, str]] = {}
    for name, argument in ARGUMENTS.items():
        value = value_of(args, name)
        if argument.info.path and value:
            section, key = name.split(".")
            several = name in ("data.train_path", "data.eval_path")
            changes.setdefault(section, {})[key] = (expand_paths if several else expand_path)(value)
    sections = {name: attrs.evolve(getattr(args, name), **new) for name, new in changes.items()}
    return attrs.evolve(args, **sections)


def _derive_model(model: ModelArguments) -> ModelArguments:
    config_path = model.config_path or model.model_path
    return attrs.evolve(
        model,
        config_path=config_path,
        tokenizer_path=model.tokenizer_path or model.model_path or config_path,
    )


def _derive_data(data: DataArguments) -> DataArguments:
    return attrs.evolve(data, text_keys=data.text_keys or TEXT_KEYS[data.data_type])


def _derive_train(
    train: TrainArguments, world_size: int, cuda: bool, by_device: str
) -> TrainArguments:
    dtype = train.compute_dtype
    if dtype is None and train.enable_mixed_precision:
        dtype = by_device
    elif dtype is None and train.optimizer == "anyprecision_adamw":
        dtype = "bfloat16"
    return attrs.evolve(
        train,
        global_batch_size=train.global_batch_size
        or train.micro_batch_size * data_ranks(train, world_size),
        init_device="cpu" if train.init_device == "cuda" and not cuda else train.init_device,
        compute_dtype=dtype,
    )


# ---- what is wrong -------------------------------------------------------------------------


def problems(args: Arguments, *, world_size: int, command: Command = TRAIN) -> list[Problem]:
    """Everything wrong with derived arguments in the sections that the command needs."""
    found: list[Problem] = []
    for step in (
        _each_alone(args),
        (*_not_yet(args), *mesh_problems(args, world_size)),
        (*_model_and_data(args), *_batch(args, world_size)),
        (*_parts(args.train), *_optimisation(args.train)),
        (*_precision(args.train), *_infer(args.infer)),
    ):
        # a value that is wrong by itself says nothing about its combinations
        bad = {name for problem in found for name in problem.names}
        found += [problem for problem in step if bad.isdisjoint(problem.names)]
    return [p for p in found if not p.names or p.names[0].split(".")[0] in command.needs]


def _each_alone(args: Arguments) -> Iterator[Problem]:
    for name, argument in ARGUMENTS.items():
        value, limits = value_of(args, name), argument.info.limits
        if argument.info.required and value == "":
            yield Problem((name,), f"required, in the recipe or by --{name}: {argument.info.help}")
        if isinstance(value, int | float) and not limits.hold(value):
            yield Problem((name,), f"must be {limits}")
        if argument.info.path and value and f",{SHIPPED}" in f",{value}":
            text = f"`{SHIPPED}` is followed by a file of the installed package, as in "
            yield Problem((name,), f"{text}{SHIPPED}data/shakespeare/train.txt")
    kind, known = args.data.datasets_type, ("mapping", "iterable")
    if kind not in known and not re.fullmatch(r"[\w.]+:\w+", kind):
        known += tuple(entry.name for entry in entry_points(group=DATASETS))
        if kind not in known:
            text = f"must be {', '.join(known)} or package.module:function{nearest(kind, known)}"
            yield Problem(("data.datasets_type",), text)
    if (date := args.data.chat_date) is not None and not _is_date(date):
        yield Problem(("data.chat_date",), f"{shown(date)} is no date as in 2026-11-27")
    if kind == "mapping" and args.data.shuffle_buffer is not None:
        text = "shuffles streams; by random access (data.datasets_type mapping) all is shuffled"
        yield Problem(("data.shuffle_buffer", "data.datasets_type"), text)
    if args.train.keep_checkpoint_every and not args.train.keep_checkpoints:
        text = "says what is kept beside the newest; train.keep_checkpoints 0 keeps all"
        yield Problem(("train.keep_checkpoint_every", "train.keep_checkpoints"), text)
    if "://" in args.train.output_dir:
        text = "must be a local directory; train.checkpoint_dir may be in a bucket"
        yield Problem(("train.output_dir",), text)
    for name in ("train.checkpoint_dir", "train.load_checkpoint_path"):
        place = value_of(args, name) or ""
        if "://" in place and not re.fullmatch(r"(gs|s3)://[^/]+(/.*)?", place):
            yield Problem((name,), "must be a local path, gs://bucket/path or s3://bucket/path")
    if args.train.empty_cache_steps == 0:
        yield Problem(("train.empty_cache_steps",), "must be at least 1, or -1 for never")


def _not_yet(args: Arguments) -> Iterator[Problem]:
    for name, available in NOT_YET.items():
        if value_of(args, name) not in available:
            only = " or ".join(map(shown, available))
            unset = value_of(args, name) == ARGUMENTS[name].default
            advice = f"; set {name}: {available[0]}" if unset else ""
            yield Problem((name,), f"not available yet (only {only}){advice}")


def _model_and_data(args: Arguments) -> Iterator[Problem]:
    if not args.model.config_path:
        yield Problem(
            ("model.config_path", "model.model_path"),
            "one of them is required: model_path starts from weights, config_path from random ones",
        )
    for modality, encoder in args.model.encoders.items():
        if modality != "image":
            text = f"only encoders of images are available yet, not of {modality!r}"
            yield Problem(("model.encoders",), text)
        elif not _has_paths(encoder):
            text = (
                "an encoder is {image: {config_path: ..., model_path: ...}}, at least one of both"
            )
            yield Problem(("model.encoders",), text)
    if args.train.eval_steps and not args.data.eval_path:
        yield Problem(("train.eval_steps", "data.eval_path"), "evaluation needs data.eval_path")


def _has_paths(encoder: Any) -> bool:
    """One path at least; what is null is not given."""
    if not isinstance(encoder, dict):
        return False
    paths = [encoder[key] for key in ENCODER_PATHS if encoder.get(key) is not None]
    return bool(paths) and all(isinstance(path, str) for path in paths)


def _batch(args: Arguments, world_size: int) -> Iterator[Problem]:
    train, row = args.train, args.train.micro_batch_size * args.data.max_seq_len
    ranks = data_ranks(train, world_size)
    unit = train.micro_batch_size * ranks
    whole = train.global_batch_size or unit
    if unit > 0 and whole % unit:
        below, above = whole // unit * unit, (whole // unit + 1) * unit
        yield Problem(
            ("train.global_batch_size", "train.micro_batch_size", *split_names(args)),
            "the global batch must be a multiple of micro_batch_size * data ranks = "
            f"{train.micro_batch_size} * {ranks} = {unit}; nearest: "
            + (f"{below} or {above}" if below else f"{above}"),
        )
    packed = train.rmpad or train.rmpad_with_pos_ids
    if train.rmpad and train.rmpad_with_pos_ids:
        text = "both pack samples, each in its own way; set one of them to false"
        yield Problem(("train.rmpad", "train.rmpad_with_pos_ids"), text)
    if packed and train.dyn_bsz_margin >= row:
        yield Problem(
            ("train.dyn_bsz_margin", "train.micro_batch_size", "data.max_seq_len"),
            f"the margin must be below the {row} tokens of a row (micro_batch_size * max_seq_len)",
        )
    for name in ("dyn_bsz_margin", "bsz_warmup_ratio"):
        if getattr(train, name) and not packed:
            text = "means something for packed rows only; set rmpad_with_pos_ids or rmpad"
            yield Problem((f"train.{name}",), text)


def _parts(train: TrainArguments) -> Iterator[Problem]:
    freeze = (train.freeze,) if isinstance(train.freeze, str) else train.freeze or ()
    if unknown := [part for part in freeze if part not in PARTS]:
        text = f"{unknown[0]!r} is not one of {', '.join(PARTS)}"
        yield Problem(("train.freeze",), text)
    for part in ("encoder", "projector"):
        if getattr(train, f"{part}_lr") is None:
            continue
        if part in freeze:
            text = f"the {part} is frozen: leave its learning rate out"
            yield Problem((f"train.{part}_lr", "train.freeze"), text)
        if train.lr == 0:
            text = "it follows the path of train.lr, scaled, so train.lr must be above 0"
            yield Problem((f"train.{part}_lr", "train.lr"), text)


def _optimisation(train: TrainArguments) -> Iterator[Problem]:
    if train.lr_min > train.lr:
        yield Problem(("train.lr_min", "train.lr"), "lr_min must not be above lr")
    if train.lr_warmup_ratio > train.lr_decay_ratio:
        text = "the warm-up must not end after the decay"
        yield Problem(("train.lr_warmup_ratio", "train.lr_decay_ratio"), text)
    if train.enable_profiling and train.profile_end_step <= train.profile_start_step:
        text = "the end must be above the start: steps in [start, end) are traced"
        yield Problem(("train.profile_start_step", "train.profile_end_step"), text)


def _precision(train: TrainArguments) -> Iterator[Problem]:
    if train.enable_mixed_precision and train.compute_dtype == "float64":
        text = "float64 is for everything at once; set enable_mixed_precision: false"
        yield Problem(("train.compute_dtype", "train.enable_mixed_precision"), text)
    elif (
        not train.enable_mixed_precision
        and train.optimizer == "anyprecision_adamw"
        and train.compute_dtype != "bfloat16"
    ):
        yield Problem(
            ("train.compute_dtype", "train.optimizer", "train.enable_mixed_precision"),
            "anyprecision_adamw keeps bfloat16 weights, and without mixed precision everything "
            "is of one dtype; set compute_dtype: bfloat16",
        )


def _infer(infer: InferArguments) -> Iterator[Problem]:
    if infer.prompt is not None and infer.prompt_file is not None:
        yield Problem(("infer.prompt", "infer.prompt_file"), "set one of them")
    if infer.image is not None and infer.prompt is None:
        text = "it is shown with infer.prompt: set that too (in a chat, `image PATH` shows one)"
        yield Problem(("infer.image",), text)


def resolve(args: Arguments, *, world_size: int, cuda: bool, command: Command = TRAIN) -> Arguments:
    """The arguments of a run that can be started: `derive`, then nothing wrong. Pure.

    `world_size` is the number of processes, `cuda` whether they have a CUDA device. Raises
    ConfigError with every problem found.
    """
    derived = derive(args, world_size=world_size, cuda=cuda)
    found = problems(derived, world_size=world_size, command=command)
    if found:
        given = [name for name, row in ARGUMENTS.items() if value_of(args, name) != row.default]
        origins = dict.fromkeys(given, "given")
        raise ConfigError([described(problem, derived, origins) for problem in found])
    return derived


def described(problem: Problem, args: Arguments, origins: Mapping[str, str]) -> str:
    """One line: each argument with its value and where that came from, then the text.

    `origins` maps the arguments that were given to where they were given.
    """
    parts = []
    for name in problem.names:
        value, argument = value_of(args, name), ARGUMENTS[name]
        unset = "default" if value == argument.default else "derived"
        missing = argument.info.required and value == ""
        parts.append(name if missing else f"{name} = {shown(value)} ({origins.get(name, unset)})")
    return ": ".join(filter(None, [", ".join(parts), problem.text]))
