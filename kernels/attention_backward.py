"""attention_backward: gradients of attention's qkv and bias, from those of its context and of its probabilities.

With P = softmax, A = P after dropout, dA = dO V^T + d_probs: dV = A^T dO, dP = dA through the dropout,
delta = rowsum(P * dP) = rowsum(dO * O) + rowsum(A * d_probs), dS = P * (dP - delta), dQ = scale dS K,
dK = scale dS^T Q. P is computed again from the saved log-sum-exp (FlashAttention-2, Dao 2023), dropout drawn again.

Two kernels, over blocks of queries (delta, dQ) and over blocks of keys (dK, dV): no atomics, the same bits every time,
for 7 products of 2 * heads * head_dim * sum(q_len * kv_len) FLOP where one kernel with atomics has 5. The second has
tiles keys x queries, so that P and dS are left operands as they come out of a product. Bytes: qkv, O, dO and d_qkv once
(blocks read again come from L2), d_probs three times, gathered through the map where rows are not positions.

Next to a bias a log-sum-exp does not do, since finfo.min swallows the sum: maximum and sum are computed again.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.attention_base import LOG2E, LOWEST, attention_ref, check, load_block
from bert_fast.kernels.configs import TileConfig, choose
from bert_fast.kernels.dropout import dropout_kept, dropout_keys, rescale, threshold
from bert_fast.kernels.registry import gradients_of, register_kernel
from bert_fast.kernels.runtime import (
    capability,
    ceil_div,
    device_guard,
    dot_precision,
    follow_previous,
    launch_options,
    next_power_of_2,
    tl,
    triton,
)

Pair = tuple[torch.Tensor, torch.Tensor]


@triton.jit
def _weights(s, scale, shift, inv_sum, bias_ptrs, mask, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr):
    """P of a tile from its products. mask: what of the tile there is, along the axis that is summed over."""
    if HAS_BIAS:
        s = s * scale + load_block(bias_ptrs, mask, mask, MASKED, False).to(tl.float32)
        p = tl.math.exp2((s - shift) * LOG2E) * inv_sum
    else:
        p = tl.math.exp2(s * scale - shift)
    return tl.where(mask, p, 0.0) if MASKED else p


@triton.jit
def _d_probs(ptr, token_ptr, is_prefix, rows, cols, S, q_len, first_token, mask, MASKED: tl.constexpr):
    """Gradients of the probabilities of the queries `rows` and the keys `cols` of a sequence, one along each axis."""
    if is_prefix:  # rows are positions
        x = tl.load(ptr + (tl.minimum(rows, S - 1) * S + cols), mask=cols < S, other=0.0)
    else:
        at = (tl.load(token_ptr + tl.minimum(rows, q_len - 1)) - first_token) * S
        x = tl.load(ptr + (at + tl.load(token_ptr + tl.minimum(cols, q_len - 1)) - first_token))
    x = x.to(tl.float32)
    return tl.where(mask, x, 0.0) if MASKED else x


@triton.jit(do_not_specialize=["T", "stride_stats", "site", "threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _attention_dq_kernel(
    qkv_ptr, stride_t, bias_ptr, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    d_out_ptr, stride_do, d_probs_ptr, token_ptr, cu_seqlens_ptr, kv_len_ptr, prefix_ptr, seed_ptr,
    stats_ptr,  # (3, heads, T): delta, then shift and (with a bias) factor of the exponentials
    stride_stats, d_qkv_ptr, out_ptr, lse_ptr,
    d_scores_ptr,  # (B, heads, S, S) zeros, where the bias wants a gradient
    S, scale, site, threshold, rescale, T, H: tl.constexpr, D: tl.constexpr,
    HAS_D_OUT: tl.constexpr, HAS_D_PROBS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    WANT_D_SCORES: tl.constexpr, UNIFORM_EMPTY: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: dQ and the statistics of BLOCK_M query rows of one head of one sequence, BLOCK_N keys at a time."""
    follow_previous(PDL)
    MASK_D: tl.constexpr = BLOCK_D != D
    tiles = tl.cdiv(S, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    b = tl.program_id(0) // tiles
    h = tl.program_id(1)
    start = tl.load(cu_seqlens_ptr + b)
    q_len = tl.load(cu_seqlens_ptr + b + 1) - start
    if first_row >= q_len:
        return
    kv_len = tl.load(kv_len_ptr + b)
    p_scale = scale if HAS_BIAS else scale * LOG2E
    if UNIFORM_EMPTY:  # weights as if all scores were 0, but gradients of the scores as ever
        p_scale = tl.where(kv_len == 0, 0.0, p_scale)
        kv_len = tl.where(kv_len == 0, q_len, kv_len)
    is_prefix = tl.load(prefix_ptr + b) != 0
    token_ptr += start
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < q_len
    d = tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    cols = tl.arange(0, BLOCK_N)
    qkv_ptr += start.to(tl.int64) * stride_t + h * D
    q = load_block(qkv_ptr + (rows * stride_t)[:, None] + d[None, :], is_row[:, None], d_mask, True, MASK_D)
    kv_offsets = cols[:, None] * stride_t + d[None, :]
    stats_ptr += h.to(tl.int64) * T + start
    delta = tl.zeros((BLOCK_M,), tl.float32)
    d_out = q
    if HAS_D_OUT:
        d_out_ptr += start.to(tl.int64) * stride_do + h * D
        d_out = load_block(d_out_ptr + (rows * stride_do)[:, None] + d[None, :], is_row[:, None], d_mask, True, MASK_D)
        out_ptr += start.to(tl.int64) * (H * D) + h * D
        out = load_block(out_ptr + (rows * (H * D))[:, None] + d[None, :], is_row[:, None], d_mask, True, MASK_D)
        delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    bias_offsets = (tl.minimum(rows, S - 1) * stride_bias_q)[:, None]
    shift = tl.full((BLOCK_M,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_BIAS:
        bias_ptr += b.to(tl.int64) * stride_bias_b + h.to(tl.int64) * stride_bias_h
    else:
        lse = tl.load(lse_ptr + h.to(tl.int64) * T + start + rows, mask=is_row, other=float("inf"))
        shift = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)  # no key, no weight
    square = (b * H + h).to(tl.int64) * S * S
    if HAS_D_PROBS:
        d_probs_ptr += square
    k0, k1 = 0, 0
    if HAS_DROPOUT:
        k0, k1 = dropout_keys(seed_ptr, site, b * H + h)
    full = kv_len // BLOCK_N * BLOCK_N
    if HAS_BIAS or HAS_D_PROBS:
        by_probs = tl.zeros((BLOCK_M,), tl.float32)
        for MASKED in tl.static_range(2):  # full blocks of keys without a mask, then the last one
            first, last = (full, kv_len) if MASKED else (0, full)
            for n in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED else None):
                keys = (n + cols)[None, :]
                is_key = keys < kv_len
                k_ptrs = qkv_ptr + H * D + (n * stride_t + kv_offsets)
                k = load_block(k_ptrs, (n + cols)[:, None] < kv_len, d_mask, MASKED, MASK_D)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                if HAS_BIAS:
                    bias = load_block(bias_ptr + (bias_offsets + keys * stride_bias_k), is_key, is_key, MASKED, False)
                    s = s * p_scale + bias.to(tl.float32)
                    s = tl.where(is_key, s, float("-inf")) if MASKED else s
                    new_max = tl.maximum(shift, tl.max(s, 1))
                    alpha = tl.math.exp2((shift - new_max) * LOG2E)
                    p = tl.math.exp2((s - new_max[:, None]) * LOG2E)
                    row_sum = row_sum * alpha + tl.sum(p, 1)
                    by_probs *= alpha
                    shift = new_max
                else:
                    p = _weights(s, p_scale, shift[:, None], 1.0, bias_ptr, is_key, False, MASKED)
                if HAS_D_PROBS:
                    da = _d_probs(
                        d_probs_ptr, token_ptr, is_prefix, rows[:, None], keys, S, q_len, b * S, is_key, MASKED
                    )
                    if HAS_DROPOUT:
                        kept = dropout_kept((rows * S)[:, None] + keys, k0, k1, threshold)
                        da = tl.where(kept, da * rescale, 0.0)
                    by_probs += tl.sum(p * da, 1)
        if HAS_BIAS:
            row_sum = 1.0 / tl.where(row_sum == 0, 1.0, row_sum)
            by_probs *= row_sum
            tl.store(stats_ptr + 2 * stride_stats + rows, row_sum, mask=is_row)
        delta += by_probs
    tl.store(stats_ptr + rows, delta, mask=is_row)
    tl.store(stats_ptr + stride_stats + rows, shift, mask=is_row)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for MASKED in tl.static_range(2):
        first, last = (full, kv_len) if MASKED else (0, full)
        for n in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED else None):
            keys = (n + cols)[None, :]
            is_key = keys < kv_len
            k_ptrs = qkv_ptr + H * D + (n * stride_t + kv_offsets)
            k = load_block(k_ptrs, (n + cols)[:, None] < kv_len, d_mask, MASKED, MASK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            bias_ptrs = bias_ptr + (bias_offsets + keys * stride_bias_k) if HAS_BIAS else bias_ptr
            p = _weights(s, p_scale, shift[:, None], row_sum[:, None], bias_ptrs, is_key, HAS_BIAS, MASKED)
            dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if HAS_D_OUT:
                v = load_block(k_ptrs + H * D, (n + cols)[:, None] < kv_len, d_mask, MASKED, MASK_D)
                dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            if HAS_D_PROBS:
                dp += _d_probs(d_probs_ptr, token_ptr, is_prefix, rows[:, None], keys, S, q_len, b * S, is_key, MASKED)
            if HAS_DROPOUT:
                dp = tl.where(dropout_kept((rows * S)[:, None] + keys, k0, k1, threshold), dp, 0.0)
            ds = p * (dp * rescale - delta[:, None] if HAS_DROPOUT else dp - delta[:, None])
            if WANT_D_SCORES:  # rows are tokens here
                at = d_scores_ptr + square + ((rows * S)[:, None] + keys)
                tl.store(at, ds, mask=is_row[:, None] & is_key if MASKED else is_row[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_ptrs = d_qkv_ptr + (start + rows).to(tl.int64)[:, None] * (3 * H * D) + (h * D + d)[None, :]
    tl.store(dq_ptrs, (dq * scale).to(d_qkv_ptr.dtype.element_ty), mask=is_row[:, None] & d_mask)


@triton.jit(do_not_specialize=["T", "stride_stats", "site", "threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _attention_dkv_kernel(
    qkv_ptr, stride_t, bias_ptr, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    d_out_ptr, stride_do, d_probs_ptr, token_ptr, cu_seqlens_ptr, kv_len_ptr, prefix_ptr, seed_ptr, stats_ptr,
    stride_stats, d_qkv_ptr, S, scale, site, threshold, rescale, T, H: tl.constexpr, D: tl.constexpr,
    HAS_D_OUT: tl.constexpr, HAS_D_PROBS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    UNIFORM_EMPTY: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_M keys of one head of one sequence, BLOCK_N queries at a time."""
    follow_previous(PDL)
    MASK_D: tl.constexpr = BLOCK_D != D
    tiles = tl.cdiv(S, BLOCK_M)
    first_key = tl.program_id(0) % tiles * BLOCK_M
    b = tl.program_id(0) // tiles
    h = tl.program_id(1)
    start = tl.load(cu_seqlens_ptr + b)
    q_len = tl.load(cu_seqlens_ptr + b + 1) - start
    if first_key >= q_len:
        return
    kv_len = tl.load(kv_len_ptr + b)
    p_scale = scale if HAS_BIAS else scale * LOG2E
    if UNIFORM_EMPTY:
        p_scale = tl.where(kv_len == 0, 0.0, p_scale)
        kv_len = tl.where(kv_len == 0, q_len, kv_len)
    is_prefix = tl.load(prefix_ptr + b) != 0
    token_ptr += start
    keys = first_key + tl.arange(0, BLOCK_M)
    is_key = (keys < kv_len)[:, None]
    d = tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    cols = tl.arange(0, BLOCK_N)
    qkv_ptr += start.to(tl.int64) * stride_t + h * D
    kv_ptrs = qkv_ptr + H * D + ((keys * stride_t)[:, None] + d[None, :])
    k = load_block(kv_ptrs, is_key, d_mask, True, MASK_D)
    v = load_block(kv_ptrs + H * D, is_key, d_mask, True, MASK_D) if HAS_D_OUT else k
    q_offsets = cols[:, None] * stride_t + d[None, :]
    d_out_offsets = cols[:, None] * stride_do + d[None, :]
    stats_ptr += h.to(tl.int64) * T + start
    if HAS_D_OUT:
        d_out_ptr += start.to(tl.int64) * stride_do + h * D
    bias_offsets = (tl.minimum(keys, S - 1) * stride_bias_k)[:, None]
    if HAS_BIAS:
        bias_ptr += b.to(tl.int64) * stride_bias_b + h.to(tl.int64) * stride_bias_h
    if HAS_D_PROBS:
        d_probs_ptr += (b * H + h).to(tl.int64) * S * S
    k0, k1 = 0, 0
    if HAS_DROPOUT:
        k0, k1 = dropout_keys(seed_ptr, site, b * H + h)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.where(first_key < kv_len, q_len, 0)  # a block of queries that are no keys: zeros
    full = end // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        first, last = (full, end) if MASKED else (0, full)
        for n in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED else None):
            rows = (n + cols)[None, :]
            is_row = rows < q_len
            q_ptrs = qkv_ptr + (n * stride_t + q_offsets)
            q = load_block(q_ptrs, (n + cols)[:, None] < q_len, d_mask, MASKED, MASK_D)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            shift = load_block(stats_ptr + stride_stats + rows, is_row, is_row, MASKED, False)
            factor = 1.0
            if HAS_BIAS:
                factor = load_block(stats_ptr + 2 * stride_stats + rows, is_row, is_row, MASKED, False)
            bias_ptrs = bias_ptr + (bias_offsets + rows * stride_bias_q) if HAS_BIAS else bias_ptr
            p = _weights(s, p_scale, shift, factor, bias_ptrs, is_row, HAS_BIAS, MASKED)
            a = p
            if HAS_DROPOUT:  # the sign of p says who is kept until dP is there: a mask would take more instructions
                p = tl.where(dropout_kept(rows * S + keys[:, None], k0, k1, threshold), p, -p)
                a = tl.where(p < 0, 0.0, p)  # rescaled at the end
            dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if HAS_D_OUT:
                d_out_ptrs = d_out_ptr + (n * stride_do + d_out_offsets)
                d_out = load_block(d_out_ptrs, (n + cols)[:, None] < q_len, d_mask, MASKED, MASK_D)
                dv = tl.dot(a.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            if HAS_D_PROBS:
                dp += _d_probs(d_probs_ptr, token_ptr, is_prefix, rows, keys[:, None], S, q_len, b * S, is_row, MASKED)
            delta = load_block(stats_ptr + rows, is_row, is_row, MASKED, False)
            if HAS_DROPOUT:
                ds = tl.abs(p) * (tl.where(p >= 0, dp, 0.0) * rescale - delta)
            else:
                ds = p * (dp - delta)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    # Past the last key lie keys of zeros, whose weights are anything: they go no further than their own row.
    dk = tl.where(is_key, dk * scale, 0.0)
    dv = tl.where(is_key, dv * rescale if HAS_DROPOUT else dv, 0.0)
    dk_ptrs = d_qkv_ptr + (start + keys).to(tl.int64)[:, None] * (3 * H * D) + (H * D + h * D + d)[None, :]
    mask = (keys < q_len)[:, None] & d_mask
    tl.store(dk_ptrs, dk.to(d_qkv_ptr.dtype.element_ty), mask=mask)
    tl.store(dk_ptrs + H * D, dv.to(d_qkv_ptr.dtype.element_ty), mask=mask)


def attention_backward_cpu(
    d_context: torch.Tensor | None, d_probs: torch.Tensor | None, qkv: torch.Tensor, bias: torch.Tensor | None,
    context: torch.Tensor, lse: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, uniform_empty: bool, seed: torch.Tensor | None, site: int, p: float,
    want_d_bias: bool,
) -> Pair:  # fmt: skip
    B, S, T, D = check(qkv, bias, token, kv_len, heads, scale, seed, p)
    _check_gradients(d_context, d_probs, T, heads * D, (B, heads, S, S))
    maps = token, cu_seqlens, kv_len, prefix
    args = qkv, bias, *maps, heads, scale, d_probs is not None, uniform_empty, seed, site, p
    needs = [True, want_d_bias, *[False] * 11]
    d_qkv, d_bias, *_ = gradients_of(attention_ref, args, needs, (d_context, d_probs, None))
    empty = _attention_backward_fake(
        d_context, d_probs, qkv, bias, context, lse, *maps, heads, scale, uniform_empty, seed, site, p, want_d_bias
    )
    return tuple(e if g is None else g.contiguous() for g, e in zip((d_qkv, d_bias), empty, strict=True))


def attention_backward_triton(
    d_context: torch.Tensor | None, d_probs: torch.Tensor | None, qkv: torch.Tensor, bias: torch.Tensor | None,
    context: torch.Tensor, lse: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, uniform_empty: bool, seed: torch.Tensor | None, site: int, p: float,
    want_d_bias: bool, config: TileConfig | None = None,
) -> Pair:  # fmt: skip
    B, S, T, D = check(qkv, bias, token, kv_len, heads, scale, seed, p)
    _check_gradients(d_context, d_probs, T, heads * D, (B, heads, S, S))
    shape = "dim<=64" if D <= 64 else "dim<=128"
    op = "attention_backward" if d_probs is None and bias is None else "attention_backward_probs"  # a smaller tile
    config = config or choose(op, shape, qkv.dtype, capability(qkv.device))
    d_scores, bias_strides = None, [0] * 4
    if bias is not None:
        bias_strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
        if want_d_bias:  # zeros: what is no pair of a query and a key has no gradient
            dtype = bias.dtype if bias.shape == (B, heads, S, S) else torch.float32
            d_scores = qkv.new_zeros(B, heads, S, S, dtype=dtype)
    if d_context is not None:
        d_context = d_context.to(qkv.dtype) if d_context.stride(1) == 1 else d_context.to(qkv.dtype).contiguous()
    stride_do = 0 if d_context is None else d_context.stride(0)
    if S * max(qkv.stride(0), 3 * heads * D, stride_do, bias_strides[2] + bias_strides[3], S) >= 2**31:
        raise ValueError(f"attention_backward: S={S}, expected rows, bias and scores to span < 2**31 elements a head")
    d_qkv = qkv.new_empty(T, 3 * heads * D)
    stats = qkv.new_empty(2 if bias is None else 3, heads, T, dtype=torch.float32)
    d_probs = None if d_probs is None else d_probs.contiguous()
    inputs = (
        qkv, qkv.stride(0), bias, *bias_strides, d_context, stride_do, d_probs, token,
        cu_seqlens, kv_len, prefix, seed if p else None, stats, heads * T, d_qkv,
    )  # fmt: skip
    numbers = S, scale, site, threshold(p), rescale(p)
    options = {
        "H": heads, "D": D, "HAS_D_OUT": d_context is not None, "HAS_D_PROBS": d_probs is not None,
        "HAS_BIAS": bias is not None, "HAS_DROPOUT": p > 0, "UNIFORM_EMPTY": uniform_empty,
        "PRECISION": dot_precision(qkv.dtype), "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N,
        "BLOCK_D": max(16, next_power_of_2(D)), "num_warps": config.num_warps, "num_stages": config.num_stages,
        **launch_options(), **config.register_limit(),
    }  # fmt: skip
    grid = (ceil_div(S, config.BLOCK_M) * B, heads)
    with device_guard(qkv):
        _attention_dq_kernel[grid](*inputs, context, lse, d_scores, *numbers, T, WANT_D_SCORES=want_d_bias, **options)
        _attention_dkv_kernel[grid](*inputs, *numbers, T, **options)
    if d_scores is None:
        return d_qkv, qkv.new_empty(0)
    return d_qkv, d_scores.sum_to_size(bias.shape).to(bias.dtype)  # type: ignore[union-attr]


def _check_gradients(
    d_context: torch.Tensor | None, d_probs: torch.Tensor | None, T: int, columns: int, square: tuple[int, ...]
) -> None:
    if d_context is None and d_probs is None:
        raise ValueError("attention_backward: expected d_context or d_probs, got neither")
    if d_context is not None and tuple(d_context.shape) != (T, columns):
        raise ValueError(
            f"attention_backward: d_context has shape {tuple(d_context.shape)}, expected ({T}, {columns})"
        )
    if d_probs is not None and tuple(d_probs.shape) != square:
        raise ValueError(f"attention_backward: d_probs has shape {tuple(d_probs.shape)}, expected {square}")


def _attention_backward_fake(
    d_context: torch.Tensor | None, d_probs: torch.Tensor | None, qkv: torch.Tensor, bias: torch.Tensor | None,
    context: torch.Tensor, lse: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, uniform_empty: bool, seed: torch.Tensor | None, site: int, p: float,
    want_d_bias: bool,
) -> Pair:  # fmt: skip
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape) if want_d_bias else qkv.new_empty(0)


attention_backward = register_kernel(
    "attention_backward(Tensor? d_context, Tensor? d_probs, Tensor qkv, Tensor? bias, Tensor context, Tensor lse,"
    " Tensor token, Tensor cu_seqlens, Tensor kv_len, Tensor prefix, int heads, float scale, bool uniform_empty,"
    " Tensor? seed, int site, float p, bool want_d_bias) -> (Tensor, Tensor)",
    cpu=attention_backward_cpu,
    cuda=attention_backward_triton,
    fake=_attention_backward_fake,
)
