"""One contestant of chat.py: fine-tunes the common model on conversations."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import work

TOKENIZER = Path(__file__).parents[2] / "data/shakespeare/tokenizer"
SEQ, ROWS = 2048, 2
"""Tokens of the longest conversation; a packed row of ours has SEQ * ROWS. Theirs are batches of
2 * ROWS conversations, which have about as many tokens."""


class Meter:
    """From one step's end to the next one's, so that loading counts; a step a line from stdin."""

    def start(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.begin = time.perf_counter()

    def stop(self, targets: float, tokens: int, loss: float) -> None:
        seconds = time.perf_counter() - self.begin
        figures = {"seconds": seconds, "targets": targets, "tokens": tokens, "loss": loss}
        print(json.dumps(figures), flush=True)


def omnistep(path: str) -> None:
    from work_omnistep import config as make_config

    from omnistep.core import param, rng
    from omnistep.core.optim import adamw
    from omnistep.core.step import init_state, make_train_step
    from omnistep.data.loader import make_loader
    from omnistep.data.loader_config import LoaderConfig
    from omnistep.data.sources import Described, open_reader
    from omnistep.data.tokenizer import load_tokenizer
    from omnistep.models import decoder, hf
    from omnistep.models.hf_names import weight_names

    tokenizer = load_tokenizer(TOKENIZER)
    config = LoaderConfig(
        max_seq_len=SEQ, micro_batch_size=ROWS, rmpad_with_pos_ids=True, num_workers=1
    )
    described = Described(
        path=path, data_type="conversation", text_keys=("messages",), chat_template="chatml"
    )
    batches = make_loader(
        open_reader(described, tokenizer, config.rules, seed=0), tokenizer, config
    ).batches()
    cfg = make_config()
    tree = decoder.params(cfg)
    source = hf.InMemory({k: torch.from_numpy(v) for k, v in work.weights().items()})
    params = hf.import_weights(
        tree, weight_names({"model_type": "qwen3"}, cfg), source, torch.float32, torch.device("cpu")
    )
    optimizer = adamw(weight_decay=work.DECAY, decay_mask=param.decay_mask(tree))
    train_step = make_train_step(
        decoder.make_stages(cfg, param.one_rank(tree, torch.float32), mode="none"),
        optimizer,
        lambda step: torch.full((), work.LR),
        max_grad_norm=work.CLIP,
    )
    state, meter = init_state(params, optimizer, rng.key(0)), Meter()
    while True:
        meter.start()
        batch, _ = next(batches)
        state, metrics = train_step(state, batch)
        meter.stop(float(metrics["weight"]), batch.tokens.numel(), float(metrics["loss"]))


def trainer(path: str, compile: bool) -> None:
    import transformers
    from work_hf import make_model

    from omnistep.data.chat import TEMPLATES

    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text()
    data = []
    with open(path, encoding="utf-8") as file:  # all of it before the clock starts
        for line in file:
            found = tokenizer.apply_chat_template(
                json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = found["input_ids"][-SEQ:], found["assistant_masks"][-SEQ:]
            labels = [i if learnt else -100 for i, learnt in zip(ids, mask, strict=True)]
            data.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    meter, seen = Meter(), {}

    class Trainer(transformers.Trainer):
        def training_step(self, model, inputs, *rest, **options):
            seen["targets"] = int((inputs["labels"][:, 1:] != -100).sum())
            seen["tokens"] = inputs["input_ids"].numel()
            seen["loss"] = float(loss := super().training_step(model, inputs, *rest, **options))
            return loss

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            meter.start()

        def on_step_end(self, *_, **__):
            meter.stop(**seen)
            meter.start()

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=1_000_000,
        per_device_train_batch_size=2 * ROWS,
        learning_rate=work.LR,
        lr_scheduler_type="constant",
        weight_decay=work.DECAY,
        max_grad_norm=work.CLIP,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        torch_compile=compile,
    )
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    Trainer(
        model=make_model(),
        args=arguments,
        train_dataset=data,  # pyright: ignore[reportArgumentType]
        data_collator=collate,
        callbacks=[Clock()],
    ).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=["omnistep", "trainer", "compiled"])
    parser.add_argument("data")
    options = parser.parse_args()
    if options.who == "omnistep":
        omnistep(options.data)
    else:
        trainer(options.data, options.who == "compiled")
