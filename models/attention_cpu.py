"""Attention on CPU: two operators over the kernel of attention_cpu.cpp.

`omnistep::attention_cpu` and `omnistep::attention_cpu_backward` are opaque to torch.compile and to
checkpointing policies: `torch.ops.omnistep.attention_cpu.default` is the name to save or recompute.
The kernel is compiled on first use, for this machine, and kept in a cache directory. Without a C++
compiler the same operators run on torch's own attention, sample by sample.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core.cache import check_own, private_directory
from omnistep.models.attention_plain import compute_dtype, torch_backward, torch_forward

SOURCE = Path(__file__).with_name("attention_cpu.cpp")
log = logging.getLogger(__name__)


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by machines of different kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    telling = ("model name", "flags", "CPU part", "CPU implementer", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))


def compile_kernel(compiler: str, extra_flags: tuple[str, ...] = ()) -> Path:
    """Makes the shared library, or finds it in the cache (compiling takes 4 to 7 s on one core).

    OpenMP's runtime is found by its soname, so the one torch has loaded is used and its threads
    are shared. Raises subprocess.CalledProcessError with the compiler's messages in `stderr`;
    OSError where the cache, or what is in it, is not this user's alone.
    """
    arm = platform.machine() in ("aarch64", "arm64")
    native = "-mcpu=native" if arm else "-march=native"
    # No -ffast-math: exp2 relies on (x + c) - c and on NaN staying NaN.
    flags = ["-std=c++17", "-O3", native, "-ffp-contract=fast", "-fno-math-errno"]
    flags += ["-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", *extra_flags]
    binary = Path(compiler).resolve()
    identity = [SOURCE.read_text(), *flags, str(binary), str(binary.stat().st_mtime), _processor()]
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:20]
    library = private_directory("kernels") / f"attention_cpu_{key}.so"
    if library.exists():
        check_own(library)
        return library
    # One rank compiles and the others wait; a rename, so that a killed one leaves no half file.
    with (
        FileLock(library.with_suffix(".lock")),
        tempfile.TemporaryDirectory(dir=library.parent) as folder,
    ):
        if not library.exists():
            built = Path(folder) / library.name
            command = [compiler, *flags, str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.chmod(0o700)  # whatever the umask
            os.replace(built, library)
    return library


@functools.cache
def compilation() -> Future[ctypes.CDLL | None]:
    """The kernel in the making, on a thread of its own; made once in a process."""
    with_one_thread = ThreadPoolExecutor(1, thread_name_prefix="attention_cpu")
    future = with_one_thread.submit(_compiled)
    with_one_thread.shutdown(wait=False)  # no more work after this one
    return future


def start_compiling() -> None:
    """Begins to compile the kernel and returns, so that it is ready when `kernel` asks for it.

    A second call does nothing; where the cache has the kernel it is only loaded.
    """
    compilation()


def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None (said once) where it cannot be had."""
    return compilation().result()


