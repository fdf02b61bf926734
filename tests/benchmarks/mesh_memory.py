"""How the memory of one rank falls with the number of ranks (ZeRO-3).

    python -m tests.benchmarks.mesh_memory > docs/memory.md

runs a compiled step on 1, 2 and 4 ranks of this machine, and on one of up to 1,024 pretended ranks.
Products are torch's own, as on GPUs. (What core/products.py puts in their place on some CPUs makes
the compiler scatter a layer's gradients later: the peak is up to 9 % above the formula.)
"""

import contextlib
import json
import math
import tempfile
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist

from omnistep.core import param, products
from omnistep.core.tree import tree_leaves
from omnistep.models import decoder
from omnistep.parallel.mesh import destroy_groups, make_mesh
from omnistep.parallel.remat import Remat
from tests.forkserver.client import ForkServer
from tests.parallel.counting import Held, held, pretended
from tests.parallel.hollow import Watch, visible_buffers
from tests.parallel.paper import Setting

MODEL = decoder.Config(vocab=512, embed=1024, layers=8, heads=8, kv_heads=4, head_dim=32, mlp=512)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MEASURED = 4
"""Up to how many ranks this machine runs."""


def own_products():
    """Inside, torch's own products are used on CPU too."""
    return patch.object(products, "HAS_WIDE_PRODUCTS", False)


def setting(ranks: int, mode: Remat, compute: torch.dtype = torch.float32) -> Setting:
    """One row of 64 tokens on every rank."""
    sizes = {"dp_shard": ranks} if ranks > 1 else {}
    return Setting(MODEL, sizes, "zero3", mode, compute=compute, rows=1, seq=64)


def state_bytes(s: Setting) -> int:
    """Of weights and two moments (none of what does not learn): matrices are cut over all ranks but
    those of dp_replicate, vectors only as tp and pp cut them. Step, count and key take 8, 8 and 16
    bytes."""
    leaves = tree_leaves(decoder.params(s.cfg), param.is_param)
    return sum((3 if p.learned else 1) * _piece(s, p) for p in leaves) + 32


def _piece(s: Setting, p: param.Param) -> int:
    return s.piece(p) * s.weights.itemsize


def peak_bytes(s: Setting, kept: int, kept_by_all: int) -> int:
    """The most that one rank needs, on a mesh of dp_shard alone, with one dtype throughout.

    The state is there all the time. Beside it come, backward, the gradients' pieces as what the
    layers kept goes: linear in the number of layers done, so that the most is at one of the ends,
    or after them.

    last layer   what all layers kept, the head's gradient; a layer at work
    first layer  what one layer kept, all gradients but the embedding's; a layer at work
    stacking     the layers' gradients of one weight become one tensor, which is there twice: so
                 all gradients but the embedding's, the largest twice, and the residual's

    A layer at work has what it computes again, one gradient whole (the largest), and weights whole:
    those of the MLP, or later those of attention; with "full" all, as the layer that runs again
    leaves them for its backward pass. (The loss has less, unless the head outweighs a layer.) A few
    scalars, together less than 64 bytes, are not counted.

    kept: by the forward pass on one rank, with recomputation as `s` says; kept_by_all: without.
    """
    tree, layers = decoder.params(s.cfg), s.cfg.layers
    stacked = tree["layers"]
    one = {name: math.prod(p.shape[1:]) * s.weights.itemsize for name, p in stacked.items()}
    mlp = sum(one[name] for name in ("mlp_norm", "gate", "up", "down"))
    whole = sum(one.values()) if s.mode == "full" else max(mlp, sum(one.values()) - mlp)
    work = whole + max(one.values()) + (kept_by_all - kept) // layers
    gradients = sum(_piece(s, p) for p in tree_leaves(tree, param.is_param))
    gradients -= _piece(s, tree["embed"])
    residual = s.rows * s.seq * s.cfg.embed * s.compute.itemsize
    return state_bytes(s) + max(
        kept + _piece(s, tree["lm_head"]) + work,
        kept // layers + gradients + work,
        gradients + max(_piece(s, p) for p in stacked.values()) + residual,
    )


def measured(ranks: int, mode: Remat, server: ForkServer) -> list[Held]:
    """By each of the ranks, run on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [folder, mode, ranks]
        done = server.run_ranks("tests.benchmarks.mesh_memory:run_rank", ranks, argv)
        assert not any(rank.code for rank in done), "\n".join(rank.err for rank in done)
        texts = [(Path(folder) / f"held{i}").read_text() for i in range(ranks)]
        return [Held(**json.loads(text)) for text in texts]


def run_rank(argv: list[str]) -> None:
    """`[FOLDER, MODE, RANKS, RANK]`."""
    folder, mode, ranks, rank = Path(argv[0]), argv[1], int(argv[2]), int(argv[3])
    s = setting(ranks, mode)  # pyright: ignore[reportArgumentType]
    if ranks > 1:
        store = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    mesh = make_mesh(s.sizes, torch.device("cpu"))
    with own_products(), visible_buffers(), Watch() as watch:
        found = held(s, mesh, watch.memory)
    (folder / f"held{rank}").write_text(json.dumps(attrs.asdict(found)))
    if ranks > 1:
        destroy_groups()


HEAD = """# What a rank holds

Written by `python -m tests.benchmarks.mesh_memory > docs/memory.md`; `pytest tests/parallel` holds
it to the formula (`peak_bytes` in that file). MB per rank, ZeRO-3, fp32, AdamW, a decoder of
{count:.1f} M parameters in {layers} layers, one row of 64 tokens on every rank.

State: weights and moments. Kept: what the layers leave for the backward pass. Peak: the largest sum
of tensors that live at one time in a compiled step; measured on ranks that run (the most of them;
what gloo copies for itself is not among them), predicted on one of pretended ranks, which compiles
the same and computes nothing.

| recomputation | ranks | state | kept | peak: formula | predicted | measured |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main(server: ForkServer) -> None:
    count = param.count(decoder.params(MODEL)) / 1e6
    print(HEAD.format(count=count, layers=MODEL.layers), end="")
    kept_by_all = pretended(setting(1, "none"))[0].kept
    for mode in get_args(Remat):
        kept = pretended(setting(1, mode))[0].kept
        for ranks in RANKS:
            s = setting(ranks, mode)
            found = pretended(s)[0]
            numbers = [found.state, found.kept, peak_bytes(s, kept, kept_by_all), found.peak]
            if ranks <= MEASURED:
                numbers.append(max(rank.peak for rank in measured(ranks, mode, server)))
            cells = [f"{n / 1e6:.2f}" for n in numbers] + [""] * (5 - len(numbers))
            print(f"| {mode} | {ranks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with (
        own_products(),
        tempfile.TemporaryDirectory() as name,
        contextlib.closing(ForkServer(Path(name))) as server,
    ):
        main(server)
