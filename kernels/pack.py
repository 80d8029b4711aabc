"""pack: attention_mask (B, S) to the row <-> token map and the lengths, on the device; no mask exists after it.

Rows are the tokens of the batch, sequence after sequence, real tokens first within each sequence. Row r stands for
token `token[r] = b * S + s`. `token` is a permutation of all B * S tokens: the first `cu_seqlens[B]` entries are the
rows, the rest the tokens that became no row, sequence after sequence too, so that one map serves to gather, to
scatter and to zero what was dropped.

skip=False: every token is a row (q_len = S); its real ones are the keys.
skip=True: rows are the real tokens, plus position 0 of every sequence (the pooler reads it; when it is padding it is
the last row and no key); a sequence without a real token keeps all S rows.

shape: the mask is a buffer larger than the batch in it (a graph's), whose true (B, S) only the device knows. What lies
outside is neither row nor key and comes last in `token`; a sequence outside has no rows, S above is the true one.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.registry import register
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, next_power_of_2, tl, triton

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def pack_ref(mask: torch.Tensor, skip: bool, shape: torch.Tensor | None = None) -> Packed:
    """mask (B, S), any dtype, non-zero = real; shape: int32 (2,), the true (B, S), or None: all of the mask.

    Returns int32: token (B*S,), cu_seqlens (B+1,), kv_len (B,) keys of each sequence, prefix (B,) 1 where row j of
    the sequence is position j (right padding or none).
    """
    B, S = mask.shape
    position = torch.arange(S, device=mask.device)
    inside = torch.ones_like(mask, dtype=torch.bool)
    if shape is not None:
        inside = (torch.arange(B, device=mask.device) < shape[0])[:, None] & (position < shape[1])
    real = (mask != 0) & inside
    kv_len = real.sum(1)
    is_row = real | inside & ((position == 0) | (kv_len == 0)[:, None]) if skip else inside
    # rank 0: real, 1: padding that is a row, 2: dropped; stable within a rank
    rank = torch.where(real, 0, torch.where(is_row, 1, 2))
    order = torch.sort(rank, dim=1, stable=True).indices
    prefix = (order == position).all(1)
    q_len = is_row.sum(1)
    tokens = (order + S * torch.arange(B, device=mask.device)[:, None]).flatten()
    dropped = (position >= q_len[:, None]).flatten()
    token = torch.cat([tokens[~dropped], tokens[dropped]])
    cu_seqlens = torch.cat([q_len.new_zeros(1), q_len.cumsum(0)])
    return token.int(), cu_seqlens.int(), kv_len.int(), prefix.int()


def padded_rows(cu_seqlens: torch.Tensor, S: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) index of row j of each sequence (clamped into range) and whether there is such a row."""
    j = torch.arange(S, device=cu_seqlens.device)
    rows = cu_seqlens[:-1, None].long() + j
    return rows.clamp(max=T - 1), j < (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]


def positions(token: torch.Tensor, cu_seqlens: torch.Tensor, S: int) -> torch.Tensor:
    """(B, S) position of the j-th place of each sequence: its rows, then its dropped tokens (see pack.py)."""
    B = cu_seqlens.shape[0] - 1
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    j = torch.arange(S, device=token.device)
    b = torch.arange(B, device=token.device)
    dropped = cu_seqlens[-1].long() + b * S - start
    place = torch.where(j < (end - start)[:, None], start[:, None] + j, (dropped - (end - start))[:, None] + j)
    return token[place].long() - (b * S)[:, None]


@triton.jit
def _true_length(shape_ptr, b, S, HAS_SHAPE: tl.constexpr):
    """Positions of sequence b that are inside the batch; the others are never loaded."""
    if HAS_SHAPE:
        S = tl.where(b < tl.load(shape_ptr), tl.minimum(tl.load(shape_ptr + 1), S), 0)
    return S


