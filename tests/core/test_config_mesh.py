"""The arguments of parallelism: the sizes of the mesh in every mode, and every error."""

import math
from typing import Any

import pytest

from omnistep.core.config import Arguments, TrainArguments
from omnistep.core.config_errors import ConfigError
from omnistep.core.config_io import load
from omnistep.core.config_mesh import data_ranks, mesh_sizes
from omnistep.core.config_rules import derive
from omnistep.parallel.mesh import AXES

BASE = [
    *("--model.config_path=config.json", "--data.train_path=text.txt"),
    *("--data.data_type=plaintext", "--train.output_dir=out"),
]
SHORT = {"tp": "tensor", "pp": "pipeline", "ulysses": "ulysses", "cp": "context"}


def options(text: str) -> list[str]:
    """`tp=2 rows=3 length=8 lr=1` as words of a command line."""
    long = {axis: f"train.{name}_parallel_size" for axis, name in SHORT.items()} | {
        "copies": "train.data_parallel_replicate_size",
        "ep": "train.expert_parallel_size",
        "mode": "train.data_parallel_mode",
        "rows": "train.micro_batch_size",
        "length": "data.max_seq_len",
    }
    pairs = (word.partition("=") for word in text.split())
    return [f"--{long.get(name, f'train.{name}')}={value}" for name, _, value in pairs]


def resolved(text: str, world_size: int) -> Arguments:
    return load([*BASE, *options(text)], world_size=world_size, cuda=False)


def one(text: str, world_size: int) -> str:
    """The one problem."""
    with pytest.raises(ConfigError) as caught:
        resolved(text, world_size)
    assert len(caught.value.problems) == 1, str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "ranks", "sizes"),
    [
        ("", 1, {}),
        ("use_doptim=true copies=1 mode=fsdp1", 1, {}),
        ("", 6, {"dp_replicate": 6}),
        ("enable_full_shard=false", 6, {"dp_replicate": 6}),
        ("use_doptim=true", 6, {"dp_shard": 6}),
        ("use_doptim=true copies=2", 6, {"dp_replicate": 2, "dp_shard": 3}),
        ("mode=fsdp1", 6, {"dp_shard": 6}),
        ("mode=fsdp2", 6, {"dp_shard": 6}),
        ("mode=fsdp2 use_doptim=true", 6, {"dp_shard": 6}),
        ("mode=fsdp2 copies=3", 6, {"dp_replicate": 3, "dp_shard": 2}),
        ("mode=fsdp1 copies=6", 6, {"dp_replicate": 6}),
        ("tp=2", 2, {"tp": 2}),
        ("tp=2 mode=fsdp2 copies=1", 2, {"tp": 2}),
        ("tp=2 ulysses=4", 16, {"tp": 2, "ulysses": 4, "dp_replicate": 2}),
        (
            "tp=2 pp=3 ulysses=2 cp=2 mode=fsdp2 copies=2",
            96,
            {"tp": 2, "pp": 3, "ulysses": 2, "cp": 2, "dp_replicate": 2, "dp_shard": 2},
        ),
        ("ep=4 mode=fsdp2", 8, {"dp_shard": 8, "ep": 4}),
        ("ep=4 tp=2 pp=2", 16, {"dp_shard": 4, "tp": 2, "pp": 2, "ep": 4}),
        ("ep=2 mode=fsdp2 copies=2", 8, {"dp_replicate": 2, "dp_shard": 4, "ep": 2}),
    ],
)
def test_sizes_of_the_mesh(given: str, ranks: int, sizes: dict[str, int]):
    found = mesh_sizes(resolved(given, ranks).train, ranks)
    assert found == dict.fromkeys((*AXES, "ep"), 1) | sizes
    assert math.prod(found[axis] for axis in AXES) == ranks
    in_data = found["dp_replicate"] * found["dp_shard"]
    assert data_ranks(resolved(given, ranks).train, ranks) == in_data


def test_the_global_batch_counts_data_ranks():
    given: dict[str, Any] = {"tensor_parallel_size": 2, "context_parallel_size": 2}
    for batch, expected in ((None, 12), (24, 24)):
        train = TrainArguments(micro_batch_size=3, global_batch_size=batch, **given)
        derived = derive(Arguments(train=train), world_size=16, cuda=False)
        assert derived.train.global_batch_size == expected


