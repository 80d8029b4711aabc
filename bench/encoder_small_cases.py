"""Cases of `bench kernels` for encoder_small: twelve layers, each with weights of its own, on one short sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bert_fast.kernels.encoder_small import MAX_ROWS, encoder_small_reason, layers_of

from .kernel_cases import GELU_FLOPS, NORM_EPS, NORM_FLOPS, Case, Shape

LAYERS = 12


def cases(
    op: str, s: Shape, device: torch.device, dtype: torch.dtype, rand: Callable[..., torch.Tensor]
) -> Iterator[Case]:
    """One sequence of a quarter of the shape's length: e LAYERS (4 H H + 2 H I) bytes of weights."""
    T, H, inner, heads, e = min(s.seq // 4, MAX_ROWS), s.hidden, s.inner, s.heads, dtype.itemsize
    if s.batch == 1:  # another shape has these sizes too
        return
    if device.type == "cuda" and encoder_small_reason(device, dtype, LAYERS, H, inner, heads, 1, T):
        return
    parameters: list[torch.Tensor] = []
    for _ in range(LAYERS):
        parameters += [rand(N, K, scale=K**-0.5) for N, K in ((H, H),) * 4 + ((inner, H), (H, inner))]
        for size, is_gamma in ((H, 0),) * 4 + ((H, 1), (H, 0), (inner, 0), (H, 0), (H, 1), (H, 0)):
            parameters.append(is_gamma + rand(size, scale=0.2))
    x = rand(T, H)
    token, cu_seqlens, kv_len = (
        torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (range(T), (0, T), (T,))
    )
    scale = (H // heads) ** -0.5

    def composite() -> torch.Tensor:
        h = x
        for p in layers_of(parameters):
            q, k, v = (F.linear(h, p[i], p[6 + i]).view(1, T, heads, -1).transpose(1, 2) for i in range(3))
            context = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(T, H)
            a = F.layer_norm(F.linear(context, p[3], p[9]) + h, (H,), p[10], p[11], NORM_EPS)
            wide = F.gelu(F.linear(a, p[4], p[12]))
            h = F.layer_norm(F.linear(wide, p[5], p[13]) + a, (H,), p[14], p[15], NORM_EPS)
        return h

    args = (x, token, cu_seqlens, kv_len, parameters, [NORM_EPS] * 2 * LAYERS, heads, scale, 0, False, False, False)
    moved = e * (sum(p.numel() for p in parameters) + 2 * T * H)
    layer = T * (8 * H * H + 4 * H * inner + 4 * H * T + 2 * (1 + NORM_FLOPS) * H + GELU_FLOPS * inner)
    yield Case(op, f"{s.name.split()[0]} 1x{T} {LAYERS} layers", args, moved, LAYERS * layer, {"torch": composite})
