"""Random small models of transformers, and what ours are compared by."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from omnistep.core.batch import Batch, segment_starts
from omnistep.core.tree import Tree
from omnistep.models import hf
from omnistep.models.config import Config
from omnistep.models.hf_config import decoder_config
from omnistep.models.hf_names import Names, weight_names
from omnistep.models.layers import rope_frequencies
from omnistep.models.params import params

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that no gradient is lost in rounding
}
CPU = torch.device("cpu")


def make_reference(
    family: str, extra: Mapping[str, Any], dtype: torch.dtype
) -> tuple[transformers.PreTrainedModel, Config]:
    """A model of transformers of SIZES and what `extra` changes, and our configuration of it."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **extra})
    config._attn_implementation = "eager" if family == "gpt_oss" else "sdpa"
    config._experts_implementation = "eager"  # the others take no fp64
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(torch.randn_like(p) * 0.2)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.add_(torch.randn_like(b) * 0.1)
    cfg = decoder_config(config.to_dict())
    if dtype == torch.float64:
        _compute_in_fp64(model, cfg)
    return model.train(), cfg


class Fp64(TorchFunctionMode):
    """What would be cast to fp32, or newly made in it, is in fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        narrows = func is Tensor.float or (
            func in (Tensor.type, Tensor.to) and args[1:] == (torch.float32,)
        )
        if narrows:
            return args[0].to(torch.float64)
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _compute_in_fp64(model: torch.nn.Module, cfg: Config) -> None:
    """transformers computes norms, angles and scores of experts in fp32 whatever the dtype."""

    def rotary(self, x, position_ids):
        frequencies, _ = rope_frequencies(cfg.rope_dim, cfg.rope_theta, cfg.rope_scaling)
        known = frequencies.to(self.inv_freq.dtype)
        torch.testing.assert_close(known, self.inv_freq, rtol=2e-6, atol=0)
        angles = position_ids.double().unsqueeze(-1) * frequencies
        if type(self).__name__.startswith("DeepseekV2"):
            return torch.polar(torch.ones_like(angles), angles) * self.attention_scaling
        if not type(self).__name__.startswith("GptOss"):
            angles = torch.cat((angles, angles), -1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = rotary.__get__(module)
    theirs = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with Fp64():
            return theirs(*args, **kwargs)

    model.forward = forward


def masks(model: transformers.PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What transformers must be told of packed samples: nothing, where it reads the positions."""
    if model.config.model_type != "gpt_oss":
        return {}
    starts, index = segment_starts(batch), torch.arange(batch.tokens.shape[1])
    seen = (index <= index[:, None]) & (index >= starts[..., None])
    near = seen & (index > index[:, None] - model.config.sliding_window)
    kinds = {"full_attention": seen, "sliding_attention": near}
    return {
        "attention_mask": {
            name: torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, -1e30)[:, None]
            for name, mask in kinds.items()
        }
    }


def split_experts(tensors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """A state_dict (or gradients) of transformers by the names of its files, in which each expert
    is a tensor."""
    own = family == "mixtral"
    split = {}
    for name, value in tensors.items():
        start, is_fused, which = name.partition("mlp.experts.")
        if own:
            start = start.replace("mlp.gate.", "block_sparse_moe.gate.")
        if not is_fused or family == "gpt_oss":  # whose files have them as its modules do
            split[start if own else name] = value
            continue
        folder = "block_sparse_moe" if own else "mlp"
        gate, up, down = ("w1", "w3", "w2") if own else ("gate_proj", "up_proj", "down_proj")
        for i, expert in enumerate(value):
            parts = {down: expert}
            if which == "gate_up_proj":
                parts = dict(zip((gate, up), expert.chunk(2), strict=True))
            for part, weight in parts.items():
                split[f"{start}{folder}.experts.{i}.{part}.weight"] = weight
    return split


def tensors_of(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Every weight by its name in files, what is not learnt included."""
    family = model.config.model_type
    return split_experts({k: v.detach() for k, v in model.state_dict().items()}, family)


def names_of(model: transformers.PreTrainedModel, cfg: Config) -> Names:
    return weight_names(model.config.to_dict(), cfg)


def imported(model: transformers.PreTrainedModel, cfg: Config, dtype: torch.dtype) -> Tree:
    source = hf.InMemory(tensors_of(model))
    return hf.import_weights(params(cfg), names_of(model, cfg), source, dtype, CPU)


def exported(tree: Tree, names: Names, values: Tree) -> dict[str, Tensor]:
    return {name: t.read() for name, t in hf.export_weights(tree, names, values).items()}


def make_batch(packed: bool, seq: int = 24) -> Batch:
    g = torch.Generator().manual_seed(1)
    rows = 1 if packed else 2
    tokens = torch.randint(SIZES["vocab_size"], (rows, seq), generator=g)
    targets = torch.randint(SIZES["vocab_size"], (rows, seq), generator=g)
    weights = (torch.rand(rows, seq, generator=g) < 0.7).float()
    lengths = (9, 1, 14) if packed else (seq,)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, seq).contiguous()
    return Batch(tokens, targets, weights, positions=positions)


def relative_errors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Per tensor, the norm of the difference over the norm of theirs."""
    assert ours.keys() == theirs.keys()
    return {
        name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs
    }
