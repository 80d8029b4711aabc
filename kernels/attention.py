"""attention on packed rows, with optional probabilities: softmax(scale * Q K^T + bias) V, one form for every padding.

Rows 0..q_len of a sequence attend to its rows 0..kv_len (pack.py puts the real tokens first), so padding costs
nothing and needs no mask. Probabilities (B, heads, S, S) are stored in the same launch, through the row <-> token map:
every element is written once, zeros for padding keys and for tokens that are no row.

Without probabilities: one pass over the keys with a running maximum (Milakov & Gimelshein 2018; FlashAttention-2, Dao
2023). With them: two passes, first the row's log-sum-exp, then P and P V; reading K twice from L2 is cheaper than
normalising B * heads * S * S stored numbers afterwards. FLOP: 4 * heads * head_dim * sum(q_len * kv_len).

A sequence without a key (kv_len = 0): uniform weights over all its rows (uniform_empty, transformers' eager) or a
context of zeros (its sdpa). Never NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bert_fast.kernels.configs import TileConfig, choose
from bert_fast.kernels.pack import padded_rows, positions
from bert_fast.kernels.registry import register
from bert_fast.kernels.runtime import capability, ceil_div, device_guard, dot_precision, next_power_of_2, tl, triton

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
LOG2E = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 128
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # (context, lse)


def attention_ref(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, want_probs: bool, uniform_empty: bool,
) -> Triple:  # fmt: skip
    """qkv (T, 3 * heads * D) packed rows; bias broadcastable to (B, heads, S, S) or None (with it, rows are tokens).

    token (T,), cu_seqlens (B+1,), kv_len (B,), prefix (B,) int32 from `pack`; T = B * S. Returns context
    (T, heads * D), probs (B, heads, S, S) or empty, lse (heads, T) fp32, natural log.
    """
    B, T = kv_len.shape[0], qkv.shape[0]
    S, D = T // B, qkv.shape[1] // (3 * heads)
    rows, is_row = padded_rows(cu_seqlens, S, T)
    q, k, v = (
        torch.where(is_row[:, :, None, None], x[rows], 0.0).transpose(1, 2)
        for x in qkv.view(T, 3, heads, D).unbind(1)
    )
    scores = q @ k.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias
    is_key = torch.arange(S, device=qkv.device) < kv_len[:, None]
    if uniform_empty:
        empty = (kv_len == 0)[:, None]
        scores = torch.where(empty[:, None, None], scores - scores.detach(), scores)  # 0 that keeps the gradient
        is_key = is_key | (empty & is_row)
    scores = scores.masked_fill(~is_key[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, dim=-1)
    dead = torch.isneginf(lse)[..., None]
    probs = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0).to(qkv.dtype)
    context = (probs @ v).transpose(1, 2)[is_row].reshape(-1, heads * D)
    context = F.pad(context, (0, 0, 0, T - context.shape[0]))
    lse_rows = F.pad(lse.transpose(0, 1)[:, is_row], (0, T - int(is_row.sum())))
    if not want_probs:
        return context, qkv.new_empty(0), lse_rows
    # row j, key i -> their positions; what is no row gets zeros and lands on a dropped token's place
    position = positions(token, cu_seqlens, S)
    inverse = torch.argsort(position, dim=1)
    probs = torch.where(is_row[:, None, :, None], probs, 0.0)
    probs = torch.gather(probs, 2, inverse[:, None, :, None].expand_as(probs))
    probs = torch.gather(probs, 3, inverse[:, None, None, :].expand_as(probs))
    return context, probs, lse_rows


@triton.jit
def _load(ptrs, key_mask, d_mask, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr):
    """A block of keys, values or bias, masked only where needed; then 0, since 0 * undefined memory may be NaN."""
    if MASK_KEYS and MASK_D:
        x = tl.load(ptrs, mask=key_mask & d_mask, other=0.0)
    elif MASK_KEYS:
        x = tl.load(ptrs, mask=key_mask, other=0.0)
    elif MASK_D:
        x = tl.load(ptrs, mask=d_mask, other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def _scores(
    q, k_ptrs, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale,
    HAS_BIAS: tl.constexpr, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one key block; in units of ln 2 (scale carries log2(e)), with a bias in natural units."""
    cols = n + n_cols
    k = _load(k_ptrs, cols[None, :] < kv_len, d_mask[:, None], MASK_KEYS, MASK_D)
    s = tl.dot(q, k, input_precision=PRECISION) * scale
    if HAS_BIAS:
        bias_ptrs = bias_ptr + (bias_offsets + cols[None, :] * stride_bias_k)
        # a bias of finfo.min must not overflow when all keys have it, so it is not folded into base 2
        s += _load(bias_ptrs, cols[None, :] < kv_len, d_mask, MASK_KEYS, False).to(tl.float32)
    if MASK_KEYS:
        s = tl.where(cols[None, :] < kv_len, s, float("-inf"))
    return s


