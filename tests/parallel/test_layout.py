"""Where parameters lie: the rules, the errors, and that no rank makes or reads another's part."""

import math

import attrs
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from omnistep.core import param, rng
from omnistep.core.tree import leaves_with_names
from omnistep.models import decoder, hf
from omnistep.models.config import Config, Experts
from omnistep.models.hf_config import decoder_config
from omnistep.models.hf_names import weight_names
from omnistep.parallel.layout import Place, extent, place, to_global
from omnistep.parallel.mesh import (
    Group,
    Mesh,
    MeshError,
    destroy_groups,
    make_mesh,
    process_group,
)

CFG = Config(vocab=128, embed=64, layers=4, heads=8, kv_heads=4, head_dim=16, mlp=96, qk_norm=True)
EXPERTS = attrs.evolve(
    CFG, experts=Experts(count=16, top_k=2, mlp=32, bias=True, shared=32, dense=(0, 2)), layers=6
)


@pytest.fixture
def fake_mesh():
    """make_mesh for a rank of as many ranks as the sizes say, without the others."""

    def make(rank: int = 0, **sizes: int) -> Mesh:
        world = math.prod(size for axis, size in sizes.items() if axis != "ep")
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        return make_mesh(sizes, torch.device("cpu"))

    yield make
    destroy_groups()


def places(mesh: Mesh, strategy, cfg: Config = CFG) -> dict[str, Place]:
    layout = param.make_layout(decoder.params(cfg), mesh, strategy, torch.float32)
    return leaves_with_names(layout.places)


def test_ranks_are_numbered_with_tp_fastest(fake_mesh):
    mesh = fake_mesh(rank=13, pp=2, dp_shard=2, ulysses=2, tp=2)
    indices = [mesh.index(axis) for axis in ("pp", "dp_shard", "ulysses", "tp")]
    assert indices == [1, 1, 0, 1]
    assert mesh.group("tp", "dp_shard").index == 3
    assert mesh.group("cp").size == 1
    assert mesh.world.size == 16


def test_sizes_must_multiply_to_the_ranks():
    with pytest.raises(MeshError, match="dp_shard 2 x tp 2 is 4 ranks, but 1 are running"):
        make_mesh({"dp_shard": 2, "tp": 2}, torch.device("cpu"))
    with pytest.raises(ValueError, match="the mesh has no axis 'dp'"):
        Mesh(torch.device("cpu")).size("dp")


def test_what_each_strategy_cuts(fake_mesh):
    mesh = fake_mesh(dp_replicate=2, dp_shard=2, tp=2)
    ddp, zero3 = places(mesh, "ddp")["layers.q"], places(mesh, "zero3")["layers.q"]
    assert ddp.cuts() == {"tp": 1}
    assert ddp.reduce.axes == ("dp_replicate", "dp_shard")
    assert zero3.cuts() == {"tp": 1, "dp_shard": 3}
    assert zero3.reduce.axes == ("dp_replicate",)
    assert zero3.inside
    assert not places(mesh, "zero1")["layers.q"].inside
    assert extent(zero3, mesh) == ((4, 4, 16, 32), (0, 0, 0, 0))
    norm = places(mesh, "zero3")["layers.attn_norm"]
    assert norm.cuts() == {}
    assert norm.reduce.axes == ("dp_replicate", "dp_shard", "tp")  # tp's ranks have other tokens


def test_stages_share_what_no_layer_owns(fake_mesh):
    mesh = fake_mesh(pp=2, dp_shard=2)
    embed = places(mesh, "zero3")["embed"]
    assert embed.cuts() == {"pp": 0, "dp_shard": 0}
    assert not embed.inside  # gathered for all stages at once
    assert places(mesh, "zero3")["layers.up"].cuts() == {"pp": 0, "dp_shard": 1}


def test_errors_name_the_parameter_and_what_would_do(fake_mesh):
    mesh = fake_mesh(tp=3)
    with pytest.raises(
        MeshError, match=r"embed has 128 vocab, which tp = 3 ranks .*; tp may be 1, 2, 4, 8"
    ):
        places(mesh, "ddp")
    shape, axes = (4, 10, 6), ("layers", "mlp", "embed")
    mesh = Mesh(torch.device("cpu"), {"dp_shard": 4}, 0, {("dp_shard",): Group(("dp_shard",), 4)})
    with pytest.raises(MeshError, match=r"up .*cut over 4 ranks.*none of mlp, embed divides by 4"):
        place("up", shape, axes, mesh, "zero3")


