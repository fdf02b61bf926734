"""transformers' Qwen3 on the common work: in a plain torch.compile loop, or by the HF Trainer."""

import argparse
import tempfile

import torch
import transformers
import work


def make_model() -> transformers.PreTrainedModel:
    config = transformers.Qwen3Config(
        vocab_size=work.VOCAB,
        hidden_size=work.EMBED,
        intermediate_size=work.MLP,
        num_hidden_layers=work.LAYERS,
        num_attention_heads=work.HEADS,
        num_key_value_heads=work.KV_HEADS,
        head_dim=work.HEAD_DIM,
        max_position_embeddings=work.SEQ,
        tie_word_embeddings=True,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "sdpa"
    model = transformers.Qwen3ForCausalLM(config)
    values = {name: torch.from_numpy(value) for name, value in work.weights().items()}
    missing = model.load_state_dict(values, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not missing.unexpected_keys
    model.tie_weights()
    return model.train()


def plain(
    model: transformers.PreTrainedModel, steps: int, compile: bool, profile: str = ""
) -> None:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": work.DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=work.LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(model) if compile else model
    timer, profiler = work.Timer(), work.Profiler(profile)
    for i, tokens in enumerate(torch.from_numpy(work.tokens(steps))):
        profiler.at(i)
        timer.start()
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timer.stop(loss.item())


def trainer(model: transformers.PreTrainedModel, steps: int, compile: bool) -> None:
    rows = torch.from_numpy(work.tokens(steps)).reshape(-1, work.SEQ)
    timer = work.Timer()

    class Trainer(transformers.Trainer):
        loss = torch.zeros(())

        def training_step(self, *inputs, **options):
            self.loss = super().training_step(*inputs, **options).detach()
            return self.loss

    class Clock(transformers.TrainerCallback):
        """From the end of one step to the end of the next: loading and logging count."""

        def on_train_begin(self, *_, **__):
            timer.start()

        def on_step_end(self, args, state, control, **_):
            timer.stop(run.loss.item())
            if state.global_step < steps:
                timer.start()

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=work.ROWS,
        learning_rate=work.LR,
        lr_scheduler_type="constant",
        weight_decay=work.DECAY,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=work.CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        torch_compile=compile,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    run = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])  # pyright: ignore[reportArgumentType]
    run.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--loop", choices=["plain", "trainer"], required=True)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    loop = {"plain": plain, "trainer": trainer}[options.loop]
    loop(make_model(), options.steps, not options.eager)
