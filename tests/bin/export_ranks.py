"""One rank of an export on four: `main([FOLDER, RANK])`.

Writes the same weights from every mesh of MESHES, measures, fails on one rank on purpose, and is
killed in the end.
"""

import json
import os
import signal
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from omnistep.bin.export import write_config
from omnistep.bin.model import Model, make_model
from omnistep.core import param, rng
from omnistep.core.checkpoint import CheckpointError, weight_files
from omnistep.core.checkpoint.pieces import LazyTensor
from omnistep.core.checkpoint.ranks import Ranks, all_ranks
from omnistep.core.checkpoint.weight_files import write_weights
from omnistep.models import hf
from omnistep.parallel.mesh import make_mesh

SMALL = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 30,  # divides by 2 only: on four ranks q is cut along head_dim
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
EXPERTS = SMALL | {
    "model_type": "deepseek_v3",
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
}
VISION = {
    "model_type": "qwen3_vl_moe",
    "text_config": {
        **{k: v for k, v in SMALL.items() if k not in ("model_type", "hidden_size")},
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0, 2],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rope_parameters": {"mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0, 1],
    },
}
DEEP = SMALL | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 32}
MESHES = {
    "ddp": ({"dp_replicate": 4}, "ddp"),
    "fsdp": ({"dp_shard": 4}, "zero3"),
    "hsdp": ({"dp_replicate": 2, "dp_shard": 2}, "zero3"),
    "fsdp x tp": ({"dp_shard": 2, "tp": 2}, "zero2"),
    "pp": ({"pp": 4}, "ddp"),
    "pp x fsdp": ({"pp": 2, "dp_shard": 2}, "zero3"),
    "cp x tp": ({"cp": 2, "tp": 2}, "zero1"),
}
EXPERT_MESHES = {
    "fsdp": ({"dp_shard": 4}, "zero3"),
    "ep": ({"dp_shard": 4, "ep": 4}, "zero3"),
    "ep x ep_shard": ({"dp_shard": 2, "tp": 2, "ep": 2}, "zero2"),
    "ep x pp": ({"pp": 2, "dp_shard": 2, "ep": 2}, "ddp"),
}
LIMITS = {"many": 20_000, "two": 80_000}
"""Bytes of a file: more files than ranks, and fewer."""
CPU = torch.device("cpu")


def weights_of(model: Model, sizes, strategy, dtype=torch.float32) -> dict[str, LazyTensor]:
    layout = param.make_layout(model.tree, make_mesh(sizes, CPU), strategy, dtype)
    params = param.initialize(model.tree, rng.key(0), dtype, CPU, layout)
    return hf.export_weights(model.tree, model.names, params, layout)


def export_from_meshes(folder: Path, ranks: Ranks) -> None:
    model = make_model(SMALL)
    kinds = {"experts": make_model(EXPERTS), "vision": make_model(VISION)}
    for kind, name in product(kinds, EXPERT_MESHES):
        weights = weights_of(kinds[kind], *EXPERT_MESHES[name])
        write_weights(folder / f"{kind}, {name}", weights, max_shard_bytes=20_000, ranks=ranks)
    for name, (sizes, strategy) in MESHES.items():
        for files, limit in LIMITS.items():
            directory = folder / f"{name}, {files}"
            weights = weights_of(model, sizes, strategy)
            write_weights(directory, weights, max_shard_bytes=limit, ranks=ranks)
            if ranks.rank == 0:
                write_config(directory, model, torch.float32, None, None)
    half, write = weights_of(model, {"dp_shard": 4}, "zero3", torch.bfloat16), weight_files._write
    written: dict[str, int] = {}

    def count(aside: Path, turn, whole) -> None:
        written[turn.file] = written.get(turn.file, 0) + torch.Size(turn.source.shape).numel()
        write(aside, turn, whole)

    weight_files._write = count
    write_weights(folder / "bfloat16", half, max_shard_bytes=20_000, ranks=ranks)
    weight_files._write = write
    (folder / f"written{ranks.rank}.json").write_text(json.dumps(written))


def fail_on_one(folder: Path, ranks: Ranks) -> None:
    """The other ranks hear of it, and none hangs."""
    model, write = make_model(SMALL), weight_files._write

    def disk_full(*args) -> None:
        raise OSError(28, "No space left on device", "the.file")

    def unreadable() -> torch.Tensor:
        raise ValueError("cannot be read")

    weights = weights_of(model, {"dp_shard": 4}, "zero3")
    write_one = partial(write_weights, folder / "failing", max_shard_bytes=20_000, ranks=ranks)
    write_one(weights)
    if ranks.rank == 2:
        weight_files._write = disk_full
    with pytest.raises(CheckpointError, match=r"rank 2: .*No space left on device: 'the.file'"):
        write_one(weights)
    weight_files._write = write
    last = list(weights)[-1]
    if ranks.rank == 1:
        whole = weights[last]
        weights[last] = LazyTensor(whole.shape, whole.dtype, unreadable, whole.pieces)
    with pytest.raises(CheckpointError, match="rank 1: cannot be read"):
        write_one(weights)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(folder: Path, ranks: Ranks) -> None:
    """What an export adds to the peak of this rank's memory."""
    weights = weights_of(make_model(DEEP), {"dp_shard": 2, "tp": 2}, "zero3")
    sizes = [torch.Size(t.shape).numel() * 4 for t in weights.values()]
    ranks.gather(None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = peak_bytes()
    write_weights(folder / "deep", weights, max_shard_bytes=2e7, ranks=ranks)
    figures = {"added": peak_bytes() - before, "model": sum(sizes), "largest": max(sizes)}
    (folder / f"memory{ranks.rank}.json").write_text(json.dumps(figures))


def be_killed(folder: Path, ranks: Ranks) -> None:
    """Rank 1 is, amid its file; the others get an error."""
    model, write = make_model(SMALL), weight_files._write
    weights = weights_of(model, {"dp_shard": 4}, "zero3")
    write_weights(folder / "killed", weights, max_shard_bytes=80_000, ranks=ranks)
    written: list[str] = []

    def kill_at_the_third(aside: Path, turn, whole) -> None:
        write(aside, turn, whole)
        written.append(turn.name)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    if ranks.rank == 1:
        weight_files._write = kill_at_the_third
    with pytest.raises((RuntimeError, dist.DistError)):
        write_weights(folder / "killed", weights, max_shard_bytes=20_000, ranks=ranks)
    sys.stdout.flush()
    os._exit(0)  # without a word to rank 1, for which the groups would wait


def main(argv: list[str]) -> None:
    folder, rank = Path(argv[0]), int(argv[1])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4
    )
    ranks = all_ranks()
    measure(folder, ranks)
    export_from_meshes(folder, ranks)
    fail_on_one(folder, ranks)
    be_killed(folder, ranks)
