"""Deliberate breaks of the product, each of which a test must fail for.

`python -m tests.breaks [NUMBER ...]` breaks a copy of the checkout in one way after another, runs
the tests that hold that place, and prints the table of docs/testing.md. It ends with 1 where a
break went unseen.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parent.parent
PRODUCT = ("bin", "core", "data", "models", "parallel")
COPIED = (*PRODUCT, "configs", "docs", "tests", "pyproject.toml", "README.md")


@frozen
class Break:
    what: str
    file: str
    """of the checkout; holds `right` once"""
    right: str
    wrong: str
    tests: str
    """files that see it, and options of pytest"""


FEW_MESHES = "tests/parallel/test_matrix.py -k test_mesh_of_two"
BREAKS = (
    Break(
        "the sign of a target's gradient",
        "models/loss.py",
        "gradient = e * (m / s).unsqueeze(-1) - torch",
        "gradient = e * (m / s).unsqueeze(-1) + torch",
        "tests/models/test_decoder.py",
    ),
    Break(
        "a lost reduction: gradients of copies are not summed",
        "parallel/unshard.py",
        "return all_reduce(grad, place.reduce)",
        "return grad",
        FEW_MESHES,
    ),
    Break(
        "a lost reduction: the norm of one rank clips",
        "core/step.py",
        "parts = all_reduce(every, mesh.world).split(",
        "parts = every.split(",
        FEW_MESHES,
    ),
    Break(
        "the transpose of an all-to-all",
        "parallel/collectives.py",
        "ctx.group = (size, name, concat, split)",
        "ctx.group = (size, name, split, concat)",
        FEW_MESHES,
    ),
    Break(
        "the ring: whose keys pass",
        "parallel/ring.py",
        "return (index - hop) % size",
        "return (index + hop) % size",
        "tests/parallel/test_ring.py",
    ),
    Break(
        "a pipeline's backward passes in another order",
        "parallel/pipeline.py",
        "for i in range(micros):",
        "for i in reversed(range(micros)):",
        FEW_MESHES,
    ),
    Break(
        "a mask: a window is one token wider",
        "models/attention_cuda.py",
        "return torch.maximum(starts, index - (window - 1))",
        "return torch.maximum(starts, index - window)",
        "tests/models/test_attention.py",
    ),
    Break(
        "rotary: the sign of a half",
        "models/layers.py",
        "b * cos + a * sin",
        "b * cos - a * sin",
        "tests/models/test_decoder.py",
    ),
    Break(
        "Adam: no correction of the second moment",
        "core/optim.py",
        "root_correction = (1.0 - c.b2**t).sqrt()",
        "root_correction = torch.ones_like(t)",
        "tests/core/test_optim.py",
    ),
    Break(
        "a step whose norm is not finite updates",
        "core/step.py",
        "new = tuple(torch.where(finite, n, o) for n, o in zip(new, old, strict=True))",
        "new = tuple(new)",
        "tests/core/test_step.py",
    ),
    Break(
        "accumulation: every micro-batch has the same key",
        "core/step.py",
        "state.step * accumulate + i)",
        "state.step * accumulate)",
        "tests/core/test_step.py",
    ),
    Break(
        "the schedule: the warm-up is a step short",
        "core/schedule.py",
        "lr * t / max(warmup, 1)",
        "lr * (t + 1) / max(warmup, 1)",
        "tests/core/test_schedule.py",
    ),
    Break(
        "threefry: a rotation",
        "core/rng.py",
        "((13, 15, 26, 6), (17, 29, 16, 24))",
        "((13, 15, 26, 7), (17, 29, 16, 24))",
        "tests/core/test_rng.py",
    ),
    Break(
        "packing: an off-by-one, a row takes a piece too many",
        "data/pack.py",
        "if len(rows[row]) >= limits.most:",
        "if len(rows[row]) > limits.most:",
        "tests/data/test_pack.py",
    ),
    Break(
        "the order of an epoch: a sample twice, another never",
        "data/order.py",
        "index[outside] = once(index[outside])",
        "index[outside] %= np.uint64(size)",
        "tests/data/test_order.py",
    ),
    Break(
        "what is learnt of a turn begins a token late",
        "data/turns.py",
        "            begin = len(prompt.text)\n",
        "            begin = len(prompt.text) + 1\n",
        "tests/data/test_turns.py tests/data/test_chat.py",
    ),
    Break(
        "a skipped checksum: of an array's chunks",
        "core/checkpoint/arrays.py",
        '{"name": "crc32c"},',
        "",
        "tests/core/test_store_contract.py",
    ),
    Break(
        "a skipped checksum: of a checkpoint's texts",
        "core/checkpoint/stored.py",
        "or checksum not in (None, zlib.crc32(text.encode())):",
        "or checksum == -1:",
        "tests/core/test_checkpoint.py",
    ),
    Break(
        "retention deletes the newest step but one",
        "core/checkpoint/place.py",
        "old = steps[:-keep] if keep is not None else []",
        "old = steps[: 1 - keep or None] if keep is not None else []",
        "tests/core/test_store_contract.py",
    ),
    Break(
        "generation: a new token stands at the place of the last one",
        "models/generate.py",
        "follows = rope_positions(cfg, batch)[:, -1:] + 1",
        "follows = rope_positions(cfg, batch)[:, -1:]",
        "tests/models/test_generate.py",
    ),
    Break(
        "experts: the last round is left out",
        "parallel/experts.py",
        "return (most + rows - 1) // rows",
        "return most // rows",
        "tests/parallel/test_experts.py",
    ),
    Break(
        "images: positions are not interpolated",
        "models/layers.py",
        "(low + 1).clamp(max=side - 1)",
        "low.clamp(max=side - 1)",
        "tests/models/test_tower.py",
    ),
)


def broken_copy(found: Break, folder: Path) -> None:
    """The checkout, importable as `omnistep` from `folder`, with this break."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (folder / "imports/omnistep").mkdir(parents=True)
    for name in PRODUCT:
        (folder / "imports/omnistep" / name).symlink_to(folder / name)
    path = folder / found.file
    path.write_text(path.read_text().replace(found.right, found.wrong))


def failing(found: Break) -> tuple[str, float]:
    """The first test that fails, "" where none does, and the seconds until then."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="omnistep-break-") as name:
        folder = Path(name)
        broken_copy(found, folder)
        options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *found.tests.split()]
        environ = os.environ | {"PYTHONPATH": f"{folder / 'imports'}:{folder}"}
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if bool(lines) != (done.returncode == 1):
        raise RuntimeError(f"the tests could not run: {done.stdout}{done.stderr}")
    test = lines[0].split(" - ")[0].split(" ", 1)[1] if lines else ""
    return test, time.monotonic() - began


def main(numbers: Sequence[int]) -> int:
    print("| | break | in | seen by |\n| --- | --- | --- | --- |")
    unseen = 0
    for number in numbers or range(1, len(BREAKS) + 1):
        found = BREAKS[number - 1]
        test, _ = failing(found)
        unseen += not test
        print(f"| {number} | {found.what} | {found.file} | {test or '**nothing**'} |", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]]))