@triton.jit
def _exp(x, HAS_BIAS: tl.constexpr):
    return tl.math.exp2(x * LOG2E) if HAS_BIAS else tl.math.exp2(x)


@triton.jit
def _safe_max(row_max, HAS_BIAS: tl.constexpr):
    """Only a bias can make every score of a row -inf so far; then exp(-inf - 0) = 0 where -inf - -inf is NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max) if HAS_BIAS else row_max


@triton.jit
def _online_step(
    acc, row_max, row_sum, q, k_ptrs, v_ptrs, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale,
    HAS_BIAS: tl.constexpr, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = _scores(q, k_ptrs, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, HAS_BIAS, MASK_KEYS, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
    new_max = tl.maximum(row_max, tl.max(s, 1))
    safe_max = _safe_max(new_max, HAS_BIAS)
    p = _exp(s - safe_max[:, None], HAS_BIAS)
    alpha = _exp(row_max - safe_max, HAS_BIAS)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    v = _load(v_ptrs, (n + n_cols)[:, None] < kv_len, d_mask[None, :], MASK_KEYS, MASK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _sum_step(
    row_max, row_sum, q, k_ptrs, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale,
    HAS_BIAS: tl.constexpr, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = _scores(q, k_ptrs, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, HAS_BIAS, MASK_KEYS, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
    new_max = tl.maximum(row_max, tl.max(s, 1))
    safe_max = _safe_max(new_max, HAS_BIAS)
    row_sum = row_sum * _exp(row_max - safe_max, HAS_BIAS) + tl.sum(_exp(s - safe_max[:, None], HAS_BIAS), 1)
    return new_max, row_sum


@triton.jit
def _probs_step(
    acc, shift, inv_sum, q, k_ptrs, v_ptrs, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale,
    probs_ptr, row_offsets, row_mask, key_token_ptr, first_token,
    MAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities of one key block to memory, and their share of P V."""
    s = _scores(q, k_ptrs, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, HAS_BIAS, MASK_KEYS, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
    p = _exp(s - shift[:, None], HAS_BIAS)
    p *= inv_sum[:, None]
    p = p.to(probs_ptr.dtype.element_ty)
    cols = n + n_cols
    at = cols
    if MAPPED:
        at = tl.load(key_token_ptr + cols, mask=cols < kv_len, other=0) - first_token
    if MASK_KEYS:
        row_mask = row_mask & (cols < kv_len)[None, :]
    tl.store(probs_ptr + (row_offsets + at[None, :]), p, mask=row_mask)
    v = _load(v_ptrs, (n + n_cols)[:, None] < kv_len, d_mask[None, :], MASK_KEYS, MASK_D)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)


@triton.jit
def _store_zeros(probs_ptr, row_offsets, first, S, row_mask, token_ptr, start, q_len, dropped, first_token, n_cols, MAPPED: tl.constexpr, BLOCK_N: tl.constexpr):  # noqa: E501  # fmt: skip
    """Zeros into columns `first`.. of the rows: padding keys, and keys that are no row."""
    zero = tl.zeros((1, BLOCK_N), probs_ptr.dtype.element_ty)
    for n in range(first, S, BLOCK_N):
        cols = n + n_cols
        at = cols
        if MAPPED:
            place = tl.where(cols < q_len, start + cols, dropped + cols - q_len)
            at = tl.load(token_ptr + place, mask=cols < S, other=0) - first_token
        tl.store(probs_ptr + (row_offsets + at[None, :]), zero, mask=row_mask & (cols < S)[None, :])


