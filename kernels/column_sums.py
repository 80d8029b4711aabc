"""Column sums over rows, for the gradients of biases and of LayerNorms' parameters: fp32 partial sums of every program,
added up by a second kernel in a fixed order: no atomics, the same bits every time.

column_sums: of rows whose number is on the device. Bytes: T * N read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bert_fast.kernels.gemm import used_rows
from bert_fast.kernels.grad_gemm import dense_rows
from bert_fast.kernels.runtime import ceil_div, device_guard, follow_previous, launch_options, num_sms, tl, triton

ROWS, COLUMNS = 32, 128  # of a tile of column_sums
PROGRAMS_PER_SM = 4


@triton.jit
def share_of_rows(T, BLOCK: tl.constexpr):
    """(first row, end of its whole blocks, end) of this program's part of T rows."""
    share = tl.cdiv(tl.cdiv(T, BLOCK), tl.num_programs(1)) * BLOCK
    first = tl.program_id(1) * share
    end = min(first + share, T)
    return first, first + max(end - first, 0) // BLOCK * BLOCK, end


@triton.jit(do_not_specialize=["programs"])
def _add_partials_kernel(
    partial_ptr, y0_ptr, y1_ptr, y2_ptr, programs, N,
    SUMS: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of one of the sums, over all partials in a fixed order."""
    follow_previous(PDL)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = (rows[:, None] * SUMS + which) * N + cols[None, :]
        acc += tl.load(partial_ptr + at, mask=(rows < programs)[:, None] & (cols < N)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    if which == 0:
        tl.store(y0_ptr + cols, total.to(y0_ptr.dtype.element_ty), mask=cols < N)
    if SUMS > 1:
        if which == 1:
            tl.store(y1_ptr + cols, total.to(y1_ptr.dtype.element_ty), mask=cols < N)
    if SUMS > 2:
        if which == 2:
            tl.store(y2_ptr + cols, total.to(y2_ptr.dtype.element_ty), mask=cols < N)


def add_partials(partial: torch.Tensor, sums: Sequence[torch.Tensor]) -> None:
    """partial, fp32 (programs, len(sums), N), added up over programs into one to three (N,), each in its own dtype."""
    programs, n_sums, N = partial.shape
    with device_guard(partial):
        _add_partials_kernel[(ceil_div(N, 32), n_sums)](
            partial, *sums, *[None] * (3 - n_sums), programs, N, SUMS=n_sums, ROWS=64, BLOCK_N=32, num_warps=4,
            **launch_options(),
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _column_sums_kernel(
    dy_ptr,
    partial_ptr,  # fp32 (programs along the rows, 1, N)
    n_rows_ptr, T, N, stride_dy,
    PDL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    T = min(T, tl.load(n_rows_ptr))
    first, _, end = share_of_rows(T, ROWS)
    rows = first + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for t in range(first, end, ROWS):
        mask = (rows < end - (t - first))[:, None] & (cols < N)[None, :]
        at = (rows + (t - first)).to(tl.int64)[:, None] * stride_dy + cols[None, :]
        total += tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * N + cols, tl.sum(total, 0), mask=cols < N)


def column_sums(dy: torch.Tensor, n_rows: torch.Tensor | None) -> torch.Tensor:
    """The bias gradient alone: (M,) sums of the rows in use."""
    if n_rows is None or dy.device.type == "cpu":
        return dy[: used_rows(dy, n_rows)].sum(0)
    return column_sums_triton(dy, n_rows)


def column_sums_triton(dy: torch.Tensor, n_rows: torch.Tensor) -> torch.Tensor:
    (T, N), dy = dy.shape, dense_rows(dy)
    columns = ceil_div(N, COLUMNS)
    programs = max(1, min(PROGRAMS_PER_SM * num_sms(dy.device) // max(columns, 1), ceil_div(T, ROWS)))
    partial, db = dy.new_empty(programs, 1, N, dtype=torch.float32), dy.new_empty(N)
    if N:
        with device_guard(dy):
            _column_sums_kernel[columns, programs](
                dy, partial, n_rows, T, N, dy.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, **launch_options()
            )
        add_partials(partial, [db])
    return db


