"""Ring attention against attention: its parts in one process, the whole on real ranks."""

import multiprocessing
import re
from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import omnistep.models.attention_cpu as cpu
import omnistep.models.attention_ring_cuda as flash
from omnistep.models.attention import SAVED_OPS, attention, ring_attention
from omnistep.models.attention_cuda import first_seen
from omnistep.models.attention_plain import compute_dtype, plain_part, plain_part_backward
from omnistep.models.attention_ring import seen_at_hops
from omnistep.parallel.mesh import Group, make_mesh
from omnistep.parallel.remat import remat
from omnistep.parallel.ring import holder, take_local
from tests.models.test_attention import (
    TOLERANCE,
    assert_close,
    random_inputs,
    random_starts,
    with_gradients,
)
from tests.tracing import capturing


@pytest.fixture(autouse=True)
def one_thread():
    """Cases are small: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def group_of(size, index):
    return Group(("cp",), size, index, "")


def kernel_part(*args):
    library = cpu.kernel()
    assert library is not None, "these tests need a C++ compiler"
    return cpu.kernel_forward_onto(library, *args)


def kernel_part_backward(*args):
    library = cpu.kernel()
    assert library is not None, "these tests need a C++ compiler"
    return cpu.kernel_backward_onto(library, *args)


def part_by_part(part, part_backward, q, k, v, grad, starts, size, scale, window):
    """What the ranks of a ring compute, one after another: (out, gradients), and scores of each."""
    dtype, first = compute_dtype(q), first_seen(starts, window)
    outs, q_grads, scores = [], [], [0] * size
    kv_grads = [torch.zeros(2, *take_local(k, group_of(size, 0)).shape) for _ in range(size)]
    kv_grads = [x.to(dtype) for x in kv_grads]
    for index in range(size):
        local = partial(take_local, group=group_of(size, index))
        here, seen = local(q), seen_at_hops(first, group_of(size, index))
        out = torch.zeros(here.shape, dtype=dtype)
        lse = torch.full(here.shape[:3], float("-inf"), dtype=dtype).transpose(1, 2).contiguous()
        blocks = [holder(hop, size, index) for hop in range(size)]
        keys = [[take_local(x, group_of(size, block)) for x in (k, v)] for block in blocks]
        for hop in range(size):
            scores[index] += part(out, lse, here, *keys[hop], seen[hop], scale) or 0
        q_grad = torch.zeros(here.shape, dtype=dtype)
        for hop, block in enumerate(blocks):
            # the kernel's gradients replace, so each part has its own
            of_q, of_kv = torch.zeros_like(q_grad), torch.zeros_like(kv_grads[block])
            part_backward((of_q, *of_kv), local(grad), here, *keys[hop], out, lse, seen[hop], scale)
            q_grad += of_q
            kv_grads[block] += of_kv
        outs.append(out)
        q_grads.append(q_grad)
    k_grads, v_grads = zip(*kv_grads, strict=True)
    return [natural(x) for x in (outs, q_grads, k_grads, v_grads)], scores


def natural(pieces: Sequence[Tensor]) -> Tensor:
    """Whole rows from what the ranks hold."""
    halves = [piece.chunk(2, 1) for piece in pieces]
    return torch.cat([a for a, _ in halves] + [b for _, b in halves[::-1]], 1)


def whole(inputs: Sequence[Tensor], starts, scale, window):
    q, k, v, grad = inputs
    ours = partial(attention, starts=starts, scale=scale, window=window)
    return with_gradients(ours, q, k, v, grad)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
@pytest.mark.parametrize("density", [0.0, 0.004, 0.05, 0.5])
@pytest.mark.parametrize("window", [None, 1, 5, 60])
def test_parts_add_up(size, chunk, density, window):
    torch.manual_seed(size * chunk)
    seq = 2 * size * chunk
    q, k, v, grad = random_inputs(2, seq, 4, 2, 16)
    starts = random_starts(2, seq, density)
    expected = list(whole((q, k, v, grad), starts, 0.2, window))
    if window == 1:  # each token sees itself: true zeros, of which rounding may leave something
        expected[1:3] = torch.zeros_like(q), torch.zeros_like(k)
    for functions in ((kernel_part, kernel_part_backward), (plain_part, plain_part_backward)):
        got, _ = part_by_part(*functions, q, k, v, grad, starts, size, 0.2, window)
        assert_close(got, expected, 1e-10)


def test_parts_of_more_than_one_block_of_queries():
    for dtype in (torch.float32, torch.float64):
        q, k, v, grad = random_inputs(1, 1400, 2, 1, 32, dtype)
        starts = random_starts(1, 1400, 0.002)
        exact = whole([x.double() for x in (q, k, v, grad)], starts, 0.2, None)
        for functions in ((kernel_part, kernel_part_backward), (plain_part, plain_part_backward)):
            got, _ = part_by_part(*functions, q, k, v, grad, starts, 2, 0.2, None)
            assert_close(got, [x.to(dtype) for x in exact], TOLERANCE[dtype])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_equally_much_and_nothing_in_vain(size):
    seq = 512 * size
    q, k, v, grad = random_inputs(1, seq, 1, 1, 16, torch.float32)
    starts = torch.zeros(1, seq, dtype=torch.int32)
    kernel = (kernel_part, kernel_part_backward)
    _, scores = part_by_part(*kernel, q, k, v, grad, starts, size, 0.2, None)
    assert sum(scores) < 1.1 * seq * seq / 2
    assert max(scores) < 1.05 * min(scores)


def test_wrong_bounds_and_lengths():
    q, k, v, _ = random_inputs(1, 4, 1, 1, 16)
    part = partial(torch.ops.omnistep.attention_part, q, k, v)
    for first, end in (([0, 2, 1, 1], [4] * 4), ([0] * 4, [1, 2, 3, 5]), ([-1] * 4, [4] * 4)):
        seen = torch.tensor([[first], [end]], dtype=torch.int32)
        with pytest.raises(ValueError, match="both bounds must be from 0 to 4 and never decrease"):
            part(seen, 0.2, None, None, [])
    starts = torch.zeros(1, 10, dtype=torch.int32)
    ring = partial(ring_attention, scale=0.2, window=None)
    with pytest.raises(ValueError, match="a multiple of 4, such as 8 or 12"):
        ring(q, k, v, starts, group_of(2, 0))
    with pytest.raises(ValueError, match=r"starts must be int32 \[1, 8\].*whole rows"):
        ring(q, k, v, torch.zeros(1, 4, dtype=torch.int32), group_of(2, 0))


def test_one_rank_is_attention():
    q, k, v, grad = random_inputs(2, 33, 4, 2, 16)
    starts = random_starts(2, 33, 0.1)
    ring = partial(ring_attention, starts=starts, group=Group(), scale=0.2, window=5)
    assert_close(
        with_gradients(ring, q, k, v, grad), whole((q, k, v, grad), starts, 0.2, 5), tolerance=0
    )


def test_operators_are_what_they_say():
    q, k, v, grad = random_inputs(2, 12, 4, 2, 16)
    seen = seen_at_hops(random_starts(2, 24, 0.1), group_of(2, 1))[0]
    part, backward = torch.ops.omnistep.attention_part, torch.ops.omnistep.attention_part_backward
    for state in ((None, None), part(q, k, v, seen, 0.2, None, None, [])):
        torch.library.opcheck(part.default, (q, k, v, seen, 0.2, *state, [grad]))
        out, lse = part(q, k, v, seen, 0.2, *state, [])
    torch.library.opcheck(backward.default, (grad, q, k, v, out, lse, seen, 0.2, [grad]))
    torch.library.opcheck(torch.ops.omnistep.ring_message.default, (k, v, grad))


# On real ranks

CASES = [
    # dtype, rows, chunk, heads, kv_heads, density, window
    (torch.float64, 1, 24, 2, 2, 0.0, None),
    (torch.float64, 2, 24, 4, 2, 0.01, None),
    (torch.float64, 2, 24, 4, 1, 0.3, None),
    (torch.float64, 3, 16, 4, 2, 0.01, 20),
    (torch.float32, 2, 96, 4, 2, 0.005, None),
    (torch.float32, 2, 96, 2, 2, 0.0, 130),
]


class Messages(TorchDispatchMode):
    """Counts what is sent and what is computed."""

    def __init__(self):
        super().__init__()
        self.bytes, self.parts = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and func._opname != "wait_tensor":
            assert func._opname == "all_to_all_single"
            self.bytes.append(args[0].numel() * args[0].element_size())
        self.parts += func is torch.ops.omnistep.attention_part.default
        return func(*args, **(kwargs or {}))


def operators(graph):
    return [
        n.target._opname for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)
    ]


def check_graphs(size, mode, graphs, inputs):
    """A block is not kept from the forward to the backward pass; selective remat runs no ring."""
    forward, backward = map(operators, graphs)
    again = mode == "full"
    assert forward.count("attention_part") == size
    assert forward.count("all_to_all_single") == size - 1
    assert backward.count("attention_part") == size * again
    assert backward.count("attention_part_backward") == size
    assert backward.count("all_to_all_single") == (size - 1) * (2 + again)
    _, *saved = next(n for n in graphs[0].graph.nodes if n.op == "output").args[0]
    kept = sum(x.meta["val"].numel() for x in saved if x.meta["val"].is_floating_point())
    q, k, v, _ = inputs
    lse = q.numel() // q.shape[-1]
    assert kept == sum(x.numel() for x in (q, k, v)) + (0 if again else q.numel() + lse)


SCHEDULE = [
    "all_to_all_single attention_part wait_tensor attention_part",
    "ring_message all_to_all_single attention_part_backward wait_tensor "
    "attention_part_backward all_to_all_single wait_tensor",
]
"""What must be the order on two ranks in what inductor makes: nobody waits before computing."""


def check_order(codes):
    call = re.compile(
        r"= torch\.ops\.(?:_c10d_functional|omnistep)\.(\w+)|(wait_tensor)\.default\("
    )
    found = [" ".join(a or b for a, b in call.findall(code)) for code in codes]
    assert found == SCHEDULE


def case_of(case, group):
    """This rank's inputs, the function to be tested, and what it must return."""
    dtype, rows, chunk, heads, kv_heads, density, window = case
    torch.manual_seed(chunk + heads)
    seq = 2 * group.size * chunk
    inputs = random_inputs(rows, seq, heads, kv_heads, 32, dtype)
    starts = random_starts(rows, seq, density)
    exact = whole([x.double() for x in inputs], starts, 0.2, window)
    ring = partial(ring_attention, starts=starts, group=group, scale=0.2, window=window)
    local = partial(take_local, group=group)
    return [local(x) for x in inputs], ring, [local(x).to(dtype) for x in exact]


