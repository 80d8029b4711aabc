"""attention on packed rows, with optional probabilities: softmax(scale * Q K^T + bias) V, one form for every padding.

Rows 0..q_len of a sequence attend to its rows 0..kv_len (pack.py puts the real tokens first): no mask, no padding keys.
Probabilities (B, heads, S, S) are stored in the same launch through the row <-> token map, every element once.

Without probabilities: one pass over the keys with a running maximum (Milakov & Gimelshein 2018; FlashAttention-2, Dao
2023). With them: two passes, first the row's log-sum-exp, then P and P V; reading K twice from L2 is cheaper than
normalising B * heads * S * S stored numbers afterwards. FLOP: 4 (with them 6) * heads * head_dim * sum(q_len * kv_len).

A sequence without a key (kv_len = 0): uniform weights over all its rows (uniform_empty, transformers' eager; not next
to a bias) or a context of zeros (its sdpa). Never NaN.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch

from bert_fast.kernels.attention_backward import attention_backward
from bert_fast.kernels.attention_base import (
    LOG2E,
    LOWEST,
    MAX_HEAD_DIM,
    Triple,
    attention_cpu,
    attention_ref,
    check,
    load_block,
)
from bert_fast.kernels.configs import TileConfig, choose
from bert_fast.kernels.dropout import dropout_kept, dropout_keys, rescale, threshold
from bert_fast.kernels.registry import Grads, gradients_of, register
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

__all__ = ["LOG2E", "LOWEST", "MAX_HEAD_DIM", "attention", "attention_cpu", "attention_ref", "attention_triton"]


# Of a program, for all blocks of keys. K and V of the sequence's first row lie k_off and v_off from ptr; offsets within
# a block have 32 bits: a moving block of pointers would cost twice the registers.
Keys = namedtuple(
    "Keys", "ptr k_off v_off stride_t full kv_len cols k_offsets v_offsets d_mask bias_ptr bias_offsets stride_bias_k"
)
# Where a program's probabilities go: to ptr + row_offsets + the key's position, found through token_ptr. The sequence's
# rows begin at `start`, its tokens at first_token; in the map, those of its tokens that are no row are at `dropped`.
Probs = namedtuple("Probs", "ptr row_offsets row_mask token_ptr start first_token S q_len dropped")
# A program's dropout: keys of its head, and the counters of its rows, to which a key's index is added.
Drop = namedtuple("Drop", "k0 k1 threshold rescale row_counters")


@triton.jit
def _scores(
    q, n, keys, scale, HAS_BIAS: tl.constexpr, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Of the key block at n: q . k, which `_exp` scales; with a bias scale * q . k + bias."""
    cols = n + keys.cols
    is_key = cols[None, :] < keys.kv_len
    k_ptrs = keys.ptr + n * keys.stride_t + keys.k_offsets + keys.k_off
    s = tl.dot(q, load_block(k_ptrs, is_key, keys.d_mask[:, None], MASK_KEYS, MASK_D), input_precision=PRECISION)
    if HAS_BIAS:
        bias_ptrs = keys.bias_ptr + (keys.bias_offsets + cols[None, :] * keys.stride_bias_k)
        s = s * scale + load_block(bias_ptrs, is_key, is_key, MASK_KEYS, False).to(tl.float32)
    if MASK_KEYS:
        s = tl.where(is_key, s, float("-inf"))
    return s


@triton.jit
def _values(n, keys, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr):
    v_ptrs = keys.ptr + n * keys.stride_t + keys.v_offsets + keys.v_off
    return load_block(v_ptrs, (n + keys.cols)[:, None] < keys.kv_len, keys.d_mask[None, :], MASK_KEYS, MASK_D)


@triton.jit
def _exp(s, shift, scale, HAS_BIAS: tl.constexpr):
    """2^(scale * s - shift): one multiply-add an element. With a bias e^(s - shift): finfo.min * log2(e) overflows."""
    return tl.math.exp2((s - shift) * LOG2E) if HAS_BIAS else tl.math.exp2(s * scale - shift)


@triton.jit
def _dropped(p, n, keys, drop, rescale):
    """The probabilities of the key block at n after dropout."""
    kept = dropout_kept(drop.row_counters + (n + keys.cols)[None, :], drop.k0, drop.k1, drop.threshold)
    return tl.where(kept, p * rescale, 0.0)


