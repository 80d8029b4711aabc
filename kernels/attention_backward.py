"""attention_backward: gradients of attention's qkv and bias, from those of its context and of its probabilities.

With P = softmax, A = P after dropout, dA = dO V^T + d_probs: dV = A^T dO, dP = dA through the dropout, delta =
rowsum(P * dP) = rowsum(dO * O) + rowsum(A * d_probs), dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q.
P is computed again from the saved log-sum-exp (FlashAttention-2, Dao 2023), the dropout drawn again.

Two kernels, one over blocks of queries (delta, dQ), one over blocks of keys (dK, dV): no atomics, the same bits every
time, for 7 products of 2 * heads * head_dim * sum(q_len * kv_len) FLOP where one kernel with atomics has 5.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.attention_base import LOG2E, attention_ref, check
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
def _rows(ptr, stride, rows, mask, d, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows (BLOCK, BLOCK_D) of one head, zeros outside; mask: of rows, where MASKED."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(ptrs, mask=mask[:, None] & (d < D)[None, :], other=0.0)
    if d.shape[0] != D:
        return tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _probabilities(s, scale, lse, bias_ptr, bias_offsets, mask, HAS_BIAS: tl.constexpr):
    """exp(scale * s + bias - lse) of a tile; lse broadcasts, in powers of 2 without a bias.

    Next to a bias of finfo.min the lse has lost the logarithm of the row's sum: there the caller divides by the sum.
    """
    if HAS_BIAS:
        s = s * scale + tl.load(bias_ptr + bias_offsets, mask=mask, other=float("-inf")).to(tl.float32)
        p = tl.math.exp2((s - lse) * LOG2E)
    else:
        p = tl.math.exp2(s * scale - lse)
    return p


@triton.jit
def _lse(lse_ptr, rows, mask, HAS_BIAS: tl.constexpr):
    """Log-sum-exp of rows as `_probabilities` wants it; inf, which makes probabilities of 0, where there is no key."""
    lse = tl.load(lse_ptr + rows, mask=mask, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse if HAS_BIAS else lse * LOG2E


@triton.jit(do_not_specialize=["B", "T", "site", "threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _attention_dq_kernel(
    d_out_ptr, stride_do, d_probs_ptr, qkv_ptr, stride_t,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    out_ptr, lse_ptr, delta_ptr, inv_sum_ptr, token_ptr, cu_seqlens_ptr, kv_len_ptr, seed_ptr, d_qkv_ptr,
    d_scores_ptr,  # (B, heads, S, S), where the bias wants a gradient
    B, S, T, scale, site, threshold, rescale, H: tl.constexpr, D: tl.constexpr,
    HAS_D_OUT: tl.constexpr, HAS_D_PROBS: tl.constexpr, UNIFORM_EMPTY: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WANT_D_SCORES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: dQ and delta of BLOCK_M query rows of one head of one sequence."""
    follow_previous(PDL)
    tiles_m = tl.cdiv(S, BLOCK_M)
    pid_m = tl.program_id(0) % tiles_m
    b = tl.program_id(0) // tiles_m
    h = tl.program_id(1)
    start = tl.load(cu_seqlens_ptr + b)
    q_len = tl.load(cu_seqlens_ptr + b + 1) - start
    if pid_m * BLOCK_M >= q_len:
        return
    n_keys = tl.load(kv_len_ptr + b)
    p_scale = scale if HAS_BIAS else scale * LOG2E
    if UNIFORM_EMPTY:  # weights as if all scores were 0, but gradients of the scores as ever
        p_scale = tl.where(n_keys == 0, 0.0, p_scale)
        n_keys = tl.where(n_keys == 0, q_len, n_keys)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row_mask = rows < q_len
    q = _rows(qkv_ptr + h * D, stride_t, start + rows, row_mask, d, D, True)
    k_ptr = qkv_ptr + H * D + h * D
    v_ptr = qkv_ptr + 2 * H * D + h * D
    lse_ptr += h.to(tl.int64) * T + start
    lse = _lse(lse_ptr, rows, row_mask, HAS_BIAS)[:, None]
    delta = tl.zeros((BLOCK_M,), tl.float32)
    d_out = q
    if HAS_D_OUT:
        d_out = _rows(d_out_ptr + h * D, stride_do, start + rows, row_mask, d, D, True)
        out = _rows(out_ptr + h * D, H * D, start + rows, row_mask, d, D, True)
        delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_BIAS:
        bias_ptr += b.to(tl.int64) * stride_bias_b + h.to(tl.int64) * stride_bias_h
    k0, k1 = 0, 0
    if HAS_DROPOUT:
        k0, k1 = dropout_keys(seed_ptr, site, b * H + h)
    at_q = rows
    if HAS_D_PROBS:
        d_probs_ptr += (b * H + h).to(tl.int64) * S * S
        at_q = tl.load(token_ptr + start + rows, mask=row_mask, other=0) - b * S
    along = tl.zeros((BLOCK_M,), tl.float32)  # rowsum(A * d_probs)
    inv_sum = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_D_PROBS or HAS_BIAS:
        total = tl.zeros((BLOCK_M,), tl.float32)
        for n in range(0, n_keys, BLOCK_N):
            cols = n + tl.arange(0, BLOCK_N)
            mask = row_mask[:, None] & (cols < n_keys)[None, :]
            k = _rows(k_ptr, stride_t, start + cols, cols < n_keys, d, D, True)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            bias_offsets = (rows * stride_bias_q)[:, None] + (cols * stride_bias_k)[None, :]
            p = tl.where(mask, _probabilities(s, p_scale, lse, bias_ptr, bias_offsets, mask, HAS_BIAS), 0.0)
            total += tl.sum(p, 1)
            if HAS_D_PROBS:
                if HAS_DROPOUT:
                    counter = (rows * S)[:, None] + cols[None, :]
                    p = tl.where(dropout_kept(counter, k0, k1, threshold), p * rescale, 0.0)
                at_k = tl.load(token_ptr + start + cols, mask=cols < n_keys, other=0) - b * S
                d_probs = tl.load(d_probs_ptr + (at_q * S)[:, None] + at_k[None, :], mask=mask, other=0.0)
                along += tl.sum(p * d_probs.to(tl.float32), 1)
        if HAS_BIAS:
            inv_sum = 1.0 / tl.where(total == 0, 1.0, total)
            tl.store(inv_sum_ptr + h.to(tl.int64) * T + start + rows, inv_sum, mask=row_mask)
    delta += along * inv_sum
    tl.store(delta_ptr + h.to(tl.int64) * T + start + rows, delta, mask=row_mask)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full = n_keys // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):  # full blocks of keys without a mask, then the last one
        first, last = (full, n_keys) if MASKED else (0, full)
        for n in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED else None):
            cols = n + tl.arange(0, BLOCK_N)
            is_key = cols < n_keys
            mask = row_mask[:, None] & is_key[None, :]
            k = _rows(k_ptr, stride_t, start + cols, is_key, d, D, MASKED)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            bias_offsets = (rows * stride_bias_q)[:, None] + (cols * stride_bias_k)[None, :]
            p = _probabilities(s, p_scale, lse, bias_ptr, bias_offsets, mask, HAS_BIAS)
            if HAS_BIAS:
                p *= inv_sum[:, None]
            if MASKED:
                p = tl.where(is_key[None, :], p, 0.0)
            dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if HAS_D_OUT:
                v = _rows(v_ptr, stride_t, start + cols, is_key, d, D, MASKED)
                dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            if HAS_D_PROBS:
                at_k = tl.load(token_ptr + start + cols, mask=is_key, other=0) - b * S
                d_probs = tl.load(d_probs_ptr + (at_q * S)[:, None] + at_k[None, :], mask=mask, other=0.0)
                dp += d_probs.to(tl.float32)
            if HAS_DROPOUT:
                counter = (rows * S)[:, None] + cols[None, :]
                dp = tl.where(dropout_kept(counter, k0, k1, threshold), dp * rescale, 0.0)
            ds = p * (dp - delta[:, None])
            if WANT_D_SCORES:  # rows are tokens here
                at = (b * H + h).to(tl.int64) * S * S + (rows * S)[:, None] + cols[None, :]
                tl.store(d_scores_ptr + at, ds, mask=mask)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_ptrs = d_qkv_ptr + h * D + (start + rows).to(tl.int64)[:, None] * (3 * H * D) + d[None, :]
    tl.store(dq_ptrs, (dq * scale).to(d_qkv_ptr.dtype.element_ty), mask=row_mask[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["B", "T", "site", "threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _attention_dkv_kernel(
    d_out_ptr, stride_do, d_probs_ptr, qkv_ptr, stride_t,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    lse_ptr, delta_ptr, inv_sum_ptr, token_ptr, cu_seqlens_ptr, kv_len_ptr, seed_ptr, d_qkv_ptr,
    B, S, T, scale, site, threshold, rescale, H: tl.constexpr, D: tl.constexpr,
    HAS_D_OUT: tl.constexpr, HAS_D_PROBS: tl.constexpr, UNIFORM_EMPTY: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one head of one sequence; tiles are keys x queries."""
    follow_previous(PDL)
    tiles_n = tl.cdiv(S, BLOCK_N)
    pid_n = tl.program_id(0) % tiles_n
    b = tl.program_id(0) // tiles_n
    h = tl.program_id(1)
    start = tl.load(cu_seqlens_ptr + b)
    q_len = tl.load(cu_seqlens_ptr + b + 1) - start
    if pid_n * BLOCK_N >= q_len:
        return
    n_keys = tl.load(kv_len_ptr + b)
    p_scale = scale if HAS_BIAS else scale * LOG2E
    if UNIFORM_EMPTY:
        p_scale = tl.where(n_keys == 0, 0.0, p_scale)
        n_keys = tl.where(n_keys == 0, q_len, n_keys)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = cols < n_keys
    d = tl.arange(0, BLOCK_D)
    k = _rows(qkv_ptr + H * D + h * D, stride_t, start + cols, is_key, d, D, True)
    v = _rows(qkv_ptr + 2 * H * D + h * D, stride_t, start + cols, is_key, d, D, True)
    q_ptr = qkv_ptr + h * D
    lse_ptr += h.to(tl.int64) * T + start
    delta_ptr += h.to(tl.int64) * T + start
    if HAS_BIAS:
        bias_ptr += b.to(tl.int64) * stride_bias_b + h.to(tl.int64) * stride_bias_h
    k0, k1 = 0, 0
    if HAS_DROPOUT:
        k0, k1 = dropout_keys(seed_ptr, site, b * H + h)
    at_k = cols
    if HAS_D_PROBS:
        d_probs_ptr += (b * H + h).to(tl.int64) * S * S
        at_k = tl.load(token_ptr + start + cols, mask=is_key, other=0) - b * S
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    q_end = tl.where(pid_n * BLOCK_N < n_keys, q_len, 0)  # padding that is a query and no key: zeros
    full = q_end // BLOCK_M * BLOCK_M
    for MASKED in tl.static_range(2):  # full blocks of queries without a mask, then the last one
        first, last = (full, q_end) if MASKED else (0, full)
        for m in tl.range(first, last, BLOCK_M, num_stages=1 if MASKED else None):
            rows = m + tl.arange(0, BLOCK_M)
            is_query = rows < q_len
            mask = is_key[:, None] & is_query[None, :]
            q = _rows(q_ptr, stride_t, start + rows, is_query, d, D, MASKED)
            lse = _lse(lse_ptr, rows, is_query, HAS_BIAS)[None, :]
            delta = tl.load(delta_ptr + rows, mask=is_query, other=0.0)[None, :]
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            bias_offsets = (rows * stride_bias_q)[None, :] + (cols * stride_bias_k)[:, None]
            p = _probabilities(s, p_scale, lse, bias_ptr, bias_offsets, mask, HAS_BIAS)
            if HAS_BIAS:
                p *= tl.load(inv_sum_ptr + h.to(tl.int64) * T + start + rows, mask=is_query, other=0.0)[None, :]
            a = p
            if HAS_DROPOUT:
                kept = dropout_kept((rows * S)[None, :] + cols[:, None], k0, k1, threshold)
                a = tl.where(kept, p * rescale, 0.0)
            dp = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if HAS_D_OUT:
                d_out = _rows(d_out_ptr + h * D, stride_do, start + rows, is_query, d, D, MASKED)
                dv = tl.dot(a.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            if HAS_D_PROBS:
                at_q = tl.load(token_ptr + start + rows, mask=is_query, other=0) - b * S
                d_probs = tl.load(d_probs_ptr + (at_q * S)[None, :] + at_k[:, None], mask=mask, other=0.0)
                dp += d_probs.to(tl.float32)
            if HAS_DROPOUT:
                dp = tl.where(kept, dp * rescale, 0.0)
            ds = p * (dp - delta)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk = tl.where(is_key[:, None], dk * scale, 0.0)  # a key of zeros, past the last one, has probabilities too
    dv = tl.where(is_key[:, None], dv, 0.0)
    mask = (cols < q_len)[:, None] & (d < D)[None, :]
    dk_ptrs = d_qkv_ptr + H * D + h * D + (start + cols).to(tl.int64)[:, None] * (3 * H * D) + d[None, :]
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
    op = "attention_backward" if d_probs is None else "attention_backward_probs"  # which want a smaller tile
    config = config or choose(op, shape, qkv.dtype, capability(qkv.device))
    d_qkv, delta = qkv.new_empty(T, 3 * heads * D), torch.empty_like(lse)
    d_scores = inv_sum = bias_strides = None
    if bias is not None:
        inv_sum = torch.empty_like(lse)
        bias_strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
        if want_d_bias:  # zeros: pairs that are none have no gradient
            d_scores = qkv.new_zeros(B, heads, S, S, dtype=torch.float32)
    strides = bias_strides or [0] * 4
    if S * max(qkv.stride(0), strides[2] + strides[3], S) >= 2**31:
        raise ValueError(f"attention_backward: S={S}, expected qkv, bias and scores to span < 2**31 elements a head")
    if d_context is not None and d_context.stride(1) != 1:
        d_context = d_context.contiguous()
    d_probs = d_probs if d_probs is None else d_probs.contiguous()
    inputs = (
        d_context, 0 if d_context is None else d_context.stride(0), d_probs, qkv, qkv.stride(0), bias, *strides,
    )  # fmt: skip
    maps = token, cu_seqlens, kv_len, seed if p else None
    numbers = B, S, T, scale, site, threshold(p), rescale(p)
    flags = {
        "H": heads, "D": D, "HAS_D_OUT": d_context is not None, "HAS_D_PROBS": d_probs is not None,
        "UNIFORM_EMPTY": uniform_empty, "HAS_BIAS": bias is not None, "HAS_DROPOUT": p > 0,
        "PRECISION": dot_precision(qkv.dtype), "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N,
        "BLOCK_D": max(16, next_power_of_2(D)), "num_warps": config.num_warps, "num_stages": config.num_stages,
        **launch_options(), **config.register_limit(),
    }  # fmt: skip
    with device_guard(qkv):
        _attention_dq_kernel[(ceil_div(S, config.BLOCK_M) * B, heads)](
            *inputs, context, lse, delta, inv_sum, *maps, d_qkv, d_scores, *numbers,
            WANT_D_SCORES=d_scores is not None, **flags,
        )
        _attention_dkv_kernel[(ceil_div(S, config.BLOCK_N) * B, heads)](
            *inputs, lse, delta, inv_sum, *maps, d_qkv, *numbers, **flags
        )
    if d_scores is None or bias is None:
        return d_qkv, qkv.new_empty(0)
    return d_qkv, d_scores.sum_to_size(bias.shape).to(bias.dtype)


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