@triton.jit
def _probs_pass(
    acc, shift, inv_sum, q, k_ptr, v_ptr, k_offsets, v_offsets, stride_t, full, kv_len, bias_ptr, bias_offsets,
    stride_bias_k, n_cols, d_mask, scale, probs_ptr, row_offsets, row_mask, token_ptr, start, q_len, dropped,
    first_token, S, MAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Second pass over the keys: every column of the rows is stored, in place or (MAPPED) at its token's position."""
    for n in range(0, full, BLOCK_N):
        acc = _probs_step(acc, shift, inv_sum, q, k_ptr + n * stride_t + k_offsets, v_ptr + n * stride_t + v_offsets, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, probs_ptr, row_offsets, row_mask, token_ptr + start, first_token, MAPPED, HAS_BIAS, False, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
    for n in tl.range(full, kv_len, BLOCK_N, num_stages=1):
        acc = _probs_step(acc, shift, inv_sum, q, k_ptr + n * stride_t + k_offsets, v_ptr + n * stride_t + v_offsets, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, probs_ptr, row_offsets, row_mask, token_ptr + start, first_token, MAPPED, HAS_BIAS, True, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
    _store_zeros(probs_ptr, row_offsets, kv_len, S, row_mask, token_ptr, start, q_len, dropped, first_token, n_cols, MAPPED, BLOCK_N)  # noqa: E501  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["B", "T"])
def _attention_kernel(
    qkv_ptr, stride_t, bias_ptr, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    token_ptr, cu_seqlens_ptr, kv_len_ptr, prefix_ptr, out_ptr, probs_ptr, lse_ptr,
    B, S, T, H, scale,
    D: tl.constexpr,  # head_dim
    WANT_PROBS: tl.constexpr, UNIFORM_EMPTY: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head of one sequence against all its keys."""
    MASK_D: tl.constexpr = BLOCK_D != D
    tiles_m = tl.cdiv(S, BLOCK_M)
    pid_m = tl.program_id(0) % tiles_m
    b = tl.program_id(0) // tiles_m
    h = tl.program_id(1)
    start = tl.load(cu_seqlens_ptr + b)
    q_len = tl.load(cu_seqlens_ptr + b + 1) - start
    if not WANT_PROBS:
        if pid_m * BLOCK_M >= q_len:
            return
    kv_len = tl.load(kv_len_ptr + b)
    if UNIFORM_EMPTY:  # scores of 0 over all S keys; such a sequence keeps all its rows
        scale = tl.where(kv_len == 0, 0.0, scale)
        kv_len = tl.where(kv_len == 0, q_len, kv_len)
    if WANT_PROBS:  # a tile of no rows has only zeros to store
        kv_len = tl.where(pid_m * BLOCK_M < q_len, kv_len, 0)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    n_cols = tl.arange(0, BLOCK_N)
    d_mask = d < D
    row_offsets = (start + rows).to(tl.int64) * stride_t
    q_ptrs = qkv_ptr + row_offsets[:, None] + (h * D + d)[None, :]
    q_mask = (rows < q_len)[:, None] & d_mask[None, :] if MASK_D else (rows < q_len)[:, None]
    q = tl.load(q_ptrs, mask=q_mask, other=0.0)
    base = qkv_ptr + start.to(tl.int64) * stride_t + h * D
    # One scalar pointer and offsets of 32 bits: a moving block of pointers would cost twice the registers.
    k_ptr = base + H * D
    v_ptr = base + 2 * H * D
    k_offsets = n_cols[None, :] * stride_t + d[:, None]
    v_offsets = n_cols[:, None] * stride_t + d[None, :]
    bias_offsets = 0
    if HAS_BIAS:
        bias_ptr += b.to(tl.int64) * stride_bias_b + h.to(tl.int64) * stride_bias_h
        bias_offsets = (tl.minimum(rows, S - 1) * stride_bias_q)[:, None]
    else:
        scale *= LOG2E  # exp2 is the hardware's exponential
    # Key blocks below `full` need no mask. The last one is a loop of one round without a pipeline: as straight code its
    # loads were hoisted above all that precedes them, and registers spilled.
    full = kv_len // BLOCK_N * BLOCK_N
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WANT_PROBS:
        for n in range(0, full, BLOCK_N):
            row_max, row_sum = _sum_step(row_max, row_sum, q, k_ptr + n * stride_t + k_offsets, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, HAS_BIAS, False, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
        for n in tl.range(full, kv_len, BLOCK_N, num_stages=1):
            row_max, row_sum = _sum_step(row_max, row_sum, q, k_ptr + n * stride_t + k_offsets, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, HAS_BIAS, True, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
        inv_sum = 1.0 / tl.where(row_sum > 0, row_sum, 1.0)
        # not row_max + log2(row_sum): its rounding would scale a whole row of probabilities
        shift = tl.where(row_sum > 0, row_max, 0.0)
        first_token = b * S
        dropped = tl.load(cu_seqlens_ptr + B) + first_token - start
        row_is_token = tl.where(rows < q_len, start + rows, dropped + rows - q_len)
        at = tl.load(token_ptr + row_is_token, mask=rows < S, other=0) - first_token
        probs_ptr += (b * H + h).to(tl.int64) * S * S
        row_offsets = (at * S)[:, None]
        row_mask = (rows < q_len)[:, None]
        if tl.load(prefix_ptr + b) != 0:  # right padding: contiguous stores, no gather of positions
            acc = _probs_pass(acc, shift, inv_sum, q, k_ptr, v_ptr, k_offsets, v_offsets, stride_t, full, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, probs_ptr, row_offsets, row_mask, token_ptr, start, q_len, dropped, first_token, S, False, HAS_BIAS, MASK_D, PRECISION, BLOCK_N)  # noqa: E501  # fmt: skip
        else:
            acc = _probs_pass(acc, shift, inv_sum, q, k_ptr, v_ptr, k_offsets, v_offsets, stride_t, full, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, probs_ptr, row_offsets, row_mask, token_ptr, start, q_len, dropped, first_token, S, True, HAS_BIAS, MASK_D, PRECISION, BLOCK_N)  # noqa: E501  # fmt: skip
        # the tokens that are no row: whole rows of zeros
        if (pid_m + 1) * BLOCK_M > q_len:
            _store_zeros(probs_ptr, row_offsets, 0, S, ((rows >= q_len) & (rows < S))[:, None], token_ptr, start, q_len, dropped, first_token, n_cols, False, BLOCK_N)  # noqa: E501  # fmt: skip
    else:
        for n in range(0, full, BLOCK_N):
            acc, row_max, row_sum = _online_step(acc, row_max, row_sum, q, k_ptr + n * stride_t + k_offsets, v_ptr + n * stride_t + v_offsets, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, HAS_BIAS, False, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
        for n in tl.range(full, kv_len, BLOCK_N, num_stages=1):
            acc, row_max, row_sum = _online_step(acc, row_max, row_sum, q, k_ptr + n * stride_t + k_offsets, v_ptr + n * stride_t + v_offsets, n, kv_len, bias_ptr, bias_offsets, stride_bias_k, n_cols, d_mask, scale, HAS_BIAS, True, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
        acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    lse = row_max + tl.math.log2(row_sum) / LOG2E if HAS_BIAS else (row_max + tl.math.log2(row_sum)) / LOG2E
    tl.store(lse_ptr + h.to(tl.int64) * T + start + rows, tl.where(row_sum > 0, lse, float("-inf")), mask=rows < q_len)
    out_ptrs = out_ptr + (start + rows).to(tl.int64)[:, None] * (H * D) + (h * D + d)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


def _check(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, kv_len: torch.Tensor, heads: int
) -> tuple[int, int, int, int]:  # fmt: skip
    """B, S, T and head_dim."""
    T, B = token.shape[0], kv_len.shape[0]
    if qkv.dim() != 2 or qkv.shape[0] != T or qkv.stride(1) != 1:
        raise ValueError(f"attention: qkv has shape {tuple(qkv.shape)}, expected ({T}, 3 * heads * D) with unit rows")
    if heads < 1 or qkv.shape[1] % (3 * heads):
        raise ValueError(f"attention: qkv has {qkv.shape[1]} columns, expected a multiple of 3 * heads = {3 * heads}")
    D = qkv.shape[1] // (3 * heads)
    if D > MAX_HEAD_DIM:
        raise ValueError(f"attention: head_dim is {D}, expected at most {MAX_HEAD_DIM}")
    if B < 1 or T % B:
        raise ValueError(f"attention: {T} tokens in {B} sequences, expected B * S")
    S = T // B
    if bias is not None:
        full = (B, heads, S, S)
        if bias.dim() != 4 or any(n not in (1, want) for n, want in zip(bias.shape, full, strict=True)):
            raise ValueError(f"attention: bias has shape {tuple(bias.shape)}, expected one that broadcasts to {full}")
    return B, S, T, D


def attention_cpu(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, want_probs: bool, uniform_empty: bool,
) -> Triple:  # fmt: skip
    """torch's fused attention, all sequences at once where they are full, else one by one on their real rows."""
    B, S, T, D = _check(qkv, bias, token, kv_len, heads)
    starts, keys = cu_seqlens.tolist(), kv_len.tolist()
    q, k, v = qkv.view(B, S, 3, heads, D).permute(2, 0, 3, 1, 4)
    lse, probs = qkv.new_empty(heads, T, dtype=torch.float32), qkv.new_empty(0)
    if want_probs or bias is not None:
        if starts[-1] < T or 0 in keys or not prefix.all():  # rows are not tokens, or uniform weights
            return attention_ref(qkv, bias, token, cu_seqlens, kv_len, prefix, heads, scale, want_probs, uniform_empty)
        context, weights, sums = _with_probs(q, k, v, bias, keys, scale)
        probs = weights if want_probs else probs
    elif min(keys) == S:
        context, sums = _flash(q, k, v, scale=scale)
    else:
        out = qkv.new_empty(T, heads * D)
        for b, n in enumerate(keys):
            rows = slice(starts[b], starts[b + 1])
            if rows.start == rows.stop:  # no such sequence
                continue
            if n == 0 and not uniform_empty:
                out[rows], lse[:, rows] = 0.0, float("-inf")
                continue
            q, k, v = qkv[rows].view(1, -1, 3, heads, D).permute(2, 0, 3, 1, 4)
            context, sums = _flash(q, k[:, :, : n or S], v[:, :, : n or S], scale=scale if n else 0.0)
            out[rows].view(1, -1, heads, D).copy_(context.transpose(1, 2))
            lse[:, rows] = sums[0]
        return out, probs, lse
    lse.view(heads, B, S).copy_(sums.transpose(0, 1))
    return context.transpose(1, 2).reshape(T, heads * D).contiguous(), probs, lse


def _with_probs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, keys: list[int], scale: float
) -> Triple:  # fmt: skip
    """(context, probs, lse) of right-padded sequences (B, heads, S, D) with at least one key each."""
    scores = (q @ k.transpose(2, 3)).mul_(scale)
    if bias is not None:
        scores = scores + bias
    for b, n in enumerate(keys):
        scores[b, :, :, n:] = float("-inf")
    highest = scores.amax(-1)
    probs = torch.softmax(scores, -1)
    # the largest probability is exp(highest - lse): no second pass of exponentials
    sums = highest.float() - probs.amax(-1).float().log()
    if bias is not None:
        dead = highest.isneginf()  # a row of nothing but -inf
        probs, sums = probs.masked_fill(dead[..., None], 0.0), sums.masked_fill(dead, float("-inf"))
    probs = probs.to(q.dtype)
    return probs @ v, probs, sums


def attention_triton(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, want_probs: bool, uniform_empty: bool,
    config: TileConfig | None = None,
) -> Triple:  # fmt: skip
    B, S, T, D = _check(qkv, bias, token, kv_len, heads)
    out, probs, lse = _attention_fake(qkv, bias, token, cu_seqlens, kv_len, prefix, heads, scale, want_probs, False)
    op = "attention_probs" if want_probs else "attention"
    config = config or choose(op, "dim<=64" if D <= 64 else "dim<=128", qkv.dtype, capability(qkv.device))
    bias_strides = [0] * 4
    if bias is not None:
        bias_strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
    if S * max(qkv.stride(0), bias_strides[2] + bias_strides[3], S * want_probs) >= 2**31:
        raise ValueError(f"attention: S={S}, expected qkv, bias and probabilities to span < 2**31 elements a head")
    with device_guard(qkv):
        _attention_kernel[(ceil_div(S, config.BLOCK_M) * B, heads)](
            qkv, qkv.stride(0), bias, *bias_strides, token, cu_seqlens, kv_len, prefix, out, probs, lse,
            B, S, T, heads, scale, D=D,
            WANT_PROBS=want_probs, UNIFORM_EMPTY=uniform_empty, HAS_BIAS=bias is not None,
            PRECISION=dot_precision(qkv.dtype),
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_D=max(16, next_power_of_2(D)),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True, **config.register_limit(),
        )  # fmt: skip
    return out, probs, lse


def _attention_fake(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, want_probs: bool, uniform_empty: bool,
) -> Triple:  # fmt: skip
    T, B = qkv.shape[0], kv_len.shape[0]
    probs = qkv.new_empty((B, heads, T // B, T // B) if want_probs else 0)
    return qkv.new_empty(T, qkv.shape[1] // 3), probs, qkv.new_empty(heads, T, dtype=torch.float32)


attention = register(
    "attention(Tensor qkv, Tensor? bias, Tensor token, Tensor cu_seqlens, Tensor kv_len, Tensor prefix, int heads,"
    " float scale, bool want_probs, bool uniform_empty) -> (Tensor, Tensor, Tensor)",
    ref=attention_ref,
    cpu=attention_cpu,
    cuda=attention_triton,
    fake=_attention_fake,
)
