"""attention_heads: softmax(scale * Q K^T + mask) V over heads (B, H, S, D) of any strides, grouped, causal or masked.

What transformers' attention interface asks of an attention function: queries and keys of different number, k and v of
fewer heads (query head h reads head h // group, nothing is repeated in memory), a mask of bools or of numbers to add.
attention.py is the same arithmetic on packed rows: one pass over the keys, two where probabilities are stored. FLOP: 4
(with them 6) * B * heads * D * Sq * Skv, half of them where causal and Sq = Skv; bytes: q, k, v and context once, the
mask once a head (its reads after the first come from L2).

A query that may attend to nothing. Bool mask: a score that is masked is the lowest number, so such a row has uniform
weights over all Skv keys (transformers' eager). Additive mask of -inf: zeros. Never NaN.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch

from bert_fast.kernels.attention import Drop, _dropped
from bert_fast.kernels.attention_backward import attention_backward
from bert_fast.kernels.attention_base import LOG2E, LOWEST, Triple, load_block
from bert_fast.kernels.attention_heads_base import (
    additive,
    attention_heads_cpu,
    attention_heads_ref,
    causal_mask,
    check,
)
from bert_fast.kernels.configs import TileConfig, choose
from bert_fast.kernels.dropout import dropout_keys, rescale, threshold
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

__all__ = ["attention_heads", "attention_heads_cpu", "attention_heads_ref", "attention_heads_triton"]

# Of a program, for all blocks of keys; offsets within one head's keys have 32 bits, for the sake of registers. Blocks
# below `full` need no mask of their own; keys from `end` on are none, or none of these rows'.
Keys = namedtuple(
    "Keys",
    "k_ptr v_ptr stride_kn stride_vn k_offsets v_offsets cols rows d_mask full end mask_ptr mask_offsets stride_mask_n",
)


@triton.jit
def _scores(
    q, n, keys, scale, MASK: tl.constexpr, CAUSAL: tl.constexpr, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the key block at n: q . k without a mask, which `_exp` scales; with one scaled and masked."""
    cols = (n + keys.cols)[None, :]
    is_key = cols < keys.end
    k_ptrs = keys.k_ptr + (n * keys.stride_kn + keys.k_offsets)
    s = tl.dot(q, load_block(k_ptrs, is_key, keys.d_mask[:, None], MASK_KEYS, MASK_D), input_precision=PRECISION)
    if MASK != "none":
        mask_ptrs = keys.mask_ptr + (keys.mask_offsets + cols * keys.stride_mask_n)
        mask = load_block(mask_ptrs, is_key, is_key, MASK_KEYS, False)
        s = tl.where(mask != 0, s * scale, LOWEST) if MASK == "keep" else s * scale + mask.to(tl.float32)
    if MASK_KEYS:
        if CAUSAL:
            is_key = is_key & (cols <= keys.rows[:, None])
        s = tl.where(is_key, s, float("-inf"))
    return s


@triton.jit
def _exp(s, shift, scale, MASK: tl.constexpr):
    """Numbers are logarithms of 2 but next to an added mask, where finfo.min * log2(e) would overflow."""
    if MASK == "none":
        return tl.math.exp2(s * scale - shift)
    return tl.math.exp2(s - shift) if MASK == "keep" else tl.math.exp2((s - shift) * LOG2E)


@triton.jit
def _values(n, keys, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr):
    v_ptrs = keys.v_ptr + (n * keys.stride_vn + keys.v_offsets)
    return load_block(v_ptrs, (n + keys.cols)[:, None] < keys.end, keys.d_mask[None, :], MASK_KEYS, MASK_D)


