"""Vision towers against transformers', and against themselves."""

import functools
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from attrs import evolve
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from omnistep.core import rng
from omnistep.core.param import abstract, initialize, make_layout, one_rank
from omnistep.core.tree import leaves_with_names, tree_leaves, tree_map
from omnistep.models.config import Config, Tower
from omnistep.models.params import params
from omnistep.models.tower import make_tower
from omnistep.models.tower_attention import attend_within, flex, seen_mask
from omnistep.parallel.layout import Strategy, extent, to_local
from omnistep.parallel.mesh import Mesh, MeshError, make_mesh
from omnistep.parallel.unshard import reduce_once
from tests.models.reference_vision import (
    TOWERS,
    VISION,
    Images,
    make_images,
    make_vision,
    our_tree,
    their_features,
)

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
QWEN_ROWS = ([(1, 4, 6), (2, 6, 10), (1, 2, 2)], [(1, 12, 8), (1, 8, 8)])
"""Of the window's 4 x 4 patches multiples and others; a video; the smallest image there is."""
ROWS = {
    "siglip": ([(1, 3, 3)], [(1, 3, 3), (1, 3, 3)]),
    "clip": ([(1, 3, 3)], [(1, 3, 3), (1, 3, 3)]),
}
BUDGET = {"siglip": 20, "clip": 24}


MIXED = evolve(TOWERS["qwen3_vl"], window=2, full_layers=(1,), init_std=0.2)
"""Windows, deepstack, learned places and rotation."""


def config(tower: Tower) -> Config:
    return Config(vocab=8, embed=24, layers=1, heads=2, kv_heads=2, head_dim=12, mlp=8, tower=tower)


def images_of(family: str, dtype: torch.dtype) -> Images:
    rows = ROWS.get(family, QWEN_ROWS)
    return make_images(TOWERS[family], rows, BUDGET.get(family, 168), dtype)


@functools.cache
def theirs(family: str, dtype: torch.dtype):
    """Weights, outputs, the projections of these that are differentiated, and all gradients."""
    model = make_vision(family, dtype)
    outputs, deepstack = their_features(model, family, images_of(family, dtype))
    outputs = [outputs, *deepstack]
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in outputs]
    torch.autograd.backward(outputs, along)
    tower = TOWERS[family]
    weights = our_tree({n: p.detach() for n, p in model.named_parameters()}, tower)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return weights, [x.detach() for x in outputs], along, our_tree(grads, tower)


def ours(weights, images, along, run):
    """The same of ours: outputs in transformers' order, and all gradients."""
    leaves = tree_map(lambda w: w.clone().requires_grad_(), weights)
    units, deepstack = run(leaves, images.patches)
    outputs = [units, *([] if deepstack is None else deepstack)]
    found = [
        torch.cat([x[row, list(order)] for row, order in enumerate(images.order)]) for x in outputs
    ]
    torch.autograd.backward(found, along)
    return [x.detach() for x in found], tree_map(lambda w: w.grad, leaves)


def random_weights(tower, dtype):
    weights = initialize(params(config(tower)), rng.key(1), dtype, CPU)
    return {part: weights[part] for part in ("encoder", "projector")}


def random_along(tower, images, dtype):
    generator = torch.Generator().manual_seed(2)
    shape = (sum(map(len, images.order)), 24)
    count = 1 + len(tower.deepstack)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def assert_equal(found, wanted, tolerance):
    names = [f"output {i}" for i in range(len(wanted[0]))]
    pairs = dict(zip(names, zip(found[0], wanted[0], strict=True), strict=True))
    of_ours, of_theirs = (leaves_with_names(x[1]) for x in (found, wanted))
    assert of_ours.keys() == of_theirs.keys()
    pairs |= {name: (of_ours[name], of_theirs[name]) for name in of_theirs}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape, name
        error = ((a - b).norm() / b.norm()).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", VISION)
