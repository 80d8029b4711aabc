"""x (T, K) @ weight (N, K)^T + bias, then an activation: the matrix kernels under the four linear ops.

`PARTS` weights of one shape (query, key, value) are read where they lie and written side by side into one output of
PARTS * N columns; each part has its own share of the grid. Two kernels: by tensor descriptors, persistent, for many
rows; by pointers, a tile a program, for few rows (or chips without descriptors), where the inner dimension may be split
over SPLIT_K programs, whose sums stay apart in fp32 for the LayerNorm that follows (kernels/linear_layer_norm.py): no
atomics, the same bits every time. Both read the number of rows in use from the device.

Bytes: T*K + N*K read, T*N written; FLOP: 2*T*N*K. The weights of one BERT layer stay in L2 (14 MB in bf16), tiles are
walked in groups of GROUP_M rows so that those of x do too.
"""

from __future__ import annotations

from typing import Any

import torch

from bert_fast.kernels.activation import activate
from bert_fast.kernels.configs import TileConfig, choose, gemm_class
from bert_fast.kernels.runtime import (
    TensorDescriptor,
    capability,
    ceil_div,
    device_guard,
    dot_precision,
    follow_previous,
    launch_options,
    num_sms,
    supports_tma,
    tl,
    triton,
)

GROUP_M = 8  # row tiles walked before the next column of tiles


def used_rows(x: torch.Tensor, n_rows: torch.Tensor | None) -> int:
    """Rows in use, on the host. Free on CPU; on CUDA it would synchronise, so only references call it there."""
    return x.shape[0] if n_rows is None else int(n_rows.item())


@triton.jit
def _tile(tile_id, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    group_size = GROUP_M * tiles_n
    first = tile_id // group_size * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    return first + (tile_id % group_size) % rows, (tile_id % group_size) // rows


@triton.jit
def _tile_product(
    x_desc, w_desc, pid_m, pid_n, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One tile of x @ w^T, fp32, as its left and right half: two epilogues of half the registers and staging memory."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(x_desc.load([pid_m * BLOCK_M, k]), w_desc.load([pid_n * BLOCK_N, k]).T, acc)
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _of_part(part, p0, p1, p2, PARTS: tl.constexpr):
    """The pointer of this program's part; of parts that are none there is none."""
    p = p0
    if PARTS > 1:
        if part == 1:
            p = p1
    if PARTS > 2:
        if part == 2:
            p = p2
    return p


@triton.jit
def _walk_descriptors(
    x_desc, w_desc, bias_ptr, y_desc, pre_desc, M, N, K,
    HAS_BIAS: tl.constexpr, WANT_PRE: tl.constexpr, ACT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # flatten: the loads of the next tile start under the epilogue of this one
    for tile_id in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = _tile(tile_id, tiles_m, tiles_n, GROUP_M)
        left, right = _tile_product(x_desc, w_desc, pid_m, pid_n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        if HAS_BIAS:
            left += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            cols += BLOCK_N // 2
            right += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if WANT_PRE:  # the activation of what is stored, which the backward will read
            pre_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], left.to(DTYPE))
            left = left.to(DTYPE).to(tl.float32)
        y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], activate(left, ACT, False).to(DTYPE))
        if WANT_PRE:
            pre_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N + BLOCK_N // 2], right.to(DTYPE))
            right = right.to(DTYPE).to(tl.float32)
        y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N + BLOCK_N // 2], activate(right, ACT, False).to(DTYPE))


