"""What runs that nobody disturbs give, and whether another run's directory holds the same."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import field, frozen

from omnistep.core.checkpoint.store import open_store
from omnistep.core.logs import read_metrics
from tests.bin.runs import (
    CONFIG,
    Files,
    make_files,
    saved_steps,
    settings,
    words,
    write_documents,
)
from tests.faults.jobs import Job, Server
from tests.faults.shim import NOTHING, Strike

STEPS, SAVE, KEEP, KEEP_EVERY = 8, 2, 1, 4
ALIVE = 8.0
"""Seconds until a stopped rank is named."""
DOCUMENT = 20
"""Characters: so short that reading goes on, a block after another, all through a run. The third
block is read after step 3, the fourth after step 7: neither is saved unless something ends it."""
CUT = 7
"""The step at which the run was cut off that a resumed one goes on with; 6 is its last save."""

MESHES: Mapping[int, Mapping[str, Any]] = {
    1: {},
    2: {"train_data_parallel_mode": "fsdp2"},
    4: {"train_data_parallel_mode": "fsdp2", "train_tensor_parallel_size": 2},
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
"""Relative, of a run on another mesh: that of tests/bin/test_mesh.py for each loss; and for each
leaf's norm, where Adam divides by second moments of a few steps, ten times as much."""

Content = dict[str, Any]
"""The leaves of a checkpoint: of an array its dtype, shape and bytes."""


def kept(steps: Iterable[int]) -> set[int]:
    """What retention leaves of these steps."""
    steps = sorted(steps)
    return {*steps[-KEEP:], *(step for step in steps if step % KEEP_EVERY == 0)}


def read_checkpoint(output: Path, step: int) -> Content:
    """All of a step, as one rank restores it."""
    store = open_store(output / "checkpoints")
    try:
        leaves = store.restore(store.stored(step), step)
    finally:
        store.close()
    return {name: _plain(leaf) for name, leaf in leaves.items()}


