"""One rank of the parity matrix: `cases` on this many ranks, each against what one rank gave.

The same seed, the same global batch, three steps; then every parameter and both moments (the
gradients' running means), the losses and gradient norms; of experts how many tokens each got.
"""

import contextlib
import math
import pickle
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from attrs import evolve, frozen

from omnistep.core import optim, param, rng
from omnistep.core.step import init_state, make_train_step
from omnistep.core.tree import Tree, leaves_with_names, map_with_name, tree_map
from omnistep.models import decoder
from omnistep.models.config import Config, Experts, Latent, Tower
from omnistep.parallel.experts import Dispatch
from omnistep.parallel.layout import Strategy, extent, to_local
from omnistep.parallel.mesh import Mesh, destroy_groups, make_mesh
from omnistep.parallel.remat import Remat
from tests.forkserver.client import ForkServer
from tests.parallel.batches import global_batch, my_rows
from tests.tracing import without_inductor

STEPS = 3
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
LLAMA = Config(vocab=64, embed=32, layers=4, heads=8, kv_heads=4, head_dim=4, mlp=64, init_std=0.2)
EXPERTS = Experts(count=8, top_k=2, mlp=16, normalize=True, aux=0.1)
LATENT = Latent(kv=16, nope=8, rope=4, value=6, q=24)
DEEPSEEK = Experts(
    count=8,
    top_k=2,
    mlp=16,
    scoring="sigmoid",
    normalize=True,
    scale=2.5,
    groups=4,
    top_groups=2,
    group_score="top2",
    bias=True,
    bias_rate=0.01,
    aux=0.01,
    shared=16,
    dense=(0,),
)
QWEN2_TOWER = Tower(
    layers=3,
    embed=16,
    heads=2,
    mlp=24,
    patch=2,
    frames=2,
    merge=2,
    rotary=True,
    activation="quick_gelu",
    init_std=0.2,
)
QWEN3_TOWER = evolve(QWEN2_TOWER, side=3, deepstack=(0, 2))
WINDOWS = evolve(
    QWEN2_TOWER,
    norm="rms",
    projector_norm="rms",
    gated=True,
    activation="silu",
    window=2,
    full_layers=(1,),
)
CLIP = Tower(
    layers=2,
    embed=16,
    heads=2,
    mlp=24,
    patch=2,
    side=2,
    class_token=True,
    pre_norm=True,
    projector_norm=None,
    projector=32,
    init_std=0.2,
)
MODELS = {
    "llama": LLAMA,
    "qwen3": evolve(LLAMA, tied=True, qk_norm=True),
    "bias": evolve(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, windows=(None, 5, None, 5)),
    "moe": evolve(LLAMA, tied=True, experts=EXPERTS),
    "deepseek": evolve(LLAMA, layers=5, kv_heads=8, head_dim=12, latent=LATENT, experts=DEEPSEEK),
    "gpt_oss": evolve(
        LLAMA,
        qkv_bias=True,
        out_bias=True,
        sinks=True,
        windows=(5, None, 5, None),
        experts=evolve(EXPERTS, limit=1.0),
    ),
    "qwen2_vl": evolve(LLAMA, qkv_bias=True, tower=QWEN2_TOWER, rope_axes=(0, 1)),
    "windows": evolve(LLAMA, tower=WINDOWS, rope_axes=(2, 1)),
    "qwen3_vl": evolve(LLAMA, tied=True, tower=QWEN3_TOWER, rope_axes=(0, 2)),
    "qwen3_vl_moe": evolve(LLAMA, experts=EXPERTS, tower=QWEN3_TOWER, rope_axes=(1, 2)),
    "llava": evolve(LLAMA, tower=CLIP),
    "projector only": evolve(LLAMA, tower=QWEN3_TOWER, rope_axes=(1, 0)),
    "skewed": evolve(LLAMA, experts=evolve(EXPERTS, bias=True)),
    "one expert": evolve(LLAMA, experts=evolve(EXPERTS, top_k=1, normalize=False, bias=True)),
}
WANTED = {"skewed": (2, 3), "one expert": (5,)}
"""Model -> the experts that all tokens go to: the router's bias for them starts above any score."""
LEARNED = {"projector only": "projector."}
"""Model -> how the names of all weights begin that learn."""


