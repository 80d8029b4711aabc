"""first_rows: the row of every sequence's first position, (T, N) rows -> (B, N).

Position 0 is row 0 of its sequence when it is a real token and the row after the real ones when it is padding (see
pack.py). A sequence without rows, as graphs have them, gets zeros. Bytes: 2 * B * N read and written.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.registry import register
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, next_power_of_2, tl, triton


def first_rows_ref(
    rows: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor
) -> torch.Tensor:
    """rows (T, N); token (T,), cu_seqlens (B + 1,), kv_len (B,) int32 from `pack`, T = B * S."""
    T, B = rows.shape[0], kv_len.shape[0]
    start = cu_seqlens[:-1].long().clamp(max=T - 1)
    is_real = token[start] == torch.arange(B, device=token.device) * (T // B)
    first = torch.where(is_real, start, start + kv_len).clamp(max=T - 1)
    exists = cu_seqlens[1:] > cu_seqlens[:-1]
    return torch.where(exists[:, None], rows[first], 0.0)


@triton.jit(do_not_specialize=["S"])
def _first_rows_kernel(
    rows_ptr, token_ptr, cu_seqlens_ptr, kv_len_ptr, out_ptr, S, N, stride_t, PDL: tl.constexpr, BLOCK_N: tl.constexpr
):
    follow_previous(PDL)
    b = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + b)
    exists = tl.load(cu_seqlens_ptr + b + 1) > start
    is_padding = tl.load(token_ptr + start, mask=exists, other=0) != b * S
    first = (start + tl.where(is_padding, tl.load(kv_len_ptr + b), 0)).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    row = tl.load(rows_ptr + first * stride_t + cols, mask=exists & (cols < N), other=0.0)
    tl.store(out_ptr + b.to(tl.int64) * N + cols, row, mask=cols < N)


def _check(rows: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor) -> None:
    T, B = token.shape[0], kv_len.shape[0]
    if rows.dim() != 2 or rows.shape[0] != T or rows.stride(1) != 1:
        raise ValueError(f"first_rows: rows has shape {tuple(rows.shape)}, expected ({T}, N) with unit rows")
    if B < 1 or T % B or cu_seqlens.shape[0] != B + 1:
        raise ValueError(f"first_rows: {T} tokens, {B} sequences and {cu_seqlens.shape[0]} bounds do not fit")


def first_rows_cpu(
    rows: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor
) -> torch.Tensor:
    _check(rows, token, cu_seqlens, kv_len)
    return first_rows_ref(rows, token, cu_seqlens, kv_len)


def first_rows_triton(
    rows: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor
) -> torch.Tensor:
    _check(rows, token, cu_seqlens, kv_len)
    (T, N), B = rows.shape, kv_len.shape[0]
    out = rows.new_empty(B, N)
    with device_guard(rows):
        _first_rows_kernel[(B,)](
            rows, token, cu_seqlens, kv_len, out, T // B, N, rows.stride(0), BLOCK_N=next_power_of_2(N),
            num_warps=1, **launch_options(),
        )  # fmt: skip
    return out


def _first_rows_fake(
    rows: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor
) -> torch.Tensor:
    return rows.new_empty(kv_len.shape[0], rows.shape[1])


first_rows = register(
    "first_rows(Tensor rows, Tensor token, Tensor cu_seqlens, Tensor kv_len) -> Tensor",
    ref=first_rows_ref,
    cpu=first_rows_cpu,
    cuda=first_rows_triton,
    fake=_first_rows_fake,
)
