"""How two results of a model differ, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.linalg import vector_norm

OUTPUT_TOLERANCE = 2e-5  # relative L2 distance of fp32 tensors; those of equal models are below 2e-6
GRADIENT_TOLERANCE = 2e-4
_SMALL = 0.01  # gradients below this share of the largest are measured against it: some are zero but for rounding


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of an output of any depth, in order."""
    if isinstance(value, Mapping):
        yield path, f"a {type(value).__name__} of {', '.join(map(str, value))}"
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (tuple, list)):
        yield path, f"a {type(value).__name__} of {len(value)}"
        for i, part in enumerate(value):
            yield from _leaves(part, f"{path}[{i}]")
    else:
        yield path, value


def output_difference(ours: Any, wanted: Any) -> str | None:
    """The first place where an output differs from transformers': structure, dtype, shape, numbers, identity."""
    got, expected = list(_leaves(ours, "")), list(_leaves(wanted, ""))
    for (path, x), (wanted_path, y) in zip(got, expected, strict=False):
        name = f"output{wanted_path}" if wanted_path[:1] in ("", "[") else wanted_path
        if path != wanted_path:
            return f"{name} is not there"
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if (x.dtype, x.shape, x.requires_grad) != (y.dtype, y.shape, y.requires_grad):
                return f"{name} is {_kind(x)} here, {_kind(y)} in transformers"
            distance = relative_distance(x, y)
            if not distance <= OUTPUT_TOLERANCE:
                return f"{name} is off by {distance:.2g} (relative)"
        elif x is not y and (isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor) or x != y):
            return f"{name} is {_shown(x)} here, {_shown(y)} in transformers"
    if _identities(got) != _identities(expected):
        return "other tensors are one and the same"
    return None


def relative_distance(x: torch.Tensor, y: torch.Tensor, floor: float = 0.0) -> float:
    """L2 distance over the length of y, or over `floor` where that is more; 0 where both are nothing but zeros."""
    distance = vector_norm(x.detach() - y.detach()).item()
    length = max(vector_norm(y.detach()).item(), floor)
    return distance / length if length else distance


def gradient_difference(ours: dict[str, torch.Tensor | None], wanted: dict[str, torch.Tensor | None]) -> str | None:
    """The first parameter whose gradient differs from transformers'."""
    floor = _SMALL * max((vector_norm(y).item() for y in wanted.values() if y is not None), default=0.0)
    for name, y in wanted.items():
        x = ours.get(name)
        if x is None or y is None:
            if x is not y:
                return f"the gradient of {name} is {_shown(x)} here, {_shown(y)} in transformers"
            continue
        distance = relative_distance(x, y, floor)
        if not distance <= GRADIENT_TOLERANCE:
            return f"the gradient of {name} is off by {distance:.2g} (relative)"
    return None


def _identities(leaves: list[tuple[str, Any]]) -> list[int]:
    """For every tensor the place of the first that is the same object."""
    tensors = [value for _, value in leaves if isinstance(value, torch.Tensor)]
    return [next(i for i, first in enumerate(tensors) if first is tensor) for tensor in tensors]


def _kind(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} {'with' if x.requires_grad else 'without'} gradient"


def _shown(value: Any) -> str:
    return _kind(value) if isinstance(value, torch.Tensor) else str(value)
