"""What attention_heads' kernel and gradient stand on: definition, CPU body, masks, and the check of arguments."""

from __future__ import annotations

import torch

from bert_fast.kernels.attention_base import MAX_HEAD_DIM, Triple
from bert_fast.kernels.dropout import check_dropout, kept_ref, rescale

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # (context, lse); takes grouped heads


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask in numbers to add: of a bool one 0, and the lowest of `dtype` where nothing is kept."""
    if mask.dtype != torch.bool:
        return mask
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # eager's softmax of float64 is in fp32
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


def causal_mask(rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """Bool (1, 1, rows, cols), True where query i may see key j: j <= i."""
    return torch.ones(rows, cols, dtype=torch.bool, device=device).tril_()[None, None]


def attention_heads_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float,
    want_probs: bool, seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Triple:  # fmt: skip
    """q (B, H, Sq, D), k and v (B, Hkv, Skv, D) of one dtype, H a multiple of Hkv; mask None or broadcastable to
    (B, H, Sq, Skv), bool (keep) or floating (added). causal: query i sees keys 0..i (torch's alignment, upper left),
    without a mask beside it.

    Returns context (B, Sq, H, D) contiguous, probs (B, H, Sq, Skv) or empty, lse (H, B * Sq) fp32, natural log.
    Dropout (p > 0, kernels/dropout.py) is of the probabilities, returned and in the context; lse is without it.
    """
    B, H, Hkv, Sq, Skv, _ = check(q, k, v, mask, causal, scale, seed, p)
    k, v = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    wide = torch.promote_types(q.dtype, torch.float32)
    if causal:
        scores = scores.masked_fill(~causal_mask(Sq, Skv, q.device), float("-inf"))
    if mask is not None:
        scores = scores + additive(mask, wide)
    lse = torch.logsumexp(scores.to(wide), dim=-1)
    dead = torch.isneginf(lse)[..., None]
    probs = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0).to(q.dtype)
    if p:
        assert seed is not None
        i, j = torch.arange(Sq, device=q.device), torch.arange(Skv, device=q.device)
        block = torch.arange(B * H, device=q.device).view(B, H, 1, 1)
        probs = torch.where(kept_ref(seed, site, block, i[:, None] * Skv + j, p), probs * rescale(p), 0.0)
    context = (probs @ v).transpose(1, 2).contiguous()
    return context, probs if want_probs else q.new_empty(0), _by_head(lse)


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float,
    seed: torch.Tensor | None, p: float,
) -> tuple[int, int, int, int, int, int]:  # fmt: skip
    """B, H, Hkv, Sq, Skv and D."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or 0 in x.shape or x.stride(3) != 1:
            got = f"{tuple(x.shape)} and strides {x.stride()}"
            raise ValueError(f"attention_heads: {name} has shape {got}, expected (B, heads, S, D) with unit rows")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"attention_heads: {name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}")
    (B, H, Sq, D), (Hkv, Skv) = q.shape, k.shape[1:3]
    if k.shape != (B, Hkv, Skv, D) or v.shape != k.shape or H % Hkv:
        raise ValueError(
            f"attention_heads: q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}, expected"
            " (B, H, Sq, D) and twice (B, Hkv, Skv, D), H a multiple of Hkv"
        )
    if D > MAX_HEAD_DIM:
        raise ValueError(f"attention_heads: head_dim is {D}, expected at most {MAX_HEAD_DIM}")
    if not 0 < scale < float("inf"):  # the kernel takes the maximum of the scores before it scales them
        raise ValueError(f"attention_heads: scale is {scale}, expected a number above 0")
    if mask is not None:
        full = (B, H, Sq, Skv)
        if mask.dim() != 4 or any(n not in (1, want) for n, want in zip(mask.shape, full, strict=True)):
            raise ValueError(
                f"attention_heads: mask has shape {tuple(mask.shape)}, expected one that broadcasts to {full}"
            )
        if (mask.dtype != torch.bool and not mask.is_floating_point()) or mask.device != q.device:
            got = f"{mask.dtype} on {mask.device}"
            raise ValueError(f"attention_heads: mask is {got}, expected bool or floating on {q.device}")
        if causal:
            raise ValueError("attention_heads: causal=True and a mask, expected one of them")
    check_dropout("attention_heads", seed, p, q.device)
    return B, H, Hkv, Sq, Skv, D


def attention_heads_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float,
    want_probs: bool, seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Triple:  # fmt: skip
    """torch's fused attention; with probabilities two products, a group's queries together against its keys."""
    B, H, Hkv, Sq, Skv, D = check(q, k, v, mask, causal, scale, seed, p)
    if p:
        return attention_heads_ref(q, k, v, mask, causal, scale, want_probs, seed, site, p)
    wide = torch.promote_types(q.dtype, torch.float32)
    added = None if mask is None else additive(mask, wide).to(wide)
    if not want_probs:
        context, lse = _flash(q, k, v, is_causal=causal, attn_mask=added, scale=scale)
        probs = q.new_empty(0)
    else:
        scores = (q.reshape(B, Hkv, -1, D) @ k.transpose(2, 3)).view(B, H, Sq, Skv).mul_(scale)
        if causal:
            scores = scores.masked_fill_(~causal_mask(Sq, Skv, q.device), float("-inf"))
        scores = scores if added is None else scores + added
        highest = scores.amax(-1)
        probs = torch.softmax(scores, -1, dtype=wide)
        lse = highest - probs.amax(-1).log()  # the largest probability is exp(highest - lse)
        if mask is not None:
            probs = probs.masked_fill(highest.isneginf()[..., None], 0.0)
        probs = probs.to(q.dtype)
        context = (probs.view(B, Hkv, -1, Skv) @ v).view(B, H, Sq, D)
    if mask is not None and mask.dtype != torch.bool:
        dead = mask.isneginf().all(-1)
        lse = lse.masked_fill(dead.expand(B, H, Sq), float("-inf"))
    return context.transpose(1, 2).contiguous(), probs, _by_head(lse.float())


def _by_head(lse: torch.Tensor) -> torch.Tensor:
    """(B, H, Sq) -> (H, B * Sq), contiguous."""
    return lse.transpose(0, 1).contiguous().flatten(1)
