"""pool: gather of every sequence's first token, dense, bias and tanh in one launch (BertPooler).

y (B, N) = tanh(hidden[:, 0] @ weight^T + bias), accumulated in fp32. Bytes: N * K weights; FLOP: 2 * B * N * K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bert_fast.kernels.activation import tanh
from bert_fast.kernels.configs import TileConfig, choose
from bert_fast.kernels.registry import Grads, register
from bert_fast.kernels.runtime import (
    capability,
    ceil_div,
    device_guard,
    dot_precision,
    follow_previous,
    launch_options,
    tl,
    triton,
)


def pool_ref(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """hidden (B, S, K), weight (N, K), bias (N,); returns (B, N)."""
    return torch.tanh(F.linear(hidden[:, 0], weight, bias))


@triton.jit(do_not_specialize=["B"])
def _pool_kernel(
    hidden_ptr, weight_ptr, bias_ptr, y_ptr, B, N, K, stride_b, stride_w,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # rows and columns past the end wrap around; they are never stored
    x_ptrs = hidden_ptr + (rows % B).to(tl.int64)[:, None] * stride_b + inner[None, :]
    w_ptrs = weight_ptr + (cols % N).to(tl.int64)[None, :] * stride_w + inner[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=inner[None, :] < K - k, other=0.0)
        w = tl.load(w_ptrs, mask=inner[:, None] < K - k, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(y_ptrs, tanh(acc).to(y_ptr.dtype.element_ty), mask=(rows < B)[:, None] & (cols < N)[None, :])


def _check(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if hidden.dim() != 3 or 0 in hidden.shape[:2] or hidden.stride(2) != 1:
        raise ValueError(f"pool: hidden has shape {tuple(hidden.shape)}, expected (B, S, K) with unit rows and no 0")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2] or weight.stride(1) != 1:
        raise ValueError(f"pool: weight has shape {tuple(weight.shape)}, expected (N, {hidden.shape[2]})")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.dtype != hidden.dtype or t.device != hidden.device or t.shape[0] != weight.shape[0]:
            raise ValueError(f"pool: {name} is {tuple(t.shape)} {t.dtype} on {t.device}, hidden is {hidden.dtype}")


def pool_cpu(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    _check(hidden, weight, bias)
    return F.linear(hidden[:, 0], weight, bias).tanh_()


def pool_triton(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, config: TileConfig | None = None
) -> torch.Tensor:
    _check(hidden, weight, bias)
    B, N, K = hidden.shape[0], *weight.shape
    y = hidden.new_empty(B, N)
    config = config or choose("pool", "any", hidden.dtype, capability(hidden.device))
    with device_guard(hidden):
        _pool_kernel[(ceil_div(B, config.BLOCK_M), ceil_div(N, config.BLOCK_N))](
            hidden, weight, bias.contiguous(), y, B, N, K, hidden.stride(0), weight.stride(0),
            PRECISION=dot_precision(hidden.dtype),
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K,
            num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(),
        )  # fmt: skip
    return y


def _pool_fake(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0])


def _gradient(
    needs: Sequence[bool], inputs: Sequence[Any], outputs: Sequence[Any], grads: Sequence[torch.Tensor | None]
) -> Grads:
    """Products of B rows: torch's own, and right under vmap. y is saved: tanh'(x) = 1 - y^2."""
    (hidden, weight, bias), (y,), (dy,) = inputs, outputs, grads
    assert dy is not None
    wide = torch.promote_types(y.dtype, torch.float32)
    d_pre = dy.to(wide) * (1 - y.to(wide) ** 2)
    low = d_pre.to(y.dtype)
    d_hidden = F.pad((low @ weight)[:, None], (0, 0, 0, hidden.shape[1] - 1)) if needs[0] else None
    d_weight = low.t() @ hidden[:, 0] if needs[1] else None
    return d_hidden, d_weight, d_pre.sum(0).to(bias.dtype) if needs[2] else None


pool = register(
    "pool(Tensor hidden, Tensor weight, Tensor bias) -> Tensor",
    ref=pool_ref,
    cpu=pool_cpu,
    cuda=pool_triton,
    fake=_pool_fake,
    gradient=_gradient,
    gradient_ref=_gradient,
    reads={"hidden": "weight", "weight": "hidden", "bias": ""},
    saved_outputs=(0,),
)