def test_parity(family, dtype):
    weights, outputs, along, grads = theirs(family, dtype)
    tree = params(config(TOWERS[family]))
    shapes = {n: p.shape for n, p in leaves_with_names(abstract(tree, dtype)).items()}
    given = {n: w.shape for n, w in leaves_with_names(weights).items()}
    assert given == {n: s for n, s in shapes.items() if n.startswith(("encoder", "projector"))}
    run = make_tower(TOWERS[family], one_rank(tree, dtype), "none", compile=False)
    found = ours(weights, images_of(family, dtype), along, run)
    assert_equal(found, (outputs, grads), TOLERANCE[dtype])


def eager(tower, weights, images, along):
    run = make_tower(tower, one_rank(params(config(tower)), torch.float64), compile=False)
    return ours(weights, images, along, run)


def test_compiled_once_for_every_mix_of_images(without_inductor):
    """That inductor computes it too bin/train's tests show."""
    dtype = torch.float64
    weights = random_weights(MIXED, dtype)
    run = make_tower(MIXED, one_rank(params(config(MIXED)), dtype), "selective")
    before = counters["stats"]["unique_graphs"]
    for rows in ([(1, 4, 6), (2, 6, 10)], [(1, 12, 12)]), ([], [(3, 4, 4)]), ([], []):
        images = make_images(MIXED, rows, 144, dtype)
        along = random_along(MIXED, images, dtype)
        found = ours(weights, images, along, run)
        if not any(rows):
            assert not any(grad.any() for grad in tree_leaves(found[1]))
        else:
            assert_equal(found, eager(MIXED, weights, images, along), 1e-10)
        # what comes before the layers, a layer, the projector, and that of deepstack
        assert counters["stats"]["unique_graphs"] == before + 4


@pytest.mark.parametrize("tower", [MIXED, TOWERS["clip"]], ids=["mixed", "clip"])
def test_filler_changes_nothing(tower):
    dtype = torch.float64
    weights = random_weights(tower, dtype)
    rows = QWEN_ROWS if tower is MIXED else ROWS["clip"]
    tight = make_images(tower, rows, 160 if tower is MIXED else 20, dtype)
    loose = make_images(tower, rows, 200, dtype)
    is_filler = loose.patches.places[..., 2:].eq(1).all(-1, keepdim=True)
    assert is_filler.any()
    noise = torch.randint(256, loose.patches.pixels.shape).to(torch.uint8)
    pixels = torch.where(is_filler, noise, loose.patches.pixels)
    loose = evolve(loose, patches=evolve(loose.patches, pixels=pixels))
    along = random_along(tower, tight, dtype)
    wanted = eager(tower, weights, tight, along)
    assert_equal(eager(tower, weights, loose, along), wanted, 1e-12)


def functions_of(output):
    """The names of what autograd has recorded."""
    found, todo = set(), [output.grad_fn]
    while todo:
        function = todo.pop()
        if function is not None and function not in found:
            found.add(function)
            todo += [following for following, _ in function.next_functions]
    return [function.name() for function in found]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_what_is_frozen_is_not_recorded(mode):
    run = make_tower(MIXED, one_rank(params(config(MIXED)), torch.float32), mode, compile=False)
    weights = random_weights(MIXED, torch.float32)
    patches = make_images(MIXED, QWEN_ROWS, 160).patches
    assert not any(x is not None and x.requires_grad for x in run(weights, patches))
    learned = tree_map(lambda w: w.clone().requires_grad_(), weights)
    parts = learned, weights | {"projector": learned["projector"]}
    all_of, of_projector = (functions_of(run(part, patches)[0]) for part in parts)
    assert sum("Ring" in name for name in all_of) == MIXED.layers
    assert not any("Ring" in name for name in of_projector)
    assert of_projector.count("torch::autograd::AccumulateGrad") == 6


def test_bf16():
    rows = make_images(MIXED, QWEN_ROWS, 160)
    weights, along = random_weights(MIXED, torch.float32), random_along(MIXED, rows, torch.float32)
    run = make_tower(MIXED, one_rank(params(config(MIXED)), torch.bfloat16), compile=False)
    found = ours(weights, rows, [x.bfloat16() for x in along], run)
    assert {x.dtype for x in found[0]} == {torch.bfloat16}
    assert {x.dtype for x in tree_leaves(found[1])} == {torch.float32}
    exact = [x.double() for x in along]
    wanted = eager(MIXED, tree_map(torch.Tensor.double, weights), rows, exact)
    assert_equal(found, wanted, 0.03)