@triton.jit(do_not_specialize=["S", "stride_b"])
def _row_count_kernel(
    mask_ptr, stride_b, stride_s, shape_ptr, q_len_ptr, S,
    HAS_SHAPE: tl.constexpr, PDL: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    b = tl.program_id(0)
    S = _true_length(shape_ptr, b, S, HAS_SHAPE)
    row_ptr = mask_ptr + b.to(tl.int64) * stride_b
    count = 0
    for s in range(0, S, BLOCK_S):
        cols = s + tl.arange(0, BLOCK_S)
        real = tl.load(row_ptr + cols.to(tl.int64) * stride_s, mask=cols < S, other=0) != 0
        count += tl.sum(real.to(tl.int32), 0)
    first_is_padding = (tl.load(row_ptr) == 0).to(tl.int32)
    tl.store(q_len_ptr + b, tl.where(count == 0, S, count + first_is_padding))


@triton.jit(do_not_specialize=["B", "S", "stride_b"])
def _pack_kernel(
    mask_ptr, stride_b, stride_s,
    shape_ptr,  # int32 (2,): the true B and S; absent: the mask's
    q_len_ptr,  # int32 (B,): rows of each sequence; absent: the true S each
    token_ptr, cu_seqlens_ptr, kv_len_ptr, prefix_ptr, B, S,
    SKIP: tl.constexpr, HAS_SHAPE: tl.constexpr, PDL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    b = tl.program_id(0)
    q_len = _true_length(shape_ptr, b, S, HAS_SHAPE)
    length = q_len
    start = b * S
    total = B * S
    if HAS_SHAPE:
        true_S = tl.minimum(tl.load(shape_ptr + 1), S)
        start = tl.minimum(b, tl.load(shape_ptr)) * true_S
        total = tl.minimum(B, tl.load(shape_ptr)) * true_S
    if SKIP:  # every program sums the B counts itself: cheaper than a scan kernel between
        start = 0
        total = 0
        for first in range(0, B, BLOCK_B):
            others = first + tl.arange(0, BLOCK_B)
            counts = tl.load(q_len_ptr + others, mask=others < B, other=0)
            start += tl.sum(tl.where(others < b, counts, 0), 0)
            total += tl.sum(counts, 0)
        q_len = tl.load(q_len_ptr + b)
    row_ptr = mask_ptr + b.to(tl.int64) * stride_b
    kv_len = 0
    for s in range(0, S, BLOCK_S):
        cols = s + tl.arange(0, BLOCK_S)
        real = tl.load(row_ptr + cols.to(tl.int64) * stride_s, mask=cols < length, other=0) != 0
        kv_len += tl.sum(real.to(tl.int32), 0)
    dropped_start = total + b * S - start
    seen = 0  # real tokens before this block
    moved = 0
    for s in range(0, S, BLOCK_S):
        position = s + tl.arange(0, BLOCK_S)
        inside = position < S
        real = tl.load(row_ptr + position.to(tl.int64) * stride_s, mask=position < length, other=0) != 0
        before = seen + tl.cumsum(real.to(tl.int32), 0) - real.to(tl.int32)
        # what is not real follows in order: a padding position 0 is row kv_len, what is outside comes last
        place = tl.where(real, before, kv_len + position - before)
        row = tl.where(place < q_len, start + place, dropped_start + place - q_len)
        tl.store(token_ptr + row, b * S + position, mask=inside)
        seen += tl.sum(real.to(tl.int32), 0)
        moved += tl.sum((inside & (real != (position < kv_len))).to(tl.int32), 0)
    tl.store(kv_len_ptr + b, kv_len)
    tl.store(prefix_ptr + b, (moved == 0).to(tl.int32))
    tl.store(cu_seqlens_ptr + b + 1, start + q_len)
    if b == 0:
        tl.store(cu_seqlens_ptr, 0)


def check_mask(mask: torch.Tensor, shape: torch.Tensor | None) -> None:
    if mask.dim() != 2 or 0 in mask.shape:
        raise ValueError(f"pack: mask has shape {tuple(mask.shape)}, expected (B, S) with B and S at least 1")
    if mask.numel() >= 2**31:
        raise ValueError(f"pack: mask has {mask.numel()} tokens, expected fewer than 2**31")
    if shape is not None and (tuple(shape.shape) != (2,) or shape.dtype != torch.int32 or shape.device != mask.device):
        raise ValueError(
            f"pack: shape is {tuple(shape.shape)} {shape.dtype} on {shape.device}, expected (2,) torch.int32 on "
            f"{mask.device}, where the mask is"
        )


def pack_triton(mask: torch.Tensor, skip: bool, shape: torch.Tensor | None = None) -> Packed:
    check_mask(mask, shape)
    B, S = mask.shape
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    token, cu_seqlens, kv_len, prefix = (mask.new_empty(n, dtype=torch.int32) for n in (B * S, B + 1, B, B))
    q_len = mask.new_empty(B, dtype=torch.int32) if skip else None
    BLOCK_S = min(max(next_power_of_2(S), 128), 1024)
    flags = dict(HAS_SHAPE=shape is not None, BLOCK_S=BLOCK_S, num_warps=4, **launch_options())
    with device_guard(mask):
        if q_len is not None:
            _row_count_kernel[(B,)](mask, *mask.stride(), shape, q_len, S, **flags)
        _pack_kernel[(B,)](
            mask, *mask.stride(), shape, q_len, token, cu_seqlens, kv_len, prefix, B, S,
            SKIP=skip, BLOCK_B=1024, **flags,
        )  # fmt: skip
    return token, cu_seqlens, kv_len, prefix


def pack_cpu(mask: torch.Tensor, skip: bool, shape: torch.Tensor | None = None) -> Packed:
    check_mask(mask, shape)
    return pack_ref(mask, skip, shape)


def _pack_fake(mask: torch.Tensor, skip: bool, shape: torch.Tensor | None = None) -> Packed:
    B, S = mask.shape
    token, cu_seqlens, kv_len, prefix = (mask.new_empty(n, dtype=torch.int32) for n in (B * S, B + 1, B, B))
    return token, cu_seqlens, kv_len, prefix


pack = register(
    "pack(Tensor mask, bool skip, Tensor? shape=None) -> (Tensor, Tensor, Tensor, Tensor)",
    ref=pack_ref,
    cpu=pack_cpu,
    cuda=pack_triton,
    fake=_pack_fake,
)
