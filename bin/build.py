"""What a run is made of: each part built from the resolved arguments."""

import math
from collections.abc import Callable
from pathlib import Path

import attrs
from attrs import frozen

from omnistep.bin.image_rules import image_rules
from omnistep.bin.model import Model, RunError, compute_dtype, lr_scale, param_dtype, parts_of
from omnistep.bin.passes import moment, passes
from omnistep.core import optim, param
from omnistep.core.checkpoint.place import Place, committed, open_place
from omnistep.core.checkpoint.ranks import Ranks
from omnistep.core.config import Arguments, DataArguments, ModelArguments, TrainArguments
from omnistep.core.config_mesh import mesh_sizes
from omnistep.core.param import Layout
from omnistep.core.schedule import make_schedule
from omnistep.core.step import Schedule
from omnistep.data.chat import Template, open_template
from omnistep.data.loader import Loader, make_loader
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.patches import ImageRules
from omnistep.data.sources import Described, open_reader
from omnistep.data.steps import packed_steps, padded_steps
from omnistep.data.tokenizer import Tokenizer, load_tokenizer
from omnistep.models import decoder, hf_config
from omnistep.models.cost import active
from omnistep.parallel import mesh as meshes
from omnistep.parallel.layout import Strategy
from omnistep.parallel.mesh import Mesh, MeshError
from omnistep.parallel.remat import Remat


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


def open_chat_template(
    args: DataArguments, tokenizer: Tokenizer, images: ImageRules | None
) -> Template | None:
    """The one that conversations are trained by; None where there are none."""
    if args.data_type != "conversation":
        return None
    return open_template(args.chat_template, tokenizer, images, moment(args.chat_date))


def make_image_rules(args: Arguments, model: Model, mesh: Mesh) -> ImageRules | None:
    """How images become patches, and how many a sample may have; None for a model without a tower.
    Raises RunError where the ranks that share a row's patches can't do so evenly."""
    data, tower, ranks = args.data, model.cfg.tower, mesh.size("cp", "ulysses", "tp")
    if tower is None:
        if data.max_patches is not None:
            raise RunError(
                f"data.max_patches = {data.max_patches}, but a {model.raw['model_type']} takes no "
                "images: leave it out, or put a tower in front of it (model.encoders)"
            )
        return None
    part = tower.unit * ranks
    wanted = data.max_patches or max(data.max_seq_len // part, 1) * part
    if wanted % part:
        raise RunError(
            f"data.max_patches = {wanted}; it must be a multiple of {part}: {tower.unit} patches "
            f"become a token, and {ranks} ranks share them; nearest: "
            f"{wanted // part * part or part} or {(wanted // part + 1) * part}"
        )
    return image_rules(model, wanted)


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


def remat_mode(args: TrainArguments) -> Remat:
    if not args.enable_gradient_checkpointing:
        return "none"
    return "full" if args.enable_reentrant else "selective"


def make_optimizer(args: TrainArguments, model: Model) -> optim.Optimizer:
    build = optim.adamw if args.optimizer == "adamw" else optim.anyprecision_adamw
    return build(
        weight_decay=args.weight_decay,
        decay_mask=param.decay_mask(model.tree),
        learned=param.learned_mask(model.tree),
        lr_scale=lr_scale(model, args),
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
    args: Arguments,
    tokenizer: Tokenizer,
    images: ImageRules | None,
    mesh: Mesh,
    ranks: Ranks,
    warn: Callable[[str], None],
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
        images=images,
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
        pieces = made.count_pieces()
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
    args: Arguments,
    tokenizer: Tokenizer,
    images: ImageRules | None,
    ranks: Ranks,
    warn: Callable[[str], None],
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
        images=images,
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
        image_keys=data.image_keys,
        chat_template=data.chat_template,
        now=moment(data.chat_date),
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
    often = passes(data.loader, args, data.total_steps * tokens)
    weights = str(param_dtype(train, model)).removeprefix("torch.")
    compute = str(compute_dtype(train, model)).removeprefix("torch.")
    start = args.model.model_path or f"random, seed {train.seed}"
    if encoder := args.model.encoders.get("image"):
        start += f", encoder from {encoder.get('model_path') or 'random'}"
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
        f"{train.num_train_epochs} epoch(s) of {data.epoch_steps}"
        + (f", {often.text}" if often else ""),
        "output": train.output_dir,
    }
    if images := data.loader.config.images:
        lines["images"] = f"at most {images.max_patches} patches a sample, {images.unit} a token"
    if frozen := [part for part, learned in parts_of(model).items() if not learned]:
        lines["frozen"] = ", ".join(frozen)
    if dropout := hf_config.unused_dropout(model.raw):
        lines["note"] = f"the model config asks for dropout {dropout}; training has none"
    if often and often.warning:
        lines["warning"] = often.warning
    return "\n".join(f"{name:>8}  {text}" for name, text in lines.items())
