"""grad_weight: dw (M, K) = dy^T (M, T) @ x (T, K) and db (M,) = column sums of dy, over the rows in use.

The sum runs over rows, whose number is on the device, and an undefined row may be NaN: whole blocks of rows are read as
they are, the last one is masked, in both operands. A weight has few tiles (36 of 128 x 128 for 768 x 768), so the rows
are split over several programs; their sums stay apart in fp32 and are added in a fixed order by a second kernel: no
atomics, the same bits every time. Without n_rows, and in fp32, the product is torch's own.

Bytes: T * (M + K) read, M * K written, 8 * parts * M * K for the parts; FLOP: 2 * T * M * K.
"""

from __future__ import annotations

from typing import Any

import torch

from bert_fast.kernels.column_sums import column_sums_triton, share_of_rows
from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.gemm import _tile, tile_options, used_rows
from bert_fast.kernels.grad_gemm import dense_rows, descriptors_fit, gradient_tile
from bert_fast.kernels.registry import register_kernel
from bert_fast.kernels.runtime import (
    TensorDescriptor,
    ceil_div,
    device_guard,
    dot_precision,
    follow_previous,
    launch_options,
    num_sms,
    tl,
    triton,
)

Pair = tuple[torch.Tensor, torch.Tensor]
MAX_SPLIT = 8
SUM_BLOCK = 1024  # elements that a program of the second kernel adds up


