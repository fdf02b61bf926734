"""A vision tower and its projector: from patches of pixels to vectors of a language model's width.

models/config.py's `Tower` says what is computed, models/params.py what is learned, core/batch.py's
`Patches` what is read. All functions see local tensors; what is sent between ranks is written out.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from omnistep.core.batch import Patches
from omnistep.core.param import Layout
from omnistep.core.tree import Tree
from omnistep.models import attention, layers
from omnistep.models import linear as products
from omnistep.models.attention_cpu import start_compiling
from omnistep.models.config import Tower
from omnistep.models.layers import activation, at_least_fp32
from omnistep.models.linear import linear
from omnistep.models.stack import unstack, unstacked, with_weights
from omnistep.models.tower_attention import attend_within
from omnistep.parallel.collectives import all_gather
from omnistep.parallel.mesh import Group, MeshError
from omnistep.parallel.remat import Remat

SAVED_OPS = attention.SAVED_OPS | products.SAVED_OPS

Weights = Mapping[str, Tensor]
Angles = tuple[Float[Tensor, "rows patches head_dim//2"], Float[Tensor, "rows patches head_dim//2"]]


def make_tower(
    tower: Tower, layout: Layout, mode: Remat = "none", *, compile: bool = True
) -> Callable[[Tree, Patches], tuple[Tensor, Tensor | None]]:
    """(weights, patches) -> (units [rows, U/n, embed], deepstack [its layers, rows, U/n, embed] or
    None): of the U = patches / tower.unit units a vector each, as wide as the language model's.

    The n ranks of cp, ulysses and tp get the same patches; each works on the nth part of every row
    that is its own, and returns its units. In each layer it gathers the keys and values of all.
    `weights` is the model's whole tree at rest, of which `encoder` and `projector` are used.

    Compiled are, each by itself: what comes before the layers, a layer, the projector, and that of
    deepstack; for one number of patches. Raises MeshError, when it is called, where the ranks can't
    share the patches so that units stay whole, and ValueError where windows are missing.
    """
    if layout.mesh.device.type == "cpu":
        start_compiling()  # attention's kernel, while the layers are traced
    group = layout.mesh.group("cp", "ulysses", "tp")
    places = _parts(layout.places)
    make = partial(with_weights, layout=layout, mode=mode, saved=SAVED_OPS, compile=compile)
    begin = make(partial(embed_patches, tower=tower, dtype=layout.dtype), places["begin"])
    layer = make(partial(run_layer, tower=tower, group=group), unstacked(places["layers"]))
    finish = make(partial(finish_patches, tower=tower), places["finish"])
    deepen = make(partial(project, tower=tower, joined=True), unstacked(places["deepstack"]))

    def run(weights: Tree, patches: Patches) -> tuple[Tensor, Tensor | None]:
        mine = share_patches(patches, tower, group)
        frames = _bounds(mine.frames)
        windows = _bounds(mine.windows) if tower.window and mine.windows is not None else frames
        angles = patch_angles(mine.places, tower, layout.dtype) if tower.rotary else None
        parts = _parts(weights)
        joiners = unstack(parts["deepstack"]) if tower.deepstack else []
        deeper = []
        x = begin(mine.pixels, parts["begin"], mine.places)
        for i, w in enumerate(unstack(parts["layers"])):
            x = layer(x, w, angles, frames if i in tower.full_layers else windows)
            if i in tower.deepstack:
                deeper.append(deepen(x, joiners[tower.deepstack.index(i)]))
        return finish(x, parts["finish"]), torch.stack(deeper) if deeper else None

    return run


def _parts(tree: Tree) -> dict[str, dict[str, Any]]:
    """Of the model's whole tree, what each of the tower's functions uses."""
    encoder, projector = dict(tree["encoder"]), dict(tree["projector"])
    last = {name: encoder.pop(name) for name in tuple(encoder) if name.startswith("post_norm")}
    parts = {"layers": encoder.pop("layers"), "deepstack": projector.pop("deepstack", {})}
    return parts | {"begin": encoder, "finish": last | projector}


def share_patches(patches: Patches, tower: Tower, group: Group) -> Patches:
    """The run of patches of every row that is this rank's.

    Raises MeshError where units of patches would be cut, ValueError where there are no windows."""
    budget, part = patches.pixels.shape[1], tower.unit * group.size
    if budget % part:
        ranks = f" on {group.size} ranks of {' x '.join(group.axes)}" if group.size > 1 else ""
        raise MeshError(
            f"a row of {budget} patches can't be cut into units of {tower.unit}{ranks}; the number "
            f"of patches (data.max_patches) must be a multiple of {part}, such as "
            f"{budget // part * part or part} or {(budget // part + 1) * part}"
        )
    if tower.window and patches.windows is None:
        raise ValueError("the tower attends within windows, but the Patches have none")
    begin, count = group.index * (budget // group.size), budget // group.size

    def mine(x: Tensor) -> Tensor:
        return x.narrow(1, begin, count)

    return Patches(
        pixels=mine(patches.pixels),
        places=mine(patches.places),
        frames=mine(patches.frames),
        units=patches.units,
        windows=None if patches.windows is None else mine(patches.windows),
    )


def _bounds(of_patches: Int[Tensor, "rows patches 2"]) -> Int[Tensor, "2 rows patches"]:
    return of_patches.movedim(-1, 0).contiguous()


def patch_angles(places: Int[Tensor, "rows patches 4"], tower: Tower, dtype: torch.dtype) -> Angles:
    """cos and sin, in fp32 or better: the first half of the frequencies turn by the row, the others
    by the column, with the same frequencies (Qwen2VLVisionRotaryEmbedding in transformers)."""
    head_dim = tower.embed // tower.heads
    theta, device = tower.rope_theta, places.device
    frequencies, factor = layers.rope_frequencies(head_dim // 2, theta, {}, device)
    exact = torch.promote_types(dtype, torch.float32)
    cos, sin = layers.rope_angles(places[..., :2, None], frequencies, factor, exact)
    return cos.flatten(-2), sin.flatten(-2)


def embed_patches(
    pixels: UInt8[Tensor, "rows patches values"],
    w: Weights,
    places: Int[Tensor, "rows patches 4"],
    *,
    tower: Tower,
    dtype: torch.dtype,
) -> Float[Tensor, "rows patches embed"]:
    """What the first layer reads."""
    x = linear(normalized(pixels, tower, dtype), w["patch"], w.get("patch_bias"))
    is_class = (places[..., :1] < 0) if tower.class_token else None
    if is_class is not None:
        x = torch.where(is_class, w["class_token"], x)
    if tower.side:
        x = x + learned_places(w["places"], places, is_class, tower.side).to(dtype)
    return norm(x, w, "pre_norm", tower.norm_eps) if tower.pre_norm else x


def normalized(
    pixels: UInt8[Tensor, "rows patches values"], tower: Tower, dtype: torch.dtype
) -> Float[Tensor, "rows patches values"]:
    """0 to 255 as 0 to 1, less the mean, over the deviation: in fp32 or better, then cast."""
    exact = torch.promote_types(dtype, torch.float32)

    def of_channels(numbers: tuple[float, ...]) -> Tensor:
        per_channel = torch.tensor(numbers, dtype=exact, device=pixels.device)
        return per_channel.repeat_interleave(tower.values // tower.channels)

    x = pixels.to(exact) * (1 / 255) - of_channels(tower.mean)
    return (x / of_channels(tower.std)).to(dtype)


def learned_places(
    table: Float[Tensor, "places embed"],
    places: Int[Tensor, "rows patches 4"],
    is_class: Tensor | None,
    side: int,
) -> Float[Tensor, "rows patches embed"]:
    """In fp32 or better. The class token's is the first of the table."""
    at, size = places[..., :2], places[..., 2:]
    if is_class is None:
        return layers.interpolated(table, at, size, side)
    of_patches = layers.interpolated(table[1:], at.clamp(min=0), size, side)
    return torch.where(is_class, at_least_fp32(table[0]), of_patches)


