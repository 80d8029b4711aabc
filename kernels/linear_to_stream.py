"""linear_to_stream: x @ weight^T + bias + residual, written for a LayerNorm that is never run (folded LayerNorm).

LayerNorm(h) = rstd * (h - mean) * gamma + beta, and rstd, mean are one number a row each. So h is written as a *stream*

    g = h * gamma                     (T, N), the activations' dtype
    sums = partial sums of h and h^2  (2, ceil(N / SUM_COLUMNS), T), fp32

and whoever needs LayerNorm(h) recovers it from mean and rstd, both from the sums:

    a product after it (kernels/folded_linear.py)    rstd * (g @ W^T - mean * u) + c
                                                     with u = W @ gamma, c = W @ beta + b (kernels/fold_vectors.py)
    a residual (here) or the end (kernels/normalise.py)    rstd * (g - mean * gamma) + beta

Against linear_layer_norm this saves the pass of the LayerNorm: of 4 T N numbers beside the product's own operands (the
sum written, sum and residual read, LayerNorm written) 2 T N are left (residual read, g written), and the sums, 1/64
of one of those. FLOP: 2 T N K. Source: the LayerNorm folding of docs/design.md; nothing is approximated.

The variance is E[h^2] - mean^2, in fp32, clamped at 0. That cancels where |mean| is many times std, but there g, like
the h of any bf16 BERT, is already rounded relative to |h|: with r = |mean| / std that costs 2^-9 r of a normalised
number, the cancellation about 2^-24 r^2, which is less for every r below 2^15; from r = 2^9 on all is rounding noise.

bf16 only: in fp16 h * gamma may overflow where LayerNorm(h) would not. By tensor descriptors only, one tile: where rows
are few, the pass over them is cheap and a product wants its inner dimension split (kernels/linear_layer_norm.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.gemm import _tile, _tile_product, _tma_fits, check_linear, programs, tile_options
from bert_fast.kernels.linear import used_rows
from bert_fast.kernels.registry import register
from bert_fast.kernels.runtime import (
    TensorDescriptor,
    capability,
    ceil_div,
    device_guard,
    follow_previous,
    tl,
    triton,
)

Tensor = torch.Tensor
TILE = TileConfig(128, 256, num_warps=8, num_stages=3, BLOCK_K=64, tma=True)
SUM_COLUMNS = TILE.BLOCK_N  # columns of one partial sum


def partials(N: int) -> int:
    """Partial sums of a row of N columns."""
    return ceil_div(N, SUM_COLUMNS)


def sum_dtype(x: Tensor) -> torch.dtype:
    """fp32; float64 where a test asks for the truth."""
    return torch.promote_types(x.dtype, torch.float32)


def statistics_ref(sums: Tensor, N: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd, (T, 1), of rows of N columns."""
    mean, square = sums.sum(1) / N
    return mean[:, None], ((square - mean.square()).clamp(min=0) + eps).rsqrt()[:, None]


