"""One encoder layer for training, as two autograd functions: they keep little, and fuse what lies between the ops.

Attend: three projections, attention. AfterAttention: output projection, dropout, residual, LayerNorm, feed-forward. The
residual goes through Attend as well, so that its gradient is added in the epilogue of the projections' data gradient
and not by a pass of its own.

Kept for backward, for each token and layer, of hidden size h, intermediate size i and b bytes a number: input rows h,
query, key and value 3h, context h, both projections' outputs 2h (the rows before the norms are those plus a residual),
pre-activation i: (7h + i) * b bytes, 11 h b with i = 4h (16896 for a base model in bf16), and a log-sum-exp of 4 bytes
a head. Under autocast the input rows have 4 bytes a number. The activation, the normalised rows, all statistics and
all dropout masks are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from bert_fast.family import LayerView
from bert_fast.kernels.attention import attention
from bert_fast.kernels.attention_backward import attention_backward
from bert_fast.kernels.grad_input import grad_input, grad_input_act
from bert_fast.kernels.grad_weight import grad_weight
from bert_fast.kernels.linear import linear, product_gradients
from bert_fast.kernels.linear_gelu import linear_gelu_pre
from bert_fast.kernels.qkv_linear import qkv_linear
from bert_fast.kernels.registry import Grads, gradients_of
from bert_fast.kernels.residual_layer_norm import residual_layer_norm
from bert_fast.kernels.residual_layer_norm_backward import residual_layer_norm_backward
from bert_fast.kernels.runtime import without_autocast
from bert_fast.packing import Packing
from bert_fast.tiers import activation_name

Tensor = torch.Tensor


class Dropout(NamedTuple):
    """What an op takes to drop elements: one seed a forward, the place, the probability (0: nothing is dropped)."""

    seed: Tensor | None
    site: int
    p: float


class AttendPlan(NamedTuple):
    """Of one self-attention. dtype: the products' (autocast's, or the rows' own)."""

    packing: Packing
    heads: int
    scale: float
    uniform_empty: bool
    dropout: Dropout
    dtype: torch.dtype


class LayerPlan(NamedTuple):
    """Of what follows attention. token: map for the random numbers; to_tokens: the output is in token order."""

    token: Tensor | None
    n_rows: Tensor | None
    to_tokens: bool
    act: str
    eps: tuple[float, float]
    dropouts: tuple[Dropout, Dropout]
    dtype: torch.dtype


def projections(*parts: nn.Linear) -> tuple[Tensor, ...]:
    """Weights, then biases, of query, key and value."""
    return (*(part.weight for part in parts), *(part.bias for part in parts))