def _plain(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    data = leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(leaf.dtype), tuple(leaf.shape), data


def read_numbers(output: Path) -> dict[int, tuple[float, ...]]:
    """Loss, gradient norm and targets of each step; a step that stands twice is one too many."""
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    steps = [row["step"] for row in rows]
    if len(set(steps)) < len(steps):
        raise AssertionError(f"metrics.jsonl has steps {steps}")
    return {row["step"]: (row["loss"], row["grad_norm"], row["weight"]) for row in rows}


@frozen
class Truth:
    """Of one mesh."""

    numbers: Mapping[int, tuple[float, ...]]
    contents: Mapping[int, Content]
    half: Path
    """The directory of a run that was cut off."""
    fresh: Job
    """A run from the start, with retention, and one that went on from `half`: their calls."""
    resumed: Job


@frozen
class World:
    """Files, a server, and the truth of each mesh that was asked for."""

    directory: Path
    server: Server
    files: Files
    truths: dict[int, Truth] = field(factory=dict)

    @classmethod
    def make(cls, directory: Path) -> "World":
        for name in ("server", "files", "data", "truths", "runs"):
            (directory / name).mkdir(parents=True)
        files = make_files(directory / "files")
        files.config.write_text(json.dumps(CONFIG | HEADS))
        lines = files.text.read_text().splitlines()
        text = "".join(json.loads(line)["content_split"] for line in lines)
        documents = [text[at : at + DOCUMENT] for at in range(0, len(text), DOCUMENT)]
        files = attrs.evolve(files, text=directory / "data/text.jsonl")
        write_documents(files.text, documents)
        return cls(directory, Server(directory / "server", directory / "data"), files)

    def run(
        self,
        output: Path,
        ranks: int,
        strike: Strike = NOTHING,
        *,
        traced: bool = False,
        workers: int = 0,
        meanwhile: Callable[[], None] = lambda: None,
        **changes: Any,
    ) -> Job:
        chosen = settings(
            self.files,
            output,
            **{
                "data_train_size": STEPS * 4 * 32,
                "train_global_batch_size": 4,
                "train_save_steps": SAVE,
                "train_rank_timeout": ALIVE,
                "train_keep_checkpoints": KEEP,
                "train_keep_checkpoint_every": KEEP_EVERY,
                "train_load_checkpoint_path": "auto",
                "data_num_workers": workers,
                **MESHES[ranks],
                **changes,
            },
        )
        how = {"traced": traced, "forks": workers > 0, "meanwhile": meanwhile}
        return self.server.run(words(chosen), ranks, output, strike, **how)

    def truth(self, ranks: int) -> Truth:
        if ranks not in self.truths:
            self.truths[ranks] = self._find_truth(ranks)
        return self.truths[ranks]

    def _find_truth(self, ranks: int) -> Truth:
        places = [
            self.directory / f"truths/{n}{ranks}" for n in ("all", "half", "fresh", "resumed")
        ]
        everything, half, fresh, resumed = places
        succeeded(
            self.run(
                everything,
                ranks,
                train_save_steps=1,
                train_keep_checkpoints=0,
                train_keep_checkpoint_every=0,
            )
        )
        contents = {step: read_checkpoint(everything, step) for step in saved_steps(everything)}
        assert list(contents) == list(range(1, STEPS + 1))
        shutil.copytree(everything, half)
        for step in contents.keys() - kept(range(SAVE, CUT, SAVE)):
            shutil.rmtree(half / f"checkpoints/{step}")
        rows = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
        rows = [row for row in rows if json.loads(row)["step"] <= CUT]
        (half / "metrics.jsonl").write_text("".join(rows))
        first = succeeded(self.run(fresh, ranks, traced=True))
        shutil.copytree(half, resumed)
        second = succeeded(self.run(resumed, ranks, traced=True))
        truth = Truth(read_numbers(everything), contents, half, first, second)
        for output in (fresh, resumed):
            assert not differences(output, truth), differences(output, truth)
            assert saved_steps(output) == sorted(kept(range(SAVE, STEPS + 1, SAVE)))
            shutil.rmtree(output)
        return truth

    def close(self) -> None:
        self.server.close()


def succeeded(job: Job) -> Job:
    assert job.code == 0, f"exit {job.code}\n{job.out}\n{job.err}"
    return job


def differences(output: Path, truth: Truth) -> list[str]:
    """Of a finished run from one on the same mesh that nobody disturbed: none, to the bit."""
    found = []
    if read_numbers(output) != truth.numbers:
        found.append(f"losses differ: {read_numbers(output)}, not {truth.numbers}")
    return found + unlike(output, STEPS, truth)


def unlike(output: Path, step: int, truth: Truth) -> list[str]:
    """How a checkpoint differs from the true one: not at all, to the bit. One of step 0 (of a run
    that was asked to stop at once) has none, and need only be read."""
    try:
        content = read_checkpoint(output, step)
    except Exception as error:
        return [f"checkpoint {step} cannot be restored: {error}"]
    true = truth.contents.get(step, content)
    names = [n for n in sorted(content.keys() | true.keys()) if content.get(n) != true.get(n)]
    return [f"checkpoint {step} differs in {', '.join(names)}"] if names else []


def distances(output: Path, truth: Truth) -> list[str]:
    """Of a finished run that went on on another mesh: none but rounding."""
    found, numbers = [], read_numbers(output)
    if numbers.keys() != truth.numbers.keys():
        return [f"metrics.jsonl has the steps {sorted(numbers)}"]
    for step, (loss, _, targets) in truth.numbers.items():
        mine = numbers[step]
        if abs(mine[0] - loss) > LOSS_TOLERANCE * loss or mine[2] != targets:
            found.append(f"step {step} has {mine}, not {truth.numbers[step]}")
    content, true = read_checkpoint(output, STEPS), truth.contents[STEPS]
    if content.keys() != true.keys():
        return [*found, f"leaves {sorted(content.keys() ^ true.keys())}"]
    for name, wanted in true.items():
        if name.startswith("state.params."):
            mine, wanted = _tensor(content[name]), _tensor(wanted)
            error = float((mine - wanted).norm() / wanted.norm())
            found += [f"{name} is {error:.1e} off"] if error > WEIGHT_TOLERANCE else []
        elif not isinstance(wanted, tuple) and content[name] != wanted:
            found.append(f"{name} is {content[name]}, not {wanted}")
    return found


def _tensor(plain: tuple[str, tuple[int, ...], bytes]) -> torch.Tensor:
    dtype, shape, data = plain
    kind = getattr(torch, dtype.removeprefix("torch."))
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)