def check_case(case, group):
    inputs, ring, expected = case_of(case, group)
    with Messages() as sent:
        assert_close(with_gradients(ring, *inputs), expected, TOLERANCE[case[0]])
    size, kv = group.size, 2 * inputs[1].numel() * inputs[1].element_size()
    # forward: k and v; backward: k and v, and their gradients, one hop behind
    assert sent.bytes == [kv] * 3 * (size - 1)
    assert sent.parts == size


def check_compiled(case, group):
    inputs, ring, expected = case_of(case, group)
    for mode in ("none", "selective", "full"):
        block = remat(lambda q, k, v: ring(q * 2, k, v) * 3, mode, SAVED_OPS)
        scaled = [inputs[0] / 2, *inputs[1:3], inputs[3] / 3]
        leaves = [expected[0] * 3, expected[1] * 2, *expected[2:]]
        graphs = []
        run = torch.compile(block, fullgraph=True, dynamic=False, backend=capturing(graphs))
        for function in (block, run):
            assert_close(with_gradients(function, *scaled), leaves, TOLERANCE[case[0]])
        check_graphs(group.size, mode, graphs, inputs)
        torch._dynamo.reset()
    run = torch.compile(ring, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():  # as an evaluation does
        assert_close([run(*inputs[:3])], expected[:1], TOLERANCE[case[0]])
    torch._dynamo.reset()


def check_inductor(case, group):
    inputs, ring, expected = case_of(case, group)
    compiled = torch.compile(ring, fullgraph=True, dynamic=False)
    with inductor_config.patch(force_disable_caches=True):
        got, codes = run_and_get_code(with_gradients, compiled, *inputs)
    assert_close(got, expected, TOLERANCE[case[0]])
    check_order(codes)


# FlashAttention needs a GPU: here what it promises. What it may leave unwritten is NaN.


def flash_runs(lengths_q, lengths_k, causal):
    for q, q_end, k, k_end in zip(
        *(x for y in (lengths_q.tolist(), lengths_k.tolist()) for x in (y[:-1], y[1:])), strict=True
    ):
        hidden = torch.ones(q_end - q, k_end - k, dtype=torch.bool).triu(1) & causal
        yield slice(q, q_end), slice(k, k_end), hidden


def flash_forward(q, k, v, lengths_q, lengths_k, causal, scale):
    rows, queries, heads, _ = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[2], 2).flatten(0, 1) for x in (k, v))
    out, lse = torch.zeros_like(q).flatten(0, 1), torch.full((heads, rows * queries), -torch.inf)
    for of_q, of_k, hidden in flash_runs(lengths_q, lengths_k, causal):
        scores = torch.einsum("ihd,jhd->hij", q.flatten(0, 1)[of_q], k[of_k]) * scale
        scores = scores.masked_fill(hidden, -torch.inf)
        if scores.numel():
            lse[:, of_q] = scores.logsumexp(-1)
            out[of_q] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[of_k])
    return out.view(q.shape), lse.view(heads, rows, queries).transpose(0, 1)