def test_a_vector_stays_whole(fake_mesh):
    mesh = fake_mesh(dp_shard=32)
    assert places(mesh, "zero3")["layers.q_norm"].cuts() == {}
    assert places(mesh, "zero3")["layers.q_norm"].reduce.size == 32


def test_heads_that_ulysses_cannot_share(fake_mesh):
    mesh = fake_mesh(ulysses=3)
    with pytest.raises(MeshError, match=r"8 attention heads.*ulysses may be 1, 2, 4, 8"):
        decoder.check_mesh(CFG, mesh)


def test_experts_see_the_same_ranks_along_other_axes(fake_mesh):
    """ep innermost, whichever axes of the first view it goes over."""
    mesh = fake_mesh(rank=13, dp_replicate=2, dp_shard=2, ulysses=2, tp=2, ep=4)
    sizes = {axis: mesh.size(axis) for axis in ("pp", "dp_replicate", "ep_shard", "ep")}
    assert sizes == {"pp": 1, "dp_replicate": 2, "ep_shard": 2, "ep": 4}
    assert [mesh.index(axis) for axis in ("dp_replicate", "ep_shard", "ep")] == [1, 1, 1]
    for axes, ranks in {("ep",): [12, 13, 14, 15], ("ep_shard",): [9, 13]}.items():
        group = mesh.group(*axes)
        members = dist.get_process_group_ranks(process_group(group))
        assert (members, members[group.index]) == (ranks, 13)
    with pytest.raises(ValueError, match="ep, tp are not axes of one view of the ranks"):
        mesh.group("ep", "tp")


def test_where_experts_lie(fake_mesh):
    mesh = fake_mesh(rank=7, dp_replicate=2, dp_shard=2, tp=2, ep=2)
    ddp, zero3 = (places(mesh, strategy, EXPERTS) for strategy in ("ddp", "zero3"))
    name = "layers.expert_gate"
    assert ddp[name].cuts() == {"ep": 1}
    assert ddp[name].reduce.axes == ("dp_replicate", "ep_shard")
    assert zero3[name].cuts() == {"ep": 1, "ep_shard": 2}
    assert zero3[name].reduce.axes == ("dp_replicate",)
    assert zero3[name].inside
    assert extent(zero3[name], mesh) == ((4, 8, 16, 64), (0, 8, 16, 0))
    # what every token meets lies in the first view: tp cuts the shared expert, not the router
    assert zero3["layers.shared_up"].cuts() == {"tp": 1, "dp_shard": 2}
    assert zero3["layers.router"].cuts() == {"dp_shard": 1, "tp": 1}
    assert zero3["router_bias"].cuts() == {}


def test_experts_whose_ranks_are_all_there_are(fake_mesh):
    """Nothing is left that could cut them further, or hold a copy."""
    at = places(fake_mesh(ulysses=2, tp=2, ep=4), "zero3", EXPERTS)["layers.expert_down"]
    assert at.cuts() == {"ep": 1}
    assert (at.gather.size, at.reduce.size, at.inside) == (1, 1, False)


def test_stages_share_layers_with_experts_and_all_hold_the_dense_ones(fake_mesh):
    at = places(fake_mesh(pp=2, dp_shard=4, ep=2), "zero3", EXPERTS)
    assert at["layers.expert_up"].cuts() == {"pp": 0, "ep": 1, "ep_shard": 2}
    assert at["router_bias"].cuts() == {"pp": 0}
    assert at["dense_layers.up"].cuts() == {"pp": 1, "dp_shard": 1}


def test_errors_of_ranks_that_share_experts(fake_mesh):
    cpu, fit = torch.device("cpu"), "ep may be 1, 2, 3, 6"
    with pytest.raises(MeshError, match=f"ep 4 does not divide the 6 ranks of .*; {fit}"):
        make_mesh({"dp_replicate": 4, "dp_shard": 3, "tp": 2, "ep": 4}, cpu)
    mesh = fake_mesh(dp_shard=32, ep=32)
    match = r"expert_gate has 16 experts, which ep = 32 ranks .*; ep may be 1, 2, 4, 8, 16"
    with pytest.raises(MeshError, match=match):
        places(mesh, "ddp", EXPERTS)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("sizes", [{"dp_shard": 4, "tp": 2, "ep": 4}, {"pp": 2, "cp": 4, "ep": 2}])
def test_the_dtensor_of_experts_cuts_as_extent_says(sizes, strategy, fake_mesh):
    mesh = fake_mesh(rank=6, **sizes)
    for name, at in places(mesh, strategy, EXPERTS).items():
        shape, offset = extent(at, mesh)
        leaf = to_global(torch.empty(shape), at, mesh)
        assert isinstance(leaf, DTensor)
        local, begin = compute_local_shape_and_global_offset(
            leaf.shape, leaf.device_mesh, leaf.placements
        )
        assert (leaf.shape, tuple(local), tuple(begin)) == (at.shape, shape, offset), name


