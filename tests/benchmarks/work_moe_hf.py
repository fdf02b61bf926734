"""transformers' Qwen3-MoE on the common work, as it comes or compiled."""

import argparse

import torch
import transformers
import work
import work_hf


def make_model(experts: str) -> transformers.PreTrainedModel:
    """`experts`: how they are computed; "default" is left to transformers."""
    fields = {name: value for name, value in work.moe_config().items() if name != "model_type"}
    config = transformers.Qwen3MoeConfig(**fields)  # pyright: ignore[reportArgumentType]
    config._attn_implementation = "sdpa"
    if experts != "default":
        config._experts_implementation = experts
    model = transformers.Qwen3MoeForCausalLM(config)
    values = {name: torch.from_numpy(value) for name, value in work.moe_weights().items()}
    for name in [name for name in values if name.endswith(".experts.0.gate_proj.weight")]:
        prefix = name.removesuffix("0.gate_proj.weight")
        gate, up, down = (
            torch.stack(
                [values.pop(f"{prefix}{e}.{kind}_proj.weight") for e in range(work.EXPERTS)]
            )
            for kind in ("gate", "up", "down")
        )
        values[prefix + "gate_up_proj"] = torch.cat([gate, up], 1)
        values[prefix + "down_proj"] = down
    missing = model.load_state_dict(values, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not missing.unexpected_keys
    model.tie_weights()
    return model.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--experts", default="default")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", default="", help="write a table of steps 5 to 7 here")
    options = parser.parse_args()
    work_hf.plain(make_model(options.experts), options.steps, options.compile, options.profile)