@frozen
class Case:
    """`sizes` as text, "dp_shard 2, tp 2", or with experts that some of these ranks share "dp_shard
    2, tp 2, ep 4"; what does not change the numbers, and what they are."""

    sizes: str
    strategy: Strategy = "zero3"
    model: str = "qwen3"
    packed: bool = True
    accumulate: int = 1
    dtype: str = "fp64"
    mode: Remat = "none"
    bucket: bool = False
    run: Literal["eager", "traced", "compiled"] = "eager"
    """traced: through torch.compile without inductor, whose graphs run operator by operator."""
    dispatch: Dispatch | None = None

    @property
    def mesh_sizes(self) -> dict[str, int]:
        pairs = (item.split() for item in self.sizes.split(",") if item.strip())
        return {axis: int(size) for axis, size in pairs}

    @property
    def ranks(self) -> int:
        return math.prod(size for axis, size in self.mesh_sizes.items() if axis != "ep")

    @property
    def cfg(self) -> Config:
        """The model: whole where its layers are shared by stages, else two layers of it (and those
        without experts), which takes half the time."""
        cfg = MODELS[self.model]
        if "pp" in self.mesh_sizes:
            return cfg
        return evolve(cfg, layers=2 + len(cfg.dense_layers), windows=cfg.windows[:2])

    @property
    def kind(self) -> str:
        return f"{self.model}-{'packed' if self.packed else 'padded'}-{self.dtype}"

    @property
    def reference(self) -> str:
        """Cases of one reference have one model and one batch."""
        return f"{self.kind}-{self.cfg.layers}"

    def __str__(self) -> str:
        parts = [self.sizes, self.strategy, self.kind, f"accumulate {self.accumulate}"]
        parts += [self.mode] * (self.mode != "none") + ["bucket"] * self.bucket
        parts += [self.dispatch] if self.dispatch else []
        return ", ".join(parts + [self.run] * (self.run != "eager"))


def optimizer(tree: Tree) -> optim.Optimizer:
    return optim.adamw(
        weight_decay=0.1,
        decay_mask=param.decay_mask(tree),
        learned=param.learned_mask(tree),
    )


@frozen(eq=False)
class Trained:
    """leaves: `gradient.*`, clipped, of the first step; `params.*`, `mu.*`, `nu.*` after all."""

    leaves: dict[str, torch.Tensor]
    metrics: list[dict[str, torch.Tensor]]
    layout: param.Layout


def tree_of(case: Case) -> Tree:
    """Of Params."""
    learned = LEARNED.get(case.model, "")
    return map_with_name(
        lambda name, p: evolve(p, learned=p.learned and name.startswith(learned)),
        decoder.params(case.cfg),
        is_leaf=param.is_param,
    )


def train(case: Case, mesh: Mesh) -> Trained:
    cfg, dtype, tree = case.cfg, DTYPES[case.dtype], tree_of(case)
    layout = param.make_layout(tree, mesh, case.strategy, dtype, bucket=case.bucket)
    cpu = torch.device("cpu")
    weights = param.initialize(tree, rng.key(3), dtype, cpu, layout)
    if case.model in WANTED:
        to_local(weights["router_bias"])[:, WANTED[case.model]] = 2.0
    step = make_train_step(
        decoder.make_stages(
            cfg, layout, mode=case.mode, dispatch=case.dispatch, compile=case.run != "eager"
        ),
        optimizer(tree),
        lambda step: torch.full((), 1e-2),
        layout=layout,
        accumulate=case.accumulate,
        compile=case.run != "eager",
    )
    state, metrics, gradient = init_state(weights, optimizer(tree), rng.key(0)), [], {}
    for i in range(STEPS):
        whole = global_batch(i, case.packed, dtype, cfg.tower)
        batch = my_rows(whole, mesh, case.accumulate)
        state, numbers = step(state, batch)
        metrics.append(numbers)
        if i == 0:  # the mean of one gradient, times 1 - b1
            gradient = tree_map(torch.clone, state.opt_state["mu"])
    leaves = {"params": state.params, "mu": state.opt_state["mu"], "nu": state.opt_state["nu"]}
    return Trained(leaves_with_names({"gradient": gradient, **leaves}), metrics, layout)