@pytest.mark.parametrize(
    ("cfg", "sizes"),
    [
        (CFG, {"dp_shard": 4, "tp": 2}),
        (CFG, {"pp": 2, "tp": 2, "dp_shard": 2}),
        (EXPERTS, {"dp_shard": 8}),
        (EXPERTS, {"dp_shard": 4, "tp": 2, "ep": 4}),
        (EXPERTS, {"pp": 2, "dp_shard": 2, "cp": 2, "ep": 2}),
    ],
)
def test_a_rank_makes_and_reads_only_its_pieces(cfg, sizes, fake_mesh):
    """init_device meta, and model_path: piece by piece, equal to the whole's."""
    tree, key, cpu = decoder.params(cfg), rng.key(0), torch.device("cpu")
    names = weight_names({"model_type": "deepseek_v3"}, cfg)
    whole = param.initialize(tree, key, torch.float32, cpu)
    tensors = {name: t.read() for name, t in hf.export_weights(tree, names, whole).items()}
    mesh = fake_mesh(rank=5, **sizes)
    layout = param.make_layout(tree, mesh, "zero3", torch.float32)
    made, read = [], []

    def watched(p: param.Param) -> param.Param:
        def init(key, shape, dtype, block):
            made.append(math.prod(block.shape))
            return p.init(key, shape, dtype, block)

        return attrs.evolve(p, init=init)

    class Watched(hf.InMemory):
        def read(self, name, slices):
            piece = super().read(name, slices)
            read.append(piece.numel())
            return piece

    spied = param.tree_map(watched, tree, is_leaf=param.is_param)
    ours = leaves_with_names(param.initialize(spied, key, torch.float32, cpu, layout))
    source = Watched(tensors)
    imported = leaves_with_names(hf.import_weights(tree, names, source, torch.float32, cpu, layout))
    at = leaves_with_names(layout.places)
    for name, leaf in leaves_with_names(whole).items():
        shape, offset = extent(at[name], mesh)
        part = leaf[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        assert torch.equal(ours[name].to_local(), part), name
        assert torch.equal(imported[name].to_local(), part), name
    vectors = sum(
        leaf.numel()
        for name, leaf in leaves_with_names(whole).items()
        if "norm" in name or name == "router_bias"
    )
    share = (param.count(tree) - vectors) / 8 + vectors
    assert sum(made) <= share
    assert sum(read) <= share
    assert max(made) == max(leaf.numel() for leaf in leaves_with_names(whole).values()) / 8


VISION_MODELS = {
    "qwen3_vl_moe": {
        "text_config": {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0, 2],
            "rope_parameters": {"mrope_section": [4, 2, 2]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    },
    "llava": {
        "text_config": {"model_type": "llama", "vocab_size": 128, "hidden_size": 64}
        | {"num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 64},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "patch_size": 4}
        | {"num_attention_heads": 2, "intermediate_size": 64, "image_size": 8}
        | {"num_hidden_layers": 3},
    },
}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3_vl_moe", {"dp_shard": 8}),
        ("qwen3_vl_moe", {"dp_shard": 4, "tp": 2, "ep": 4}),
        ("qwen3_vl_moe", {"pp": 2, "dp_shard": 2, "cp": 2, "ep": 2}),
        ("llava", {"dp_shard": 2, "tp": 2}),
    ],
)
def test_a_rank_reads_its_pieces_of_a_tower_and_of_experts_in_one_tensor(family, sizes, fake_mesh):
    raw = {"model_type": family, **VISION_MODELS[family]}
    cfg, cpu = decoder_config(raw), torch.device("cpu")
    tree, names = decoder.params(cfg), weight_names(raw, cfg)
    whole = param.initialize(tree, rng.key(0), torch.float32, cpu)
    tensors = {name: t.read() for name, t in hf.export_weights(tree, names, whole).items()}
    mesh = fake_mesh(rank=3, **sizes)
    layout = param.make_layout(tree, mesh, "zero3", torch.float32)
    imported = leaves_with_names(
        hf.import_weights(tree, names, hf.InMemory(tensors), torch.float32, cpu, layout)
    )
    at = leaves_with_names(layout.places)
    for name, leaf in leaves_with_names(whole).items():
        shape, offset = extent(at[name], mesh)
        part = leaf[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        assert torch.equal(imported[name].to_local(), part), name