def normalised_ref(g: Tensor, sums: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """LayerNorm(h) of a stream, in the dtype of its sums."""
    mean, rstd = statistics_ref(sums, g.shape[1], eps)
    return rstd * (g.to(sums) - mean * gamma.to(sums)) + beta.to(sums)


def linear_to_stream_ref(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, residual_sums: Tensor | None,
    residual_gamma: Tensor | None, residual_beta: Tensor | None, gamma: Tensor, eps: float, n_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (T, K), weight (N, K), bias (N,), residual (T, N): plain rows, or the g of a stream whose sums, gamma and beta
    are given and whose LayerNorm has this eps; gamma (N,): of the LayerNorm that follows; n_rows int32 (1,) or None.

    Returns (g (T, N), sums (2, partials(N), T)); rows past n_rows come out zero.
    """
    n, dtype = used_rows(x, n_rows), sum_dtype(x)
    rest = x.shape[0] - n
    h = F.linear(x[:n].to(dtype), weight.to(dtype), bias.to(dtype))
    if residual_sums is None:
        h = h + residual[:n].to(dtype)
    else:
        h = h + normalised_ref(residual[:n], residual_sums[..., :n], residual_gamma, residual_beta, eps)
    g = (h * gamma.to(dtype)).to(x.dtype)
    columns = F.pad(h, (0, -h.shape[1] % SUM_COLUMNS)).unflatten(1, (-1, SUM_COLUMNS))
    sums = torch.stack([columns.sum(2).t(), columns.square().sum(2).t()])
    return F.pad(g, (0, 0, 0, rest)), F.pad(sums, (0, rest))


@triton.jit
def row_statistics(sums_ptr, rows, T, N, eps, PARTIALS: tl.constexpr):
    """mean and rstd of one row or a block of rows, fp32, from sums (2, PARTIALS, T)."""
    mean = 0.0
    square = 0.0
    for part in tl.static_range(PARTIALS):
        mean += tl.load(sums_ptr + part * T + rows)
        square += tl.load(sums_ptr + (PARTIALS + part) * T + rows)
    mean = mean / N
    variance = tl.maximum(square / N - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def _store_half(
    acc, row, col, mean, rstd, bias_ptr, residual_desc, residual_gamma_ptr, residual_beta_ptr, gamma_ptr, g_desc, N,
    FROM_STREAM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """g of half a tile, from (row, col) on, and its sums of h and h^2: columns past N are zero in every term of h."""
    cols = col + tl.arange(0, HALF)
    inside = cols < N
    residual = residual_desc.load([row, col]).to(tl.float32)
    if FROM_STREAM:
        residual_gamma = tl.load(residual_gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        residual_beta = tl.load(residual_beta_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        residual = rstd[:, None] * (residual - mean[:, None] * residual_gamma[None, :]) + residual_beta[None, :]
    h = acc + residual + tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    gamma = tl.load(gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    g_desc.store([row, col], (h * gamma[None, :]).to(tl.bfloat16))
    return tl.sum(h, 1), tl.sum(h * h, 1)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _linear_to_stream_kernel(
    x_desc, w_desc, bias_ptr,
    residual_desc, residual_sums_ptr, residual_gamma_ptr, residual_beta_ptr,
    gamma_ptr, g_desc,
    sums_ptr,  # fp32 (2, PARTIALS, capacity), as residual_sums
    n_rows_ptr, M, N, K, eps,
    HAS_N_ROWS: tl.constexpr, FROM_STREAM: tl.constexpr, PARTIALS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As many programs as SMs: each walks over tiles, as in kernels/gemm.py."""
    follow_previous(PDL)
    T = M
    if HAS_N_ROWS:
        M = tl.load(n_rows_ptr)
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile_id in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = _tile(tile_id, tiles_m, tiles_n, GROUP_M)
        left, right = _tile_product(x_desc, w_desc, pid_m, pid_n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        mean = None
        rstd = None
        if FROM_STREAM:
            # past M a live row's instead: masks would cost registers, and what they belong to is never read
            mean, rstd = row_statistics(residual_sums_ptr, tl.minimum(rows, M - 1), T, N, eps, PARTIALS)
        total, square = _store_half(
            left, row, col, mean, rstd, bias_ptr, residual_desc, residual_gamma_ptr, residual_beta_ptr, gamma_ptr,
            g_desc, N, FROM_STREAM, HALF,
        )  # fmt: skip
        right_total, right_square = _store_half(
            right, row, col + HALF, mean, rstd, bias_ptr, residual_desc, residual_gamma_ptr, residual_beta_ptr,
            gamma_ptr, g_desc, N, FROM_STREAM, HALF,
        )  # fmt: skip
        sums_ptrs = sums_ptr + pid_n * T + rows
        tl.store(sums_ptrs, total + right_total, mask=rows < M)
        tl.store(sums_ptrs + PARTIALS * T, square + right_square, mask=rows < M)


def check_vector(op: str, name: str, vector: Tensor, size: int, like: Tensor) -> None:
    if tuple(vector.shape) != (size,) or vector.device != like.device:
        raise ValueError(
            f"{op}: {name} is {tuple(vector.shape)} on {vector.device}, expected ({size},) on {like.device}"
        )


def check_stream(op: str, g: Tensor, sums: Tensor) -> None:
    """g (T, N) with unit rows, and sums as linear_to_stream writes them."""
    if g.dim() != 2 or g.stride(1) != 1:
        raise ValueError(f"{op}: g has shape {tuple(g.shape)} and strides {g.stride()}, expected (T, N) with unit rows")
    shape = (2, partials(g.shape[1]), g.shape[0])
    if tuple(sums.shape) != shape or sums.dtype != sum_dtype(g) or sums.device != g.device or not sums.is_contiguous():
        raise ValueError(
            f"{op}: sums are {tuple(sums.shape)} {sums.dtype} on {sums.device}, expected dense {shape} {sum_dtype(g)} "
            f"on {g.device}"
        )


def stream_reason(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the products of a stream cannot run (None: they can); on CPU tensors, the interpreter."""
    if dtype != torch.bfloat16:
        return f"folded LayerNorm is for bfloat16, not {dtype}"
    if device.type == "cpu":
        return None
    # consumer chips from sm_120 on have descriptors too, but 99 KiB of shared memory: the tile needs about 200
    if not (9, 0) <= capability(device) < (12, 0):
        return "folded LayerNorm needs tensor descriptors and a large tile: compute capability 9.0 to 11.x"
    return None


def check_launch(op: str, x: Tensor, weights: list[Tensor]) -> None:
    """What the product's kernel needs and the op's other bodies do not; the residual counts as a weight."""
    reason = stream_reason(x.dtype, x.device)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")
    if not _tma_fits(x, weights):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, *weights))
        raise ValueError(f"{op}: {shapes} do not fit descriptors, whose rows and addresses are multiples of 16 bytes")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, residual_sums: Tensor | None,
    residual_gamma: Tensor | None, residual_beta: Tensor | None, gamma: Tensor,
) -> None:  # fmt: skip
    op = "linear_to_stream"
    check_linear(op, x, [weight], [bias])
    T, N = x.shape[0], weight.shape[0]
    if tuple(residual.shape) != (T, N) or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(f"{op}: residual is {tuple(residual.shape)} {residual.dtype}, expected {(T, N)} {x.dtype}")
    check_vector(op, "gamma", gamma, N, x)
    if residual_sums is None:
        return
    check_stream(op, residual, residual_sums)
    if residual_gamma is None or residual_beta is None:
        raise ValueError(f"{op}: a residual with sums needs residual_gamma and residual_beta")
    check_vector(op, "residual_gamma", residual_gamma, N, x)
    check_vector(op, "residual_beta", residual_beta, N, x)


def linear_to_stream_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, residual_sums: Tensor | None,
    residual_gamma: Tensor | None, residual_beta: Tensor | None, gamma: Tensor, eps: float, n_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(x, weight, bias, residual, residual_sums, residual_gamma, residual_beta, gamma)
    return linear_to_stream_ref(
        x, weight, bias, residual, residual_sums, residual_gamma, residual_beta, gamma, eps, n_rows
    )


def linear_to_stream_triton(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, residual_sums: Tensor | None,
    residual_gamma: Tensor | None, residual_beta: Tensor | None, gamma: Tensor, eps: float, n_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(x, weight, bias, residual, residual_sums, residual_gamma, residual_beta, gamma)
    weight, residual = weight.contiguous(), residual.contiguous()
    check_launch("linear_to_stream", x, [weight, residual])
    g, sums = _linear_to_stream_fake(
        x, weight, bias, residual, residual_sums, residual_gamma, residual_beta, gamma, eps, n_rows
    )
    (M, K), N = x.shape, weight.shape[0]
    if M == 0:
        return g, sums
    if residual_sums is not None:
        residual_gamma, residual_beta = residual_gamma.contiguous(), residual_beta.contiguous()  # type: ignore[union-attr]
    with device_guard(x):
        half = [TILE.BLOCK_M, TILE.BLOCK_N // 2]
        _linear_to_stream_kernel[(programs(TILE, M, N, 1, x.device),)](
            TensorDescriptor.from_tensor(x, [TILE.BLOCK_M, TILE.BLOCK_K]),
            TensorDescriptor.from_tensor(weight, [TILE.BLOCK_N, TILE.BLOCK_K]),
            bias.contiguous(),
            TensorDescriptor.from_tensor(residual, half), residual_sums, residual_gamma, residual_beta,
            gamma.contiguous(), TensorDescriptor.from_tensor(g, half), sums, n_rows, M, N, K, eps,
            HAS_N_ROWS=n_rows is not None, FROM_STREAM=residual_sums is not None, PARTIALS=sums.shape[1],
            **tile_options(TILE),
        )  # fmt: skip
    return g, sums


def _linear_to_stream_fake(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, residual_sums: Tensor | None,
    residual_gamma: Tensor | None, residual_beta: Tensor | None, gamma: Tensor, eps: float, n_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, N = x.shape[0], weight.shape[0]
    return x.new_empty(T, N), x.new_empty(2, partials(N), T, dtype=sum_dtype(x))


linear_to_stream = register(
    "linear_to_stream(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor? residual_sums,"
    " Tensor? residual_gamma, Tensor? residual_beta, Tensor gamma, float eps, Tensor? n_rows) -> (Tensor, Tensor)",
    ref=linear_to_stream_ref,
    cpu=linear_to_stream_cpu,
    cuda=linear_to_stream_triton,
    fake=_linear_to_stream_fake,
)
