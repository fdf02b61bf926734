"""The model of a run: read from configuration files, alone or a tower in front of a language model;
which parts of it learn, and how fast; the weights it starts from."""

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor

from omnistep.core import param, rng
from omnistep.core.checkpoint.safetensors import Weights, open_weights
from omnistep.core.config import Arguments, ModelArguments, TrainArguments
from omnistep.core.config_rules import ENCODER_PATHS, PARTS, expand_path
from omnistep.core.param import Layout, Param, is_param
from omnistep.core.tree import Tree, leaves_with_names, map_with_name, pick
from omnistep.models import decoder, hf
from omnistep.models.hf_config import (
    ConfigJsonError,
    compose,
    decoder_config,
    read_config_json,
    read_json_beside,
)
from omnistep.models.hf_names import Names, weight_names
from omnistep.models.hf_vision import tower_kind, with_preprocessor
from omnistep.models.params import part_of

Json = Mapping[str, Any]


class RunError(Exception):
    """Something a run was given does not fit; str() says what, and what would."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
GENERATION = "generation_config.json"
PREPROCESSOR, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
PROCESSOR = "processor_config.json"
"""Holds both in what transformers 5 saves; where it does, they are read before the files above."""


@frozen(eq=False)
class Model:
    """A model before it has values."""

    raw: Json
    """The config.json as it was read."""
    cfg: decoder.Config
    tree: Tree
    """Of Params."""
    names: Names
    """Of its weights in files."""
    preprocessors: Mapping[str, Json] = attrs.field(factory=dict)
    """Of a model with a tower, the files beside its config.json that say how images are prepared,
    as they were read."""
    generation: Json = attrs.field(factory=dict)
    """The generation_config.json beside its config.json; empty: there is none."""
    notes: tuple[str, ...] = ()
    """What a person should know of its files."""


def make_model(raw: Json, preprocessors: Mapping[str, Json] | None = None) -> Model:
    """The model that a config.json describes. Raises ConfigJsonError."""
    cfg, files = decoder_config(raw), preprocessors or {}
    if cfg.tower is None:
        return Model(raw, cfg, decoder.params(cfg), weight_names(raw, cfg))
    cfg = attrs.evolve(cfg, tower=with_preprocessor(cfg.tower, files.get(PREPROCESSOR, {})))
    return Model(raw, cfg, decoder.params(cfg), weight_names(raw, cfg), files)


def read_model(args: ModelArguments) -> Model:
    """Reads the model that model.config_path describes; with model.encoders, the language model and
    the tower in front of it. What the files of model.model_path say otherwise is in its notes.

    Raises ConfigJsonError where a file can't be read, or what it describes is not built.
    """
    raw, notes = _as_files_are(read_config_json(args.config_path or ""), args.model_path)
    if encoder := args.encoders.get("image"):
        further = {key: value for key, value in encoder.items() if key not in ENCODER_PATHS}
        try:
            raw = compose(raw, read_config_json(_images_place(args)), **further)
        except ConfigJsonError as error:
            raise ConfigJsonError(f"model.encoders.image: {error}") from None
    model = make_model(raw, read_preprocessors(args))
    if args.model_path and not args.encoders:
        notes += _without_place(model, args.model_path)
    generation = read_json_beside(args.config_path, GENERATION) if args.config_path else None
    return attrs.evolve(model, generation=generation or {}, notes=notes)


HEAD, EMBED = "lm_head.weight", "embed_tokens.weight"
COMPUTED = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
"""Ends of names of what older files hold though it follows from the configuration."""


def _as_files_are(raw: Json, path: str | None) -> tuple[Json, tuple[str, ...]]:
    """A config.json that ties the output layer to the embedding, where the files hold two different
    tensors: then not tied, as in transformers (tie_weights in modeling_utils.py)."""
    texts = [raw, *(raw[name] for name in ("text_config",) if isinstance(raw.get(name), Mapping))]
    if path is None or not any(text.get("tie_word_embeddings") for text in texts):
        return raw, ()
    try:
        weights = open_weights(expand_path(path))
        found = {
            end: next((name for name in weights.infos if name.endswith(end)), None)
            for end in (HEAD, EMBED)
        }
        head, embed = found[HEAD], found[EMBED]
        if head is None or embed is None or _same(weights, head, embed):
            return raw, ()
    except (OSError, ValueError):
        return raw, ()  # told when the weights are read
    untied = {**raw, "tie_word_embeddings": False}
    if isinstance(text := raw.get("text_config"), Mapping):
        untied["text_config"] = {**text, "tie_word_embeddings": False}
    return untied, (f"config.json ties the output layer, but {head} is another tensor: not tied",)


def _same(weights: Weights, one: str, other: str) -> bool:
    shape = weights.shape(one)
    if shape != weights.shape(other):
        return False
    rows, rest = 1024, [slice(0, n) for n in shape[1:]]
    blocks = ([slice(i, min(i + rows, shape[0])), *rest] for i in range(0, shape[0], rows))
    return all(
        torch.equal(weights.read(one, block), weights.read(other, block)) for block in blocks
    )


def _without_place(model: Model, path: str) -> tuple[str, ...]:
    try:
        held = open_weights(expand_path(path)).infos
    except (OSError, ValueError):
        return ()
    wanted = {part.theirs for part in model.names.all_parts(model.tree)}
    unused = [
        name
        for name in held
        if model.names.spelled(name) not in wanted and not name.endswith((*COMPUTED, HEAD))
    ]
    if not unused:
        return ()
    first = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
    return (f"{len(unused)} tensors of the files have no place in the model: {first}",)


def stop_tokens(model: Model, tokenizer_eos: int) -> list[int]:
    """Lists the tokens that end an answer, as the model's files name them: generation_config.json's
    first, then config.json's, then the tokenizer's."""
    text = model.raw.get("text_config")
    ends = [model.generation.get("eos_token_id"), model.raw.get("eos_token_id")]
    ends += [text.get("eos_token_id") if isinstance(text, Mapping) else None, tokenizer_eos]
    each = [token for end in ends for token in (end if isinstance(end, list) else [end])]
    return list(dict.fromkeys(token for token in each if type(token) is int))


def check_finite(params: Tree, where: str) -> None:
    """Raises RunError, naming the first, where a weight is not finite."""
    for name, leaf in leaves_with_names(params).items():
        if leaf.is_floating_point() and not leaf.isfinite().all():
            raise RunError(f"the weights at {where} are damaged: {name} holds NaN or infinity")


def _images_place(args: ModelArguments) -> str:
    """Where the configuration of what reads images is: the encoder's, or the model's own."""
    encoder = args.encoders.get("image")
    if not encoder:
        return args.config_path or ""
    return expand_path(encoder.get("config_path") or encoder["model_path"])


def read_preprocessors(args: ModelArguments) -> dict[str, Json]:
    """What stands beside the config.json of what reads images: of PREPROCESSOR and VIDEO those that
    there are. Raises ConfigJsonError where a file can't be read."""
    place = _images_place(args)
    if not place:  # else the current directory's
        return {}
    both = read_json_beside(place, PROCESSOR) or {}
    found = {
        name: both.get(part) or read_json_beside(place, name)
        for name, part in ((PREPROCESSOR, "image_processor"), (VIDEO, "video_processor"))
    }
    return {name: content for name, content in found.items() if content}


