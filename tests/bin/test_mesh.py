"""bin/train on meshes: the numbers of one rank, whatever is killed, resumed, exported."""

import json

import pytest

from omnistep.core.checkpoint.safetensors import open_weights
from omnistep.core.logs import read_metrics
from tests.bin.runs import CONFIG, Files, losses, settings, succeeded, words

pytestmark = pytest.mark.slow

FSDP = {"train_data_parallel_mode": "fsdp2"}
MESHES = {
    "ddp": (2, {}),
    "zero1": (2, {"train_use_doptim": True}),
    "fsdp2": (4, FSDP),
    "hsdp, fsdp1": (
        4,
        {"train_data_parallel_mode": "fsdp1", "train_data_parallel_replicate_size": 2},
    ),
    "fsdp2 x tp": (4, {**FSDP, "train_tensor_parallel_size": 2}),
    "cp x ulysses": (
        4,
        {"train_context_parallel_size": 2, "train_ulysses_parallel_size": 2},
    ),
    "fsdp2 x pp": (
        4,
        {**FSDP, "train_pipeline_parallel_size": 2, "train_enable_full_shard": False},
    ),
}
COMMON = {
    "train_global_batch_size": 8,
    "data_train_size": 6 * 8 * 32,
    "train_lr_decay_style": "constant",
    "train_eval_steps": 3,
    "train_save_hf_weights": True,
}


@pytest.fixture(scope="module")
def common(files: Files, tmp_path_factory):
    config = tmp_path_factory.mktemp("mesh") / "config.json"
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config.write_text(json.dumps(CONFIG | sizes))
    return {**COMMON, "model_config_path": config, "data_eval_path": files.held_out}


def numbers(output) -> dict[tuple[str, int], float]:
    rows = read_metrics(output / "metrics.jsonl")
    names = ("loss", "grad_norm", "weight", "eval_loss")
    return {(name, row["step"]): row[name] for row in rows for name in names if name in row}


@pytest.fixture(scope="module")
def alone(files, common, tmp_path_factory, server):
    output = tmp_path_factory.mktemp("alone") / "run"
    succeeded(server.run("train", words(settings(files, output, **common))))
    assert len(losses(output)) == 6
    return output


def assert_same_run(output, alone) -> None:
    ours, theirs = numbers(output), numbers(alone)
    assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = open_weights(output / "hf"), open_weights(alone / "hf")
    assert ours.infos.keys() == theirs.infos.keys()
    for name in theirs.infos:
        a, b = ours.read(name), theirs.read(name)
        # six steps of Adam: what it divides by is small, and tells roundings of machines apart
        assert (a - b).norm() < 1e-4 * b.norm(), name


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_as_one_rank_does(mesh, files, common, alone, tmp_path, server):
    ranks, changes = MESHES[mesh]
    argv = words(settings(files, tmp_path / "run", **common, **changes))
    result = succeeded(server.run("train", argv, ranks=ranks))
    assert f"{ranks} ranks" in result.out
    assert_same_run(tmp_path / "run", alone)


def test_a_run_goes_on_on_another_mesh(files, common, alone, tmp_path, server):
    """Two steps each on 4 ranks, 1 rank, 2 ranks, with other axes."""
    legs = [
        ("fsdp2 x tp", 2),
        (None, 4),
        ("zero1", 6),
    ]
    for mesh, until in legs:
        ranks, changes = MESHES[mesh] if mesh else (1, {})
        size = {"data_train_size": until * 8 * 32, "train_load_checkpoint_path": "auto"}
        argv = words(settings(files, tmp_path / "run", **{**common, **changes, **size}))
        succeeded(server.run("train", argv, ranks=ranks))
    ours = {key: value for key, value in numbers(tmp_path / "run").items() if key[0] == "loss"}
    theirs = {key: value for key, value in numbers(alone).items() if key[0] == "loss"}
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_weights_are_read_in_pieces(files, common, alone, tmp_path, server):
    """From an export: a first loss on a mesh as on one rank."""
    start = {**common, "model_model_path": alone / "hf", "data_train_size": 8 * 32}
    one, many = tmp_path / "one", tmp_path / "many"
    succeeded(server.run("train", words(settings(files, one, **start))))
    argv = words(settings(files, many, **start, **MESHES["fsdp2 x tp"][1]))
    succeeded(server.run("train", argv, ranks=4))
    assert losses(many)[1] == pytest.approx(losses(one)[1], rel=1e-6)
    assert_same_run(many, one)


def test_a_model_that_does_not_fit_the_mesh(files, common, tmp_path, server):
    changes = {**common, "train_tensor_parallel_size": 4}
    argv = words(settings(files, tmp_path / "run", **changes))
    result = server.run("train", argv, ranks=4)
    assert result.code == 1
    assert "has 2 kv_heads, which tp = 4 ranks cannot share evenly; tp may be 1, 2" in result.err
    assert result.err.count("error") == 1
