"""Padding modes and the packed rows of one call: what every kernel of the forward shares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from bert_fast.kernels.attention_heads_base import additive
from bert_fast.kernels.pack import pack

PADDING_MODES = ("auto", "exact", "skip")


def check_padding(padding: str) -> str:
    if padding not in PADDING_MODES:
        raise ValueError(f"padding={padding!r}: expected one of {', '.join(map(repr, PADDING_MODES))}")
    return padding


_real_tokens_only: ContextVar[bool] = ContextVar("bert_fast_real_tokens_only", default=False)


@contextlib.contextmanager
def only_real_tokens_are_read(so: bool) -> Iterator[None]:
    """Within, in this thread: whoever calls a model reads no padding position of its last_hidden_state."""
    before = _real_tokens_only.set(so)
    try:
        yield
    finally:
        _real_tokens_only.reset(before)


def resolve_padding(padding: str, first_token_only: bool, returns_positions: bool) -> str:
    """"exact" or "skip" for one call.

    first_token_only: a head reads nothing else; returns_positions: hidden states or attentions leave the model too.
    "auto" skips only where nobody can see the difference.
    """
    if padding == "auto":
        unseen = first_token_only or _real_tokens_only.get()
        return "skip" if unseen and not returns_positions else "exact"
    return padding


def relative_mask(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A bias (1, heads, S, S) of all scores and a mask as `make_packing` takes it, as one additive 4-D mask."""
    if mask is None:
        return bias
    keep = mask if mask.dim() == 4 else (mask != 0)[:, None, None]
    return bias + additive(keep.to(bias.device), bias.dtype)


def own_mask(mask: torch.Tensor | None, eager: bool, dropout: float) -> torch.Tensor | None:
    """An additive 4-D mask for a forward that has a backward: a copy, since the caller may write into his before that.

    transformers lets him but in one case, where its backward reads the mask: sdpa's fused attention, which torch takes
    without dropout and where no gradient of the mask is wanted. There it is the caller's own, and torch refuses.
    """
    if mask is None or not torch.is_grad_enabled() or not (eager or dropout or mask.requires_grad):
        return mask
    return mask[tuple(slice(None if stride else 1) for stride in mask.stride())].clone()


@dataclass(frozen=True)
class Packing:
    """Row <-> token map and lengths of one call, from kernels/pack.py."""

    B: int
    S: int
    identity: bool  # known on the host: row r is token r, so rows (T, H) are the padded tensor (B, S, H)
    token: torch.Tensor  # int32 (B * S,)
    cu_seqlens: torch.Tensor  # int32 (B + 1,)
    kv_len: torch.Tensor  # int32 (B,)
    prefix: torch.Tensor  # int32 (B,)
    n_rows: torch.Tensor | None  # int32 (1,) on the device, or None: all B * S
    bias: torch.Tensor | None  # additive, broadcasts to (B, heads, S, S)


def make_packing(
    mask: torch.Tensor | None,
    B: int,
    S: int,
    device: torch.device,
    skip: bool,
    uniform_empty: bool,
    shape: torch.Tensor | None = None,
) -> Packing:
    """Packing of one call. mask: (B, S) of any dtype, 4-D additive float, 4-D bool (keep), or None.

    shape: int32 (2,) on the device, the true batch and length where (B, S) is a graph's bucket; no 4-D mask then.
    uniform_empty: rows without any key get uniform weights (eager) rather than a context of zeros (sdpa).
    """
    bias = None
    if mask is not None and mask.dim() == 4:
        bias, mask = mask, None
        if bias.dtype == torch.bool:
            fill = torch.finfo(torch.float32).min if uniform_empty else float("-inf")
            bias = torch.where(bias, torch.zeros((), dtype=torch.float32, device=device), fill)
    skip = skip and mask is not None
    identity = mask is None and shape is None
    if mask is None:
        mask = torch.ones((), dtype=torch.uint8, device=device).expand(B, S)
    token, cu_seqlens, kv_len, prefix = pack(mask.to(device), skip, shape)
    n_rows = cu_seqlens[B:] if skip or shape is not None else None
    return Packing(B, S, identity, token, cu_seqlens, kv_len, prefix, n_rows, bias)
