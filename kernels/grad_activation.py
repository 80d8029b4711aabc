"""grad_activation: dy * act'(pre), elementwise: the gradient before the activation of linear_gelu_pre.

Bytes: 2 * T * N read, T * N written; bandwidth-bound.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.activation import BACKWARD, activate_backward, check_activation
from bert_fast.kernels.gemm import used_rows
from bert_fast.kernels.grad_gemm import dense_rows
from bert_fast.kernels.registry import register_kernel
from bert_fast.kernels.runtime import ceil_div, device_guard, follow_previous, launch_options, tl, triton

ROWS, COLUMNS = 8, 256  # rows and columns of a program


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _grad_activation_kernel(
    dy_ptr, pre_ptr, dx_ptr, n_rows_ptr, M, N, stride_dy, stride_pre,
    HAS_N_ROWS: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    if HAS_N_ROWS:
        M = tl.load(n_rows_ptr)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < M) & (cols < N)
    dy = tl.load(dy_ptr + rows * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + rows * stride_pre + cols, mask=mask, other=0.0).to(tl.float32)
    dx, _ = activate_backward(dy, pre, ACT, dx_ptr.dtype.element_ty == tl.float32)
    tl.store(dx_ptr + rows * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def check_gradient(op: str, dy: torch.Tensor, like: torch.Tensor, name: str) -> None:
    """dy (T, N) beside another tensor of its shape, dtype and device."""
    if dy.dim() != 2:
        raise ValueError(f"{op}: dy has shape {tuple(dy.shape)}, expected (T, N)")
    if like.shape != dy.shape or like.dtype != dy.dtype or like.device != dy.device:
        raise ValueError(
            f"{op}: {name} is {tuple(like.shape)} {like.dtype} on {like.device}, dy is {tuple(dy.shape)} {dy.dtype} on"
            f" {dy.device}"
        )


def zeros_below(rows: torch.Tensor, T: int) -> torch.Tensor:
    """The rows in use, and zeros up to T rows."""
    return rows if len(rows) == T else torch.cat([rows, rows.new_zeros(T - len(rows), rows.shape[1])])


def grad_activation_ref(dy: torch.Tensor, pre: torch.Tensor, act: str, n_rows: torch.Tensor | None) -> torch.Tensor:
    """dy, pre (T, N), act one of activation.TORCH, n_rows int32 (1,) or None (all T), past which rows come out zero."""
    n = used_rows(dy, n_rows)
    return zeros_below(BACKWARD[act](dy[:n], pre[:n]), len(dy))


def grad_activation_cpu(dy: torch.Tensor, pre: torch.Tensor, act: str, n_rows: torch.Tensor | None) -> torch.Tensor:
    check_activation(act)
    check_gradient("grad_activation", dy, pre, "pre")
    return grad_activation_ref(dy, pre, act, n_rows)


def grad_activation_triton(dy: torch.Tensor, pre: torch.Tensor, act: str, n_rows: torch.Tensor | None) -> torch.Tensor:
    check_activation(act)
    check_gradient("grad_activation", dy, pre, "pre")
    dx = _grad_activation_fake(dy, pre, act, n_rows)
    if dx.numel():
        dy, pre, (M, N) = dense_rows(dy), dense_rows(pre), dy.shape
        with device_guard(dy):
            _grad_activation_kernel[ceil_div(M, ROWS), ceil_div(N, COLUMNS)](
                dy, pre, dx, n_rows, M, N, dy.stride(0), pre.stride(0), HAS_N_ROWS=n_rows is not None, ACT=act,
                ROWS=ROWS, COLUMNS=COLUMNS, **launch_options(),
            )  # fmt: skip
    return dx


def _grad_activation_fake(dy: torch.Tensor, pre: torch.Tensor, act: str, n_rows: torch.Tensor | None) -> torch.Tensor:
    return dy.new_empty(dy.shape)


grad_activation = register_kernel(
    "grad_activation(Tensor dy, Tensor pre, str act, Tensor? n_rows) -> Tensor",
    cpu=grad_activation_cpu,
    cuda=grad_activation_triton,
    fake=_grad_activation_fake,
)
