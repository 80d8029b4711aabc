"""Shared by the kernel tests: the bodies of an op, and the one tolerance rule (docs/design.md, "Numbers")."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILES = {"linear_gelu_pre": "linear_gelu", "grad_input_act": "grad_input"}  # ops not in a file of their own
# every op has these; the Triton one runs on CPU tensors, so that the kernel is what is tested
BODIES = (pytest.param("triton", marks=pytest.mark.interpreter), "cpu")


def body(op: str, name: str) -> Any:
    """`<op>_<name>` of the op's file; name "" is the registered op."""
    return getattr(import_module(f"bert_fast.kernels.{FILES.get(op, op)}"), f"{op}_{name}" if name else op)


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normal numbers that depend on the shape and seed only, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed + sum((i + 1) * n for i, n in enumerate(shape)))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def count(n: int | None) -> torch.Tensor | None:
    """n_rows as the ops take it."""
    return None if n is None else torch.tensor([n], dtype=torch.int32)


def double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 distance; 0 where both are empty or zero."""
    distance = (x.double() - truth).norm().item()
    return distance / truth.norm().item() if distance else 0.0


def assert_error_rule(ours: torch.Tensor, low: torch.Tensor, truth: torch.Tensor, what: str = "output") -> None:
    """The one rule: error of ours <= 1.25 x error of the reference in the same dtype + 4 eps of the dtype."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == low.dtype, f"{what}: {ours.dtype}, expected {low.dtype}"
    assert torch.isfinite(ours).all(), f"{what}: {int((~torch.isfinite(ours)).sum())} numbers are not finite"
    error, reference = relative_error(ours, truth), relative_error(low, truth)
    limit = 1.25 * reference + 4 * torch.finfo(ours.dtype).eps
    assert error <= limit, f"{what} in {ours.dtype}: error {error:.3g}, limit {limit:.3g} (reference {reference:.3g})"


def references(ref: Any, *args: Any) -> tuple[Any, Any]:
    """The reference in the dtype of its arguments, and in float64."""
    return ref(*args), ref(*map(double, args))


def outputs(op: str, name: str, *args: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each output of the op: (the body's, the reference's in the same dtype, the reference's in float64)."""
    results = body(op, name)(*args), *references(body(op, "ref"), *args)
    yield from zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True)


def assert_like_ref(op: str, name: str, *args: Any, rows: int | None = None) -> None:
    """All outputs by the rule; of outputs of rows, the first `rows` (the others are undefined)."""
    for i, (ours, low, truth) in enumerate(outputs(op, name, *args)):
        assert_error_rule(ours[:rows], low[:rows], truth[:rows], f"{op}_{name} output {i}")
