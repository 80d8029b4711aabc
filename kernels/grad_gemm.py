"""dy (T, parts * K) @ [w0; w1; w2], each weight (K, N): the matrix kernels under grad_input and grad_input_act.

As kernels/gemm.py, with its letters (M rows, N columns of the output, K of the inner dimension), but the weights are
not transposed, and the parts are summed in one accumulator: dx is rounded once and written once. What else belongs to
the data gradient happens in the epilogue: another gradient is added, or the product goes through the derivative of the
activation, whose value is written beside it.

Bytes: T * parts * K + parts * K * N read, T * N written; with an activation, 2 * T * N more.
FLOP: 2 * T * parts * K * N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bert_fast.kernels.activation import activate_backward
from bert_fast.kernels.configs import TileConfig, choose, gradient_class
from bert_fast.kernels.gemm import _of_part, _tile, programs, tile_options, triton_type
from bert_fast.kernels.runtime import (
    TensorDescriptor,
    capability,
    ceil_div,
    device_guard,
    dot_precision,
    follow_previous,
    supports_tma,
    tl,
    triton,
)

EPILOGUE_COLUMNS = 64  # that an epilogue has in registers and staging memory at a time; more and a derivative spills


@triton.jit
def _halves(tile):
    """Left and right half of a tile: two epilogues of half the registers and staging memory."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _store_half(
    acc, rows, cols, other_ptr, dx_ptr, y_ptr, M, N, stride_other,
    HAS_ADD: tl.constexpr, HAS_PRE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Epilogue of half a tile."""
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    rows = rows.to(tl.int64)[:, None]
    if HAS_ADD:
        acc += tl.load(other_ptr + rows * stride_other + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_PRE:
        pre = tl.load(other_ptr + rows * stride_other + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        acc, y = activate_backward(acc, pre, ACT, y_ptr.dtype.element_ty == tl.float32)
        tl.store(y_ptr + rows * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + rows * N + cols[None, :], acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _grad_pointer_kernel(
    dy_ptr, w0_ptr, w1_ptr, w2_ptr,
    other_ptr,  # (M, N): what is added, or the input of the activation
    dx_ptr,
    y_ptr,  # the activation, where HAS_PRE
    n_rows_ptr,  # int32 (1,): rows in use, read on the device; absent: all M
    M, N, K, stride_dy, stride_w, stride_other,
    PARTS: tl.constexpr, HAS_ADD: tl.constexpr, HAS_PRE: tl.constexpr, HAS_N_ROWS: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program: one tile."""
    follow_previous(PDL)
    if HAS_N_ROWS:
        M = tl.load(n_rows_ptr)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if tl.program_id(0) >= tiles_m * tiles_n:  # the grid covers the capacity
        return
    pid_m, pid_n = _tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    inside = (cols < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(PARTS):
        w_ptr = _of_part(part, w0_ptr, w1_ptr, w2_ptr, PARTS)
        # rows wrap around: what they bring in twice is never stored. Columns, contiguous here, would lose wide loads.
        dy_ptrs = dy_ptr + (rows % M).to(tl.int64)[:, None] * stride_dy + (part * K + inner)[None, :]
        w_ptrs = w_ptr + inner.to(tl.int64)[:, None] * stride_w + cols[None, :]
        for k in range(0, K, BLOCK_K):
            dy = tl.load(dy_ptrs, mask=inner[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs, mask=(inner[:, None] < K - k) & inside, other=0.0)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
            dy_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_w
    left, right = _halves(acc)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _store_half(left, rows, cols, other_ptr, dx_ptr, y_ptr, M, N, stride_other, HAS_ADD, HAS_PRE, ACT)
    cols += BLOCK_N // 2
    _store_half(right, rows, cols, other_ptr, dx_ptr, y_ptr, M, N, stride_other, HAS_ADD, HAS_PRE, ACT)


@triton.jit
def _store_half_by_descriptors(
    acc, row, col, other_desc, dx_desc, y_desc, HAS_ADD: tl.constexpr, HAS_PRE: tl.constexpr, ACT: tl.constexpr,
    DTYPE: tl.constexpr, EPILOGUE_N: tl.constexpr,
):  # fmt: skip
    """As _store_half, from (row, col) on, in pieces of EPILOGUE_N columns: half of this half, or all of it."""
    if acc.shape[1] > EPILOGUE_N:
        left, right = _halves(acc)
        _store_by_descriptors(left, row, col, other_desc, dx_desc, y_desc, HAS_ADD, HAS_PRE, ACT, DTYPE)
        _store_by_descriptors(right, row, col + EPILOGUE_N, other_desc, dx_desc, y_desc, HAS_ADD, HAS_PRE, ACT, DTYPE)
    else:
        _store_by_descriptors(acc, row, col, other_desc, dx_desc, y_desc, HAS_ADD, HAS_PRE, ACT, DTYPE)


@triton.jit
def _store_by_descriptors(
    acc, row, col, other_desc, dx_desc, y_desc,
    HAS_ADD: tl.constexpr, HAS_PRE: tl.constexpr, ACT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    if HAS_ADD:
        acc += other_desc.load([row, col]).to(tl.float32)
    if HAS_PRE:
        acc, y = activate_backward(acc, other_desc.load([row, col]).to(tl.float32), ACT, False)
        y_desc.store([row, col], y.to(DTYPE))
    dx_desc.store([row, col], acc.to(DTYPE))


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _grad_tma_kernel(
    dy_desc, w0_desc, w1_desc, w2_desc, other_desc, dx_desc, y_desc, n_rows_ptr, M, N, K,
    PARTS: tl.constexpr, HAS_ADD: tl.constexpr, HAS_PRE: tl.constexpr, HAS_N_ROWS: tl.constexpr, ACT: tl.constexpr,
    DTYPE: tl.constexpr, EPILOGUE_N: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As many programs as SMs: each walks over tiles, as in kernels/gemm.py."""
    follow_previous(PDL)
    if HAS_N_ROWS:
        M = tl.load(n_rows_ptr)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile_id in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = _tile(tile_id, tiles_m, tiles_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # a descriptor is a kernel parameter and cannot be selected at run time; a loop per part would not be flattened
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(dy_desc.load([row, k]), w0_desc.load([k, col]), acc)
            if PARTS > 1:
                acc = tl.dot(dy_desc.load([row, K + k]), w1_desc.load([k, col]), acc)
            if PARTS > 2:
                acc = tl.dot(dy_desc.load([row, 2 * K + k]), w2_desc.load([k, col]), acc)
        left, right = _halves(acc)
        for half in tl.static_range(2):
            _store_half_by_descriptors(
                right if half else left, row, col + half * (BLOCK_N // 2), other_desc, dx_desc, y_desc,
                HAS_ADD, HAS_PRE, ACT, DTYPE, EPILOGUE_N,
            )  # fmt: skip


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x (T, N) with unit columns and rows that do not overlap: autograd hands out expanded gradients."""
    if x.shape[1] > 1 and x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def descriptors_fit(*tensors: torch.Tensor) -> bool:
    """Whether tensor descriptors can take these: a chip that has them, 16-byte rows and addresses."""
    device = tensors[0].device
    if device.type == "cuda" and not supports_tma(device):
        return False  # the interpreter (CPU tensors) emulates descriptors
    return all(t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors)


def gradient_tile(op: str, rows: int, tensors: Sequence[torch.Tensor], tma_fits: bool) -> TileConfig:
    """The table's tile for a product of `rows` rows; a generic one where descriptors or wide loads do not fit."""
    dtype, chip = tensors[0].dtype, capability(tensors[0].device)
    if dtype == torch.float32:
        return choose(op, "any", dtype, chip)
    config = choose(op, gradient_class(rows), dtype, chip)
    if config.tma and not tma_fits:
        config = choose(op, gradient_class(rows), dtype, (0, 0))
    if not config.tma and any(n % 16 for t in tensors for n in (t.shape[1], t.stride(0))):
        config = choose(op, "unaligned", dtype, (0, 0))  # loads of single elements: a large tile would spill
    return config


def grad_gemm_triton(
    dy: torch.Tensor,
    weights: list[torch.Tensor],
    n_rows: torch.Tensor | None,
    add: torch.Tensor | None = None,
    pre: torch.Tensor | None = None,
    act: str = "none",
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch on checked arguments: (dx (T, N), act(pre) or None); rows past n_rows are undefined."""
    (M, _), (K, N), parts = dy.shape, weights[0].shape, len(weights)
    other = add if pre is None else pre
    dx = torch.empty((M, N), dtype=dy.dtype if other is None else other.dtype, device=dy.device)
    y = None if pre is None else torch.empty_like(dx)
    if M == 0 or N == 0:
        return dx, y
    dy, other = dense_rows(dy), other if other is None else dense_rows(other)
    if any(w.stride() != weights[0].stride() or w.stride(1) != 1 for w in weights):  # one stride for all
        weights = [w.contiguous() for w in weights]
    operands = [dy, *weights, *([] if other is None else [other])]
    tma_fits = dy.dtype != torch.float32 and descriptors_fit(*operands, dx)
    if config is None:
        config = gradient_tile("grad_input", M, operands, tma_fits)
    if config.tma and not tma_fits:
        raise ValueError(f"{config}: dy {tuple(dy.shape)}, weight {tuple(weights[0].shape)} do not fit descriptors")
    if config.tma and parts > 1:  # a step of the loop reads all parts: of each half as much, in the same memory
        stages = ceil_div(2 * config.num_stages, parts)
        config = replace(config, BLOCK_K=config.BLOCK_K // 2, num_stages=stages)
    absent = [None] * (3 - parts)
    shared = {
        "PARTS": parts,
        "HAS_ADD": add is not None,
        "HAS_PRE": pre is not None,
        "HAS_N_ROWS": n_rows is not None,
        "ACT": act,
        **tile_options(config),
    }
    with device_guard(dy):
        if config.tma:
            columns = min(config.BLOCK_N // 2, max(config.BLOCK_N // 4, EPILOGUE_COLUMNS))
            piece = [config.BLOCK_M, columns]
            epilogue = [None if t is None else TensorDescriptor.from_tensor(t, piece) for t in (other, dx, y)]
            _grad_tma_kernel[(programs(config, M, N, 1, dy.device),)](
                TensorDescriptor.from_tensor(dy, [config.BLOCK_M, config.BLOCK_K]),
                *[TensorDescriptor.from_tensor(w, [config.BLOCK_K, config.BLOCK_N]) for w in weights], *absent,
                *epilogue, n_rows, M, N, K, DTYPE=triton_type(dx.dtype), EPILOGUE_N=columns, **shared,
            )  # fmt: skip
        else:
            _grad_pointer_kernel[(ceil_div(M, config.BLOCK_M) * ceil_div(N, config.BLOCK_N),)](
                dy, *weights, *absent, other, dx, y, n_rows, M, N, K,
                dy.stride(0), weights[0].stride(0), 0 if other is None else other.stride(0),
                PRECISION=dot_precision(dy.dtype), **shared,
            )  # fmt: skip
    return dx, y
