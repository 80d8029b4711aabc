"""first_token_attention: one query a sequence, against all its keys: the last layer where only first tokens are read.

context[b, h] = softmax(scale * q[b, h] . K[b, h]^T) V[b, h], K and V packed rows as `attention` has them, without the
queries. Bytes: 2 * heads * D * sum(kv_len) of K and V, each read once; FLOP: 4 * heads * D * sum(kv_len), so no tensor
cores: bandwidth-bound.

A sequence without a key (kv_len = 0): uniform weights over its rows (uniform_empty, transformers' eager) or zeros (its
sdpa). A sequence without rows, as graphs have them: zeros. Never NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bert_fast.kernels.attention import LOG2E, LOWEST, MAX_HEAD_DIM
from bert_fast.kernels.pack import padded_rows
from bert_fast.kernels.registry import register
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, next_power_of_2, tl, triton

BLOCK = 8192  # elements of K, and of V, that a program has in flight
NUM_WARPS = 8  # 32 fp32 accumulators a thread; three programs on an SM


def first_token_attention_ref(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor, heads: int, scale: float,
    uniform_empty: bool,
) -> torch.Tensor:  # fmt: skip
    """q (B, heads * D); kv (T, 2 * heads * D) rows [K | V]; cu_seqlens (B + 1,), kv_len (B,) int32 from `pack`,
    T = B * S. Returns the context (B, heads * D)."""
    B, T = kv_len.shape[0], kv.shape[0]
    rows, is_row = padded_rows(cu_seqlens, T // B, T)
    is_key = torch.arange(T // B, device=kv.device) < kv_len[:, None]
    empty = (kv_len == 0)[:, None]
    if uniform_empty:
        is_key = is_key | (empty & is_row)
    k, v = (  # what is no key is not read: 0 * NaN would be NaN
        torch.where(is_key[:, :, None, None], x[rows], 0.0).transpose(1, 2)
        for x in kv.unflatten(1, (2, heads, -1)).unbind(1)
    )
    scores = (q.unflatten(1, (heads, 1, -1)) @ k.transpose(2, 3) * scale).squeeze(2)
    if uniform_empty:
        scores = torch.where(empty[:, None], scores - scores.detach(), scores)  # 0 that keeps the gradient
    has_key = is_key.any(1)[:, None, None]
    probs = torch.softmax(scores.masked_fill(~is_key[:, None] & has_key, float("-inf")), -1)
    probs = probs.masked_fill(~has_key, 0.0)
    return (probs[:, :, None] @ v).reshape(q.shape)


@triton.jit
def _first_token_attention_kernel(
    q_ptr, kv_ptr, cu_seqlens_ptr, kv_len_ptr, out_ptr, stride_q, stride_kv, H, scale,
    D: tl.constexpr,  # head_dim
    UNIFORM_EMPTY: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one head of one sequence. Each of BLOCK_N lanes of keys has its own softmax; merged at the end."""
    follow_previous(PDL)
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start = tl.load(cu_seqlens_ptr + b)
    kv_len = tl.load(kv_len_ptr + b)
    if UNIFORM_EMPTY:
        scale = tl.where(kv_len == 0, 0.0, scale)
        kv_len = tl.where(kv_len == 0, tl.load(cu_seqlens_ptr + b + 1) - start, kv_len)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + b.to(tl.int64) * stride_q + h * D + d, mask=d < D, other=0.0).to(tl.float32)
    q *= scale * LOG2E  # exp2 is the hardware's exponential
    lane_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
    lane_sum = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for n in range(0, kv_len, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        ptrs = kv_ptr + (start + keys).to(tl.int64)[:, None] * stride_kv + (h * D + d)[None, :]
        mask = (keys < kv_len)[:, None] & (d < D)[None, :]
        k = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(ptrs + H * D, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(keys < kv_len, tl.sum(k * q[None, :], 1), float("-inf"))
        new_max = tl.maximum(lane_max, s)
        p = tl.math.exp2(s - new_max)
        alpha = tl.math.exp2(lane_max - new_max)
        lane_sum = lane_sum * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v
        lane_max = new_max
    weight = tl.math.exp2(lane_max - tl.max(lane_max, 0))
    total = tl.sum(lane_sum * weight, 0)
    context = tl.sum(acc * weight[:, None], 0) / tl.where(kv_len == 0, 1.0, total)
    out_ptrs = out_ptr + b.to(tl.int64) * (H * D) + h * D + d
    tl.store(out_ptrs, context.to(out_ptr.dtype.element_ty), mask=d < D)


def _check(q: torch.Tensor, kv: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor, heads: int) -> None:
    op, B = "first_token_attention", kv_len.shape[0]
    if q.dim() != 2 or q.shape[0] != B or q.stride(1) != 1:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, expected ({B}, heads * D) with unit rows")
    if heads < 1 or q.shape[1] % heads or not 1 <= q.shape[1] // heads <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: q has {q.shape[1]} columns, expected heads * D = {heads} * 1..{MAX_HEAD_DIM}")
    if kv.dim() != 2 or kv.shape[1] != 2 * q.shape[1] or kv.stride(1) != 1:
        raise ValueError(f"{op}: kv has shape {tuple(kv.shape)}, expected (T, {2 * q.shape[1]}) with unit rows")
    if kv.dtype != q.dtype or kv.device != q.device:
        raise ValueError(f"{op}: kv is {kv.dtype} on {kv.device}, q is {q.dtype} on {q.device}")
    if B < 1 or kv.shape[0] % B or cu_seqlens.shape[0] != B + 1:
        raise ValueError(f"{op}: {kv.shape[0]} rows, {B} sequences and {cu_seqlens.shape[0]} bounds do not fit")


def first_token_attention_cpu(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor, heads: int, scale: float,
    uniform_empty: bool,
) -> torch.Tensor:  # fmt: skip
    """torch's fused attention, sequence by sequence on its real keys."""
    _check(q, kv, cu_seqlens, kv_len, heads)
    out, starts = q.new_zeros(q.shape), cu_seqlens.tolist()
    for b, n in enumerate(kv_len.tolist()):
        keys = n or (starts[b + 1] - starts[b] if uniform_empty else 0)
        if keys:
            k, v = kv[starts[b] : starts[b] + keys].view(1, keys, 2, heads, -1).permute(2, 0, 3, 1, 4)
            first = q[b].view(1, heads, 1, -1)
            out[b] = F.scaled_dot_product_attention(first, k, v, scale=scale if n else 0.0).flatten()
    return out


def first_token_attention_triton(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor, heads: int, scale: float,
    uniform_empty: bool,
) -> torch.Tensor:  # fmt: skip
    _check(q, kv, cu_seqlens, kv_len, heads)
    out = q.new_empty(q.shape)
    D = q.shape[1] // heads
    BLOCK_D = max(16, next_power_of_2(D))
    with device_guard(q):
        _first_token_attention_kernel[(q.shape[0] * heads,)](
            q, kv, cu_seqlens, kv_len, out, q.stride(0), kv.stride(0), heads, scale, D=D, UNIFORM_EMPTY=uniform_empty,
            BLOCK_N=BLOCK // BLOCK_D, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS, **launch_options(),
        )  # fmt: skip
    return out


def _first_token_attention_fake(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor, heads: int, scale: float,
    uniform_empty: bool,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty(q.shape)


first_token_attention = register(
    "first_token_attention(Tensor q, Tensor kv, Tensor cu_seqlens, Tensor kv_len, int heads, float scale,"
    " bool uniform_empty) -> Tensor",
    ref=first_token_attention_ref,
    cpu=first_token_attention_cpu,
    cuda=first_token_attention_triton,
    fake=_first_token_attention_fake,
)
