"""Cases of `bench kernels` for the folded LayerNorm (kernels/linear_to_stream.py): bytes and FLOP by formula.

Compare by hand: linear_to_stream with linear_layer_norm, whose LayerNorm pass it does without; fold_vectors and
folded_linear with linear_gelu and qkv_linear. The peers compute the same from the rows before the LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bert_fast.kernels.fold_vectors import fold_vectors
from bert_fast.kernels.linear_to_stream import linear_to_stream, partials, stream_reason

from .kernel_cases import GELU_FLOPS, NORM_EPS, Case, Shape


def cases(
    op: str, s: Shape, device: torch.device, dtype: torch.dtype, rand: Callable[..., torch.Tensor]
) -> Iterator[Case]:
    if device.type == "cuda" and stream_reason(dtype, device):  # the launchers refuse
        return
    T, H, inner, e = s.rows, s.hidden, s.inner, dtype.itemsize
    sums = 2 * 4 * T * partials(H)  # bytes
    x, m, p, residual = rand(T, H), rand(H, H, scale=H**-0.5), rand(H), rand(T, H)
    gamma, beta = 1 + 0.2 * rand(H), rand(H)
    before = x, m, p, residual, None, None, None, gamma, NORM_EPS, None
    h = F.linear(x, m, p) + residual
    stream = linear_to_stream(*before)
    for parts, N, act in ((3, H, "none"), (1, inner, "gelu")):
        absent = [None] * (3 - parts)
        weights, biases = [rand(N, H, scale=H**-0.5) for _ in range(parts)], [rand(N) for _ in range(parts)]
        vectors = (*weights, *absent, *biases, *absent, gamma, beta)
        w, b = torch.cat(weights), torch.cat(biases)
        if op == "fold_vectors":  # each weight read once, for two products with a vector

            def both(w=w, b=b) -> list[torch.Tensor]:
                return [(w @ gamma).float(), (w @ beta + b).float()]

            moved = e * (parts * N * H + 2 * H) + 8 * parts * N
            yield Case(op, f"{s.name} {parts}x{H}->{N}", vectors, moved, 4 * parts * N * H, {"torch": both})
        elif op == "folded_linear":

            def composite(w=w, b=b, act=act) -> torch.Tensor:
                y = F.linear(F.layer_norm(h, (H,), gamma, beta, NORM_EPS), w, b)
                return F.gelu(y) if act == "gelu" else y

            args = (*stream, *weights, *absent, *fold_vectors(*vectors), NORM_EPS, act, None)
            moved = e * (T * H + parts * N * H + parts * T * N) + sums
            work = 2 * parts * T * N * H + (GELU_FLOPS if act == "gelu" else 0) * T * N
            yield Case(op, f"{s.name} {parts}x{H}->{N}", args, moved, work, {"torch": composite})
    if op == "linear_to_stream":  # x, the weight and the residual read, g and the sums written
        for K in (H, inner):
            for name, of_residual in (("", (None, None, None)), (" stream", (stream[1], gamma, beta))):
                y, w = rand(T, K), rand(H, K, scale=K**-0.5)
                old = residual if of_residual[0] is None else stream[0]
                args = (y, w, p, old, *of_residual, gamma, NORM_EPS, None)

                def added(y=y, w=w, plain=of_residual[0] is None) -> torch.Tensor:
                    r = residual if plain else F.layer_norm(h, (H,), gamma, beta, NORM_EPS)
                    return (F.linear(y, w, p) + r) * gamma

                moved = e * (T * K + H * K + 2 * T * H) + sums * (2 if name else 1)
                yield Case(op, f"{s.name} {K}->{H}{name}", args, moved, 2 * T * H * K, {"torch": added})
    elif op == "normalise":  # one row read, one written
        peers = {"torch": lambda: F.layer_norm(h, (H,), gamma, beta, NORM_EPS)}
        args = (*stream, gamma, beta, NORM_EPS, None, None, True, False)
        yield Case(op, f"{s.name} {H}", args, 2 * T * H * e + sums, 3 * T * H, peers)
