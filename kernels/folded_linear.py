"""folded_linear: act(LayerNorm(h) @ W^T + b) from the stream of h: LayerNorm, product, bias, activation in one launch.

y = act(rstd * (g @ W^T - mean * u) + c), with g and the sums behind mean and rstd from kernels/linear_to_stream.py, and
u, c from kernels/fold_vectors.py. One weight (the intermediate layer), or three of one shape side by side in one output
(query, key, value), as in kernels/qkv_linear.py.

Bytes: T*K + PARTS*N*K read, PARTS*T*N written, the sums once a tile (1/192 of its operands at K = 768);
FLOP: 2*PARTS*T*N*K. The epilogue has two multiply-adds more than that of kernels/linear_gelu.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bert_fast.kernels.activation import TORCH, activate, check_activation
from bert_fast.kernels.fold_vectors import parts_of
from bert_fast.kernels.gemm import _tile, _tile_product, check_linear, programs, tile_options
from bert_fast.kernels.linear import used_rows
from bert_fast.kernels.linear_to_stream import (
    TILE,
    check_launch,
    check_stream,
    check_vector,
    row_statistics,
    statistics_ref,
    sum_dtype,
)
from bert_fast.kernels.registry import register
from bert_fast.kernels.runtime import TensorDescriptor, device_guard, follow_previous, tl, triton

Tensor = torch.Tensor


def folded_linear_ref(
    g: Tensor, sums: Tensor, w0: Tensor, w1: Tensor | None, w2: Tensor | None, u: Tensor, c: Tensor, eps: float,
    act: str, n_rows: Tensor | None,
) -> Tensor:  # fmt: skip
    """g (T, K) and sums: a stream; one or three weights (N, K); u, c (parts * N,), fp32; eps of the LayerNorm;
    act of activation.TORCH; n_rows int32 (1,) or None (all T).

    Returns (T, parts * N); rows past n_rows come out as zero.
    """
    n, dtype = used_rows(g, n_rows), sum_dtype(g)
    mean, rstd = statistics_ref(sums[..., :n], g.shape[1], eps)
    product = F.linear(g[:n].to(dtype), torch.cat(parts_of(w0, w1, w2)).to(dtype))
    y = TORCH[act](rstd * (product - mean * u) + c).to(g.dtype)
    return F.pad(y, (0, 0, 0, g.shape[0] - n))


@triton.jit
def _unfold(acc, mean, rstd, u_ptr, c_ptr, cols, N, ACT: tl.constexpr):
    u = tl.load(u_ptr + cols, mask=cols < N, other=0.0)
    c = tl.load(c_ptr + cols, mask=cols < N, other=0.0)
    y = rstd[:, None] * (acc - mean[:, None] * u[None, :]) + c[None, :]
    return activate(y, ACT, False).to(tl.bfloat16)


@triton.jit
def _walk(
    g_desc, w_desc, u_ptr, c_ptr, y_desc, sums_ptr, M, T, N, K, eps,
    ACT: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile_id in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = _tile(tile_id, tiles_m, tiles_n, GROUP_M)
        left, right = _tile_product(g_desc, w_desc, pid_m, pid_n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)  # as in linear_to_stream: no masks
        mean, rstd = row_statistics(sums_ptr, rows, T, K, eps, PARTIALS)
        cols = col + tl.arange(0, BLOCK_N // 2)
        y_desc.store([row, col], _unfold(left, mean, rstd, u_ptr, c_ptr, cols, N, ACT))
        cols += BLOCK_N // 2
        y_desc.store([row, col + BLOCK_N // 2], _unfold(right, mean, rstd, u_ptr, c_ptr, cols, N, ACT))


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _folded_linear_kernel(
    g_desc, w0_desc, w1_desc, w2_desc, u_ptr, c_ptr,
    y0_desc, y1_desc, y2_desc,  # each part's columns of the output
    sums_ptr,  # fp32 (2, PARTIALS, capacity)
    n_rows_ptr, M, N, K, eps,
    PARTS: tl.constexpr, HAS_N_ROWS: tl.constexpr, ACT: tl.constexpr, PARTIALS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As many programs a part as there are SMs to share, and one tile loop a part: kernels/gemm.py says why."""
    follow_previous(PDL)
    T = M
    if HAS_N_ROWS:
        M = tl.load(n_rows_ptr)
    part = tl.program_id(1)
    u_ptr += part * N
    c_ptr += part * N
    if part == 0:
        _walk(g_desc, w0_desc, u_ptr, c_ptr, y0_desc, sums_ptr, M, T, N, K, eps, ACT, PARTIALS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # noqa: E501  # fmt: skip
    if PARTS > 1:
        if part == 1:
            _walk(g_desc, w1_desc, u_ptr, c_ptr, y1_desc, sums_ptr, M, T, N, K, eps, ACT, PARTIALS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # noqa: E501  # fmt: skip
        if part == 2:
            _walk(g_desc, w2_desc, u_ptr, c_ptr, y2_desc, sums_ptr, M, T, N, K, eps, ACT, PARTIALS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # noqa: E501  # fmt: skip


def _check(g: Tensor, sums: Tensor, weights: list[Tensor], u: Tensor, c: Tensor, act: str) -> None:
    op = "folded_linear"
    check_activation(act)
    check_stream(op, g, sums)
    if len(weights) not in (1, 3):
        raise ValueError(f"{op}: {len(weights)} weights, expected one or three")
    check_linear(op, g, weights, [None] * len(weights))
    for name, vector in (("u", u), ("c", c)):
        check_vector(op, name, vector, len(weights) * weights[0].shape[0], g)
        if vector.dtype != sums.dtype:
            raise ValueError(f"{op}: {name} is {vector.dtype}, expected {sums.dtype}")


def folded_linear_cpu(
    g: Tensor, sums: Tensor, w0: Tensor, w1: Tensor | None, w2: Tensor | None, u: Tensor, c: Tensor, eps: float,
    act: str, n_rows: Tensor | None,
) -> Tensor:  # fmt: skip
    _check(g, sums, parts_of(w0, w1, w2), u, c, act)
    return folded_linear_ref(g, sums, w0, w1, w2, u, c, eps, act, n_rows)


def folded_linear_triton(
    g: Tensor, sums: Tensor, w0: Tensor, w1: Tensor | None, w2: Tensor | None, u: Tensor, c: Tensor, eps: float,
    act: str, n_rows: Tensor | None,
) -> Tensor:  # fmt: skip
    weights = [w.contiguous() for w in parts_of(w0, w1, w2)]
    _check(g, sums, weights, u, c, act)
    check_launch("folded_linear", g, weights)
    y = _folded_linear_fake(g, sums, w0, w1, w2, u, c, eps, act, n_rows)
    (M, K), N, parts = g.shape, w0.shape[0], len(weights)
    if M == 0:
        return y
    absent = [None] * (3 - parts)
    with device_guard(g):
        w_descs = [TensorDescriptor.from_tensor(w, [TILE.BLOCK_N, TILE.BLOCK_K]) for w in weights]
        y_descs = [TensorDescriptor.from_tensor(part, [TILE.BLOCK_M, TILE.BLOCK_N // 2]) for part in y.split(N, 1)]
        _folded_linear_kernel[programs(TILE, M, N, parts, g.device), parts](
            TensorDescriptor.from_tensor(g, [TILE.BLOCK_M, TILE.BLOCK_K]), *w_descs, *absent,
            u.contiguous(), c.contiguous(), *y_descs, *absent, sums, n_rows, M, N, K, eps,
            PARTS=parts, HAS_N_ROWS=n_rows is not None, ACT=act, PARTIALS=sums.shape[1], **tile_options(TILE),
        )  # fmt: skip
    return y


def _folded_linear_fake(
    g: Tensor, sums: Tensor, w0: Tensor, w1: Tensor | None, w2: Tensor | None, u: Tensor, c: Tensor, eps: float,
    act: str, n_rows: Tensor | None,
) -> Tensor:  # fmt: skip
    return g.new_empty(g.shape[0], len(parts_of(w0, w1, w2)) * w0.shape[0])


folded_linear = register(
    "folded_linear(Tensor g, Tensor sums, Tensor w0, Tensor? w1, Tensor? w2, Tensor u, Tensor c, float eps, str act,"
    " Tensor? n_rows) -> Tensor",
    ref=folded_linear_ref,
    cpu=folded_linear_cpu,
    cuda=folded_linear_triton,
    fake=_folded_linear_fake,
)
