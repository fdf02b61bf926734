"""What is to be converted: a checkpoint, a Hugging Face directory, a torch.distributed.checkpoint.

Each becomes a Source (models/hf.py): tensors by their Hugging Face names, none read until asked
for.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor

from omnistep.bin.build import checkpoint_place
from omnistep.bin.model import Model, RunError
from omnistep.core.checkpoint.dcp_weights import (
    METADATA,
    METADATA_SUM,
    DcpWeights,
    common_prefix,
    open_dcp_weights,
)
from omnistep.core.checkpoint.directory import Stored
from omnistep.core.checkpoint.fit import describe
from omnistep.core.checkpoint.place import is_url
from omnistep.core.checkpoint.safetensors import INDEX, SINGLE, nearest, open_weights
from omnistep.core.checkpoint.store import open_store
from omnistep.models import hf
from omnistep.models.hf_config import read_config_json
from omnistep.models.hf_names import OUTER, Part, fused

Kind = Literal["checkpoint", "hf", "dcp"]

PARAMS = "state.params."
"""What the names of a model's weights begin with in a checkpoint."""

SHOWN = 5
"""Names that an error lists."""


@frozen(eq=False)
class Origin:
    """What a path holds, opened."""

    kind: Kind
    text: str
    """For a person."""
    weights: Callable[[Model], hf.Source]
    """Raises ValueError where they are not those of the model."""
    config: Mapping[str, Any] | None = None
    """Its own config.json."""
    recipe: Path | None = None
    """Of the run that wrote it."""


def open_origin(path: str, prefix: str | None) -> Origin:
    """Raises RunError where nothing that can be converted is there."""
    place, kind = Path(path).expanduser(), kind_of(path)
    if prefix is not None and kind != "dcp":
        raise RunError(f"--prefix is for a torch.distributed.checkpoint; {path} is none")
    try:
        if kind == "checkpoint":
            return _open_checkpoint(path)
        if kind == "dcp":
            dcp = open_dcp_weights(place)
            return Origin(
                kind,
                f"torch.distributed.checkpoint {path}",
                lambda model: _named(dcp, model, prefix),
                _config_beside(place),
            )
        weights = open_weights(place)
        config = _config_beside(place if place.is_dir() else place.parent)
        return Origin(
            kind,
            f"Hugging Face weights {path}",
            lambda model: hf.respelled(weights, weights.infos, model.names, model.tree),
            config,
        )
    except ValueError as error:
        raise RunError(str(error)) from error


def kind_of(path: str) -> Kind:
    """What a path looks like; a torch.distributed.checkpoint may be called by its step too."""
    if is_url(path):
        return "checkpoint"
    place = Path(path).expanduser()
    if not place.exists():
        raise RunError(f"there is nothing at {path}")
    if place.is_file():
        return "hf"  # open_weights says what is wrong with other files
    inner = (place, *(place.iterdir() if place.is_dir() else ()), *place.glob("checkpoints/*"))
    if any(step.name.isdecimal() and _is_ours(step) for step in inner):
        return "checkpoint"
    if (place / METADATA).is_file():
        return "dcp"
    if (place / SINGLE).is_file() or (place / INDEX).is_file():
        return "hf"
    if (place / "config.json").is_file():
        return "hf"
    raise RunError(
        f"{path} is no checkpoint (a step, its directory, or the output_dir of its run), no "
        f"Hugging Face directory ({SINGLE} or {INDEX}), no torch.distributed.checkpoint "
        f"({METADATA})"
    )


def _is_ours(step: Path) -> bool:
    """Whether this is a step that a run saved, in any of its formats."""
    return (step / "state").is_dir() or (step / METADATA_SUM).is_file()


def _config_beside(directory: Path) -> dict[str, Any] | None:
    has_one = (directory / "config.json").is_file()
    return read_config_json(directory) if has_one else None


# ---- checkpoints -----------------------------------------------------------------------------