@triton.jit
def _softmax_pass(
    q, keys, scale, drop, WITH_V: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over all keys: WITH_V exponentials times V; maximum of the scores; sum of the exponentials."""
    acc = tl.zeros(q.shape, tl.float32)
    row_max = tl.full((q.shape[0],), LOWEST, tl.float32)
    row_sum = tl.zeros((q.shape[0],), tl.float32)
    for MASK_KEYS in tl.static_range(2):  # as in attention.py: what needs a mask is a loop of its own, not pipelined
        first, last = (keys.full, keys.end) if MASK_KEYS else (0, keys.full)
        for n in tl.range(first, last, keys.cols.shape[0], num_stages=1 if MASK_KEYS else None):
            s = _scores(q, n, keys, scale, MASK, CAUSAL, MASK_KEYS, MASK_D, PRECISION)
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale if MASK == "none" else tl.max(s, 1))  # scale > 0
            p = _exp(s, new_max[:, None], scale, MASK)
            alpha = _exp(row_max, new_max, 1.0, MASK)
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
    acc, row_max, inv_sum, q, keys, scale, drop, probs_ptrs, row_mask, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Again over all keys: the probabilities are stored; and P V. probs_ptrs: of the rows' first key."""
    for MASK_KEYS in tl.static_range(2):
        first, last = (keys.full, keys.end) if MASK_KEYS else (0, keys.full)
        for n in tl.range(first, last, keys.cols.shape[0], num_stages=1 if MASK_KEYS else None):
            s = _scores(q, n, keys, scale, MASK, CAUSAL, MASK_KEYS, MASK_D, PRECISION)
            p = _exp(s, row_max[:, None], scale, MASK) * inv_sum[:, None]
            if HAS_DROPOUT:
                p = _dropped(p, n, keys, drop, drop.rescale)
            cols = (n + keys.cols)[None, :]
            v = _values(n, keys, MASK_KEYS, MASK_D)
            p = p.to(v.dtype)
            tl.store(probs_ptrs + cols, p, mask=row_mask & (cols < keys.end) if MASK_KEYS else row_mask)
            acc = tl.dot(p, v, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["B", "site", "threshold"], do_not_specialize_on_alignment=["seed_ptr"])
def _attention_heads_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn, mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    seed_ptr, out_ptr, probs_ptr, lse_ptr, B, Sq, Skv, group, scale, site, threshold, rescale,
    D: tl.constexpr, WANT_PROBS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head of one sequence against their keys. MASK: none, keep or add."""
    follow_previous(PDL)
    MASK_D: tl.constexpr = BLOCK_D != D
    tiles_m = tl.cdiv(Sq, BLOCK_M)
    pid_m = tl.program_id(0) % tiles_m
    if CAUSAL:  # those with most keys begin
        pid_m = tiles_m - 1 - pid_m
    first_row = pid_m * BLOCK_M
    b = (tl.program_id(0) // tiles_m).to(tl.int64)
    H = tl.num_programs(1)
    h = tl.program_id(1).to(tl.int64)
    row_in_tile = tl.arange(0, BLOCK_M)
    rows = first_row + row_in_tile
    row_mask = (rows < Sq)[:, None]
    d = tl.arange(0, BLOCK_D)
    d_mask = d < D
    q_ptr += b * stride_qb + h * stride_qh + first_row.to(tl.int64) * stride_qm
    q_ptrs = q_ptr + ((row_in_tile * stride_qm)[:, None] + d[None, :])
    q = load_block(q_ptrs, row_mask, d_mask[None, :], True, MASK_D)
    mask_offsets = (tl.minimum(row_in_tile, Sq - 1 - first_row) * stride_mask_m)[:, None]
    if MASK != "none":
        mask_ptr += b * stride_mask_b + h * stride_mask_h + first_row.to(tl.int64) * stride_mask_m
    if MASK != "add":
        scale *= LOG2E  # exp2 is the hardware's exponential
    end = Skv
    full = Skv // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(Skv, first_row + BLOCK_M)
        full = tl.minimum(full, (first_row + 1) // BLOCK_N * BLOCK_N)
    k_ptr += b * stride_kb + (h // group) * stride_kh
    v_ptr += b * stride_vb + (h // group) * stride_vh
    cols = tl.arange(0, BLOCK_N)
    k_offsets = (cols * stride_kn)[None, :] + d[:, None]
    v_offsets = (cols * stride_vn)[:, None] + d[None, :]
    keys = Keys(
        k_ptr, v_ptr, stride_kn, stride_vn, k_offsets, v_offsets, cols, rows, d_mask, full, end, mask_ptr,
        mask_offsets, stride_mask_n,
    )  # fmt: skip
    k0, k1 = 0, 0
    if HAS_DROPOUT:
        k0, k1 = dropout_keys(seed_ptr, site, (b * H + h).to(tl.int32))
    drop = Drop(k0, k1, threshold, rescale, (rows * Skv)[:, None])
    acc, row_max, row_sum = _softmax_pass(
        q, keys, scale, drop, not WANT_PROBS, MASK, CAUSAL, HAS_DROPOUT, MASK_D, PRECISION
    )
    lse = row_max + tl.math.log2(row_sum) / LOG2E if MASK == "add" else (row_max + tl.math.log2(row_sum)) / LOG2E
    if MASK == "keep":
        lse = tl.where(row_max == LOWEST, LOWEST, lse)
    tl.store(lse_ptr + h * (B * Sq) + b * Sq + rows, lse, mask=rows < Sq)
    inv_sum = 1.0 / tl.where(row_sum == 0, 1.0, row_sum)
    if WANT_PROBS:
        probs_ptr += ((b * H + h) * Sq + first_row) * Skv
        probs_ptrs = probs_ptr + (row_in_tile * Skv)[:, None]
        acc = _probs_pass(acc, row_max, inv_sum, q, keys, scale, drop, probs_ptrs, row_mask, MASK, CAUSAL, HAS_DROPOUT, MASK_D, PRECISION)  # noqa: E501  # fmt: skip
        if CAUSAL:
            for n in range(end // BLOCK_N * BLOCK_N, Skv, BLOCK_N):
                later = (n + cols)[None, :]
                tl.store(probs_ptrs + later, 0.0, mask=row_mask & (later >= end) & (later < Skv))
    else:
        acc *= (inv_sum * rescale if HAS_DROPOUT else inv_sum)[:, None]
    out_ptr += ((b * Sq + first_row) * H + h) * D
    out_ptrs = out_ptr + ((row_in_tile * (H * D))[:, None] + d[None, :])
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=row_mask & d_mask[None, :] if MASK_D else row_mask)


def attention_heads_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float,
    want_probs: bool, seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
    config: TileConfig | None = None,
) -> Triple:  # fmt: skip
    B, H, Hkv, Sq, Skv, D = check(q, k, v, mask, causal, scale, seed, p)
    if Skv * max(k.stride(2), v.stride(2)) >= 2**31:
        raise ValueError(f"attention_heads: {Skv} keys of strides {k.stride(2)}, {v.stride(2)}: expected < 2**31")
    out, probs, lse = _attention_heads_fake(q, k, v, mask, causal, scale, want_probs)
    # the tiles of attention.py; beside a mask, too, a smaller one
    op = "attention_probs" if want_probs or mask is not None else "attention"
    config = config or choose(op, "dim<=64" if D <= 64 else "dim<=128", q.dtype, capability(q.device))
    kind, mask_strides = "none", [0] * 4
    if mask is not None:
        kind, mask = ("keep", mask.view(torch.uint8)) if mask.dtype == torch.bool else ("add", mask)
        mask_strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    with device_guard(q):
        _attention_heads_kernel[(ceil_div(Sq, config.BLOCK_M) * B, H)](
            q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], mask, *mask_strides, seed if p else None, out,
            probs, lse, B, Sq, Skv, H // Hkv, scale, site, threshold(p), rescale(p), D=D, WANT_PROBS=want_probs,
            MASK=kind, CAUSAL=causal, HAS_DROPOUT=p > 0, PRECISION=dot_precision(q.dtype),
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_D=max(16, next_power_of_2(D)),
            num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(), **config.register_limit(),
        )  # fmt: skip
    return out, probs, lse


def _attention_heads_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float,
    want_probs: bool, seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Triple:  # fmt: skip
    B, H, Sq, D = q.shape
    probs = q.new_empty((B, H, Sq, k.shape[2]) if want_probs else 0)
    return q.new_empty(B, Sq, H, D), probs, q.new_empty(H, B * Sq, dtype=torch.float32)


def _gradient(
    needs: Sequence[bool], inputs: Sequence[Any], outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> Grads:
    """By attention_backward where queries and keys are as many: one copy into its packed rows, grouped heads repeated.

    It knows no causal order, which becomes a mask there.
    """
    q, k, v, mask, causal, scale, want_probs, seed, site, p = inputs
    d_context, d_lse = grads[0], grads[2]
    d_probs = grads[1] if want_probs else None
    (B, H, S, D), (Hkv, Skv) = q.shape, k.shape[1:3]
    if d_lse is not None or S != Skv:
        return tuple(gradients_of(attention_heads_ref, inputs, needs, grads))
    if d_context is None and d_probs is None:
        return (None,) * len(inputs)
    qkv = q.new_empty(B, S, 3, H, D)
    qkv[:, :, 0] = q.transpose(1, 2)
    for i, x in ((1, k), (2, v)):
        qkv[:, :, i].view(B, S, Hkv, -1, D).copy_(x.transpose(1, 2)[:, :, :, None])
    bias = causal_mask(S, S, q.device) if causal else mask
    if bias is not None:  # of finfo.min in fp16 a score would still show
        bias = additive(bias, torch.float32 if q.dtype == torch.float16 else q.dtype)
    token = torch.arange(B * S, dtype=torch.int32, device=q.device)
    starts = torch.arange(B + 1, dtype=torch.int32, device=q.device) * S
    lengths = torch.full((B,), S, dtype=torch.int32, device=q.device)
    d_qkv, d_mask = attention_backward(
        None if d_context is None else d_context.reshape(B * S, H * D), d_probs,
        qkv.view(B * S, 3 * H * D), bias, outputs[0].view(B * S, H * D), outputs[2], token, starts, lengths,
        torch.ones_like(lengths), H, scale, False, seed, site, p, needs[3],
    )  # fmt: skip
    d_q, d_k, d_v = d_qkv.view(B, S, 3, H, D).unbind(2)
    if H != Hkv:
        d_k, d_v = (x.reshape(B, S, Hkv, -1, D).sum(3) for x in (d_k, d_v))
    found = (*(x.transpose(1, 2) for x in (d_q, d_k, d_v)), d_mask)
    return (*(x if need else None for x, need in zip(found, needs, strict=False)), *[None] * (len(inputs) - 4))


attention_heads = register(
    "attention_heads(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, bool want_probs,"
    " Tensor? seed=None, int site=0, float p=0.0) -> (Tensor, Tensor, Tensor)",
    ref=attention_heads_ref,
    cpu=attention_heads_cpu,
    cuda=attention_heads_triton,
    fake=_attention_heads_fake,
    gradient=_gradient,
    saved_outputs=(0, 2),
)
