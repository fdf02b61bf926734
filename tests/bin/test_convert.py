"""bin/convert: every way there and back to the bit, in bounded memory, or a clear error."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from omnistep.bin import convert, train
from omnistep.bin.model import make_model
from omnistep.core import param
from omnistep.core.checkpoint import open_store
from omnistep.core.checkpoint.dcp_weights import common_prefix
from omnistep.core.checkpoint.safetensors import open_weights
from omnistep.core.checkpoint.weight_files import write_weights
from omnistep.core.logs import read_metrics
from tests.bin.runs import (
    CONFIG,
    TOKENIZER,
    Files,
    Result,
    call,
    content,
    settings,
    succeeded,
    wait_until,
    words,
)
from tests.core import buckets
from tests.forkserver.client import ForkServer


def run(*argv: Any) -> Result:
    return call(convert.main, [str(word) for word in argv])


def converted(*argv: Any) -> Path:
    """The target of a conversion that succeeded."""
    succeeded(run(*argv))
    return Path(argv[1])


def stored(directory: Path, step: int) -> dict[str, Any]:
    with closing(open_store(directory)) as store:
        return store.restore(store.stored(step), step)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 24)[None]).logits


def from_pretrained(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


# ---- checkpoint to Hugging Face --------------------------------------------------------------


def test_the_last_checkpoint_becomes_what_the_run_exported(trained: Path, tmp_path: Path) -> None:
    expected = content(trained / "hf")
    assert content(converted(trained, tmp_path / "hf")) == expected
    step = trained / "checkpoints/6"
    assert content(converted(step, tmp_path / "of a step")) == expected


def test_another_step_is_written_over_an_older_export(trained: Path, tmp_path: Path) -> None:
    target = converted(trained, tmp_path / "hf")
    (target / "README.md").write_text("mine")
    (target / "generation_config.json").write_text("of another model")
    converted(trained / "checkpoints/4", target)
    params = stored(trained / "checkpoints", 4)
    weights = open_weights(target)
    assert torch.equal(weights.read("model.embed_tokens.weight"), params["state.params.embed"])
    up = weights.read("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(up, params["state.params.layers.up"][1])
    assert content(target).keys() == content(trained / "hf").keys() | {"README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_in_another_dtype(trained: Path, tmp_path: Path) -> None:
    target = converted(trained, tmp_path / "hf", "--dtype", "bfloat16")
    ours, theirs = open_weights(target), open_weights(trained / "hf")
    for name in theirs.infos:
        assert torch.equal(ours.read(name), theirs.read(name).bfloat16()), name
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert from_pretrained(target).dtype == torch.bfloat16


def test_without_its_run_a_checkpoint_still_knows_its_model(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoints/6", tmp_path / "moved/6")
    result = succeeded(run(tmp_path / "moved", tmp_path / "hf"))
    assert "no tokenizer is written: none is known; --model.tokenizer_path names one" in result.out
    assert torch.equal(
        logits(from_pretrained(tmp_path / "hf")), logits(from_pretrained(trained / "hf"))
    )
    converted(tmp_path / "moved", tmp_path / "hf", f"--model.tokenizer_path={TOKENIZER}")
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (
        TOKENIZER / "tokenizer.json"
    ).read_bytes()


# ---- Hugging Face to checkpoint --------------------------------------------------------------


def test_there_and_back(trained: Path, tmp_path: Path) -> None:
    checkpoint = converted(trained / "hf", tmp_path / "checkpoints")
    ours, theirs = stored(checkpoint, 0), stored(trained / "checkpoints", 6)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if name.startswith("state.params."):
            assert torch.equal(ours[name], theirs[name]), name
    arguments = (checkpoint, tmp_path / "back", f"--model.tokenizer_path={trained / 'hf'}")
    assert content(converted(*arguments)) == content(trained / "hf")
    again = converted(checkpoint, tmp_path / "again", "--to", "checkpoint")
    assert_same(stored(again, 0), ours)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_optimizer": "anyprecision_adamw", "train_seed": 7},
        {"train_enable_mixed_precision": False, "train_compute_dtype": "float64"},
    ],
    ids=["adamw", "kahan", "float64"],
)
def test_a_run_from_it_is_the_run_from_the_weights(
    changes: dict[str, Any], files: Files, trained: Path, tmp_path: Path
) -> None:
    weights = trained / "hf"
    one = settings(files, tmp_path / "one", model_model_path=weights, data_train_size=64, **changes)
    succeeded(call(train.main, words(one)))
    checkpoint = converted(weights, tmp_path / "start", tmp_path / "one/recipe.yaml")
    two = settings(
        files,
        tmp_path / "two",
        data_train_size=64,
        train_load_checkpoint_path=checkpoint,
        **changes,
    )
    result = succeeded(call(train.main, words(two)))
    assert "resume  step 0" in result.out
    ours, theirs = (stored(tmp_path / name / "checkpoints", 1) for name in ("two", "one"))
    assert json.loads(ours.pop("model")) == CONFIG
    assert json.loads(theirs.pop("model")) == CONFIG
    assert_same(ours, theirs)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [row[0]["loss"] for row in rows] == [rows[0][0]["loss"]] * 2


def test_into_a_bucket_and_out_of_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with buckets.served(monkeypatch):
        url = "gs://bucket/start"
        succeeded(run(trained / "hf", url))
        assert "holds checkpoints, as of step 0" in run(trained / "hf", url).err
        arguments = (url, tmp_path / "hf", f"--model.tokenizer_path={trained / 'hf'}")
        assert content(converted(*arguments)) == content(trained / "hf")
        result = run(trained, "gs://bucket/hf")
        assert (result.code, "a TARGET hf is a local directory" in result.err) == (2, True)


# ---- torch.distributed.checkpoint ------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A transformers model with random weights, and its config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    untied: dict[str, Any] = CONFIG | {"tie_word_embeddings": False}
    config = AutoConfig.for_model(**untied)
    place = tmp_path_factory.mktemp("foreign") / "config.json"
    config.save_pretrained(place.parent)
    return AutoModelForCausalLM.from_config(config).eval(), place


def save_dcp(place: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=place, no_dist=True)
    return place


@pytest.mark.parametrize("prefix", ["", "model.", "app.module."])
def test_a_state_dict_of_transformers(
    prefix: str, foreign: tuple[Any, Path], tmp_path: Path
) -> None:
    model, config = foreign
    state: dict[str, Any] = {prefix + name: t for name, t in model.state_dict().items()}
    state |= {"optimizer.state": {"step": torch.tensor(3.0)}, "epoch": 2}
    source = save_dcp(tmp_path / "40", state)
    target = converted(source, tmp_path / "hf", f"--model.config_path={config}")
    assert torch.equal(logits(from_pretrained(target)), logits(model))
    shutil.copy(config, source)
    checkpoint = converted(source, tmp_path / "checkpoint", "--to", "checkpoint")
    params = stored(checkpoint, 0)
    gate = model.state_dict()["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(params["state.params.layers.gate"][1], gate)


def test_of_two_copies_one_is_chosen(foreign: tuple[Any, Path], tmp_path: Path) -> None:
    model, config = foreign
    weights = model.state_dict()
    averaged = {name: t * 2 for name, t in weights.items()}
    source = save_dcp(tmp_path / "dcp", {"model": weights, "ema": averaged})
    arguments = (source, tmp_path / "hf", f"--model.config_path={config}")
    assert (
        "behind each of the prefixes ['ema.', 'model.']; choose one by --prefix"
        in run(*arguments).err
    )
    weights = open_weights(converted(*arguments, "--prefix", "ema."))
    assert torch.equal(weights.read("lm_head.weight"), averaged["lm_head.weight"])


def test_names_that_do_not_map(foreign: tuple[Any, Path], tmp_path: Path) -> None:
    model, config = foreign
    state = dict(model.state_dict())
    state["model.layers.0.mlp.up_prj.weight"] = state.pop("model.layers.0.mlp.up_proj.weight")
    arguments = (save_dcp(tmp_path / "a", state), tmp_path / "hf", f"--model.config_path={config}")
    error = run(*arguments).err
    assert "but 1 of the model's 25 are not among them" in error
    assert (
        "model.layers.0.mlp.up_proj.weight; the nearest name is 'model.layers.0.mlp.up_prj.weight'"
        in error
    )
    state = model.state_dict() | {"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2)}
    source = save_dcp(tmp_path / "b", state)
    error = run(source, tmp_path / "hf", f"--model.config_path={config}").err
    assert "holds what the model has no place for: model.layers.0.self_attn.q_proj.lora_A" in error
    assert not (tmp_path / "hf").exists()


def test_the_prefix_is_found() -> None:
    wanted = ["a.w", "b"]
    assert common_prefix(["a.w", "b", "x.a.w"], wanted) == ""
    assert common_prefix(["m.a.w", "m.b", "m.a", "opt.m.a.w"], wanted) == "m."
    assert common_prefix(["c"], wanted) == ""
    with pytest.raises(ValueError, match=r"\['', 'm.'\]"):
        common_prefix(["a.w", "b", "m.a.w", "m.b"], wanted)


# ---- what is wrong ---------------------------------------------------------------------------


def damage(step: Path) -> None:
    """A bit in each 10 kB of the arrays."""
    for file in step.rglob("ocdbt.process_torch0/d/*"):
        data = bytearray(file.read_bytes())
        data[5000::10_000] = (byte ^ 1 for byte in data[5000::10_000])
        file.write_bytes(data)


def test_a_damaged_checkpoint_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoints/6", tmp_path / "steps/6")
    damage(tmp_path / "steps/6/state")
    result = run(tmp_path / "steps", tmp_path / "hf")
    assert result.code == 1
    assert "in the checkpoint" in result.err
    assert "is damaged" in result.err
    assert result.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["steps"]


def cut(place: Path) -> None:
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def other_size(place: Path) -> None:
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 48}))


def other_family(place: Path) -> None:
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "is no complete safetensors file"),
        (
            other_size,
            r"mlp.gate_proj.weight has shape (64, 32); the configuration asks for (48, 32)",
        ),
        (other_family, "model_type 'gpt2' is not built"),
        (lambda place: (place / "config.json").unlink(), "give --model.config_path"),
        (
            lambda place: (place / "model.safetensors").unlink(),
            "holds neither model.safetensors nor",
        ),
    ],
)
def test_wrong_weights(
    change: Callable[[Path], None], message: str, trained: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained / "hf", source)
    change(source)
    result = run(source, tmp_path / "target")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert message in result.err
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "expected SOURCE TARGET [recipe.yaml]; given: nothing"),
        (["{run}"], 2, "expected SOURCE TARGET"),
        (["nowhere", "x"], 1, "there is nothing at nowhere"),
        (["{run}", "{tmp}/x", "--dtype", "int8"], 2, "--dtype int8: expected one of float32"),
        (["{run}", "{tmp}/x", "--dtype"], 2, "--dtype: expected one of"),
        (["{run}", "{tmp}/x", "--to=disk"], 2, "--to disk: expected one of hf, checkpoint"),
        (["{run}", "{tmp}/x", "--train.seed=1"], 2, "train.seed (command line): means nothing"),
        (["{run}", "{tmp}/x", "--train.lr=1"], 2, "omnistep-convert reads"),
        (["{run}", "{tmp}/x", "--train.sed=1"], 2, "did you mean train.seed"),
        (["{run}", "{tmp}/x", "--prefix=a."], 1, "--prefix is for a torch.distributed.checkpoint"),
        (["{run}/hf", "{tmp}/x", "--dtype=bfloat16"], 2, "--dtype is for a TARGET hf"),
        (["{run}/hf", "{run}/hf", "--to=hf"], 1, "source and target are one"),
        (["{run}/checkpoints", "{run}"], 1, "holds .lock and more"),
        (["{run}/hf", "{run}/checkpoints"], 1, "holds 4 and more"),
        (["{run}/checkpoints/5", "{tmp}/x"], 1, "there is nothing at"),
        (["{tmp}", "{tmp}/x"], 1, "is no checkpoint (a step, its directory"),
        (["{run}", "{tmp}/x", "--model.tokenizer_path=nowhere"], 1, "no tokenizer at 'nowhere'"),
        (["{run}", "/proc/x"], 1, "/proc"),
    ],
)
def test_wrong_words(
    argv: list[str], code: int, message: str, trained: Path, tmp_path: Path
) -> None:
    before = content(trained)
    result = run(*(word.format(run=trained, tmp=tmp_path) for word in argv))
    assert result.code == code
    assert result.err.startswith("error: ")
    assert message in result.err
    assert content(trained) == before
    assert not list(tmp_path.iterdir())


def test_a_damaged_dcp(foreign: tuple[Any, Path], tmp_path: Path) -> None:
    model, config = foreign
    source = save_dcp(tmp_path / "dcp", model.state_dict())
    arguments = (source, tmp_path / "hf", f"--model.config_path={config}")
    (data,) = source.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    result = run(*arguments)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "cannot be read" in result.err
    data.unlink()
    assert "is made of 1 files, of which 1 are missing: __0_0.distcp" in run(*arguments).err
    (source / ".metadata").write_bytes(b"not a pickle")
    assert "is no metadata of a torch.distributed.checkpoint" in run(*arguments).err
    assert not (tmp_path / "hf").exists()


# ---- memory, and kills -----------------------------------------------------------------------

DEEP = CONFIG | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 8,
    "head_dim": 32,
}
"""280 MB; its largest tensor has 2."""


def write_random(directory: Path, raw: dict[str, Any]) -> Path:
    model = make_model(raw)
    weights = {p.theirs: torch.randn(p.shape) for p in model.names.all_parts(model.tree)}
    directory.mkdir()
    write_weights(directory, weights)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def convert_and_tell_peak(argv: list[str]) -> int:
    """bin/convert in a process of its own; prints the most memory that it held."""
    Path("/proc/self/clear_refs").write_text("5")  # not what the forking process held
    code = convert.main(argv)
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))
    return code


GIVES_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""glibc then gives freed memory back at once. What it keeps by default, up to 100 MB here, varies
from run to run and hides what the program holds."""


