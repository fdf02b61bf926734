"""Profiles: which steps a trace holds, and what is recorded with them."""

import gzip
import json

import pytest
import torch
from torch.profiler import record_function

from omnistep.core.profile import ProfileConfig, Profiler


def trace_of(tmp_path, steps: range, **config):
    """Runs marked steps under a profiler: the trace's name, marks and operators."""
    config = {"start_step": 2, "end_step": 4, "with_stack": False} | config
    with Profiler(ProfileConfig(trace_dir=tmp_path / "trace", **config), rank=3) as profiler:
        for n in steps:
            profiler.step(n)
            with record_function(f"step {n}"):
                torch.mm(torch.ones(17, 5), torch.ones(5, 3))
    (path,) = profiler.written
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    marks = sorted({e["name"] for e in events if e.get("name", "").startswith("step ")})
    return path.name, marks, [e for e in events if e.get("name") == "aten::mm"]


def test_the_steps_from_start_to_before_end(tmp_path):
    name, marks, products = trace_of(tmp_path, range(7))
    assert name == "steps_2-3_rank_3.json.gz"
    assert marks == ["step 2", "step 3"]
    assert len(products) == 2
    assert products[0]["args"]["Input Dims"][:2] == [[17, 5], [5, 3]]


def test_a_run_that_ends_or_resumes_within(tmp_path):
    name, marks, _ = trace_of(tmp_path, range(3, 4), end_step=10)
    assert (name, marks) == ("steps_3-3_rank_3.json.gz", ["step 3"])


def test_shapes_can_be_left_out(tmp_path):
    _, _, products = trace_of(tmp_path, range(5), record_shapes=False, profile_memory=False)
    assert all("Input Dims" not in e["args"] for e in products)


def test_stacks_are_recorded(tmp_path):
    trace_of(tmp_path, range(5), with_stack=True)
    (path,) = (tmp_path / "trace").iterdir()
    assert "test_profile.py" in gzip.decompress(path.read_bytes()).decode()


def test_without_configuration_nothing_happens():
    with Profiler() as profiler:
        profiler.step(0)
    assert profiler.written == []


def test_an_empty_span_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="profile_start_step is 3 and profile_end_step is 3"):
        ProfileConfig(start_step=3, end_step=3, trace_dir=tmp_path)
