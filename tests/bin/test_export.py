"""The weights of a mesh, written by all its ranks at once."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnistep.core import param, rng
from omnistep.core.checkpoint.safetensors import open_weights
from omnistep.models import hf
from tests.bin.export_ranks import EXPERT_MESHES, EXPERTS, LIMITS, MESHES, SMALL, VISION, make_model
from tests.bin.runs import content
from tests.forkserver.client import ForkServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    done = server.run_ranks("tests.bin.export_ranks:main", 4, [folder])
    codes = [rank.code for rank in done]
    assert codes == [0, -signal.SIGKILL, 0, 0], "\n".join(rank.out + rank.err for rank in done)
    return folder


def one_rank(
    dtype: torch.dtype = torch.float32, raw: Mapping[str, Any] = SMALL
) -> dict[str, Tensor]:
    model = make_model(raw)
    params = param.initialize(model.tree, rng.key(0), dtype, torch.device("cpu"))
    weights = hf.export_weights(model.tree, model.names, params)
    return {name: tensor.read() for name, tensor in weights.items()}


def assert_holds(directory: Path, expected: dict[str, Tensor]) -> None:
    weights = open_weights(directory)
    assert weights.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name


@pytest.mark.parametrize("mesh", EXPERT_MESHES)
def test_experts_shared_by_ranks_are_written_one_by_one(mesh: str, exports: Path) -> None:
    expected = one_rank(raw=EXPERTS)
    assert "model.layers.3.mlp.experts.7.down_proj.weight" in expected
    assert_holds(exports / f"experts, {mesh}", expected)


@pytest.mark.parametrize("mesh", EXPERT_MESHES)
def test_towers_and_experts_in_one_tensor(mesh: str, exports: Path) -> None:
    expected = one_rank(raw=VISION)
    assert expected["model.language_model.layers.3.mlp.experts.gate_up_proj"].shape == (8, 32, 32)
    assert_holds(exports / f"vision, {mesh}", expected)


@pytest.mark.parametrize("files", LIMITS)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_writes_what_one_rank_does(mesh: str, files: str, exports: Path) -> None:
    directory = exports / f"{mesh}, {files}"
    assert_holds(directory, one_rank())
    count = len(list(directory.glob("*.safetensors")))
    assert count > 4 if files == "many" else 1 < count < 4
    assert content(directory) == content(exports / f"ddp, {files}")  # the very same files


def test_bfloat16(exports: Path) -> None:
    assert_holds(exports / "bfloat16", one_rank(torch.bfloat16))


def test_every_rank_writes_files_of_its_own(exports: Path) -> None:
    written = [json.loads((exports / f"written{rank}.json").read_text()) for rank in range(4)]
    files = [name for of_rank in written for name in of_rank]
    assert sorted(files) == sorted(p.name for p in (exports / "bfloat16").glob("*.safetensors"))
    assert max(map(len, written)) - min(map(len, written)) <= 1
    assert min(map(len, written)) > 0
    assert sum(map(sum, (of.values() for of in written))) == param.count(make_model(SMALL).tree)


def test_transformers_reads_what_many_ranks_wrote(exports: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = exports / "fsdp x tp, many"
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = one_rank()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("end", ["failing", "killed"])
def test_a_rank_that_fails_or_is_killed_leaves_the_older_export(end: str, exports: Path) -> None:
    assert_holds(exports / end, one_rank())
    assert not [path for path in (exports / end).iterdir() if path.is_dir()]


def test_a_rank_holds_little_beside_its_share(exports: Path) -> None:
    for rank in range(4):
        figures = json.loads((exports / f"memory{rank}.json").read_text())
        # a tensor, a piece, and what the first messages cost; a share is a quarter of the model
        assert figures["added"] < 0.05 * figures["model"], figures
        assert figures["largest"] < 0.02 * figures["model"]
