"""What a training step costs, as the model's size says."""

import math
from collections.abc import Mapping

from attrs import evolve, frozen
from torch import Tensor

from omnistep.core.batch import Batch, Patches, positions
from omnistep.core.config_rules import PARTS
from omnistep.core.param import Param, is_param
from omnistep.core.tree import Tree, leaves_with_names
from omnistep.models.config import Config, Tower
from omnistep.models.params import params, part_of

FIRST = ("encoder.patch", "projector.up", "projector.deepstack.up")
"""The first matrices of a tower and its projectors."""


@frozen
class Work:
    """What a step has to go through, on all ranks."""

    tokens: float
    visible: float
    """Pairs of tokens that attention looks at, averaged over the layers (causal: about seq/2 a
    token)."""
    patches: float = 0.0
    """Those of images and videos, class tokens among them; not filler."""
    units: float = 0.0
    """How many vectors the projector makes of them."""
    pairs: float = 0.0
    """Pairs of patches that the tower's attention looks at, averaged over its layers."""


def flops(cfg: Config, tree: Tree, work: Work) -> float:
    """Model FLOPs of one training step: what is needed, so that recomputation and masked pairs do
    not count. A product of the forward pass is 2 per weight of a matrix and token (patch, unit)
    that uses it, or per pair and element of a head; it has one more for the gradient of its
    weights, and one for that of its input.

    `tree`, of Params, says what is learned. What is not has no gradient of weights, and that of its
    input only where something before it learns.
    """
    named = leaves_with_names(tree, is_leaf=is_param)
    learns = dict.fromkeys(PARTS, False)
    for name, p in named.items():
        learns[part_of(name)] |= p.learned
    used = dict(zip(PARTS, (work.patches, work.units, work.tokens), strict=True))
    total = 0.0
    for name, p in named.items():
        if p.decay and not _looked_up(name, cfg):
            number = math.prod(p.shape) * _share(p, cfg) * used[part_of(name)]
            total += 2 * number * (1 + p.learned + _input_learns(name, learns))
    value = cfg.latent.value if cfg.latent else cfg.head_dim
    elements = cfg.layers * cfg.heads * (cfg.head_dim + value)
    total += 2 * elements * work.visible * (3 if any(learns.values()) else 1)
    if cfg.tower is not None:
        elements = 2 * cfg.tower.layers * cfg.tower.embed
        total += 2 * elements * work.pairs * (3 if learns["encoder"] else 1)
    return total


def _looked_up(name: str, cfg: Config) -> bool:
    """Whether a matrix is a table of which rows are taken, and no factor of a product."""
    return name == "encoder.places" or (name == "embed" and not cfg.tied)


def _input_learns(name: str, learns: Mapping[str, bool]) -> bool:
    """Whether what a product multiplies its weights with depends on what is learned."""
    part = part_of(name)
    if name in FIRST:
        return part == "projector" and learns["encoder"]
    return any(learns[before] for before in PARTS[: PARTS.index(part) + 1])


def active(cfg: Config) -> float:
    """Weights of the language model's matrices that one token uses: of the experts those it is
    sent to."""
    named = leaves_with_names(params(cfg), is_leaf=is_param)
    language = {name: p for name, p in named.items() if part_of(name) == "language_model"}
    return sum(math.prod(p.shape) * _share(p, cfg) for p in language.values() if p.decay)


def _share(p: Param, cfg: Config) -> float:
    return cfg.experts.top_k / cfg.experts.count if cfg.experts and "experts" in p.axes else 1.0


def work_of(cfg: Config, batch: Batch, ranks: int = 1) -> Work:
    """That of `ranks` times a batch, padding included."""
    seen = positions(batch).double() + 1
    windows = cfg.windows or (None,)
    visible = sum((seen if w is None else seen.clamp(max=w)).sum().item() for w in windows)
    work = Work(tokens=batch.tokens.numel() * ranks, visible=visible / len(windows) * ranks)
    if cfg.tower is None or batch.patches is None:
        return work
    patches, units, pairs = _seen(cfg.tower, batch.patches)
    return evolve(work, patches=patches * ranks, units=units * ranks, pairs=pairs * ranks)


def _seen(tower: Tower, patches: Patches) -> tuple[float, float, float]:
    """(patches, units, pairs averaged over the layers)"""
    units = (patches.units >= 0).sum().item()
    class_tokens = (patches.places[..., 0] < 0).sum().item()
    count = units * tower.unit + class_tokens
    filler = math.prod(patches.frames.shape[:-1]) - count

    def pairs(bounds: Tensor) -> float:
        return (bounds[..., 1] - bounds[..., 0]).sum().item() - filler  # which sees itself

    full = len(tower.full_layers) if tower.window else tower.layers
    total = full * pairs(patches.frames)
    if patches.windows is not None:
        total += (tower.layers - full) * pairs(patches.windows)
    return count, units, total / tower.layers