def reference(case: Case) -> dict:
    """What one rank gives; plain tensors."""
    alone = evolve(case, strategy="ddp", accumulate=1, mode="none", bucket=False, run="eager")
    trained = train(evolve(alone, dispatch=None), Mesh(torch.device("cpu")))
    return {"leaves": trained.leaves, "metrics": trained.metrics}


def compare(case: Case, mesh: Mesh, wanted: dict) -> dict[str, float]:
    """Relative errors: of every leaf over all ranks, and of every metric."""
    trained = train(case, mesh)
    places = leaves_with_names(trained.layout.places)
    names, squares = [], []
    for name, leaf in trained.leaves.items():
        at = places[name.split(".", 1)[1]]
        shape, offset = extent(at, mesh)
        whole = wanted["leaves"][name]
        part = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        local = to_local(leaf)
        assert local.shape == part.shape
        assert leaf.shape == whole.shape
        names.append(name)
        squares.append(
            torch.stack([(local - part).double().square().sum(), part.double().square().sum()])
        )
    sums = torch.stack(squares)
    if mesh.world.size > 1:
        dist.all_reduce(sums)
    errors = {n: _relative(*both) for n, both in zip(names, sums.tolist(), strict=True)}
    for i, (ours, theirs) in enumerate(zip(trained.metrics, wanted["metrics"], strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "grad_norm", "weight", "load_balancing_loss"):
            if name in ours:
                error = abs(float(ours[name]) - float(theirs[name]))
                errors[f"{name} of step {i}"] = error / abs(float(theirs[name]))
        if "tokens_per_expert" in ours:  # exact
            moved = ours["tokens_per_expert"] - theirs["tokens_per_expert"]
            errors[f"tokens_per_expert of step {i}"] = float(moved.abs().sum())
            errors[f"dropped_tokens of step {i}"] = abs(float(ours["dropped_tokens"]))
    return errors


def _relative(squared_error: float, squared: float) -> float:
    """What should be all 0 must be."""
    if squared == 0.0:
        return 0.0 if squared_error == 0.0 else math.inf
    return math.sqrt(squared_error / squared)


def run_rank(argv: list[str]) -> None:
    """`[FOLDER, WORLD, RANK]`: writes {case: its errors} from rank 0."""
    folder, world, rank = Path(argv[0]), int(argv[1]), int(argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world
    )
    results = {}
    for case in pickle.loads((folder / f"cases{world}").read_bytes()):
        mesh = make_mesh(case.mesh_sizes, torch.device("cpu"))
        wanted = torch.load(folder / f"{case.reference}.pt")
        begin = time.perf_counter()
        with without_inductor() if case.run == "traced" else contextlib.nullcontext():
            results[str(case)] = compare(case, mesh, wanted)
        results[str(case)]["seconds"] = time.perf_counter() - begin
    if rank == 0:
        torch.save(results, folder / f"results{world}.pt")
    destroy_groups()


def run(cases: Sequence[Case], server: ForkServer) -> dict[str, dict[str, float]]:
    """The errors of each case, with one group of processes for each number of ranks."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in {case.reference: case for case in cases}.values():
            torch.save(reference(case), folder / f"{case.reference}.pt")
        for world in sorted({case.ranks for case in cases}):
            mine = [case for case in cases if case.ranks == world]
            (folder / f"cases{world}").write_bytes(pickle.dumps(mine))
            done = server.run_ranks("tests.parallel.matrix:run_rank", world, [name, world])
            assert not any(rank.code for rank in done), "\n".join(rank.err for rank in done)
            results |= torch.load(folder / f"results{world}.pt")
    return results