@pytest.mark.parametrize(
    ("given", "ranks", "parts"),
    [
        (
            "tp=3",
            4,
            [
                "train.tensor_parallel_size = 3 (command line): it is 3, but 4 ranks are running",
                "it may be 1, 2 or 4, or start a multiple of 3 ranks (--nproc 3)",
            ],
        ),
        ("tp=2", 1, ["but 1 rank is running: it may be 1, or start", "(--nproc 2)"]),
        (
            "tp=2 pp=2 cp=2 mode=fsdp2 copies=3",
            12,
            [
                *("pipeline_parallel_size = 2", "context_parallel_size = 2"),
                *("tensor_parallel_size = 2", "data_parallel_replicate_size = 3"),
                "the product is 24, but 12 ranks are running",
                "the product may be 1, 2, 3, 4, 6 or 12, or start a multiple of 24 ranks",
            ],
        ),
        ("tp=8 global_batch_size=7", 4, ["it may be 1, 2 or 4"]),  # of the batch nothing is known
        (
            "copies=2",
            4,
            ['data_parallel_mode = "ddp"', "use_doptim = false", "fsdp2", "copies at 1"],
        ),
        (
            "global_batch_size=10 rows=2 tp=2",
            8,
            ["tensor_parallel_size = 2", "= 2 * 4 = 8; nearest: 8 or 16"],
        ),
        ("mode=fsdp2 global_batch_size=3", 8, ["= 1 * 8 = 8; nearest: 8"]),
        ("tp=0", 4, ["train.tensor_parallel_size = 0", "must be at least 1"]),
        ("ep=3", 4, ["expert_parallel_size = 3", "4 ranks are running: it may be 1, 2 or 4"]),
        (
            "ep=4 pp=2 mode=fsdp2 copies=2",
            8,
            [
                *("expert_parallel_size = 4", "pipeline_parallel_size = 2", "replicate_size = 2"),
                "by the 2 ranks of each of 4 stages and copies of the state: it may be 1 or 2",
            ],
        ),
        ("mode=fsdp2 copies=0", 4, ["must be at least 1"]),
    ],
)
def test_sizes_that_do_not_fit(given: str, ranks: int, parts: list[str]):
    message = one(given, ranks)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("given", "ranks", "parts"),
    [
        (
            "tp=4 length=30",
            4,
            [
                "data.max_seq_len = 30 (command line), train.tensor_parallel_size = 4",
                "a row (max_seq_len tokens) is cut into 4 equal parts",
                "a multiple of 4; nearest: 28 or 32",
            ],
        ),
        ("ulysses=2 tp=2 length=6 rows=2", 4, ["into 2 * 2 = 4", "nearest: 4 or 8"]),
        ("cp=2 length=6", 2, ["into 2 * 2 = 4 equal", "nearest: 4 or 8"]),
        ("cp=4 length=4", 4, ["into 2 * 4 = 8 equal", "nearest: 8"]),
        (
            "cp=2 tp=2 ulysses=2 length=10 rows=2 rmpad=true",
            8,
            ["micro_batch_size = 2", "max_seq_len = 20 tokens", "2 * 2 * 2 * 2 = 16", "8 or 16"],
        ),
        ("tp=2 length=5 rows=3 rmpad_with_pos_ids=true", 2, ["= 15 tokens", "nearest: 4 or 6"]),
    ],
)
def test_rows_that_cannot_be_cut(given: str, ranks: int, parts: list[str]):
    message = one(given, ranks)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ("tp=4 length=5 rows=4 rmpad=true", 4),  # a packed row has 20 tokens
        ("cp=2 length=6 rows=2 rmpad=true", 2),
        ("cp=3 length=12", 3),
        ("pp=4 length=5", 4),  # the layers are cut, not the rows
        ("pp=2 global_batch_size=1", 2),
        ("length=7 mode=fsdp2", 4),
    ],
)
def test_rows_that_can_be_cut(given: str, ranks: int):
    resolved(given, ranks)
