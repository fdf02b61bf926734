# pyright: reportMissingImports=false
# (litgpt lives in an environment of its own)
"""litgpt's own pretraining loop, compiled, on the common work."""

import argparse
import tempfile
from pathlib import Path

import lightning
import torch
import work
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule

TIMER = work.Timer()
NAMES = {
    "attn.proj": "self_attn.o_proj",
    "attn.norm_q": "self_attn.q_norm",
    "attn.norm_k": "self_attn.k_norm",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
}


def initialize(fabric, model, n_layer, n_embd) -> None:
    w = {name: torch.from_numpy(value) for name, value in work.weights().items()}
    embed = w["model.embed_tokens.weight"]
    state = {"transformer.wte.weight": embed, "lm_head.weight": embed}
    state["transformer.ln_f.weight"] = w["model.norm.weight"]
    for i in range(work.LAYERS):
        theirs, ours = f"transformer.h.{i}.", f"model.layers.{i}."
        qkv = [w[f"{ours}self_attn.{x}_proj.weight"] for x in "qkv"]
        state[theirs + "attn.qkv.weight"] = torch.cat(qkv)
        for a, b in NAMES.items():
            state[f"{theirs}{a}.weight"] = w[f"{ours}{b}.weight"]
    model.load_state_dict(state, strict=True)


class Rows(torch.utils.data.Dataset):
    """The work's rows; the last target of each is masked, as in the other contestants."""

    training = False

    def __init__(self, steps: int):
        self.rows = torch.from_numpy(work.tokens(steps)).reshape(-1, work.SEQ)

    def __len__(self) -> int:
        return len(self.rows) + 2 * work.ROWS

    def __getitem__(self, i: int) -> torch.Tensor:
        if i % work.ROWS == 0 and Rows.training and i < len(self.rows):
            TIMER.start()
        return torch.cat([self.rows[i % len(self.rows)], torch.tensor([-100])])


class Data(DataModule):
    def __init__(self, steps: int):
        self.rows = Rows(steps)
        self.seq_length = work.SEQ

    def connect(self, **_) -> None:
        pass

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.rows, batch_size=work.ROWS)

    val_dataloader = train_dataloader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    steps = parser.parse_args().steps

    check = pretrain.validate
    log = lightning.Fabric.log_dict

    def validate(*inputs, **options):  # its check before the first step is not timed
        result = check(*inputs, **options)
        Rows.training = True
        return result

    def log_dict(self, values, step=None):
        if "loss" in values:
            TIMER.stop(float(values["loss"]))
        log(self, values, step)

    def optimizer(_, params, **options):
        params = list(params)
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": work.DECAY},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=work.LR, betas=(0.9, 0.95), eps=1e-8, **options)

    pretrain.initialize_weights = initialize
    pretrain.validate = validate
    pretrain.instantiate_torch_optimizer = optimizer
    pretrain.save_checkpoint = lambda *_, **__: None
    lightning.Fabric.log_dict = log_dict
    pretrain.setup(
        model_name="Qwen3-0.6B",
        model_config=Config.from_name(
            "Qwen3-0.6B",
            padded_vocab_size=work.VOCAB,
            vocab_size=work.VOCAB,
            block_size=work.SEQ,
            n_layer=work.LAYERS,
            n_head=work.HEADS,
            n_query_groups=work.KV_HEADS,
            n_embd=work.EMBED,
            head_size=work.HEAD_DIM,
            intermediate_size=work.MLP,
            rope_base=10000,
            padding_multiple=1,
        ),
        out_dir=Path(tempfile.mkdtemp()),
        precision="32-true",
        data=Data(steps),
        devices=1,
        logger_name="csv",
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=work.ROWS,
            micro_batch_size=work.ROWS,
            max_tokens=steps * work.TOKENS,
            max_norm=work.CLIP,
            min_lr=work.LR,
            lr_warmup_steps=0,
            tie_embeddings=True,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
    )


if __name__ == "__main__":
    main()