@triton.jit
def _softmax_pass(
    q, keys, scale, drop, WITH_V: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over all keys: WITH_V exponentials times V; maximum of the scaled scores; sum of the exponentials."""
    acc = tl.zeros(q.shape, tl.float32)
    row_max = tl.full((q.shape[0],), LOWEST, tl.float32)
    row_sum = tl.zeros((q.shape[0],), tl.float32)
    # Blocks below `full` need no mask. The last one is a loop of one round without a pipeline: as straight code its
    # loads were hoisted above all that precedes them, and registers spilled.
    for MASK_KEYS in tl.static_range(2):
        first, last = (keys.full, keys.kv_len) if MASK_KEYS else (0, keys.full)
        for n in tl.range(first, last, keys.cols.shape[0], num_stages=1 if MASK_KEYS else None):
            s = _scores(q, n, keys, scale, HAS_BIAS, MASK_KEYS, MASK_D, PRECISION)
            new_max = tl.max(s, 1) if HAS_BIAS else tl.max(s, 1) * scale  # scale > 0
            new_max = tl.maximum(row_max, new_max)
            p = _exp(s, new_max[:, None], scale, HAS_BIAS)
            alpha = _exp(row_max, new_max, 1.0, HAS_BIAS)
            row_sum = row_sum * alpha + tl.sum(p, 1)
            if WITH_V:
                if HAS_DROPOUT:  # the sum is of all; what is kept is rescaled with it at the end
                    p = _dropped(p, n, keys, drop, 1.0)
                v = _values(n, keys, MASK_KEYS, MASK_D)
                acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _probs_pass(
    acc, shift, inv_sum, q, keys, scale, probs, drop, MAPPED: tl.constexpr, FOLDED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Again over all keys: every column of the rows is stored, in place or (MAPPED) where its token is; and P V."""
    for MASK_KEYS in tl.static_range(2):
        first, last = (keys.full, keys.kv_len) if MASK_KEYS else (0, keys.full)
        for n in tl.range(first, last, keys.cols.shape[0], num_stages=1 if MASK_KEYS else None):
            s = _scores(q, n, keys, scale, HAS_BIAS, MASK_KEYS, MASK_D, PRECISION)
            p = _exp(s, shift[:, None], scale, HAS_BIAS)
            if not FOLDED:
                p *= inv_sum[:, None]
            if HAS_DROPOUT:
                p = _dropped(p, n, keys, drop, drop.rescale)
            p = p.to(probs.ptr.dtype.element_ty)
            cols = n + keys.cols
            at = cols
            if MAPPED:
                at = tl.load(probs.token_ptr + probs.start + cols, mask=cols < keys.kv_len, other=0) - probs.first_token
            mask = probs.row_mask & (cols < keys.kv_len)[None, :] if MASK_KEYS else probs.row_mask
            tl.store(probs.ptr + (probs.row_offsets + at[None, :]), p, mask=mask)
            v = _values(n, keys, MASK_KEYS, MASK_D)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    _store_zeros(probs, keys.kv_len, probs.row_mask, keys.cols, MAPPED)
    return acc


@triton.jit
def _store_zeros(probs, first, row_mask, block_cols, MAPPED: tl.constexpr):
    """Zeros into columns `first`.. of the rows: padding keys, and keys that are no row."""
    BLOCK_N: tl.constexpr = block_cols.shape[0]
    whole = tl.cdiv(first, BLOCK_N) * BLOCK_N
    for WHOLE in tl.static_range(2):  # a block cut off at `first`, number by number; then whole ones, 16 bytes a store
        begin, end = (whole, probs.S) if WHOLE else (first // BLOCK_N * BLOCK_N, whole)
        for n in range(begin, end, BLOCK_N):
            cols = n + block_cols
            at = cols
            if MAPPED:
                place = tl.where(cols < probs.q_len, probs.start + cols, probs.dropped + cols - probs.q_len)
                at = tl.load(probs.token_ptr + place, mask=cols < probs.S, other=0) - probs.first_token
            mask = cols < probs.S if WHOLE else (cols < probs.S) & (cols >= first)
            tl.store(probs.ptr + (probs.row_offsets + at[None, :]), 0.0, mask=row_mask & mask[None, :])


@triton.jit(do_not_specialize=["B", "T", "site", "threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _attention_kernel(
    qkv_ptr, stride_t, bias_ptr, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    token_ptr, cu_seqlens_ptr, kv_len_ptr, prefix_ptr, seed_ptr, out_ptr, probs_ptr, lse_ptr,
    B, S, T, kv_middle, scale, site, threshold, rescale,
    H: tl.constexpr, D: tl.constexpr,  # heads and head_dim
    WANT_PROBS: tl.constexpr, UNIFORM_EMPTY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head of one sequence against all its keys."""
    follow_previous(PDL)
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
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_mask = rows < q_len
    if UNIFORM_EMPTY:  # scores of 0, those of a query of zeros, over all rows
        query_mask &= kv_len > 0
        kv_len = tl.where(kv_len == 0, q_len, kv_len)
    if WANT_PROBS:  # a tile of no rows has only zeros to store
        kv_len = tl.where(pid_m * BLOCK_M < q_len, kv_len, 0)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < D
    q_ptrs = qkv_ptr + (start + rows).to(tl.int64)[:, None] * stride_t + (h * D + d)[None, :]
    q = tl.load(q_ptrs, mask=query_mask[:, None] & d_mask[None, :] if MASK_D else query_mask[:, None], other=0.0)
    bias_offsets = (tl.minimum(rows, S - 1) * stride_bias_q)[:, None]
    if HAS_BIAS:
        bias_ptr += b.to(tl.int64) * stride_bias_b + h.to(tl.int64) * stride_bias_h
    else:
        scale *= LOG2E  # exp2 is the hardware's exponential
    # K lies HALF before `ptr` and V the rest of H * D behind it: constants within the reach of the copies' immediate
    # offsets, so that K and V share an address. How far `ptr` is from qkv_ptr is no constant, lest they be added up.
    HALF: tl.constexpr = H * D // 32 * 16
    ptr = qkv_ptr + start.to(tl.int64) * stride_t + h * D + kv_middle
    cols = tl.arange(0, BLOCK_N)
    k_offsets = cols[None, :] * stride_t + d[:, None]
    v_offsets = cols[:, None] * stride_t + d[None, :]
    keys = Keys(
        ptr, -HALF, H * D - HALF, stride_t, kv_len // BLOCK_N * BLOCK_N, kv_len, cols, k_offsets, v_offsets, d_mask,
        bias_ptr, bias_offsets, stride_bias_k,
    )  # fmt: skip
    k0, k1 = 0, 0
    if HAS_DROPOUT:
        k0, k1 = dropout_keys(seed_ptr, site, b * H + h)
    drop = Drop(k0, k1, threshold, rescale, (rows * S)[:, None])
    acc, row_max, row_sum = _softmax_pass(
        q, keys, scale, drop, not WANT_PROBS, HAS_BIAS, HAS_DROPOUT, MASK_D, PRECISION
    )
    lse = row_max + tl.math.log2(row_sum) / LOG2E if HAS_BIAS else (row_max + tl.math.log2(row_sum)) / LOG2E
    tl.store(lse_ptr + h.to(tl.int64) * T + start + rows, lse, mask=rows < q_len)
    inv_sum = 1.0 / tl.where(row_sum == 0, 1.0, row_sum)
    if WANT_PROBS:
        # The sum goes into the exponent only where its rounding, which scales a whole row, is that of a half output at
        # scores far beyond those of any model; and never next to a bias of finfo.min, which swallows it.
        FOLDED: tl.constexpr = (not HAS_BIAS) and probs_ptr.dtype.element_ty != tl.float32
        shift = row_max + tl.math.log2(row_sum) if FOLDED else tl.where(row_sum == 0, 0.0, row_max)
        dropped = tl.load(cu_seqlens_ptr + B) + b * S - start
        row_is_token = tl.where(rows < q_len, start + rows, dropped + rows - q_len)
        at = tl.load(token_ptr + row_is_token, mask=rows < S, other=0) - b * S
        probs_ptr += (b * H + h).to(tl.int64) * S * S
        probs = Probs(probs_ptr, (at * S)[:, None], (rows < q_len)[:, None], token_ptr, start, b * S, S, q_len, dropped)
        if tl.load(prefix_ptr + b) != 0:  # right padding: contiguous stores, no gather of positions
            acc = _probs_pass(acc, shift, inv_sum, q, keys, scale, probs, drop, False, FOLDED, HAS_BIAS, HAS_DROPOUT, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
        else:
            acc = _probs_pass(acc, shift, inv_sum, q, keys, scale, probs, drop, True, FOLDED, HAS_BIAS, HAS_DROPOUT, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
        if (pid_m + 1) * BLOCK_M > q_len:  # the tokens that are no row: whole rows of zeros
            _store_zeros(probs, 0, ((rows >= q_len) & (rows < S))[:, None], cols, False)
    else:
        acc *= (inv_sum * rescale if HAS_DROPOUT else inv_sum)[:, None]
    out_ptrs = out_ptr + (start + rows).to(tl.int64)[:, None] * (H * D) + (h * D + d)[None, :]
    out_mask = (rows < q_len)[:, None] & d_mask[None, :] if MASK_D else (rows < q_len)[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


def attention_triton(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, want_probs: bool, uniform_empty: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0, config: TileConfig | None = None,
) -> Triple:  # fmt: skip
    B, S, T, D = check(qkv, bias, token, kv_len, heads, scale, seed, p)
    out, probs, lse = _attention_fake(qkv, bias, token, cu_seqlens, kv_len, prefix, heads, scale, want_probs, False)
    op = "attention_probs" if want_probs or bias is not None else "attention"  # a bias, too, wants a smaller tile
    config = config or choose(op, "dim<=64" if D <= 64 else "dim<=128", qkv.dtype, capability(qkv.device))
    bias_strides = [0] * 4
    if bias is not None:
        bias_strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
    if S * max(qkv.stride(0), bias_strides[2] + bias_strides[3], S * want_probs) >= 2**31:
        raise ValueError(f"attention: S={S}, expected qkv, bias and probabilities to span < 2**31 elements a head")
    with device_guard(qkv):
        _attention_kernel[(ceil_div(S, config.BLOCK_M) * B, heads)](
            qkv, qkv.stride(0), bias, *bias_strides, token, cu_seqlens, kv_len, prefix, seed if p else None, out,
            probs, lse, B, S, T, heads * D + heads * D // 32 * 16, scale, site, threshold(p), rescale(p), H=heads, D=D,
            WANT_PROBS=want_probs, UNIFORM_EMPTY=uniform_empty, HAS_BIAS=bias is not None, HAS_DROPOUT=p > 0,
            PRECISION=dot_precision(qkv.dtype),
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_D=max(16, next_power_of_2(D)),
            num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(), **config.register_limit(),
        )  # fmt: skip
    return out, probs, lse


def _attention_fake(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, want_probs: bool, uniform_empty: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Triple:  # fmt: skip
    T, B = qkv.shape[0], kv_len.shape[0]
    probs = qkv.new_empty((B, heads, T // B, T // B) if want_probs else 0)
    return qkv.new_empty(T, qkv.shape[1] // 3), probs, qkv.new_empty(heads, T, dtype=torch.float32)


def _gradient(
    needs: Sequence[bool], inputs: Sequence[Any], outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> Grads:
    d_context, d_probs, d_lse = grads
    if d_lse is not None:  # which no model reads
        return tuple(gradients_of(attention_ref, inputs, needs, grads))
    qkv, bias, token, cu_seqlens, kv_len, prefix, heads, scale, want_probs, uniform_empty, seed, site, p = inputs
    d_qkv, d_bias = attention_backward(
        d_context, d_probs if want_probs else None, qkv, bias, outputs[0], outputs[2], token, cu_seqlens, kv_len,
        prefix, heads, scale, uniform_empty, seed, site, p, needs[1],
    )  # fmt: skip
    return (d_qkv if needs[0] else None, d_bias if needs[1] else None, *[None] * (len(inputs) - 2))


attention = register(
    "attention(Tensor qkv, Tensor? bias, Tensor token, Tensor cu_seqlens, Tensor kv_len, Tensor prefix, int heads,"
    " float scale, bool want_probs, bool uniform_empty, Tensor? seed=None, int site=0, float p=0.0)"
    " -> (Tensor, Tensor, Tensor)",
    ref=attention_ref,
    cpu=attention_cpu,
    cuda=attention_triton,
    fake=_attention_fake,
    gradient=_gradient,
    saved_outputs=(0, 2),
)