def _open_checkpoint(path: str) -> Origin:
    directory, step = checkpoint_place(path)
    with contextlib.closing(open_store(directory)) as store:
        step = store.latest() if step is None else step
        if step is None:
            raise RunError(f"{path} holds no complete checkpoint")
        stored = store.opened(step)
    leaves, parent = stored.leaves(), directory.parent
    config = json.loads(str(stored.value("model"))) if "model" in leaves else None
    recipe = parent / "recipe.yaml" if isinstance(parent, Path) else None
    return Origin(
        "checkpoint",
        f"step {step} of {directory}",
        lambda model: CheckpointWeights.of(stored, f"{directory}/{step}", model),
        config,
        recipe if recipe is not None and recipe.is_file() else None,
    )


@frozen(eq=False)
class CheckpointWeights:
    """The weights in a checkpoint, by their Hugging Face names."""

    stored: Stored
    leaves: Mapping[str, Any]
    tensors: Mapping[str, tuple[Part, ...]]
    """What each tensor is made of, by their Hugging Face names."""

    @classmethod
    def of(cls, stored: Stored, place: str, model: Model) -> "CheckpointWeights":
        tensors = model.names.tensors(model.tree)
        known = {PARAMS + part.ours: part.param for parts in tensors.values() for part in parts}
        leaves = stored.leaves()
        others = [n for n in leaves if n.startswith(PARAMS) and n not in known]
        if others:
            raise ValueError(
                f"{place} holds what the model has no place for: {_listed(others)}. "
                "It is of another model: set model.config_path as in the recipe.yaml of its run"
            )
        for name, param in known.items():
            held = describe(name, leaves[name]) if name in leaves else "nothing"
            if not isinstance(leaves.get(name), Tensor) or leaves[name].shape != param.shape:
                raise ValueError(
                    f"{place} holds as {name} {held}; the model's configuration asks for "
                    f"{list(param.shape)}"
                )
        return cls(stored, leaves, tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][0].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.leaves[PARAMS + self.tensors[name][0].ours].dtype

    def read(self, name: str, slices: Sequence[slice]) -> Tensor:
        parts = self.tensors[name]
        return hf.joined(parts, [self._part(part) for part in parts])[tuple(slices)]

    def _part(self, part: Part) -> Tensor:
        cuts = [slice(i, i + 1) for i in part.at]
        cuts += [slice(0, n) for n in part.param.shape[len(cuts) :]]
        return self.stored.part(PARAMS + part.ours, cuts)[(0,) * len(part.at)]


# ---- torch.distributed.checkpoint ------------------------------------------------------------


def _named(dcp: DcpWeights, model: Model, prefix: str | None) -> hf.Source:
    """The tensors by the model's names: experts one by one, as in files, or a layer's together, as
    in transformers' modules. Raises ValueError where names are missing, or stand there that the
    model does not have."""
    held, wanted = dcp.names(), [part.theirs for part in model.names.all_parts(model.tree)]
    is_fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in held)
    if is_fused:
        wanted = list(dict.fromkeys(fused(name).name for name in wanted))
    if prefix is None:
        try:
            prefix = common_prefix(held, wanted)
        except ValueError as error:
            raise ValueError(f"{dcp.path}: {error}; choose one by --prefix") from None
    known, there = {prefix + name for name in wanted}, set(held)
    if missing := [name for name in wanted if prefix + name not in there]:
        lines = (f"\n  {prefix + name}{nearest(prefix + name, held)}" for name in missing[:SHOWN])
        raise ValueError(
            f"{dcp.path} holds {len(held)} tensors, but {len(missing)} of the model's {len(wanted)}"
            f" are not among them:{''.join(lines)}{', …' * (len(missing) > SHOWN)}"
        )
    kin = tuple(f"{prefix}{start}" for start in {name.split(".")[0] + "." for name in wanted})
    others = [n for n in held if n.startswith(kin) and n not in known and not _is_extra(n)]
    if others:
        raise ValueError(
            f"{dcp.path} holds what the model has no place for: {_listed(others)}. It is of "
            "another model, or one that was changed (as by LoRA): set model.config_path to its own"
        )
    found = DcpWeights(dcp.path, prefix, dcp.reader, dcp.metadata)
    return hf.FusedExperts.of(found) if is_fused else found


def _is_extra(name: str) -> bool:
    """Whether a tensor follows from others: frequencies, and the output layer where it is tied
    (where it is not, it is one of the model's)."""
    return name.endswith(("rotary_emb.inv_freq", OUTER["lm_head"]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)
