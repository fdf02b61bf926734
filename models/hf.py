"""To and from Hugging Face: `config.json` read into a decoder's Config, names and layouts of
weights in both directions. Sources: transformers/models/<model_type>/configuration_*.py for the
defaults, modeling_*.py for the names."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import frozen
from torch import Tensor

from omnistep.core.checkpoint.pieces import Box, LazyTensor, Pieces
from omnistep.core.param import Layout, Param, is_param
from omnistep.core.tree import Tree, leaves_with_names, map_with_name
from omnistep.models import decoder
from omnistep.parallel.layout import Place, extent, to_global, to_local
from omnistep.parallel.mesh import Mesh

Json = Mapping[str, Any]


class ConfigJsonError(ValueError):
    """A config.json that can't be read, or asks for what is not built."""


DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
    },
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "head_dim": 128, "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6, "sliding_window": 4096,
    },
    "seed_oss": {
        "vocab_size": 155136, "hidden_size": 4096, "intermediate_size": 27648,
        "num_hidden_layers": 64, "num_attention_heads": 80, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "attention_bias": True,
    },
}  # fmt: skip
"""What a family takes a key for that its config.json leaves out."""

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
}


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The JSON object at `path`, a config.json or the directory that holds it."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigJsonError(f"no model configuration at {file}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigJsonError(f"{file} can't be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigJsonError(f"{file} holds a JSON {type(raw).__name__}, not an object")
    return raw


def decoder_config(raw: Json) -> decoder.Config:
    """The decoder that a config.json describes. Raises ConfigJsonError for an unknown family, a
    variant that is not built, or sizes that do not fit together."""
    family = raw.get("model_type")
    if family not in DEFAULTS:
        raise ConfigJsonError(
            f"model_type {family!r} is not built; there are {', '.join(sorted(DEFAULTS))}"
        )
    c = {**DEFAULTS[family], **{k: v for k, v in raw.items() if v is not None}}
    if (act := c.get("hidden_act", "silu")) != "silu":
        raise ConfigJsonError(f"hidden_act {act!r} is not built; only silu")
    heads, embed, layers = c["num_attention_heads"], c["hidden_size"], c["num_hidden_layers"]
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    theta = float(rope.pop("rope_theta", c.get("rope_theta", 10000.0)))
    if rope.get("rope_type", "default") == "yarn" or rope.get("rope_type") == "llama3":
        rope.setdefault("original_max_position_embeddings", c.get("max_position_embeddings"))
    bias = family == "qwen2" or bool(c.get("attention_bias", False))
    out_bias = {"seed_oss": "attention_out_bias", "qwen2": ""}.get(family, "attention_bias")
    try:
        return decoder.Config(
            vocab=c["vocab_size"],
            embed=embed,
            layers=layers,
            heads=heads,
            kv_heads=c.get("num_key_value_heads", heads),
            head_dim=c.get("head_dim", embed // heads),
            mlp=c["intermediate_size"],
            rope_theta=theta,
            rope_scaling=rope,
            norm_eps=c["rms_norm_eps"],
            tied=bool(c.get("tie_word_embeddings", False)),
            qkv_bias=bias,
            out_bias=bool(c.get(out_bias, False)),
            mlp_bias=family in ("llama", "seed_oss") and bool(c.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            windows=_windows(family, c, layers),
            init_std=c.get("initializer_range", 0.02),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigJsonError(
            f"the {family} configuration does not fit together: {error}"
        ) from None


def _windows(family: str, c: Json, layers: int) -> tuple[int | None, ...]:
    window = c.get("sliding_window")
    if family in ("qwen2", "qwen3"):
        if not c.get("use_sliding_window", False) or window is None:
            return ()
        kinds = c.get("layer_types") or [
            "sliding_attention" if i >= c.get("max_window_layers", 28) else "full_attention"
            for i in range(layers)
        ]
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window,) * layers if family == "mistral" and window is not None else ()


def unused_dropout(raw: Json) -> float:
    """The largest dropout a config.json asks for; Omnistep trains without dropout."""
    return max(
        (raw.get(key) or 0.0 for key in ("attention_dropout", "residual_dropout")), default=0.0
    )


# Ours -> theirs. A layer's weight "q" is model.layers.<i>.self_attn.q_proj.weight, flattened to
# the two dimensions (or one, for biases) of torch.nn.Linear.
OUTER = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}


Shape = tuple[int, ...]


def hf_shape(param: Param) -> tuple[int, ...]:
    """The shape of one layer's weight there: `heads × head_dim` is one dimension."""
    shape: list[int] = []
    for axis, size in zip(param.axes, param.shape, strict=True):
        if axis == "layers":
            continue
        if axis == "head_dim" and len(param.shape) > 2:
            shape[-1] *= size
        else:
            shape.append(size)
    return tuple(shape)


def hf_names(name: str, param: Param) -> list[str]:
    """The Hugging Face tensors that one of our leaves is made of: one a layer, or one."""
    if name.startswith("layers."):
        theirs = LAYER[name.removeprefix("layers.")]
        return [f"model.layers.{i}.{theirs}" for i in range(param.shape[0])]
    return [OUTER[name]]


def hf_tensors(params: Tree) -> Iterator[tuple[str, str, Param, int | None]]:
    """Every weight of a model: its Hugging Face name, our leaf, and which layer of it."""
    for name, param in leaves_with_names(params, is_leaf=is_param).items():
        for i, theirs in enumerate(hf_names(name, param)):
            yield theirs, name, param, i if name.startswith("layers.") else None


class Source(Protocol):
    """Tensors by their Hugging Face names, read in part."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, slices: Sequence[slice]) -> Tensor: ...


@frozen
class InMemory:
    """A state_dict as a Source."""

    tensors: Mapping[str, Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, slices: Sequence[slice]) -> Tensor:
        return self.tensors[name].detach()[tuple(slices)]


def import_weights(
    params: Tree,
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout | None = None,
) -> Tree:
    """Our tree, leaf by leaf; a rank of a mesh reads only its own pieces.

    Raises ValueError, naming the tensor, where a shape differs.
    """

    def load(name: str, param: Param, at: Place | None = None) -> Tensor:
        shape, offset = param.shape, (0,) * len(param.shape)
        if at is not None and layout is not None:
            shape, offset = extent(at, layout.mesh)
        piece = torch.empty(shape, dtype=dtype, device=device)
        names, stacked = hf_names(name, param), name.startswith("layers.")
        if stacked:
            names = names[offset[0] : offset[0] + shape[0]]
        for i, theirs in enumerate(names):
            _check_shape(source, theirs, param)
            one = slice(1, None) if stacked else slice(None)
            part = piece[i] if stacked else piece
            part.copy_(_read(source, theirs, param, tuple(part.shape), offset[one]))
        return piece if at is None or layout is None else to_global(piece, at, layout.mesh)

    if layout is None:
        return map_with_name(load, params, is_leaf=is_param)
    return map_with_name(load, params, layout.places, is_leaf=is_param)


def import_blocks(
    name: str, param: Param, source: Source, dtype: torch.dtype
) -> Iterator[tuple[Shape, Tensor]]:
    """One of our leaves as `import_weights` makes it, in blocks of one layer: (offset, values).

    Raises ValueError, naming the tensor, where a shape differs.
    """
    for i, theirs in enumerate(hf_names(name, param)):
        _check_shape(source, theirs, param)
        stacked = name.startswith("layers.")
        shape, rest = param.shape[stacked:], (0,) * (len(param.shape) - stacked)
        values = _read(source, theirs, param, shape, rest).to(dtype)
        yield ((i, *rest), values[None]) if stacked else (rest, values)


def _check_shape(source: Source, name: str, param: Param) -> None:
    if source.shape(name) != hf_shape(param):
        raise ValueError(
            f"{name} has shape {source.shape(name)}; the configuration asks for {hf_shape(param)}"
        )


def _read(source: Source, name: str, param: Param, shape: Shape, offset: Shape) -> Tensor:
    """A block of a layer's weight, `shape` at `offset`. Of two dimensions of ours that are one
    there, whole rows of the outer one are read."""
    whole, axes = param.shape[-len(shape) :], param.axes[-len(shape) :]
    spans, joined = [], None
    for i, (axis, start, size) in enumerate(zip(axes, offset, shape, strict=True)):
        if axis == "head_dim" and len(param.shape) > 2:
            outer, joined = spans.pop(), i
            spans.append(slice(outer.start * whole[i], outer.stop * whole[i]))
        else:
            spans.append(slice(start, start + size))
    block = source.read(name, spans)
    if joined is None:
        return block
    block = block.unflatten(joined - 1, (shape[joined - 1], whole[joined]))
    return block.narrow(joined, offset[joined], shape[joined])


def relayed_weights(
    params: Tree, source: Source, dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The model's weights in `source`, to be read when their turn comes, in their own dtype or as
    `dtype`. Raises ValueError, naming the tensor, where one is missing or a shape differs."""

    def read(name: str, param: Param) -> Tensor:
        cuts = [slice(0, n) for n in hf_shape(param)]
        return source.read(name, cuts).to(dtype or source.dtype(name))

    lazy = {}
    for theirs, _, param, _ in hf_tensors(params):
        _check_shape(source, theirs, param)
        kept = dtype or source.dtype(theirs)
        lazy[theirs] = LazyTensor(hf_shape(param), kept, partial(read, theirs, param))
    return lazy


def export_weights(
    params: Tree, values: Tree, layout: Layout | None = None
) -> dict[str, LazyTensor]:
    """Every weight by its Hugging Face name; on a mesh in the pieces that its ranks hold."""
    local = {name: to_local(value) for name, value in leaves_with_names(values).items()}
    lazy = {}
    if layout is None or layout.mesh.device_mesh is None:
        for theirs, name, param, layer in hf_tensors(params):
            shape, value = hf_shape(param), local[name]
            lazy[theirs] = LazyTensor(shape, value.dtype, partial(_layer, value, layer, shape))
        return lazy
    mesh, places = layout.mesh, leaves_with_names(layout.places)
    holders = {name: _holders(at, mesh) for name, at in places.items()}
    by_layer = {n: _by_layer(held) for n, held in holders.items() if n.startswith("layers.")}
    for theirs, name, param, layer in hf_tensors(params):
        value, shape, held, here = local[name], places[name].shape, holders[name], None
        if layer is not None:
            shape, held = shape[1:], by_layer[name][layer]
            here = layer - extent(places[name], mesh)[1][0]
        read, pieces = partial(_layer, value, here), Pieces(shape, held, value.device)
        lazy[theirs] = LazyTensor(hf_shape(param), value.dtype, read, pieces)
    return lazy


def _layer(value: Tensor, layer: int | None, shape: Shape | None = None) -> Tensor:
    one = value if layer is None else value[layer]
    return one if shape is None else one.reshape(shape)


def _holders(at: Place, mesh: Mesh) -> dict[Box, tuple[int, ...]]:
    """Each part of a parameter, and the ranks that hold it."""
    held: dict[Box, list[int]] = {}
    for rank in range(mesh.world.size):
        shape, offset = extent(at, mesh, rank)
        held.setdefault((offset, shape), []).append(rank)
    return {box: tuple(ranks) for box, ranks in held.items()}


def _by_layer(holders: Mapping[Box, tuple[int, ...]]) -> list[dict[Box, tuple[int, ...]]]:
    """Of a stacked parameter, the same for each layer; those of one stage share a dict."""
    stages: dict[range, dict[Box, tuple[int, ...]]] = {}
    for (offset, shape), ranks in holders.items():
        layers = range(offset[0], offset[0] + shape[0])
        stages.setdefault(layers, {})[offset[1:], shape[1:]] = ranks
    in_order = sorted(stages, key=lambda layers: layers.start)
    return [stages[layers] for layers in in_order for _ in layers]
