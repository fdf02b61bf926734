"""What the tests of this folder share: a tiny model and text, and ways to run the commands."""

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from omnistep.core.logs import read_metrics
from tests.forkserver.client import ENVIRONMENT, ROOT, Result

TOKENIZER = ROOT / "data/shakespeare/tokenizer"

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # gradients well above Adam's eps, so that rounding stays small
}


@frozen
class Files:
    """Of one session. `text`: 150 documents; `held_out`: 8; `short`: 5 of one sequence each."""

    directory: Path
    config: Path
    text: Path
    held_out: Path
    short: Path


def make_files(directory: Path) -> Files:
    text = (ROOT / "data/shakespeare/train.txt").read_text(encoding="utf-8")[20_000:]
    files = Files(directory, *(directory / n for n in ("c.json", "t.jsonl", "h.jsonl", "s.jsonl")))
    files.config.write_text(json.dumps(CONFIG))
    write_documents(files.text, [text[i * 200 : (i + 1) * 200] for i in range(150)])
    write_documents(files.held_out, [text[i * 200 : (i + 1) * 200] for i in range(200, 208)])
    write_documents(files.short, ["To be, or not to be", "Hark!", "Who's there?", "Nay", "Exit."])
    return files


def write_documents(path: Path, documents: list[str]) -> None:
    lines = (json.dumps({"content_split": document}) for document in documents)
    path.write_text("".join(line + "\n" for line in lines))


Settings = Mapping[str, Any]


def words(settings: Settings) -> list[str]:
    """A command line; a setting of None is left out."""

    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return [f"--{name}={text(value)}" for name, value in settings.items() if value is not None]


def settings(files: Files, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of 6 packed steps of 64 tokens. Changes are spelled `train_lr=1` or in full."""
    base = {
        "model.config_path": files.config,
        "model.tokenizer_path": TOKENIZER,
        "data.train_path": files.text,
        "data.data_type": "plaintext",
        "data.max_seq_len": 32,
        "data.train_size": 6 * 64,
        "data.num_workers": 0,
        "train.output_dir": output,
        "train.rmpad_with_pos_ids": True,
        "train.micro_batch_size": 2,
        "train.lr": 1e-2,
        "train.enable_manual_eager": True,
        "train.save_hf_weights": False,
        "train.use_wandb": False,
    }
    return base | {name.replace("_", ".", 1): value for name, value in changes.items()}


PADDED = {"train_rmpad_with_pos_ids": False, "train_max_steps": 6}


def call(main: Callable[[list[str]], int], argv: list[str]) -> Result:
    """`main` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return Result(code, out.getvalue(), err.getvalue())


def process(program: str, argv: list[str], **options: Any) -> Result:
    """`python -m omnistep.bin.<program>` as a user starts it: seconds of imports, which the fork
    server saves."""
    command = [sys.executable, "-m", f"omnistep.bin.{program}", *argv]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options
    )
    return Result(done.returncode, done.stdout, done.stderr)


def succeeded(result: Result) -> Result:
    assert result.code == 0, f"exit {result.code}\n{result.out}\n{result.err}"
    return result


def losses(output: Path) -> dict[int, float]:
    """The loss of each step; each step stands once."""
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, len(steps) + 1))
    return {row["step"]: row["loss"] for row in rows}


def saved_steps(output: Path) -> list[int]:
    places = (output / "checkpoints").glob("*")
    return sorted(int(path.name) for path in places if path.name.isdecimal())


def content(directory: Path) -> dict[str, bytes]:
    """Every file below, for `nothing was touched`."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