def grad_weight_ref(dy: torch.Tensor, x: torch.Tensor, n_rows: torch.Tensor | None, want_bias: bool) -> Pair:
    """dy (T, M), x (T, K), n_rows int32 (1,) or None (all T); returns (dw (M, K), db (M,) or empty)."""
    n = used_rows(dy, n_rows)
    return dy[:n].t() @ x[:n], dy[:n].sum(0) if want_bias else dy.new_empty(0)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _grad_weight_pointer_kernel(
    dy_ptr, x_ptr,
    dw_ptr,  # (M, N), or the parts of the sums, fp32 (parts, M, N)
    n_rows_ptr,  # int32 (1,): rows in use, read on the device; absent: all T
    T, M, N, stride_dy, stride_x,
    HAS_N_ROWS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program: one tile over its share of the rows."""
    follow_previous(PDL)
    if HAS_N_ROWS:
        T = tl.load(n_rows_ptr)
    first, _, end = share_of_rows(T, BLOCK_K)
    pid_m, pid_n = _tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    dy_ptrs = dy_ptr + (first + inner).to(tl.int64)[:, None] * stride_dy + rows[None, :]
    x_ptrs = x_ptr + (first + inner).to(tl.int64)[:, None] * stride_x + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(first, end, BLOCK_K):
        used = inner[:, None] < end - t
        dy = tl.load(dy_ptrs, mask=used & (rows < M)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=used & (cols < N)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
        dy_ptrs += BLOCK_K * stride_dy
        x_ptrs += BLOCK_K * stride_x
    at = (tl.program_id(1) * M + rows).to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(dw_ptr + at, acc.to(dw_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _grad_weight_tma_kernel(
    dy_desc, x_desc, dw_ptr, n_rows_ptr, T, M, N,
    HAS_N_ROWS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    if HAS_N_ROWS:
        T = tl.load(n_rows_ptr)
    first, whole, end = share_of_rows(T, BLOCK_K)
    pid_m, pid_n = _tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = pid_m * BLOCK_M
    col = pid_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(first, whole, BLOCK_K):
        acc = tl.dot(dy_desc.load([t, row]).T, x_desc.load([t, col]), acc)
    if whole < end:
        used = (tl.arange(0, BLOCK_K) < end - whole)[:, None]
        dy = tl.where(used, dy_desc.load([whole, row]), 0.0)
        x = tl.where(used, x_desc.load([whole, col]), 0.0)
        acc = tl.dot(tl.trans(dy), x, acc)
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    at = (tl.program_id(1) * M + rows).to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(dw_ptr + at, acc.to(dw_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(parts_ptr, out_ptr, parts, size, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """out (size,) = sum over the first axis of parts (parts, size), fp32, in this order."""
    follow_previous(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(parts_ptr + at, mask=at < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


def _check(dy: torch.Tensor, x: torch.Tensor) -> None:
    if dy.dim() != 2:
        raise ValueError(f"grad_weight: dy has shape {tuple(dy.shape)}, expected (T, M)")
    if x.dim() != 2 or x.shape[0] != dy.shape[0] or x.dtype != dy.dtype or x.device != dy.device:
        raise ValueError(
            f"grad_weight: x is {tuple(x.shape)} {x.dtype} on {x.device}, expected ({dy.shape[0]}, K) {dy.dtype} on"
            f" {dy.device}"
        )


def grad_weight_cpu(dy: torch.Tensor, x: torch.Tensor, n_rows: torch.Tensor | None, want_bias: bool) -> Pair:
    _check(dy, x)
    return grad_weight_ref(dy, x, n_rows, want_bias)


def used_or_zero(rows: torch.Tensor, n_rows: torch.Tensor | None) -> torch.Tensor:
    """rows (T, N) with zeros for those not in use, without a question to the device."""
    if n_rows is None:
        return rows
    return torch.where((torch.arange(rows.shape[0], device=rows.device) < n_rows)[:, None], rows, 0.0)


def split(tiles: int, T: int, M: int, N: int, config: TileConfig, sms: int) -> int:
    """Over how many programs to split the rows: the fewest rows a multiprocessor walks, against the parts' bytes.

    A part is written and read in fp32, which costs as much time as the products of M * N / 2000 rows of one tile of 128
    x 128 on one multiprocessor (H100: 3 TB/s for all, 5.7 TFLOP/s for each).
    """
    tile = config.BLOCK_M * config.BLOCK_N / 128**2

    def cost(parts: int) -> float:
        return ceil_div(tiles * parts, sms) / parts * T * tile + (parts > 1) * (300 + parts * M * N / 2000)

    return min(range(1, MAX_SPLIT + 1), key=cost)


def _sum_parts(parts: torch.Tensor, out: torch.Tensor) -> None:
    """out = sum over the first axis of dense parts."""
    size = out.numel()
    _sum_parts_kernel[(ceil_div(size, SUM_BLOCK),)](
        parts, out, parts.shape[0], size, BLOCK=SUM_BLOCK, **launch_options()
    )


def grad_weight_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    n_rows: torch.Tensor | None,
    want_bias: bool,
    config: TileConfig | None = None,
    parts: int | None = None,
) -> Pair:
    """parts: instead of `split`'s choice."""
    _check(dy, x)
    dy, x = dense_rows(dy), dense_rows(x)
    (T, M), N = dy.shape, x.shape[1]
    dw, db = _grad_weight_fake(dy, x, n_rows, False)
    if want_bias:
        db = column_sums_triton(dy, n_rows) if n_rows is not None else dy.sum(0)
    if M * N == 0:
        return dw, db
    tma_fits = dy.dtype != torch.float32 and descriptors_fit(dy, x)
    config = config or gradient_tile("grad_weight", T, [dy, x], tma_fits)
    if config.tma and not tma_fits:
        raise ValueError(f"{config}: dy {tuple(dy.shape)}, x {tuple(x.shape)} do not fit descriptors")
    tiles = ceil_div(M, config.BLOCK_M) * ceil_div(N, config.BLOCK_N)
    parts = parts or split(tiles, T, M, N, config, num_sms(dy.device))
    out = dw if parts == 1 else dw.new_empty(parts, M, N, dtype=torch.float32)
    shared: dict[str, Any] = {"HAS_N_ROWS": n_rows is not None, **tile_options(config)}
    with device_guard(dy):
        if config.tma and T:
            _grad_weight_tma_kernel[tiles, parts](
                TensorDescriptor.from_tensor(dy, [config.BLOCK_K, config.BLOCK_M]),
                TensorDescriptor.from_tensor(x, [config.BLOCK_K, config.BLOCK_N]),
                out, n_rows, T, M, N, **shared,
            )  # fmt: skip
        else:
            _grad_weight_pointer_kernel[tiles, parts](
                dy, x, out, n_rows, T, M, N, dy.stride(0), x.stride(0), PRECISION=dot_precision(dy.dtype), **shared
            )
        if parts > 1:
            _sum_parts(out, dw)
    return dw, db


def _grad_weight_cuda(dy: torch.Tensor, x: torch.Tensor, n_rows: torch.Tensor | None, want_bias: bool) -> Pair:
    if n_rows is not None and dy.dtype != torch.float32:
        return grad_weight_triton(dy, x, n_rows, want_bias)
    _check(dy, x)
    dy, x = used_or_zero(dy, n_rows), used_or_zero(x, n_rows)
    return torch.mm(dy.t(), x), dy.sum(0) if want_bias else dy.new_empty(0)


def _grad_weight_fake(dy: torch.Tensor, x: torch.Tensor, n_rows: torch.Tensor | None, want_bias: bool) -> Pair:
    return dy.new_empty(dy.shape[1], x.shape[1]), dy.new_empty(dy.shape[1] if want_bias else 0)


grad_weight = register_kernel(
    "grad_weight(Tensor dy, Tensor x, Tensor? n_rows, bool want_bias) -> (Tensor, Tensor)",
    cpu=grad_weight_cpu,
    cuda=_grad_weight_cuda,
    fake=_grad_weight_fake,
)
