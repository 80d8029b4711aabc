"""Arguments of the ops that make up the backward of the products."""

from __future__ import annotations

from typing import Any

import torch
from kernel_helpers import count, randn

NAN = float("nan")


def weights(parts: int, N: int, K: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """w0, w1, w2 of grad_input: products of size 1."""
    given = [randn(N, K, dtype=dtype, scale=(parts * N) ** -0.5, seed=i) for i in range(parts)]
    return [*given, *[None] * (3 - parts)]


def arguments(op: str, T: int, N: int, K: int, dtype: torch.dtype, n: int | None = None) -> tuple[Any, ...]:
    """Of any backward op, undefined rows NaN in all that have rows."""
    dy, (w, *_), rows = randn(T, N, dtype=dtype), weights(1, N, K, dtype), randn(T, K, dtype=dtype, seed=1)
    pre, three = randn(T, N, dtype=dtype, seed=2), randn(T, 3 * N, dtype=dtype)
    for t in (dy, rows, pre, three):
        t[T if n is None else n :] = NAN
    return {
        "grad_input": (three, *weights(3, N, K, dtype), rows, count(n)),
        "grad_input_act": (dy, w, rows, "gelu", count(n)),
        "grad_weight": (dy, rows, count(n), True),
        "grad_activation": (dy, pre, "gelu", count(n)),
    }[op]


OPS = ("grad_input", "grad_input_act", "grad_weight", "grad_activation")