def _compiled() -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        log.warning(
            "no C++ compiler ($CXX, c++, g++, clang++): attention runs on torch's own CPU kernel, "
            "about half as fast; install one, e.g. `apt install g++`"
        )
        return None
    try:
        return _declared(ctypes.CDLL(str(compile_kernel(compiler))))
    except (subprocess.CalledProcessError, OSError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("%s cannot build %s, torch's own is used: %s", compiler, SOURCE, reason)
        return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer = ctypes.c_void_p
    # sizes q k v strides starts ends, scale, window
    operands = [pointer] * 7 + [ctypes.c_double, ctypes.c_int64]
    for name in ("float", "double"):
        for function, results in (("forward", 2), ("backward", 7)):
            entry = getattr(library, f"attention_{function}_{name}")
            entry.argtypes = [*operands, *[pointer] * results, ctypes.c_int]
            entry.restype = ctypes.c_int64
    return library


def _numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the kernel's dtype and with a contiguous last axis; no copy where that already holds."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(
    library: ctypes.CDLL,
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor | None,
    scale: float,
    window: int | None,
    *results: Tensor | ctypes.Array[ctypes.c_int64],
) -> int:
    """Calls an entry point; returns the number of scores it computed (whole tiles)."""
    rows, seq, heads, head_dim = q.shape
    q, k, v = (_readable(x, compute_dtype(q)) for x in (q, k, v))
    starts = starts.contiguous()
    ends = None if ends is None else ends.contiguous()
    name = "double" if q.dtype == torch.float64 else "float"
    scores = getattr(library, f"attention_{function}_{name}")(
        _numbers(rows, seq, heads, k.shape[2], head_dim, k.shape[1]),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        _numbers(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        starts.data_ptr(),
        None if ends is None else ends.data_ptr(),
        scale,
        seq if window is None else window,
        *(result.data_ptr() if isinstance(result, Tensor) else result for result in results),
        torch.get_num_threads(),
    )
    if scores >= 0:
        return scores
    row, token = divmod(-1 - scores, seq)
    if ends is None:
        raise ValueError(
            f"starts[{row}] is {starts[row, : token + 1].tolist()[-3:]} up to token {token}: each "
            "start must be the token's own index or the start of the token before it"
        )
    seen = [list(x) for x in zip(starts[row].tolist(), ends[row].tolist(), strict=True)]
    raise ValueError(
        f"the keys that queries of row {row} see are {seen[max(token - 2, 0) : token + 1]} up to "
        f"query {token}: both bounds must be from 0 to {k.shape[1]} and never decrease"
    )


def kernel_forward(
    library: ctypes.CDLL,
    q: Float[Tensor, "rows seq heads head_dim"],
    k: Float[Tensor, "rows seq kv_heads head_dim"],
    v: Float[Tensor, "rows seq kv_heads head_dim"],
    starts: Int[Tensor, "rows seq"],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, int]:
    """Output, logsumexp [rows, heads, seq], and how many scores were computed."""
    rows, seq, heads, _ = q.shape
    out = q.new_empty(q.shape, dtype=compute_dtype(q))
    lse = q.new_empty((rows, heads, seq), dtype=out.dtype)
    scores = _call(library, "forward", q, k, v, starts, None, scale, window, out, lse)
    return out.to(q.dtype), lse, scores


def kernel_forward_onto(
    library: ctypes.CDLL,
    out: Float[Tensor, "rows queries heads head_dim"],
    lse: Float[Tensor, "rows heads queries"],
    q: Float[Tensor, "rows queries heads head_dim"],
    k: Float[Tensor, "rows keys kv_heads head_dim"],
    v: Float[Tensor, "rows keys kv_heads head_dim"],
    seen: Int[Tensor, "2 rows queries"],
    scale: float,
) -> int:
    """Further keys for queries whose attention over others is (out, lse), which it writes over.

    `out` and `lse` are contiguous and in compute_dtype; 0 and -inf: no other keys. `seen` as in
    `omnistep.models.attention_ring.attention_part`. Returns how many scores were computed.
    """
    return _call(library, "forward", q, k, v, seen[0], seen[1], scale, None, out, lse)


def kernel_backward(
    library: ctypes.CDLL,
    grad: Float[Tensor, "rows seq heads head_dim"],
    q: Float[Tensor, "rows seq heads head_dim"],
    k: Float[Tensor, "rows seq kv_heads head_dim"],
    v: Float[Tensor, "rows seq kv_heads head_dim"],
    out: Float[Tensor, "rows seq heads head_dim"],
    lse: Float[Tensor, "rows heads seq"],
    starts: Int[Tensor, "rows seq"],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The gradients of q, k and v, and how many scores were computed."""
    grads = [x.new_empty(x.shape, dtype=compute_dtype(q)) for x in (q, k, v)]
    known = _known(grad, out, lse)
    scores = _call(library, "backward", q, k, v, starts, None, scale, window, *known, *grads)
    q_grad, k_grad, v_grad = (g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return q_grad, k_grad, v_grad, scores


def kernel_backward_onto(
    library: ctypes.CDLL,
    grads: tuple[Tensor, Tensor, Tensor],
    grad: Float[Tensor, "rows queries heads head_dim"],
    q: Float[Tensor, "rows queries heads head_dim"],
    k: Float[Tensor, "rows keys kv_heads head_dim"],
    v: Float[Tensor, "rows keys kv_heads head_dim"],
    out: Float[Tensor, "rows queries heads head_dim"],
    lse: Float[Tensor, "rows heads queries"],
    seen: Int[Tensor, "2 rows queries"],
    scale: float,
) -> int:
    """What these keys give to the gradients of q, k and v, when `out` and `lse` are over all keys.

    `grads` are contiguous zeros in compute_dtype, of the shapes of q, k and v. Returns how many
    scores were computed.
    """
    known = _known(grad, out, lse)
    return _call(library, "backward", q, k, v, seen[0], seen[1], scale, None, *known, *grads)


def _known(grad: Tensor, out: Tensor, lse: Tensor):
    """What the backward pass is told of the forward pass and of what followed it."""
    dtype = compute_dtype(grad)
    grad = _readable(grad, dtype)
    strides = _numbers(*grad.stride()[:3])
    return out.to(dtype).contiguous(), lse.contiguous(), grad, strides


@torch.library.custom_op("omnistep::attention_cpu", mutates_args=(), device_types="cpu")
def attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `omnistep.models.attention.attention`; also returns the logsumexp [rows, heads, seq]."""
    library = kernel()
    if library is None:
        return torch_forward(q, k, v, starts, scale, window)
    out, lse, _ = kernel_forward(library, q, k, v, starts, scale, window)
    return out, lse


@torch.library.custom_op("omnistep::attention_cpu_backward", mutates_args=(), device_types="cpu")
def attention_cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, contiguous."""
    library = kernel()
    if library is None:
        return torch_backward(grad, q, k, v, out, lse, starts, scale, window)
    return kernel_backward(library, grad, q, k, v, out, lse, starts, scale, window)[:3]


@attention_cpu.register_fake
def _(q, k, v, starts, scale, window):
    rows, seq, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((rows, heads, seq), dtype=compute_dtype(q))


@attention_cpu_backward.register_fake
def _(grad, q, k, v, out, lse, starts, scale, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, starts, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, starts)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    q, k, v, out, lse, starts = ctx.saved_tensors
    grads = attention_cpu_backward(grad, q, k, v, out, lse, starts, ctx.scale, ctx.window)
    return *grads, None, None, None


attention_cpu.register_autograd(_backward, setup_context=_save)
