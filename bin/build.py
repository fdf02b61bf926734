"""What a run is made of: each part built from the resolved arguments."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen

from omnistep.bin.image_rules import read_preprocessor
from omnistep.core import optim, param, rng
from omnistep.core.checkpoint.place import Place, committed, open_place
from omnistep.core.checkpoint.ranks import Ranks
from omnistep.core.checkpoint.safetensors import open_weights
from omnistep.core.config import Arguments, DataArguments, ModelArguments, TrainArguments
from omnistep.core.config_mesh import mesh_sizes
from omnistep.core.param import Layout
from omnistep.core.schedule import make_schedule
from omnistep.core.step import Schedule
from omnistep.core.tree import Tree
from omnistep.data.chat import Template, open_template
from omnistep.data.loader import Loader, make_loader
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.sources import Described, open_reader
from omnistep.data.steps import packed_steps, padded_steps
from omnistep.data.tokenizer import Tokenizer, load_tokenizer
from omnistep.models import decoder, hf, hf_config
from omnistep.models.cost import active
from omnistep.models.hf_names import Names, weight_names
from omnistep.models.hf_vision import with_preprocessor
from omnistep.parallel import mesh as meshes
from omnistep.parallel.layout import Strategy
from omnistep.parallel.mesh import Mesh, MeshError
from omnistep.parallel.remat import Remat


class RunError(Exception):
    """Something a run was given does not fit; str() says what, and what would."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@frozen(eq=False)
class Model:
    """A model before it has values."""

    raw: Mapping[str, Any]
    """The config.json as it was read."""
    cfg: decoder.Config
    tree: Tree
    """Of Params."""
    names: Names
    """Of its weights in files."""


def read_model(args: ModelArguments) -> Model:
    path = args.config_path or ""
    return make_model(hf_config.read_config_json(path), read_preprocessor(path))


