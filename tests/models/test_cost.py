"""FLOPs as counted from a model's size, against those of the products that torch runs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from omnistep.core.batch import Batch
from omnistep.core.param import is_param
from omnistep.core.tree import Tree, map_with_name
from omnistep.models import cost
from omnistep.models.config import Config, Experts
from omnistep.models.params import params
from tests.models.reference_vision import TOWERS, make_images, place_units

TEXT = Config(
    vocab=64, embed=24, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=40,
    windows=(4, None, None),
)  # fmt: skip
GRIDS = {"qwen2_5_vl": ((1, 4, 6), (2, 6, 10)), "clip": ((1, 3, 3), (1, 3, 3))}
BUDGET = {"qwen2_5_vl": 168, "clip": 24}


def make_batch(cfg: Config, family: str | None) -> Batch:
    """Two samples in one row, the second with images."""
    positions = torch.cat((torch.arange(10), torch.arange(50)))[None]
    tokens = torch.zeros(1, 60, dtype=torch.long)
    batch = Batch(tokens, tokens, torch.ones(1, 60), positions=positions)
    if cfg.tower is None or family is None:
        return batch
    images = make_images(cfg.tower, [GRIDS[family]], BUDGET[family])
    is_image = (torch.arange(60) >= 60 - len(images.order[0]))[None]
    return evolve(batch, patches=place_units(images, is_image))


def test_a_text_model():
    batch = make_batch(TEXT, None)
    work = cost.work_of(TEXT, batch, ranks=2)
    full = 10 * 11 / 2 + 50 * 51 / 2
    near = 1 + 2 + 3 + 4 * 7 + 1 + 2 + 3 + 4 * 47
    assert (work.tokens, work.visible) == (120, pytest.approx(2 * (2 * full + near) / 3))
    matrices = 3 * (24 * 32 * 2 + 24 * 16 * 2 + 3 * 24 * 40) + 64 * 24
    assert cost.active(TEXT) == matrices + 64 * 24
    expected = 6 * matrices * 120 + 12 * 3 * 32 * work.visible
    assert cost.flops(TEXT, params(TEXT), work) == pytest.approx(expected)


def test_experts_count_for_those_of_a_token():
    cfg = evolve(TEXT, experts=Experts(count=8, top_k=2, mlp=16))
    assert cost.active(cfg) == cost.active(TEXT) + 3 * (24 * 8 + 2 * 3 * 24 * 16 - 3 * 24 * 40)


@pytest.mark.parametrize("family", GRIDS)
def test_a_tower_counts_for_the_patches_that_are_real(family):
    tower = TOWERS[family]
    cfg = evolve(TEXT, tower=tower)
    work = cost.work_of(cfg, make_batch(cfg, family))
    frames = [h * w + tower.class_token for t, h, w in GRIDS[family] for _ in range(t)]
    classes = len(frames) * tower.class_token
    assert work.patches == sum(frames)
    assert work.units * tower.unit == sum(frames) - classes
    whole = sum(n * n for n in frames)
    if tower.window is None:
        assert work.pairs == whole
    else:  # of 4 x 4 patches in two layers of three: 4 x 6 is 16 + 8; 6 x 10: 16 16 8, 8 8 4
        cut = 16**2 + 8**2 + 2 * (2 * 16**2 + 3 * 8**2 + 4**2)
        assert work.pairs == pytest.approx((whole + 2 * cut) / 3)


def frozen(tree: Tree, *parts: str) -> Tree:
    """With these parts not learned."""

    def of(name: str, p):
        part = name.partition(".")[0]
        part = part if part in ("encoder", "projector") else "language"
        return evolve(p, learned=part not in parts)

    return map_with_name(of, tree, is_leaf=is_param)


def counted(run: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        run().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "parts", [(), ("encoder",), ("encoder", "language"), ("projector",), ("encoder", "projector")]
)
def test_what_is_frozen_has_no_backward_pass(parts):
    """A chain of as many products as the model has weights, differentiated by torch."""
    cfg = evolve(TEXT, tower=TOWERS["clip"], windows=())
    tree = frozen(params(cfg), *parts)
    work = cost.Work(tokens=60, visible=0, patches=20, units=18)
    tower = cfg.tower
    assert tower is not None
    learns = {part: part not in parts for part in ("encoder", "projector", "language")}

    def weight(part: str, rows: int, columns: int) -> Tensor:
        return torch.ones(rows, columns, requires_grad=learns[part])

    D, M = tower.embed, tower.mlp

    def run() -> Tensor:
        x = F.linear(torch.ones(20, tower.values), weight("encoder", D, tower.values))
        for _ in range(tower.layers):
            x = F.linear(F.linear(x, weight("encoder", 3 * D, D))[:, :D], weight("encoder", D, D))
            x = F.linear(F.linear(x, weight("encoder", M, D)), weight("encoder", D, M))
        hidden = tower.projector or 0
        x = F.linear(x[:18], weight("projector", hidden, D))
        x = F.linear(x, weight("projector", cfg.embed, hidden))
        text = torch.ones(42, cfg.embed, requires_grad=learns["language"])
        x = torch.cat((x, text))
        for _ in range(cfg.layers):
            q, kv = weight("language", 32, 24), weight("language", 32, 24)
            x = F.linear(
                torch.cat((F.linear(x, q), F.linear(x, kv)), 1)[:, :32], weight("language", 24, 32)
            )
            up, gate = weight("language", 40, 24), weight("language", 40, 24)
            x = F.linear(F.linear(x, up) * F.linear(x, gate), weight("language", 24, 40))
        return F.linear(x, weight("language", 64, 24))

    assert cost.flops(cfg, tree, work) == counted(run)