def attended(
    plan: AttendPlan, qkv: Tensor, bias: Tensor | None, want_probs: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(context, probabilities, lse)"""
    p = plan.packing
    return attention(
        qkv, bias, p.token, p.cu_seqlens, p.kv_len, p.prefix, plan.heads, plan.scale, want_probs, plan.uniform_empty,
        *plan.dropout,
    )  # fmt: skip


class Attend(torch.autograd.Function):
    """rows (T, h), three weights and biases, additive bias or None -> context (T, h), rows (the same)."""

    @staticmethod
    def _through(plan: AttendPlan, rows: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(query, key and value, context, lse)"""
        *parameters, bias = tensors
        qkv = qkv_linear(rows.to(plan.dtype), *parameters, plan.packing.n_rows)
        context, _, lse = attended(plan, qkv, bias, False)
        return qkv, context, lse

    @staticmethod
    def forward(ctx: Any, plan: AttendPlan, rows: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        qkv, context, lse = Attend._through(plan, rows, *tensors)
        ctx.plan = plan
        ctx.save_for_backward(rows, *tensors, qkv, context, lse)
        ctx.set_materialize_grads(False)
        return context, rows

    @staticmethod
    def chain(plan: AttendPlan, rows: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same, of ops that can be differentiated twice."""
        return Attend._through(plan, rows, *tensors)[1], rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, d_context: Tensor | None, d_rows: Tensor | None) -> Grads:
        plan, needs = ctx.plan, ctx.needs_input_grad
        *inputs, qkv, context, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(gradients_of(Attend.chain, [plan, *inputs], needs, [d_context, d_rows], True))
        if d_context is None:
            return (None, d_rows, *[None] * 7)
        p, (rows, *weights), bias = plan.packing, inputs[:4], inputs[7]
        with without_autocast(rows.device.type):
            d_qkv, d_bias = attention_backward(
                d_context, None, qkv, bias, context, lse, p.token, p.cu_seqlens, p.kv_len, p.prefix, plan.heads,
                plan.scale, plan.uniform_empty, *plan.dropout, needs[8],
            )  # fmt: skip
            d_rows, *grads = product_gradients(needs[1:8], d_qkv, rows.to(plan.dtype), weights, p.n_rows, d_rows)
        d_rows = d_rows if d_rows is None else d_rows.to(rows.dtype)
        return (None, d_rows, *grads, d_bias if needs[8] else None)


class AfterAttention(torch.autograd.Function):
    """context, residual (T, h) and the parameters of BertSelfOutput, BertIntermediate and BertOutput -> rows (T, h).

    Parameters in order: dense weight and bias, LayerNorm weight and bias of the first; dense weight and bias of the
    second; the third as the first.
    """

    @staticmethod
    def _normed(plan: LayerPlan, which: int, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        to_tokens = plan.to_tokens and which == 1
        return residual_layer_norm(
            x, residual, weight, bias, plan.eps[which], plan.token, plan.n_rows, not to_tokens, to_tokens,
            *plan.dropouts[which],
        )[to_tokens]  # fmt: skip

    @staticmethod
    def _through(plan: LayerPlan, context: Tensor, residual: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        """(output, output of the first projection, pre-activation, output of the last projection)"""
        w_out, b_out, gamma1, beta1, w_up, b_up, w_down, b_down, gamma2, beta2 = params
        normed, n_rows = AfterAttention._normed, plan.n_rows
        projected = linear(context, w_out, b_out, n_rows)
        between = normed(plan, 0, projected, residual, gamma1, beta1)
        wide, pre = linear_gelu_pre(between.to(plan.dtype), w_up, b_up, n_rows, plan.act)
        down = linear(wide, w_down, b_down, n_rows)
        return normed(plan, 1, down, between, gamma2, beta2), projected, pre, down

    @staticmethod
    def forward(ctx: Any, plan: LayerPlan, context: Tensor, residual: Tensor, *params: Tensor) -> Tensor:
        out, projected, pre, down = AfterAttention._through(plan, context, residual, *params)
        ctx.plan = plan
        ctx.save_for_backward(context, residual, *params, projected, pre, down)
        return out

    @staticmethod
    def chain(plan: LayerPlan, *inputs: Tensor) -> Tensor:
        return AfterAttention._through(plan, *inputs)[0]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Grads:
        plan, needs = ctx.plan, ctx.needs_input_grad
        *inputs, projected, pre, down = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(gradients_of(AfterAttention.chain, [plan, *inputs], needs, [d_out], True))
        context, residual, w_out, _, gamma1, beta1, w_up, _, w_down, _, gamma2, _ = inputs
        n_rows = plan.n_rows
        needs_context, needs_residual, *wanted = needs[1:]
        want_out, want_norm1, want_up, want_down, want_norm2 = (
            any(wanted[i : i + 2]) for i in range(0, 10, 2)
        )  # fmt: skip
        grads: list[Tensor | None] = [None] * 13

        def norm_backward(
            which: int, dy: Tensor, dy_padded: bool, x: Tensor, residual: Tensor, gamma: Tensor, want: bool
        ) -> tuple[Tensor, ...]:
            dx, d_residual, *sums = residual_layer_norm_backward(
                dy, dy_padded, x, residual, gamma, plan.eps[which], plan.token, n_rows, *plan.dropouts[which], want
            )
            return dx if dx.numel() else d_residual, d_residual, *sums

        with without_autocast(context.device.type):
            between = AfterAttention._normed(plan, 0, projected, residual, gamma1, beta1)
            d_down, d_between, grads[11], grads[12], grads[10] = norm_backward(
                1, d_out, plan.to_tokens, down, between, gamma2, want_norm2 or want_down
            )
            if needs_context or needs_residual or want_out or want_norm1 or want_up or wanted[6]:
                d_pre, wide = grad_input_act(d_down, w_down, pre, plan.act, n_rows)
                if wanted[6]:
                    grads[9], _ = grad_weight(d_down, wide, n_rows, False)
                del wide, d_down
                if want_up:
                    grads[7], grads[8] = grad_weight(d_pre, between.to(plan.dtype), n_rows, wanted[5])
                del between
                if needs_context or needs_residual or want_out or want_norm1:
                    d_between = grad_input(d_pre, w_up, None, None, d_between, n_rows)
                    del d_pre
                    d_projected, grads[2], grads[5], grads[6], grads[4] = norm_backward(
                        0, d_between, False, projected, residual, gamma1, want_norm1 or want_out
                    )
                    if wanted[0]:
                        grads[3], _ = grad_weight(d_projected, context, n_rows, False)
                    if needs_context:
                        grads[1] = grad_input(d_projected, w_out, None, None, None, n_rows)
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def after_attention(
    layer: LayerView, plan: LayerPlan, cast: Callable[[Tensor], Tensor], context: Tensor, residual: Tensor
) -> Tensor:
    """AfterAttention with the parameters of one layer; `cast` brings those of products to their dtype."""
    dense, norm1, up, down, norm2 = layer.attention_dense, layer.attention_norm, layer.up, layer.down, layer.norm
    return AfterAttention.apply(
        plan, context, residual,
        cast(dense.weight), cast(dense.bias), norm1.weight, norm1.bias, cast(up.weight), cast(up.bias),
        cast(down.weight), cast(down.bias), norm2.weight, norm2.bias,
    )  # fmt: skip


def layer_plan(
    layer: LayerView, packing: Packing, to_tokens: bool, dropouts: tuple[Dropout, Dropout], dtype: torch.dtype
) -> LayerPlan:
    token = None if packing.identity else packing.token
    act = activation_name(layer.act)
    assert act is not None
    return LayerPlan(
        token, packing.n_rows, to_tokens, act, (layer.attention_norm.eps, layer.norm.eps), dropouts, dtype
    )  # fmt: skip