@pytest.fixture(scope="module")
def peak_bytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Of bin/convert with these words."""
    server = ForkServer(tmp_path_factory.mktemp("server"), environ=GIVES_BACK)

    def ask(*argv: Any) -> int:
        done = succeeded(server.run("tests.bin.test_convert:convert_and_tell_peak", argv))
        return int(done.out.splitlines()[-1])

    yield ask
    server.close()


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A model of ten layers, one of forty, and the bytes that this has more. Fewer than ten would
    not fill the buffers that are of one size for all."""
    folder = tmp_path_factory.mktemp("sizes")
    models = [DEEP | {"num_hidden_layers": layers} for layers in (10, 40)]
    ten, forty = (4 * param.count(make_model(raw).tree) for raw in models)
    small, deep = (write_random(folder / f"{i}", raw) for i, raw in enumerate(models))
    return small, deep, forty - ten


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(
    sizes: tuple[Path, Path, int], peak_bytes: Callable[..., int], tmp_path: Path
) -> None:
    """What more layers add to the peak, against their size: there, back, from DCP."""
    small, deep, size = sizes
    assert size > 200e6
    peaks = {}
    for name, place in (("small", small), ("deep", deep)):
        checkpoint = tmp_path / f"{name}-checkpoint"
        peaks["there", name] = peak_bytes(place, checkpoint)
        peaks["back", name] = peak_bytes(checkpoint, tmp_path / f"{name}-hf")
        weights = open_weights(place)
        state = {tensor: weights.read(tensor) for tensor in weights.infos}
        other = save_dcp(tmp_path / f"{name}-dcp", state)
        config = f"--model.config_path={place / 'config.json'}"
        peaks["dcp", name] = peak_bytes(other, tmp_path / f"{name}-of-dcp", config)
    ours, theirs = open_weights(tmp_path / "deep-hf"), open_weights(deep)
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.infos)
    for way in ("there", "back", "dcp"):
        assert peaks[way, "deep"] - peaks[way, "small"] < 0.1 * size, (way, peaks)


def written(directory: Path) -> int:
    """Bytes of the files below, which come and go meanwhile."""
    total = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "checkpoint"])
def test_a_kill_leaves_no_target(
    to: str, sizes: tuple[Path, Path, int], tmp_path: Path, server: ForkServer
) -> None:
    _, deep, _ = sizes
    target = tmp_path / "out/target"
    argv = [deep, target, "--to", to]
    child = server.start("convert", argv)
    wait_until(lambda: written(tmp_path) >= 20e6)
    child.kill(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL, "it ended too early"
    if to == "hf":
        assert not target.exists()
    else:
        with closing(open_store(target)) as store:
            assert store.steps() == []
    succeeded(server.run("convert", argv))
    if to == "hf":
        assert [path.name for path in target.parent.iterdir()] == ["target"]
    else:
        assert [path.name for path in target.iterdir() if path.is_dir()] == ["0"]
