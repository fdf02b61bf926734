"""That the check of a GPU runs: here on the CPU, tiny."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from omnistep.models.loss import _add_weight_gradient, chunk_tokens
from tests.device import check, table


@pytest.mark.slow
def test_every_line_reaches_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check.main(["--dry", "--out", str(tmp_path), "--only", "probe,loss_chunks,attention,waits"])
    capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not any("failure" in row for row in rows), rows
    table.main(tmp_path)
    page = capsys.readouterr().out
    assert f"torch {torch.__version__}" in page
    assert page.count("\n| 64 |") == 4
    assert "| sdpa |" in page


def test_logits_of_many_tokens_on_a_gpu_of_few_in_a_cpus_cache() -> None:
    assert chunk_tokens(8192, 128_256, "cuda") == 2048
    assert chunk_tokens(8192, 128_256, "cpu") == 32
    assert chunk_tokens(100, 128_256, "cuda") == 100


def test_gradients_of_chunks_are_added_in_one_fp32_buffer_on_a_gpu() -> None:
    """By one operator, which computes in half precision and adds in single precision."""
    called: list[str] = []

    class Recorded(FakeTensorMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            if func is torch.ops.aten.addmm.dtype_out:  # a torch without CUDA can't pretend it
                return kwargs["out"]
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Recorded():
        p, h = (torch.empty(8, n, dtype=torch.bfloat16, device="cuda") for n in (32, 16))
        called.clear()
        total = _add_weight_gradient(None, p, h)
        again = _add_weight_gradient(total, p, h)
    assert (total.shape, total.dtype) == ((32, 16), torch.float32)
    assert again is total
    products = [name for name in called if "mm" in name]
    assert products == ["aten.mm.dtype", "aten.addmm.dtype_out"]
    assert not [name for name in called if "add." in name or "_to_copy" in name]
