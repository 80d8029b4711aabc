"""What every kernel file needs from the machine: Triton if it is there, the device guard, the SM count.

Nothing here asks CUDA anything at import, so the package imports where Triton or a GPU is absent; there the
CPU bodies serve and the CUDA bodies are never reached.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:  # macOS, Windows, or a torch without its Triton

    class _Absent:
        """Stands in for `triton` and `tl` while kernel files are read; calling a kernel is an error."""

        @staticmethod
        def constexpr(value: Any) -> Any:
            return value

        def jit(self, fn: Any = None, **options: Any) -> Any:
            return fn if fn is not None else lambda fn: fn

    triton = tl = _Absent()  # type: ignore[assignment]
    TensorDescriptor = None  # type: ignore[assignment, misc]
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "TensorDescriptor", "ceil_div", "dependent_launches", "device_guard", "dot_precision"]
__all__ += ["follow_previous", "launch_options", "next_power_of_2", "num_sms", "supports_tma", "tl", "triton"]
__all__ += ["is_batched", "unsupported_reason", "without_autocast"]

MIN_CAPABILITY = (8, 0)  # bf16 tensor cores and asynchronous copies
INTERPRETER_SMS = 3  # programs of a persistent grid on CPU tensors: few, and no divisor of typical tile counts


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _properties(index: int) -> tuple[tuple[int, int], int]:
    p = torch.cuda.get_device_properties(index)
    return (p.major, p.minor), p.multi_processor_count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of `device`: the grid of a persistent kernel."""
    return _properties(_index(device))[1] if device.type == "cuda" else INTERPRETER_SMS


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for the interpreter's CPU tensors and for AMD GPUs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return _properties(_index(device))[0]


def supports_tma(device: torch.device) -> bool:
    """Whether host tensor descriptors map to the bulk copy engine (sm_90 and newer)."""
    return capability(device) >= (9, 0)


def unsupported_reason(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device` (None: they can). CPU has its own bodies and always can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device type {device.type!r} has no kernels here"
    if not HAS_TRITON:
        return "Triton is not installed"
    if torch.version.hip is None and capability(device) < MIN_CAPABILITY:
        return "compute capability {}.{} is below 8.0".format(*capability(device))
    return None


def device_guard(x: torch.Tensor) -> Any:
    """Context manager under which a kernel for `x` is launched: Triton launches on the *current* device."""
    return torch.cuda.device_of(x)


def without_autocast(device_type: str) -> Any:
    """Context manager in which torch's own operators take their arguments as they come."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def is_batched(grads: Iterable[torch.Tensor | None]) -> bool:
    """Whether these are, under one of torch's two vmaps, batches of what our kernels take."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None:
        return True
    return any(g is not None and functorch.is_legacy_batchedtensor(g) for g in grads)  # of is_grads_batched=True


# The two instructions of programmatic dependent launch; Triton's interpreter and AMD's backend have none.
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def follow_previous(PDL: tl.constexpr):
    """First line of every kernel. PDL: let the next kernel's programs start, then wait for the previous kernel's end.

    Every program of every kernel must wait, those with nothing to do as well: a kernel's end then means that all
    kernels before it have ended too.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


class _Launches(threading.local):
    dependent = False


_launches = _Launches()


@contextlib.contextmanager
def dependent_launches(device: torch.device) -> Iterator[None]:
    """Kernels launched by this thread inside overlap their start with the previous kernel's end (sm_90 and newer)."""
    before, _launches.dependent = _launches.dependent, capability(device) >= (9, 0)
    try:
        yield
    finally:
        _launches.dependent = before


def launch_options() -> dict[str, bool]:
    """What every launch passes: multiply-add fusion (Triton 3.10 turns it off), and dependent launch where it is on."""
    options = {"PDL": _launches.dependent, "enable_fp_fusion": True}
    return options | {"launch_pdl": True} if _launches.dependent else options


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: IEEE for fp32 unless torch allows TF32; other dtypes ignore it."""
    # `allow_tf32` shows here too, but reading it raises once a user has set the newer `fp32_precision`
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
