"""gelu_layer_norm_backward: the gradients of LayerNorm(act(x)), one pass.

h = act(x) is computed again, dx = dh * act'(x) with dh as in kernels/layer_norm_backward.py. Bytes: 2 * T * N read,
T * N written; bandwidth-bound.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.activation import BACKWARD, TORCH, activate, activate_backward, check_activation
from bert_fast.kernels.column_sums import add_partials
from bert_fast.kernels.layer_norm_backward import (
    check_backward,
    layer_norm_gradients,
    norm_backward,
    store_partials,
    tile_of,
)
from bert_fast.kernels.registry import register_kernel
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, tl, triton

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit(do_not_specialize=["T"])
def _gelu_layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, stride_dy, stride_x, T, N, eps,
    ACT: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: tiles of ROWS rows, as far apart as there are programs."""
    follow_previous(PDL)
    cols = tl.arange(0, BLOCK_N)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_N,), tl.float32)
    d_bias = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < T) & (cols < N)
        x = tl.load(x_ptr + rows * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
        dh, xhat = norm_backward(dy, activate(x, ACT, True), weight, mask, N, eps)
        dx, _ = activate_backward(dh, x, ACT, True)
        tl.store(dx_ptr + rows * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        d_weight += tl.sum(dy * xhat, 0)
        d_bias += tl.sum(dy, 0)
    store_partials(partial_ptr, 0, 2, d_weight, N)
    store_partials(partial_ptr, 1, 2, d_bias, N)


def _check(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, act: str) -> None:
    check_activation(act)
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"gelu_layer_norm_backward: x has shape {tuple(x.shape)}, expected (T, N) with unit rows")
    check_backward("gelu_layer_norm_backward", dy, False, x, weight, None)


def gelu_layer_norm_backward_cpu(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, act: str
) -> Three:
    _check(dy, x, weight, act)
    dh, d_weight, d_bias = layer_norm_gradients(dy, TORCH[act](x), weight, eps)
    return BACKWARD[act](dh, x), d_weight, d_bias


def gelu_layer_norm_backward_triton(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, act: str
) -> Three:
    _check(dy, x, weight, act)
    dx, *sums = outputs = _gelu_layer_norm_backward_fake(dy, x, weight, eps, act)
    T, N = x.shape
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    programs, tile = tile_of(T, N, x.device)
    partial = x.new_empty((programs, 2, N), dtype=torch.float32)
    with device_guard(x):
        _gelu_layer_norm_backward_kernel[(programs,)](
            dy, x, weight.contiguous(), dx, partial, dy.stride(0), x.stride(0), T, N, eps, ACT=act, **tile,
            **launch_options(),
        )  # fmt: skip
    add_partials(partial, sums)
    return outputs


def _gelu_layer_norm_backward_fake(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, act: str
) -> Three:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


gelu_layer_norm_backward = register_kernel(
    "gelu_layer_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps, str act) -> (Tensor, Tensor, Tensor)",
    cpu=gelu_layer_norm_backward_cpu,
    cuda=gelu_layer_norm_backward_triton,
    fake=_gelu_layer_norm_backward_fake,
)
