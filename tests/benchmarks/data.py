"""From a file of conversations to batches: our loader against HF datasets with the HF collator.

    pip install datasets && python -m tests.benchmarks.data

The chat corpus of chitchat.py (fetched from PyPI), the embedded tokenizer and template. One epoch,
from opening the file to the last batch, in turn, the median of the rounds. Theirs: `load_dataset`,
`map` with apply_chat_template and the assistant's mask in as many processes as our loader has
workers, then a DataLoader with DataCollatorForSeq2Seq (padded to the longest of 4) or
DataCollatorWithFlattening (packed, without a budget). Ours packs rows of 4096 tokens.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omnistep.data.chat import TEMPLATES
from omnistep.data.loader import make_loader
from omnistep.data.loader_config import LoaderConfig
from omnistep.data.sources import Described, open_reader
from omnistep.data.tokenizer import load_tokenizer
from tests.benchmarks.chitchat import write

TOKENIZER = Path(__file__).parents[2] / "data/shakespeare/tokenizer"
SEQ = 2048


def ours(path: str, workers: int) -> tuple[int, float]:
    """Conversations of an epoch, and the share of its rows that is no padding."""
    tokenizer = load_tokenizer(TOKENIZER)
    config = LoaderConfig(
        max_seq_len=SEQ, micro_batch_size=2, rmpad_with_pos_ids=True, num_workers=workers
    )
    described = Described(
        path=path, data_type="conversation", text_keys=("messages",), chat_template="chatml"
    )
    reader = open_reader(described, tokenizer, config.rules, seed=0)
    loader = make_loader(reader, tokenizer, config)
    places = samples = tokens = 0
    for batch, state in loader.batches():
        if state.epoch > 0:
            break
        places += batch.tokens.numel()
        samples, tokens = state.given[0]
    loader.close()
    return samples, tokens / places


def theirs(path: str, workers: int, flat: bool) -> tuple[int, float]:
    import datasets  # pyright: ignore[reportMissingImports]
    import transformers
    from torch.utils.data import DataLoader

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text()

    def encode(example: dict[str, Any]) -> dict[str, list[int]]:
        found = tokenizer.apply_chat_template(
            example["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = found["input_ids"][-SEQ:], found["assistant_masks"][-SEQ:]
        labels = [i if learnt else -100 for i, learnt in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "labels": labels}

    with tempfile.TemporaryDirectory() as cache:
        data = datasets.load_dataset("json", data_files=path, cache_dir=cache, split="train")
        data = data.map(encode, num_proc=workers, remove_columns=["messages"])
        collate = (
            transformers.DataCollatorWithFlattening()
            if flat
            else transformers.DataCollatorForSeq2Seq(tokenizer)
        )
        loader = DataLoader(
            data,  # pyright: ignore[reportArgumentType]
            batch_size=4,
            shuffle=True,
            collate_fn=collate,
            num_workers=workers,
        )
        places = sum(int(batch["input_ids"].numel()) for batch in loader)
        return len(data), sum(map(len, data["input_ids"])) / places


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism, for all
    contestants: dict[str, Callable[[str, int], tuple[int, float]]] = {
        "omnistep": ours,
        "datasets, padded": lambda path, workers: theirs(path, workers, flat=False),
        "datasets, flattened": lambda path, workers: theirs(path, workers, flat=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/chat.jsonl"
        write(Path(path))
        megabytes = Path(path).stat().st_size / 1e6
        for _ in range(options.rounds):
            for name, run in contestants.items():
                start = time.perf_counter()
                counts[name] = run(path, options.workers)
                seconds[name].append(time.perf_counter() - start)
    print(
        " " * 20
        + "".join(f"{h:>16}" for h in ("seconds", "conversations/s", "MB/s", "ratio", "full"))
    )
    first = statistics.median(seconds["omnistep"])
    for name in contestants:
        median = statistics.median(seconds[name])
        samples, full = counts[name]
        print(
            f"{name:20}{median:16.1f}{samples / median:16.0f}{megabytes / median:16.2f}"
            f"{first / median:16.2f}{full:16.1%}"
        )


if __name__ == "__main__":
    main()
