"""What the arguments of parallelism mean together: the size of each axis of the mesh."""

import math
from collections.abc import Iterator, Mapping

from omnistep.core.config import Arguments, TrainArguments, value_of
from omnistep.core.config_errors import Problem

MODEL_AXES: Mapping[str, str] = {
    "pp": "train.pipeline_parallel_size",
    "cp": "train.context_parallel_size",
    "ulysses": "train.ulysses_parallel_size",
    "tp": "train.tensor_parallel_size",
}
"""The axes along which ranks share the work on the same samples, and their arguments."""

REPLICAS = "train.data_parallel_replicate_size"
EXPERTS = "train.expert_parallel_size"


def data_ranks(train: TrainArguments, world_size: int) -> int:
    """Ranks that see different samples: those left by tp, pp, ulysses and cp; at least 1."""
    shared = math.prod(_sizes(train).values())
    return max(1, world_size // max(1, shared))


def mesh_sizes(train: TrainArguments, world_size: int) -> dict[str, int]:
    """Sizes of pp, dp_replicate, dp_shard, cp, ulysses and tp, whose product is `world_size`, and
    of ep, which divides the product of the last four.

    The data ranks all replicate with ddp. With fsdp1 and fsdp2, and with use_doptim, they are
    data_parallel_replicate_size copies of a state that is sharded over the rest. (With ddp and ep
    they are dp_shard, over which experts can be shared; all else is replicated nevertheless.) For
    arguments that `config_rules.resolve` let pass with this number of ranks.
    """
    sizes, ranks = _sizes(train), data_ranks(train, world_size)
    replicas = train.data_parallel_replicate_size
    if not _shards(train) and train.expert_parallel_size == 1:
        replicas = ranks
    return {
        "pp": sizes["pp"],
        "dp_replicate": replicas,
        "dp_shard": ranks // replicas,
        "cp": sizes["cp"],
        "ulysses": sizes["ulysses"],
        "tp": sizes["tp"],
        "ep": train.expert_parallel_size,
    }


def mesh_problems(args: Arguments, world_size: int) -> Iterator[Problem]:
    """What is wrong with the sizes: with each other, the number of ranks, the length of a row."""
    train = args.train
    if train.data_parallel_replicate_size > 1 and not _shards(train):
        yield Problem(
            (REPLICAS, "train.data_parallel_mode", "train.use_doptim"),
            "ddp keeps a whole copy on every data rank; set data_parallel_mode: fsdp2 (or fsdp1), "
            "or use_doptim: true, or leave the number of copies at 1",
        )
        return
    names = split_names(args)
    together = math.prod(value_of(args, name) for name in names)
    if world_size % together:
        yield Problem(names, _does_not_divide(names, together, world_size))
        return
    yield from _experts(args, world_size)
    yield from _row(args)


def _experts(args: Arguments, world_size: int) -> Iterator[Problem]:
    """Experts are shared by ranks that hold different tokens of one copy of the state."""
    names = tuple(n for n in (MODEL_AXES["pp"], REPLICAS) if value_of(args, n) > 1)
    ep, copies = args.train.expert_parallel_size, math.prod(value_of(args, n) for n in names)
    inside = world_size // copies
    if ep < 1 or inside % ep == 0:
        return
    fit = _or([size for size in range(1, inside + 1) if inside % size == 0])
    running = "1 rank is" if inside == 1 else f"{inside} ranks are"
    yield Problem(
        (EXPERTS, *names),
        f"the experts are shared by the {inside} ranks of each of {copies} stages and copies of "
        f"the state: it may be {fit}"
        if names
        else f"{running} running: it may be {fit}, or start {ep} ranks or more (--nproc {ep})",
    )


def split_names(args: Arguments) -> tuple[str, ...]:
    """The arguments that split the ranks, where they are above 1."""
    return tuple(name for name in (*MODEL_AXES.values(), REPLICAS) if value_of(args, name) > 1)


def _sizes(train: TrainArguments) -> dict[str, int]:
    return {axis: getattr(train, name.split(".")[1]) for axis, name in MODEL_AXES.items()}


def _shards(train: TrainArguments) -> bool:
    return train.data_parallel_mode != "ddp" or train.use_doptim


def _does_not_divide(names: tuple[str, ...], together: int, world_size: int) -> str:
    fit = [size for size in range(1, world_size + 1) if world_size % size == 0]
    what = "the product" if len(names) > 1 else "it"
    running = "1 rank is" if world_size == 1 else f"{world_size} ranks are"
    return (
        f"{what} is {together}, but {running} running: {what} may be {_or(fit)}, "
        f"or start a multiple of {together} ranks (--nproc {together})"
    )


def _row(args: Arguments) -> Iterator[Problem]:
    """Each rank of cp, ulysses and tp holds an equal part of a row's tokens; cp holds two chunks,
    one from either half, so that causal attention costs all of them the same."""
    train, length = args.train, args.data.max_seq_len
    names = tuple(
        name
        for axis, name in MODEL_AXES.items()
        if axis in ("cp", "ulysses", "tp") and value_of(args, name) > 1
    )
    parts = math.prod(value_of(args, name) for name in names)
    parts *= 2 if train.context_parallel_size > 1 else 1
    packed = train.rmpad or train.rmpad_with_pos_ids
    rows = train.micro_batch_size if packed else 1
    if rows * length % parts == 0:
        return
    unit = parts // math.gcd(parts, rows)
    below, above = length // unit * unit, (length // unit + 1) * unit
    factors = ["2"] if train.context_parallel_size > 1 else []
    factors += [str(value_of(args, name)) for name in names]
    product = f"{' * '.join(factors)} = " if len(factors) > 1 else ""
    row = f"micro_batch_size * max_seq_len = {rows * length}" if packed else "max_seq_len"
    yield Problem(
        ("data.max_seq_len", *(("train.micro_batch_size",) if packed else ()), *names),
        f"a row ({row} tokens) is cut into {product}{parts} equal parts; max_seq_len must be "
        f"a multiple of {unit}; nearest: {_or([n for n in (below, above) if n > 0])}",
    )


def _or(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
