"""The backward of a LayerNorm, shared by the ops that end in one.

With xhat = (h - mean(h)) * rstd and g = dy * weight: dh = rstd * (g - mean(g) - xhat * mean(g * xhat)), d_weight the
column sums of dy * xhat, d_bias those of dy (Ba, Kiros & Hinton 2016). mean and rstd are computed again from h: it has
to be read for xhat anyway.

A program walks the tiles of ROWS rows pid, pid + programs, ... and keeps its column sums in registers; they are written
once, fp32 (programs, sums, N), and added up by a second kernel (kernels/column_sums.py): no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bert_fast.kernels.runtime import (
    ceil_div,
    next_power_of_2,
    num_sms,
    tl,
    triton,
)

WARPS_PER_SM = 12  # as many as registers hold at 140 a thread: one wave of programs, 28 KB of half precision in flight


@triton.jit
def norm_backward(dy, h, weight, mask, N, eps):
    """A tile of rows, fp32 (ROWS, BLOCK_N), zeros outside the mask: gradient of h, and the normalised h.

    Outside the mask the normalised h is zero whatever eps is, the gradient is not.
    """
    mean = tl.sum(h, 1)[:, None] / N
    centred = tl.where(mask, h - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / N + eps)
    xhat = tl.where(mask, centred * rstd, 0.0)
    g = dy * weight
    along = tl.sum(g * xhat, 1)[:, None] / N
    return rstd * (g - tl.sum(g, 1)[:, None] / N - xhat * along), xhat


@triton.jit
def store_partials(partial_ptr, index: tl.constexpr, SUMS: tl.constexpr, sums, N):
    """This program's column sums number `index` of SUMS, to fp32 (programs, SUMS, N)."""
    cols = tl.arange(0, sums.shape[0])
    at = (tl.program_id(0).to(tl.int64) * SUMS + index) * N + cols
    tl.store(partial_ptr + at, sums, mask=cols < N)


def tile_of(T: int, N: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """(programs, tile and warps) of a backward over T rows of N.

    The warps lie side by side along a row, eight columns a thread, so that rows of a tile are summed in registers.
    """
    BLOCK_N = next_power_of_2(N)
    ROWS = max(512 // BLOCK_N, 2 if BLOCK_N <= 2048 else 1)
    warps = min(max(BLOCK_N // 256, 1), 8)
    programs = max(1, min(ceil_div(T, ROWS), WARPS_PER_SM // warps * num_sms(device)))
    return programs, {"ROWS": ROWS, "BLOCK_N": BLOCK_N, "num_warps": warps}


def output_gradient(
    grads: Sequence[torch.Tensor | None], want_rows: bool, want_padded: bool, token: torch.Tensor | None
) -> tuple[torch.Tensor | None, bool]:
    """The gradient of a pair (rows, padded), and whether it is in padded order; None where neither was used."""
    rows = grads[0] if want_rows else None
    padded = grads[1] if want_padded else None
    if rows is None or padded is None:
        return (padded, True) if rows is None else (rows, False)
    assert token is not None
    return rows + padded.index_select(0, token), False


def check_backward(
    op: str, dy: torch.Tensor, dy_padded: bool, x: torch.Tensor, weight: torch.Tensor, token: torch.Tensor | None
) -> None:
    """dy (T, N) like x, weight (N,), a map where dy is in padded order."""
    if dy.shape != x.shape or dy.device != x.device:
        raise ValueError(f"{op}: dy is {tuple(dy.shape)} on {dy.device}, expected {tuple(x.shape)} on {x.device}")
    if weight.shape != x.shape[1:] or weight.device != x.device:
        raise ValueError(f"{op}: weight is {tuple(weight.shape)} on {weight.device}, expected ({x.shape[1]},)")
    if dy_padded and token is None:
        raise ValueError(f"{op}: dy is in padded order, but there is no token map")


def layer_norm_gradients(
    dy: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, eps: float, want_params: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch's own (dh, d_weight, d_bias) of LayerNorm(h), the last two empty where not wanted: for the CPU bodies."""
    shape, dy = h.shape[1:], dy.to(h.dtype).contiguous()
    h = h.contiguous()
    _, mean, rstd = torch.native_layer_norm(h, shape, weight, weight, eps)
    wanted = [True, want_params, want_params]
    dh, *params = torch.ops.aten.native_layer_norm_backward(dy, h, shape, mean, rstd, weight, weight, wanted)
    return (dh, *params) if want_params else (dh, weight.new_empty(0), weight.new_empty(0))