# ---- parts ---------------------------------------------------------------------------------


def parts_of(model: Model) -> dict[str, int]:
    """The parts that a model has, and how many parameters of each learn."""
    counts = dict.fromkeys(PARTS, 0)
    leaves = leaves_with_names(model.tree, is_leaf=is_param)
    for name, p in leaves.items():
        counts[part_of(name)] += math.prod(p.shape) * p.learned
    found = {part_of(name) for name in leaves}
    return {part: count for part, count in counts.items() if part in found}


def with_frozen(model: Model, args: TrainArguments) -> Model:
    """The model in which the parts that train.freeze names do not learn: a router's bias, which no
    gradient moves, stays too. Raises RunError where it has no such part, or nothing is left to
    learn."""
    freeze = (args.freeze,) if isinstance(args.freeze, str) else args.freeze or ()
    parts = parts_of(model)
    given = {"freeze": freeze}
    given |= {f"{p}_lr": (p,) for p in ("encoder", "projector") if lr_of(args, p) is not None}
    for argument, named in given.items():
        if missing := [part for part in named if part not in parts]:
            raise RunError(
                f"train.{argument} is about the {missing[0]}, but a {model.raw['model_type']} has "
                f"none; it has {', '.join(parts)}"
            )
    if set(parts) <= set(freeze):
        raise RunError(f"train.freeze names all parts ({', '.join(freeze)}): nothing would learn")

    def of_part(name: str, p: Param) -> Param:
        return attrs.evolve(p, learned=False) if part_of(name) in freeze else p

    cfg = model.cfg
    if "language_model" in freeze and cfg.experts:
        cfg = attrs.evolve(cfg, experts=attrs.evolve(cfg.experts, bias_rate=0.0))
    return attrs.evolve(model, cfg=cfg, tree=map_with_name(of_part, model.tree, is_leaf=is_param))


