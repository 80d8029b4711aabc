"""What attention and its backward share: the definition, the CPU body, the check of arguments, and a masked load."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from bert_fast.kernels.dropout import check_dropout, kept_ref, rescale
from bert_fast.kernels.pack import padded_rows, positions
from bert_fast.kernels.runtime import tl, triton

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum of nothing: finite, since -inf - -inf would be NaN
MAX_HEAD_DIM = 128
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # (context, lse)


def attention_ref(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, want_probs: bool, uniform_empty: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Triple:  # fmt: skip
    """qkv (T, 3 * heads * D) packed rows; bias broadcastable to (B, heads, S, S) or None (with it, rows are tokens).

    token (T,), cu_seqlens (B+1,), kv_len (B,), prefix (B,) int32 from `pack`; T = B * S. Returns context
    (T, heads * D), probs (B, heads, S, S) or empty, lse (heads, T) fp32, natural log.

    Dropout (p > 0, kernels/dropout.py) is of the probabilities, returned and in the context; lse is without it.
    """
    B, T = kv_len.shape[0], qkv.shape[0]
    S, D = T // B, qkv.shape[1] // (3 * heads)
    rows, is_row = padded_rows(cu_seqlens, S, T)
    is_key = torch.arange(S, device=qkv.device) < kv_len[:, None]
    empty = (kv_len == 0)[:, None]
    if uniform_empty:
        is_key = is_key | (empty & is_row)
    # what is no key is not read: 0 * NaN would be NaN
    q, k, v = (
        torch.where(read[:, :, None, None], x[rows], 0.0).transpose(1, 2)
        for read, x in zip((is_row, is_key, is_key), qkv.view(T, 3, heads, D).unbind(1), strict=True)
    )
    scores = q @ k.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias
    if uniform_empty:
        scores = torch.where(empty[:, None, None], scores - scores.detach(), scores)  # 0 that keeps the gradient
    scores = scores.masked_fill(~is_key[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, dim=-1)
    dead = torch.isneginf(lse)[..., None]
    probs = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0).to(qkv.dtype)
    if p:
        assert seed is not None
        i = torch.arange(S, device=qkv.device)
        block = torch.arange(B * heads, device=qkv.device).view(B, heads, 1, 1)
        probs = torch.where(kept_ref(seed, site, block, i[:, None] * S + i, p), probs * rescale(p), 0.0)
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
def load_block(ptrs, key_mask, d_mask, MASK_KEYS: tl.constexpr, MASK_D: tl.constexpr):
    """A block of keys, values or bias, masked only where needed; then 0, since 0 * undefined memory may be NaN."""
    if MASK_KEYS:
        x = tl.load(ptrs, mask=key_mask & d_mask if MASK_D else key_mask, other=0.0)
    elif MASK_D:
        x = tl.load(ptrs, mask=d_mask, other=0.0)
    else:
        x = tl.load(ptrs)
    return x


def check(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, kv_len: torch.Tensor, heads: int, scale: float,
    seed: torch.Tensor | None, p: float,
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
    if not scale > 0:  # the kernel takes the maximum of the scores before it scales them
        raise ValueError(f"attention: scale is {scale}, expected a number above 0")
    if B < 1 or T % B:
        raise ValueError(f"attention: {T} tokens in {B} sequences, expected B * S")
    S = T // B
    if bias is not None:
        full = (B, heads, S, S)
        if bias.dim() != 4 or any(n not in (1, want) for n, want in zip(bias.shape, full, strict=True)):
            raise ValueError(f"attention: bias has shape {tuple(bias.shape)}, expected one that broadcasts to {full}")
    check_dropout("attention", seed, p, qkv.device)
    return B, S, T, D


def attention_cpu(
    qkv: torch.Tensor, bias: torch.Tensor | None, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    prefix: torch.Tensor, heads: int, scale: float, want_probs: bool, uniform_empty: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Triple:  # fmt: skip
    """torch's fused attention, all sequences at once where they are full, else one by one on their real rows."""
    B, S, T, D = check(qkv, bias, token, kv_len, heads, scale, seed, p)
    if p:
        args = (qkv, bias, token, cu_seqlens, kv_len, prefix, heads, scale, want_probs, uniform_empty)
        return attention_ref(*args, seed, site, p)
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
            # of equal weights it is known; torch's own, in half precision, uses an approximate exponential on some CPUs
            lse[:, rows] = sums[0] if n else math.log(rows.stop - rows.start)
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
    if min(keys) < v.shape[2]:  # 0 * NaN of what is no key would be NaN
        is_key = torch.arange(v.shape[2]) < torch.tensor(keys)[:, None]
        v = torch.where(is_key[:, None, :, None], v, 0.0)
    highest = scores.amax(-1)
    probs = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    # the largest probability is exp(highest - lse): no second pass of exponentials
    sums = highest.float() - probs.amax(-1).float().log()
    if bias is not None:
        dead = highest.isneginf()  # a row of nothing but -inf
        probs, sums = probs.masked_fill(dead[..., None], 0.0), sums.masked_fill(dead, float("-inf"))
    probs = probs.to(q.dtype)
    return probs @ v, probs, sums