def test_errors():
    layout = one_rank(params(config(MIXED)), torch.float32)
    run, weights = make_tower(MIXED, layout, compile=False), random_weights(MIXED, torch.float32)
    images = make_images(MIXED, [[]], 10)
    with pytest.raises(MeshError, match=r"10 patches .* of 4; .* multiple of 4, such as 8 or 12"):
        run(weights, images.patches)
    patches = evolve(make_images(MIXED, [[]], 12).patches, windows=None)
    with pytest.raises(ValueError, match="within windows, but the Patches have none"):
        run(weights, patches)


@pytest.mark.parametrize("part", [slice(0, 300), slice(100, 200), slice(290, 300)])
def test_block_mask_and_flex(part):
    """What CUDA runs; of it the forward pass can be run here."""
    rows = [(1, 4, 6), (1, 10, 14), (2, 4, 4)], [(1, 16, 18)]
    frames = make_images(MIXED, rows, 300).patches.frames
    seen = frames.movedim(-1, 0)[:, :, part]
    mask = seen_mask(seen, 300)
    built = create_block_mask(mask.mask_mod, 2, None, seen.shape[2], 300, device="cpu")
    assert torch.equal(mask.to_dense(), built.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(built, name)), name
    q, k, v = torch.randn(3, 2, 300, 2, 16)
    with torch.no_grad():
        wanted = attend_within(q[:, part], k, v, seen, 0.2)
        torch.testing.assert_close(flex(q[:, part], k, v, seen, 0.2), wanted)


def check_shared(mesh: Mesh, strategy: Strategy) -> None:
    dtype, tree = torch.float64, params(config(MIXED))
    images = make_images(MIXED, QWEN_ROWS, 160, dtype)
    along = random_along(MIXED, images, dtype)
    wanted, of_whole = eager(MIXED, random_weights(MIXED, dtype), images, along)
    layout = make_layout(tree, mesh, strategy, dtype)
    weights = tree_map(to_local, initialize(tree, rng.key(1), dtype, CPU, layout))
    leaves = {name: tree_map(torch.Tensor.requires_grad_, weights[name]) for name in of_whole}
    units, deepstack = make_tower(MIXED, layout, compile=False)(leaves, images.patches)
    assert deepstack is not None
    outputs = torch.stack([units, *deepstack]).flatten(1, 2)
    n, rank = units.shape[1], mesh.rank
    assert n == 160 // 4 // mesh.world.size
    mine = [  # (in this rank's output, in what is wanted)
        (row * n + unit - rank * n, sum(map(len, images.order[:row])) + i)
        for row, order in enumerate(images.order)
        for i, unit in enumerate(order)
        if unit // n == rank
    ]
    here, there = (list(places) for places in zip(*mine, strict=True))
    torch.testing.assert_close(outputs[:, here], torch.stack(wanted)[:, there])
    outputs[:, here].backward(torch.stack(along)[:, there])
    places = leaves_with_names({name: layout.places[name] for name in leaves})
    of_whole = leaves_with_names(of_whole)
    for name, leaf in leaves_with_names(leaves).items():
        shape, offset = extent(places[name], mesh)
        part = of_whole[name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        error = (reduce_once(leaf.grad, places[name]) - part).norm()
        assert error <= 1e-10 * part.norm(), f"{name}: {error / part.norm():.1e}"


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    try:
        check_shared(make_mesh({"tp": 2}, CPU), "ddp")
        check_shared(make_mesh({"cp": 2}, CPU), "zero3")
    finally:
        dist.destroy_process_group()


def test_two_ranks_share_the_patches(tmp_path):
    # forked from a server that has imported this module once, and started no thread
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    arguments = [(rank, str(tmp_path / "store")) for rank in range(2)]
    ranks = [context.Process(target=run_rank, args=args, daemon=True) for args in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