def lr_of(args: TrainArguments, part: str) -> float | None:
    """The largest learning rate of its own that a part has."""
    return {"encoder": args.encoder_lr, "projector": args.projector_lr}.get(part)


def lr_scale(model: Model, args: TrainArguments) -> Tree | None:
    """For each leaf, its part's learning rate over train.lr; None where all have that."""
    if args.encoder_lr is None and args.projector_lr is None:
        return None

    def scale(name: str, _: Param) -> float:
        own = lr_of(args, part_of(name))
        return 1.0 if own is None else own / args.lr

    return map_with_name(scale, model.tree, is_leaf=is_param)


# ---- numbers and weights -------------------------------------------------------------------


def param_dtype(args: TrainArguments, model: Model) -> torch.dtype:
    """What parameters are kept in: fp32 with mixed precision, else the one dtype of everything."""
    if args.optimizer == "anyprecision_adamw":
        return torch.bfloat16
    if args.enable_mixed_precision:
        return torch.float32
    if args.compute_dtype is not None:
        return DTYPES[args.compute_dtype]
    name = str(model.raw.get("dtype") or model.raw.get("torch_dtype") or "float32")
    if name not in DTYPES:
        raise RunError(f"the model config's dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def compute_dtype(args: TrainArguments, model: Model) -> torch.dtype:
    if args.compute_dtype is None:
        return param_dtype(args, model)
    return DTYPES[args.compute_dtype]


def make_params(args: Arguments, model: Model, layout: Layout) -> Tree:
    """The weights a run starts from: read from model_path, else a function of train.seed alone. A
    rank reads or makes only its own pieces.

    With model.encoders each of the two may have weights or none; a projector whose sizes are not
    those of the files is random.

    init_device cpu makes random values on the CPU and moves them; cuda and meta make each in
    place on the device. The values are the same.
    """
    dtype, device = param_dtype(args.train, model), layout.mesh.device
    path, encoder = args.model.model_path, args.model.encoders.get("image", {}).get("model_path")
    if path and not args.model.encoders:
        return read_weights(path, model, dtype, device, layout)
    place = torch.device("cpu") if args.train.init_device == "cpu" else device
    key = rng.key(args.train.seed, place)
    if not path and not encoder:
        return param.initialize(model.tree, key, dtype, device, layout)
    source = _composed(path, encoder, model)
    lacking = hf.absent(model.tree, model.names, source)
    wanted = [] if path else ["language_model"]
    wanted += [] if encoder else ["encoder", "projector"]

    def is_random(name: str, _: Param) -> bool:
        return name in lacking or part_of(name) in wanted

    random = map_with_name(is_random, model.tree, is_leaf=is_param)
    some = attrs.evolve(layout, places=pick(layout.places, random))
    instead = param.initialize(pick(model.tree, random), key, dtype, device, some)
    return _imported(model, source, dtype, device, layout, leaves_with_names(instead))


def _composed(language: str | None, encoder: str | None, model: Model) -> hf.Found:
    """Raises RunError."""
    try:
        return hf.composed(tower_kind(model.raw), _files(language), _files(encoder))
    except (OSError, ValueError) as error:
        where = " and ".join(path for path in (language, encoder) if path)
        raise RunError(f"the weights at {where} can't be used: {error}") from error


def _files(path: str | None) -> hf.Files | None:
    if path is None:
        return None
    weights = open_weights(expand_path(path))
    return weights, weights.infos


def read_weights(
    path: str,
    model: Model,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout | None = None,
) -> Tree:
    """All weights of a model, from files. Raises RunError."""
    try:
        weights = open_weights(path)
        source = hf.respelled(weights, weights.infos, model.names, model.tree)
    except (OSError, ValueError) as error:
        raise RunError(f"the weights at {path} can't be used: {error}") from error
    return _imported(model, source, dtype, device, layout, where=path)


def _imported(
    model: Model,
    source: hf.Source,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout | None,
    instead: Mapping[str, Tensor] | None = None,
    where: str = "model.model_path and model.encoders",
) -> Tree:
    try:
        return hf.import_weights(model.tree, model.names, source, dtype, device, layout, instead)
    except (OSError, ValueError) as error:
        raise RunError(f"the weights at {where} can't be used: {error}") from error
