"""Cases of `bench kernels` for training: the backward ops, and the product that keeps its pre-activation.

The peers are torch's own: its products for the gradients of products, autograd of its operators for the others. Dropout
is off, so that peers compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bert_fast.kernels.attention import attention
from bert_fast.kernels.pack import pack

from .kernel_cases import GELU_FLOPS, NORM_EPS, NORM_FLOPS, Case, Shape

NO_DROPOUT = (None, 0, 0.0)  # seed, site, probability


def _autograd(out: torch.Tensor, inputs: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def cases(
    op: str, s: Shape, device: torch.device, dtype: torch.dtype, rand: Callable[..., torch.Tensor]
) -> Iterator[Case]:
    T, H, inner, e = s.rows, s.hidden, s.inner, dtype.itemsize
    name = s.name
    if op == "linear_gelu_pre":
        x, w, b = rand(T, H), rand(inner, H, scale=H**-0.5), rand(inner)
        peers = {"torch": lambda: F.gelu(F.linear(x, w, b))}
        moved = e * (T * H + inner * H + 2 * T * inner)
        yield Case(op, f"{name} {H}->{inner}", (x, w, b, None, "gelu"), moved, 2 * T * H * inner, peers)
    elif op == "grad_input":
        dy, ws, add = rand(T, 3 * H), [rand(H, H, scale=H**-0.5) for _ in range(3)], rand(T, H)
        whole = torch.cat(ws)
        peers = {"torch": lambda: torch.addmm(add, dy, whole)}
        yield Case(op, f"{name} {3 * H}->{H}", (dy, *ws, add, None), e * (5 * T * H + 3 * H * H), 6 * T * H * H, peers)
    elif op == "grad_input_act":
        dy, w, pre = rand(T, H), rand(H, inner, scale=H**-0.5), rand(T, inner)
        peers = {"torch": lambda: (torch.ops.aten.gelu_backward(dy @ w, pre), F.gelu(pre))}
        moved = e * (T * H + H * inner + 3 * T * inner)
        yield Case(op, f"{name} {H}->{inner}", (dy, w, pre, "gelu", None), moved, 2 * T * H * inner, peers)
    elif op == "grad_weight":
        for M, K in ((3 * H, H), (inner, H), (H, inner)):
            dy, x = rand(T, M), rand(T, K)
            peers = {"torch": lambda dy=dy, x=x: (dy.t() @ x, dy.sum(0))}
            yield Case(op, f"{name} {M}x{K}", (dy, x, None, True), e * (T * (M + K) + M * K), 2 * T * M * K, peers)
    elif op == "grad_activation":
        dy, pre = rand(T, inner), rand(T, inner)
        peers = {"torch": lambda: torch.ops.aten.gelu_backward(dy, pre)}
        yield Case(op, f"{name} {inner}", (dy, pre, "gelu", None), 3 * T * inner * e, GELU_FLOPS * T * inner, peers)
    elif op == "residual_layer_norm_backward":  # three rows read, one written
        dy, x, r, w = rand(T, H), rand(T, H), rand(T, H), rand(H)
        leaves = [t.clone().requires_grad_() for t in (r, w, rand(H))]
        out = F.layer_norm(x + leaves[0], (H,), *leaves[1:], NORM_EPS)
        args = (dy, False, x, r, w, NORM_EPS, None, None, *NO_DROPOUT, True)
        peers = {"torch": _autograd(out, leaves, dy)}
        yield Case(op, f"{name} {H}", args, 4 * T * H * e, 2 * NORM_FLOPS * T * H, peers)
    elif op == "gelu_layer_norm_backward":  # two rows read, one written
        dy, x, w = rand(T, H), rand(T, H), rand(H)
        leaves = [t.clone().requires_grad_() for t in (x, w, rand(H))]
        out = F.layer_norm(F.gelu(leaves[0]), (H,), *leaves[1:], NORM_EPS)
        work = (GELU_FLOPS + 2 * NORM_FLOPS) * T * H
        peers = {"torch": _autograd(out, leaves, dy)}
        yield Case(op, f"{name} {H}", (dy, x, w, NORM_EPS, "gelu"), 3 * T * H * e, work, peers)
    elif op == "embed_layer_norm_backward":  # two rows read, one written where the map says
        dy, h, w = rand(T, H), rand(T, H), rand(H)
        leaves = [t.clone().requires_grad_() for t in (h, w, rand(H))]
        out = F.layer_norm(leaves[0], (H,), *leaves[1:], NORM_EPS)
        args = (dy, False, h, w, NORM_EPS, torch.arange(T, device=device, dtype=torch.int32), None, *NO_DROPOUT)
        peers = {"torch": _autograd(out, leaves, dy)}
        yield Case(op, f"{name} {H}", args, T * (4 + 3 * H * e), 2 * NORM_FLOPS * T * H, peers)
    elif op == "attention_backward":
        yield _attention_case(s, device, dtype, rand)


def _attention_case(
    s: Shape, device: torch.device, dtype: torch.dtype, rand: Callable[..., torch.Tensor]
) -> Case:
    """e (4 + 1 + 3) T H bytes; 14 H sum(q_len kv_len) FLOP in two kernels."""
    B, S, H, D = s.batch, s.seq, s.hidden, s.hidden // s.heads
    qkv, dy, scale = rand(B * S, 3 * H), rand(B * S, H), D**-0.5
    maps = pack(torch.ones(B, S, device=device, dtype=torch.long), False)
    context, _, lse = attention(qkv, None, *maps, s.heads, scale, False, False)
    leaf = qkv.clone().requires_grad_()
    q, k, v = leaf.view(B, S, 3, s.heads, D).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B * S, H)
    args = (dy, None, qkv, None, context, lse, *maps, s.heads, scale, False, *NO_DROPOUT, False)
    moved = dtype.itemsize * 8 * B * S * H
    return Case("attention_backward", s.name, args, moved, 14 * H * B * S * S, {"sdpa": _autograd(out, [leaf], dy)})