def flash_backward(grad, q, k, v, out, lse, lengths_q, lengths_k, causal, scale):
    group, shapes = q.shape[2] // k.shape[2], (q.shape, k.shape, v.shape)
    lse = lse.transpose(0, 1).flatten(1)
    grad, q, k, v, out = (x.flatten(0, 1) for x in (grad, q, k, v, out))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for of_q, of_k, hidden in flash_runs(lengths_q, lengths_k, causal):
        if not hidden.numel():
            continue
        scores = torch.einsum("ihd,jhd->hij", q[of_q], k[of_k]) * scale
        weights = (scores - lse[:, of_q, None]).exp().masked_fill(hidden, 0)
        delta = (out[of_q] * grad[of_q]).sum(-1).T[..., None]
        of_scores = weights * (torch.einsum("ihd,jhd->hij", grad[of_q], v[of_k]) - delta) * scale
        grads[0][of_q] = torch.einsum("hij,jhd->ihd", of_scores, k[of_k])
        grads[1][of_k] = torch.einsum("hij,ihd->jhd", of_scores, q[of_q])
        grads[2][of_k] = torch.einsum("hij,ihd->jhd", weights, grad[of_q])
    shared = [grads[0], *(x.unflatten(1, (-1, group)).sum(2) for x in grads[1:])]
    return [x.view(shape) for x, shape in zip(shared, shapes, strict=True)]


def check_flash(case, group):
    inputs, ring, expected = case_of(case, group)
    starts = ring.keywords["starts"]
    with (
        patch.object(flash, "_flash_forward", flash_forward),
        patch.object(flash, "_flash_backward", flash_backward),
    ):
        seen = seen_at_hops(starts, group)
        bound = int((starts == torch.arange(starts.shape[1])).sum(1).max())
        ours = partial(
            flash.flash_in_ring,
            starts=starts, seen=seen, group=group, scale=0.2, max_samples=bound,
        )  # fmt: skip
        assert_close(with_gradients(ours, *inputs), expected, TOLERANCE[case[0]])


def run_rank(rank, size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    try:
        group = make_mesh({"cp": size}, torch.device("cpu")).group("cp")
        for case in CASES:
            check_case(case, group)
        for case in CASES[4], (torch.float32, 3, 24, 4, 2, 0.1, None):
            check_flash(case, group)
        if size < 4:
            check_compiled(CASES[size - 1], group)
        if size == 2:
            check_inductor(CASES[-1], group)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_on_real_ranks(size, tmp_path):
    # forked from a server that has imported this module once, and started no thread
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [
        context.Process(target=run_rank, args=(rank, size, tmp_path / "store"), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * size