def run_layer(
    x: Float[Tensor, "rows patches embed"],
    w: Weights,
    angles: Angles | None,
    seen: Int[Tensor, "2 rows patches"],
    *,
    tower: Tower,
    group: Group,
) -> Float[Tensor, "rows patches embed"]:
    """x, its attention to the patches from seen[0] to seen[1], and its MLP. `patches` are this
    rank's of `group`; `seen` counts those of the whole row."""
    eps = tower.norm_eps
    x = x + attend(norm(x, w, "attn_norm", eps), w, angles, seen, tower, group)
    return x + mlp(norm(x, w, "mlp_norm", eps), w, tower)


def attend(
    h: Float[Tensor, "rows patches embed"],
    w: Weights,
    angles: Angles | None,
    seen: Int[Tensor, "2 rows patches"],
    tower: Tower,
    group: Group,
) -> Float[Tensor, "rows patches embed"]:
    head_dim = tower.embed // tower.heads
    qkv = linear(h, w["qkv"].flatten(0, 1), w["qkv_bias"].flatten())
    q, k, v = qkv.unflatten(-1, (3, tower.heads, head_dim)).unbind(2)
    if angles is not None:
        q, k = (layers.rotary(at_least_fp32(y), *angles).to(y.dtype) for y in (q, k))
    if group.size > 1:  # by one message
        k, v = all_gather(torch.cat([k, v], -1), group, 1).chunk(2, -1)
    a = attend_within(q, k, v, seen, head_dim**-0.5)
    return linear(a.flatten(-2), w["o"], w["o_bias"])


def mlp(
    h: Float[Tensor, "rows patches embed"], w: Weights, tower: Tower
) -> Float[Tensor, "rows patches embed"]:
    up = linear(h, w["up"], w["up_bias"])
    if tower.gated:
        up = activation(tower.activation, linear(h, w["gate"], w["gate_bias"])) * up
    else:
        up = activation(tower.activation, up)
    return linear(up, w["down"], w["down_bias"])


def norm(x: Float[Tensor, "... embed"], w: Weights, name: str, eps: float) -> Tensor:
    """A layer norm, or where there is no bias an RMS norm."""
    bias = w.get(f"{name}_bias")
    if bias is None:
        return layers.rms_norm(x, w[name], eps)
    return layers.layer_norm(x, w[name], bias, eps)


def finish_patches(
    x: Float[Tensor, "rows patches embed"], w: Weights, *, tower: Tower
) -> Float[Tensor, "rows units model_embed"]:
    """From what the last layer returned to what stands among the language model's tokens."""
    if tower.post_norm:
        x = norm(x, w, "post_norm", tower.norm_eps)
    return project(x, w, tower=tower, joined=False)


def project(
    x: Float[Tensor, "rows patches embed"], w: Weights, *, tower: Tower, joined: bool
) -> Float[Tensor, "rows units model_embed"]:
    """Patches joined into units, and the projector's two layers; its norm is of units (`joined`) or
    of patches."""
    rows, patches, embed = x.shape
    units = (rows, patches // tower.unit, tower.unit * embed)
    x = x.view(units) if joined else x
    if tower.projector_norm:
        x = norm(x, w, "norm", tower.norm_eps)
    h = activation("gelu", linear(x.reshape(units), w["up"], w.get("up_bias")))
    return linear(h, w["down"], w.get("down_bias"))