def make_model(raw: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Model:
    """The model that a config.json describes; the preprocessor_config.json beside it says what is
    taken off the pixels of a tower."""
    cfg = hf_config.decoder_config(raw)
    if cfg.tower and preprocessor:
        cfg = attrs.evolve(cfg, tower=with_preprocessor(cfg.tower, preprocessor))
    return Model(raw, cfg, decoder.params(cfg), weight_names(raw, cfg))


def read_tokenizer(args: ModelArguments, cfg: decoder.Config) -> Tokenizer:
    """Raises RunError when the tokenizer has ids the model's embedding has no row for."""
    tokenizer = load_tokenizer(args.tokenizer_path or "")
    if tokenizer.vocab_size > cfg.vocab:
        raise RunError(
            f"the tokenizer {tokenizer.path} has ids up to {tokenizer.vocab_size - 1}, but the "
            f"model's vocabulary is {cfg.vocab} ({args.config_path}): set vocab_size to at least "
            f"{tokenizer.vocab_size}, or give model.tokenizer_path the tokenizer of this model"
        )
    return tokenizer


def open_chat_template(args: DataArguments, tokenizer: Tokenizer) -> Template | None:
    """The one that conversations are trained by; None where there are none."""
    return (
        open_template(args.chat_template, tokenizer) if args.data_type == "conversation" else None
    )


def make_mesh(args: TrainArguments, world_size: int) -> Mesh:
    return meshes.make_mesh(mesh_sizes(args, world_size), meshes.pick_device(args.init_device))


def make_layout(args: TrainArguments, model: Model, mesh: Mesh) -> Layout:
    """Where the parameters lie. Raises RunError where the model's sizes do not fit the mesh."""
    strategy: Strategy = "zero1" if args.use_doptim else "ddp"
    if args.data_parallel_mode != "ddp":
        strategy = "zero3" if args.enable_full_shard else "zero2"
    dtype, bucket = compute_dtype(args, model), args.data_parallel_mode == "fsdp1"
    if args.expert_parallel_size > 1 and model.cfg.experts is None:
        raise RunError(
            f"train.expert_parallel_size = {args.expert_parallel_size}, but a "
            f"{model.raw['model_type']} has no experts to share; set it to 1"
        )
    try:
        decoder.check_mesh(model.cfg, mesh)
        return param.make_layout(model.tree, mesh, strategy, dtype, bucket=bucket)
    except MeshError as error:
        raise RunError(f"the model does not fit the mesh: {error}") from None


def param_dtype(args: TrainArguments, model: Model) -> torch.dtype:
    """What parameters are kept in: fp32 with mixed precision, else the one dtype of everything."""
    if args.optimizer == "anyprecision_adamw":
        return torch.bfloat16
    if args.enable_mixed_precision:
        return torch.float32
    if args.compute_dtype is not None:
        return DTYPES[args.compute_dtype]
    name = str(model.raw.get("dtype") or model.raw.get("torch_dtype") or "float32")
    if name not in DTYPES:
        raise RunError(f"the model config's dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def compute_dtype(args: TrainArguments, model: Model) -> torch.dtype:
    if args.compute_dtype is None:
        return param_dtype(args, model)
    return DTYPES[args.compute_dtype]


def remat_mode(args: TrainArguments) -> Remat:
    if not args.enable_gradient_checkpointing:
        return "none"
    return "full" if args.enable_reentrant else "selective"


def make_params(args: Arguments, model: Model, layout: Layout) -> Tree:
    """The weights a run starts from: read from model_path, else a function of train.seed alone. A
    rank reads or makes only its own pieces.

    init_device cpu makes random values on the CPU and moves them; cuda and meta make each in
    place on the device. The values are the same.
    """
    dtype, device = param_dtype(args.train, model), layout.mesh.device
    if args.model.model_path:
        return read_weights(args.model.model_path, model, dtype, device, layout)
    place = torch.device("cpu") if args.train.init_device == "cpu" else device
    key = rng.key(args.train.seed, place)
    return param.initialize(model.tree, key, dtype, device, layout)


def read_weights(
    path: str,
    model: Model,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout | None = None,
) -> Tree:
    try:
        weights = open_weights(path)
        source = hf.respelled(weights, weights.infos, model.names, model.tree)
        return hf.import_weights(model.tree, model.names, source, dtype, device, layout)
    except (OSError, ValueError) as error:
        raise RunError(f"the weights at {path} can't be used: {error}") from error


def make_optimizer(args: TrainArguments, model: Model) -> optim.Optimizer:
    build = optim.adamw if args.optimizer == "adamw" else optim.anyprecision_adamw
    return build(
        weight_decay=args.weight_decay,
        decay_mask=param.decay_mask(model.tree),
        learned=param.learned_mask(model.tree),
    )


def make_lr(args: TrainArguments, total_steps: int) -> Schedule:
    return make_schedule(
        total_steps=total_steps,
        lr=args.lr,
        lr_min=args.lr_min,
        style=args.lr_decay_style,
        warmup_ratio=args.lr_warmup_ratio,
        decay_ratio=args.lr_decay_ratio,
    )


@frozen(eq=False)
class Data:
    """The training stream, and how many steps it is read for."""

    loader: Loader
    epoch_steps: int
    total_steps: int
    accumulate: int


def open_data(
    args: Arguments, tokenizer: Tokenizer, mesh: Mesh, ranks: Ranks, warn: Callable[[str], None]
) -> Data:
    """Opens the training data and starts its workers. Padded data whose number of pieces is not
    that of its samples is counted by one pass."""
    data, train = args.data, args.train
    global_batch = train.global_batch_size or train.micro_batch_size * mesh.data_ranks
    accumulate = global_batch // (train.micro_batch_size * mesh.data_ranks)
    config = LoaderConfig(
        max_seq_len=data.max_seq_len,
        micro_batch_size=train.micro_batch_size,
        accumulate=accumulate,
        rmpad=train.rmpad,
        rmpad_with_pos_ids=train.rmpad_with_pos_ids,
        dyn_bsz_margin=train.dyn_bsz_margin,
        dyn_bsz_runtime=train.dyn_bsz_runtime,
        seed=train.seed,
        drop_last=data.drop_last,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        pin_memory=data.pin_memory,
        bad_records=data.bad_records,
        data_rank=mesh.index("dp_replicate", "dp_shard"),
        data_ranks=mesh.data_ranks,
    )
    reader = open_reader(_described(args, data.train_path), tokenizer, config.rules, train.seed)

    def loader(config: LoaderConfig) -> Loader:
        return make_loader(reader, tokenizer, config, ranks, warn)

    if config.packed:
        steps = packed_steps(
            data.train_size,
            global_batch_size=global_batch,
            micro_batch_size=train.micro_batch_size,
            max_seq_len=data.max_seq_len,
            dyn_bsz_margin=train.dyn_bsz_margin,
            bsz_warmup_ratio=train.bsz_warmup_ratio,
        )
        steps = _capped(steps, train)
        total = steps * train.num_train_epochs
        config = attrs.evolve(config, bsz_warmup_steps=int(total * train.bsz_warmup_ratio))
        return Data(loader(config), steps, total, accumulate)
    made = loader(config)
    if reader.blocks is None and train.max_steps is not None:
        steps = train.max_steps
    else:
        pieces = reader.pieces if reader.pieces is not None else made.count_pieces()
        steps = padded_steps(pieces, global_batch_size=global_batch, drop_last=data.drop_last)
        if steps == 0:
            raise RunError(
                f"{data.train_path} has {pieces} sequences of at most {data.max_seq_len} tokens, "
                f"fewer than train.global_batch_size = {global_batch}: make it smaller, or set "
                "data.drop_last false"
            )
    steps = _capped(steps, train)
    return Data(made, steps, steps * train.num_train_epochs, accumulate)


def _capped(steps: int, args: TrainArguments) -> int:
    return steps if args.max_steps is None else min(steps, args.max_steps)


def open_eval(
    args: Arguments, tokenizer: Tokenizer, ranks: Ranks, warn: Callable[[str], None]
) -> Loader | None:
    """The held-out data, in micro-batches of the training's shape; None where none is given."""
    if args.data.eval_path is None:
        return None
    config = LoaderConfig(
        max_seq_len=args.data.max_seq_len,
        micro_batch_size=args.train.micro_batch_size,
        rmpad=args.train.rmpad,
        rmpad_with_pos_ids=args.train.rmpad_with_pos_ids,
        bad_records=args.data.bad_records,
        drop_last=False,
    )
    described = _described(args, args.data.eval_path, argument="data.eval_path")
    reader = open_reader(described, tokenizer, config.rules, args.train.seed)
    return make_loader(reader, tokenizer, config, ranks, warn)


def _described(args: Arguments, path: str, argument: str = "data.train_path") -> Described:
    data = args.data
    return Described(
        path=path,
        argument=argument,
        data_type=data.data_type,
        datasets_type=data.datasets_type,
        text_keys=data.text_keys or (),
        chat_template=data.chat_template,
        shuffle_buffer=data.shuffle_buffer,
    )


def checkpoint_dir(args: TrainArguments) -> Place:
    """Where a run's own checkpoints lie."""
    return open_place(args.checkpoint_dir or Path(args.output_dir) / "checkpoints")


def checkpoint_place(path: str) -> tuple[Place, int | None]:
    """(directory of checkpoints, step or None for the newest) that a path or URL means: one
    checkpoint, a directory of them, or the output_dir of a run. Raises RunError when it is none of
    these."""
    place = open_place(path)
    if isinstance(place, Path) and not place.is_dir():
        raise RunError(f"train.load_checkpoint_path: there is no directory {place}")
    if place.name.isdecimal():
        return place.parent, int(place.name)
    return (place if committed(place) else place / "checkpoints"), None


def mesh_text(mesh: Mesh, args: TrainArguments) -> str:
    """`8 ranks: dp_shard 4 x tp 2, experts over 4, cpu, fsdp2`"""
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.sizes.items())
    if (ep := mesh.size("ep")) > 1:
        shape += f", experts over {ep}"
    ranks = f"{mesh.world.size} ranks: {shape}" if shape else "1 rank"
    return f"{ranks}, {mesh.device.type}, {args.data_parallel_mode}"


def describe(args: Arguments, model: Model, data: Data, mesh: Mesh) -> str:
    """What is about to happen, for a person."""
    cfg, train = model.cfg, args.train
    total = param.count(model.tree)
    outer = cfg.vocab * cfg.embed * (1 if cfg.tied else 2)
    size = f"{total / 1e6:.1f} M parameters ({(total - outer) / 1e6:.1f} M without embeddings"
    if cfg.experts:
        size += f", {active(cfg) / 1e6:.1f} M for each token: {cfg.experts.top_k} of "
        size += f"{cfg.experts.count} experts"
    rows = math.prod((train.micro_batch_size, data.accumulate, mesh.data_ranks))
    packing = "cu_seqlens" if train.rmpad else "positions" if train.rmpad_with_pos_ids else None
    tokens = rows * args.data.max_seq_len
    weights = str(param_dtype(train, model)).removeprefix("torch.")
    compute = str(compute_dtype(train, model)).removeprefix("torch.")
    start = args.model.model_path or f"random, seed {train.seed}"
    lines = {
        "model": f"{model.raw['model_type']}, {size}), from {start}",
        "mesh": mesh_text(mesh, train),
        "numbers": f"weights {weights}, compute {compute}, {train.optimizer}, "
        f"recomputation {remat_mode(train)}, "
        f"{'eager' if train.enable_manual_eager else 'compiled'}",
        "data": f"{args.data.train_path}: {data.loader.reader.text}, {args.data.data_type}, "
        + (f"packed ({packing})" if packing else "padded"),
        "steps": f"{data.total_steps} of {tokens} tokens "
        f"({train.micro_batch_size} x {args.data.max_seq_len}, "
        f"accumulated {data.accumulate} times), "
        f"{train.num_train_epochs} epoch(s) of {data.epoch_steps}",
        "output": train.output_dir,
    }
    if dropout := hf_config.unused_dropout(model.raw):
        lines["note"] = f"the model config asks for dropout {dropout}; training has none"
    return "\n".join(f"{name:>8}  {text}" for name, text in lines.items())
