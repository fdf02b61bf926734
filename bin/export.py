"""A trained model as a Hugging Face directory: weights, config, tokenizer."""

import json
import os
import shutil
from pathlib import Path

from omnistep.bin.build import Model
from omnistep.core.checkpoint.safetensors import write_weights
from omnistep.core.param import Layout
from omnistep.core.tree import Tree, tree_leaves
from omnistep.data.chat import Template
from omnistep.data.tokenizer import Tokenizer
from omnistep.models import hf

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def export(
    directory: Path,
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    layout: Layout,
    template: Template | None = None,
) -> None:
    """Writes what `transformers.AutoModelForCausalLM.from_pretrained(directory)` reads, with the
    chat template it was trained by. Files of an earlier export are replaced one by one, each by a
    whole one. Collective: rank 0 writes what all ranks gather, tensor by tensor."""
    weights = hf.export_weights(model.tree, params, layout)
    if layout.mesh.rank > 0:
        for tensor in weights.values():
            tensor.read()
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, weights)
    dtype = str(tree_leaves(params)[0].dtype).removeprefix("torch.")
    config = {k: v for k, v in model.raw.items() if k not in ("torch_dtype", "dtype")}
    config["architectures"] = [hf.ARCHITECTURES[config["model_type"]]]
    config["dtype"] = dtype
    if template is not None:  # a turn ends with a token of its own
        ends = sorted({tokenizer.eos_id, template.turn_end(tokenizer)})
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        generation = {"eos_token_id": config["eos_token_id"]}
        _write(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    config.setdefault("eos_token_id", tokenizer.eos_id)
    _write(directory / "config.json", json.dumps(config, indent=2) + "\n")
    source = Path(tokenizer.path)
    for name in TOKENIZER_FILES:
        # tokenizer.path may be a file of any name
        file = source if name == "tokenizer.json" else source.parent / name
        if file.is_file() and not _same(file, directory / name):
            shutil.copyfile(file, directory / name)
    if template is not None and template.jinja != tokenizer.chat_template:
        _write(directory / "chat_template.jinja", template.jinja)
        place = directory / "tokenizer_config.json"
        if place.is_file():
            named = json.loads(place.read_text(encoding="utf-8")) | {
                "chat_template": template.jinja
            }
            _write(place, json.dumps(named, indent=2, ensure_ascii=False) + "\n")


def _same(a: Path, b: Path) -> bool:
    return b.exists() and a.samefile(b)


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
