"""What around a call our ops do not go through: compilers, transforms, modes, hooks, replaced functions, autocast.

Asked at every call, by the whole model and by each module of the module tier; answers are reasons or None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from operator import attrgetter
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext


def _is_torchs_own(function: Any) -> bool:
    """Whether a function is of torch itself, so that nobody replaced it before bert_fast was imported."""
    code = getattr(function, "__code__", None)
    return isinstance(function, BuiltinFunctionType) or (code is not None and code.co_filename.startswith(_TORCH))


def _watched(owner: Any, *names: str) -> tuple[Any, tuple[str, ...], Callable[[Any], Any], tuple[Any, ...]]:
    """What `replaced_function` reads: owner, names, how, and what was there at import (None: already replaced)."""
    read = attrgetter(*names)
    return owner, names, read, tuple(own if _is_torchs_own(own) else None for own in read(owner))


# What transformers' forwards call. Profilers, emulated number formats and tracers put theirs in these places. A call of
# any submodule goes through nn.Module.__call__, which torch.fx replaces while it traces.
_TORCH = os.path.dirname(torch.__file__) + os.sep
_WATCHED = (
    _watched(
        nn.functional,
        *("linear", "layer_norm", "softmax", "dropout", "embedding", "gelu", "relu", "silu"),
        "scaled_dot_product_attention",
    ),
    _watched(torch, "matmul", "tanh"),
    _watched(nn.Module, "__call__", "__getattr__"),
)
TORCH_GELU = torch._C._nn.gelu  # activations keep a reference to it


def replaced_function() -> str | None:
    """Which function of torch that transformers' code calls somebody has replaced."""
    for owner, names, read, own in _WATCHED:
        if (found := read(owner)) != own:
            name = next(name for name, a, b in zip(names, found, own, strict=True) if a != b)
            return f"{owner.__name__}.{name} was replaced"
    return None


def mode_reason() -> str | None:
    """Which mode sees the calls of torch's functions or operators; torch.set_default_device's is no concern of ours."""
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is on"
    for i in range(torch._C._len_torch_function_stack()):
        if type(torch._C._get_function_stack_at(i)) is not DeviceContext:
            return "a TorchFunctionMode is on"
    return None


def surroundings_reason() -> str | None:
    """Why transformers' code runs here, whatever the model; autocast is asked for by itself."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the call is being compiled, exported or traced"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "the call is under a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "the call is under forward-mode differentiation"
    if nn_module._has_any_global_hook():
        return "a global module hook is installed"
    return replaced_function() or mode_reason()


def autocast_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why our ops do not do what autocast asks of a model of `dtype`: only fp32 parameters are brought to half."""
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return None
    to = torch.get_autocast_dtype(device_type)
    if dtype == torch.float32 and to in (torch.bfloat16, torch.float16):
        return None
    return f"autocast to {to} is on, parameters are {dtype}"