# The row capacity and the address of n_rows change from call to call and buy no better code: no variants for them.
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _gemm_pointer_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr,
    y_ptr,  # (M, PARTS * N); with SPLIT_K > 1 the parts of the sums, fp32 (SPLIT_K, M, N), without bias and activation
    pre_ptr,  # like y, of one part: what the activation is taken of, where WANT_PRE
    n_rows_ptr,  # int32 (1,): rows in use, read on the device; absent: all M
    M, N, K, stride_x, stride_w, stride_y,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_N_ROWS: tl.constexpr, WANT_PRE: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one part, or 1 / SPLIT_K of the inner dimension of one tile."""
    follow_previous(PDL)
    capacity = M
    if HAS_N_ROWS:
        M = tl.load(n_rows_ptr)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if tl.program_id(0) >= tiles_m * tiles_n:  # the grid covers the capacity
        return
    part = tl.program_id(1)
    w_ptr = _of_part(part, w0_ptr, w1_ptr, w2_ptr, PARTS)
    pid_m, pid_n = _tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end = 0, K
    if SPLIT_K > 1:
        share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
        first = tl.program_id(2) * share
        end = min(first + share, K)
    inner = first + tl.arange(0, BLOCK_K)
    # loads wrap around instead of masking rows and columns: what they bring in twice is never stored
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_x + inner[None, :]
    w_ptrs = w_ptr + (cols % N).to(tl.int64)[None, :] * stride_w + inner[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, end, BLOCK_K):
        x = tl.load(x_ptrs, mask=(inner - first)[None, :] < end - k, other=0.0)
        w = tl.load(w_ptrs, mask=(inner - first)[:, None] < end - k, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if SPLIT_K > 1:
        y_ptr += tl.program_id(2).to(tl.int64) * capacity * N
    elif HAS_BIAS:
        bias_ptr = _of_part(part, b0_ptr, b1_ptr, b2_ptr, PARTS)
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_y + (part * N + cols)[None, :]
    if WANT_PRE:  # the activation of what is stored, which the backward will read
        pre = acc.to(pre_ptr.dtype.element_ty)
        tl.store(pre_ptr + at, pre, mask=mask)
        acc = pre.to(tl.float32)
    out = activate(acc, ACT, y_ptr.dtype.element_ty == tl.float32)
    tl.store(y_ptr + at, out.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _gemm_tma_kernel(
    x_desc, w0_desc, w1_desc, w2_desc, b0_ptr, b1_ptr, b2_ptr,
    y0_desc, y1_desc, y2_desc,  # each part's columns of the output: stores are clipped at N
    pre_desc, n_rows_ptr, M, N, K,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_N_ROWS: tl.constexpr, WANT_PRE: tl.constexpr, ACT: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As many programs a part as there are SMs to share: each walks over tiles."""
    follow_previous(PDL)
    if HAS_N_ROWS:
        M = tl.load(n_rows_ptr)
    part = tl.program_id(1)
    # a descriptor is a kernel parameter and cannot be selected at run time: one tile loop per part
    if part == 0:
        _walk_descriptors(x_desc, w0_desc, b0_ptr, y0_desc, pre_desc, M, N, K, HAS_BIAS, WANT_PRE, ACT, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # noqa: E501  # fmt: skip
    if PARTS > 1:
        if part == 1:
            _walk_descriptors(x_desc, w1_desc, b1_ptr, y1_desc, None, M, N, K, HAS_BIAS, False, ACT, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # noqa: E501  # fmt: skip
    if PARTS > 2:
        if part == 2:
            _walk_descriptors(x_desc, w2_desc, b2_ptr, y2_desc, None, M, N, K, HAS_BIAS, False, ACT, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # noqa: E501  # fmt: skip


def check_linear(op: str, x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
    """Shapes, dtypes and devices of a linear op, before anything is launched."""
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)} and strides {x.stride()}, expected (T, K) with unit rows")
    N, dtype, device = weights[0].shape[0], x.dtype, x.device
    shape = (N, x.shape[1])
    for weight, bias in zip(weights, biases, strict=True):
        if weight.shape != shape:
            raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected {shape}")
        if weight.dtype != dtype or weight.device != device:
            raise ValueError(f"{op}: weight is {weight.dtype} on {weight.device}, x is {x.dtype} on {x.device}")
        if bias is not None and (bias.shape != (N,) or bias.dtype != dtype or bias.device != device):
            raise ValueError(f"{op}: bias is {tuple(bias.shape)} {bias.dtype}, expected ({N},) {x.dtype}")
        if (bias is None) != (biases[0] is None):
            raise ValueError(f"{op}: some projections have a bias and some have none")


def _tma_fits(x: torch.Tensor, weights: list[torch.Tensor]) -> bool:
    """Whether tensor descriptors can take these: a chip that has them, half dtypes, 16-byte rows and addresses."""
    if x.dtype == torch.float32 or (x.device.type == "cuda" and not supports_tma(x.device)):
        return False  # the interpreter (CPU tensors) emulates descriptors
    strides = [weights[0].shape[0], *(t.stride(0) for t in (x, *weights))]
    return all(n * x.element_size() % 16 == 0 for n in strides) and all(
        t.data_ptr() % 16 == 0 for t in (x, *weights)
    )


def _config(x: torch.Tensor, N: int, parts: int, tma_fits: bool, multiples_of_16: bool) -> TileConfig:
    """The table's tile for this product; a generic one where descriptors or wide loads do not fit."""
    rows, K = x.shape
    if x.dtype == torch.float32:
        return choose("gemm", "any", x.dtype, capability(x.device))
    shape = gemm_class(rows, parts * N, K)
    config = choose("gemm", shape, x.dtype, capability(x.device))
    if config.tma and not tma_fits:
        config = choose("gemm", shape, x.dtype, (0, 0))
    if not config.tma and not multiples_of_16:  # loads of single elements: a large tile would spill
        config = choose("gemm", gemm_class(1, parts * N, K), x.dtype, (0, 0))
    return config


def programs(config: TileConfig, M: int, N: int, parts: int, device: torch.device) -> int:
    """Programs a part of a persistent grid: the SMs shared among the parts, no more than there are tiles."""
    return max(1, min(ceil_div(M, config.BLOCK_M) * ceil_div(N, config.BLOCK_N), num_sms(device) // parts))


def triton_type(dtype: torch.dtype) -> Any:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def tile_options(config: TileConfig) -> dict[str, Any]:
    """What every kernel over tiles takes of its configuration."""
    return {
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "GROUP_M": GROUP_M,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **config.register_limit(),
        **launch_options(),
    }


def gemm_triton(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    n_rows: torch.Tensor | None,
    act: str,
    config: TileConfig | None = None,
    may_split: bool = False,
    pre: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch on x (T, K): one to three (N, K) weights, to (T, len(weights) * N). Rows past n_rows are undefined.

    pre: dense (T, N), which then gets the numbers before the activation; for one weight.

    may_split: where the tile splits the inner dimension, return the parts of the sums instead, fp32 (SPLIT_K, T, N),
    to which the bias is yet to be added. Elsewhere the tile's SPLIT_K is 1.
    """
    M, K = x.shape
    N, parts = weights[0].shape[0], len(weights)
    if any(w.stride() != weights[0].stride() or w.stride(1) != 1 for w in weights):  # one stride for all
        weights = [w.contiguous() for w in weights]
    biases = [b if b is None else b.contiguous() for b in biases]
    tma_fits = _tma_fits(x, weights)
    if config is None:
        wide_loads = all(n % 16 == 0 for n in (K, x.stride(0), weights[0].stride(0)))
        config = _config(x, N, parts, tma_fits, wide_loads)
    if config.tma and not tma_fits:
        raise ValueError(f"{config}: x {tuple(x.shape)}, weight {tuple(weights[0].shape)} do not fit descriptors")
    split = config.SPLIT_K if may_split else 1
    y = x.new_empty(M, parts * N) if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    if M == 0:
        return y
    absent = [None] * (3 - parts)
    b0, b1, b2 = biases + absent
    shared = {
        "PARTS": parts,
        "HAS_BIAS": b0 is not None,
        "HAS_N_ROWS": n_rows is not None,
        "WANT_PRE": pre is not None,
        "ACT": act,
        **tile_options(config),
    }
    with device_guard(x):
        if config.tma:
            grid = (programs(config, M, N, parts, x.device), parts)
            x_desc = TensorDescriptor.from_tensor(x, [config.BLOCK_M, config.BLOCK_K])
            w_descs = [TensorDescriptor.from_tensor(w, [config.BLOCK_N, config.BLOCK_K]) for w in weights]
            y_descs = [TensorDescriptor.from_tensor(c, [config.BLOCK_M, config.BLOCK_N // 2]) for c in y.split(N, 1)]
            pre_desc = None if pre is None else TensorDescriptor.from_tensor(pre, [config.BLOCK_M, config.BLOCK_N // 2])
            _gemm_tma_kernel[grid](
                x_desc, *w_descs, *absent, b0, b1, b2, *y_descs, *absent, pre_desc, n_rows, M, N, K,
                DTYPE=triton_type(x.dtype), **shared,
            )  # fmt: skip
        else:
            tiles = ceil_div(M, config.BLOCK_M) * ceil_div(N, config.BLOCK_N)
            _gemm_pointer_kernel[tiles, parts, split](
                x, *weights, *absent, b0, b1, b2, y, pre, n_rows, M, N, K,
                x.stride(0), weights[0].stride(0), y.stride(-2),
                PRECISION=dot_precision(x.dtype), SPLIT_K=split, **shared,
            )  # fmt: skip
    return y
