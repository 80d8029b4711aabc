"""One encoder layer for training, as two autograd functions: they keep little, and fuse what lies between the ops.

Attend: three projections, attention. AfterAttention: output projection, dropout, residual, LayerNorm, feed-forward. The
residual goes through Attend as well, so that its gradient is added in the epilogue of the projections' data gradient
and not by a pass of its own.

Kept for backward, for each token and layer, of hidden size h, intermediate size i and b bytes a number: input rows h,
query, key and value 3h, context h, both projections' outputs 2h (the rows before the norms are those plus a residual),
pre-activation i: (7h + i) * b bytes, 11 h b with i = 4h (16896 for a base model in bf16), and a log-sum-exp of 4 bytes
a head. Under autocast the input rows have 4 bytes a number. The activation, the normalised rows, all statistics and
all dropout masks are computed again. Before the layers, the sum of the embeddings: h b bytes a token.

Parameters are kept where backward reads them, which is where transformers' operators keep them. Into these nobody may
write before it (torch refuses), into others anybody: the bias of a projection, a weight below which nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from bert_fast.family import LayerView
from bert_fast.kernels.attention import attention, attention_ref
from bert_fast.kernels.attention_backward import attention_backward
from bert_fast.kernels.grad_input import grad_input, grad_input_act
from bert_fast.kernels.grad_weight import grad_weight
from bert_fast.kernels.linear import linear, linear_ref, product_gradients
from bert_fast.kernels.linear_gelu import linear_gelu_pre, linear_gelu_pre_ref
from bert_fast.kernels.qkv_linear import qkv_linear, qkv_linear_ref
from bert_fast.kernels.registry import Grads, gradients_of
from bert_fast.kernels.residual_layer_norm import residual_layer_norm, residual_layer_norm_ref
from bert_fast.kernels.residual_layer_norm_backward import residual_layer_norm_backward
from bert_fast.kernels.runtime import is_batched, without_autocast
from bert_fast.packing import Packing, own_mask
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


class Ops(NamedTuple):
    """The ops of a layer."""

    qkv_linear: Callable[..., Any]
    attention: Callable[..., Any]
    linear: Callable[..., Any]
    linear_gelu_pre: Callable[..., Any]
    residual_layer_norm: Callable[..., Any]


FUSED = Ops(qkv_linear, attention, linear, linear_gelu_pre, residual_layer_norm)
# their references, of plain operators: for what is differentiated twice, or under vmap
PLAIN = Ops(qkv_linear_ref, attention_ref, linear_ref, linear_gelu_pre_ref, residual_layer_norm_ref)


def attend(
    plan: AttendPlan, qkv: Tensor, bias: Tensor | None, want_probs: bool, ops: Ops = FUSED
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(context, probabilities, lse)"""
    p = plan.packing
    return ops.attention(
        qkv, bias, p.token, p.cu_seqlens, p.kv_len, p.prefix, plan.heads, plan.scale, want_probs, plan.uniform_empty,
        *plan.dropout,
    )  # fmt: skip


def attended(
    plan: AttendPlan, qkv: Tensor, bias: Tensor | None, want_probs: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same of an attention for itself, whose mask may be the caller's."""
    return attend(plan, qkv, own_mask(bias, plan.uniform_empty, plan.dropout.p), want_probs)


Aside = list[tuple[Tensor, int | None] | None]  # parameters with their versions; None: saved


def keep(ctx: Any, parameters: Sequence[Tensor], reads: Sequence[bool]) -> list[Tensor]:
    """What to save of the parameters: those that backward reads.

    The others stay aside with their versions: what computes forward again reads them as well.
    """
    ctx.aside = [
        None if read else (t, None if t.is_inference() else t._version)
        for t, read in zip(parameters, reads, strict=True)
    ]
    return [t for t, read in zip(parameters, reads, strict=True) if read]


def kept(ctx: Any) -> tuple[list[Tensor | None], list[Tensor]]:
    """The parameters in order, None for those aside; and what else was saved, behind them."""
    saved = iter(ctx.saved_tensors)
    return [next(saved) if other is None else None for other in ctx.aside], list(saved)


def with_those_aside(parameters: Sequence[Tensor | None], aside: Aside) -> list[Tensor]:
    """All parameters; an error as torch's own where one of those aside was written into."""
    found = []
    for parameter, other in zip(parameters, aside, strict=True):
        if other is not None:
            parameter, version = other
            if version is not None and parameter._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a parameter of shape {tuple(parameter.shape)} is at version {parameter._version}; expected "
                    f"version {version} instead (a second derivative, or one under vmap, computes forward again)"
                )
        found.append(parameter)
    return found


class Attend(torch.autograd.Function):
    """rows (T, h), three weights and biases, additive bias or None -> context (T, h), rows (the same)."""

    @staticmethod
    def _through(
        ops: Ops, plan: AttendPlan, rows: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(query, key and value, context, lse)"""
        *parameters, bias = tensors
        qkv = ops.qkv_linear(rows.to(plan.dtype), *parameters, plan.packing.n_rows)
        context, _, lse = attend(plan, qkv, bias, False, ops)
        return qkv, context, lse

    @staticmethod
    def forward(ctx: Any, plan: AttendPlan, rows: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        qkv, context, lse = Attend._through(FUSED, plan, rows, *tensors)
        ctx.plan = plan
        parameters = keep(ctx, tensors[:6], [ctx.needs_input_grad[1]] * 3 + [False] * 3)
        ctx.save_for_backward(*parameters, rows, tensors[6], qkv, context, lse)
        ctx.set_materialize_grads(False)
        return context, rows

    @staticmethod
    def plain(plan: AttendPlan, rows: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return Attend._through(PLAIN, plan, rows, *tensors)[1], rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, d_context: Tensor | None, d_rows: Tensor | None) -> Grads:
        plan, needs = ctx.plan, ctx.needs_input_grad
        if d_context is None:
            return (None, d_rows, *[None] * 7)
        parameters, (rows, bias, qkv, context, lse) = kept(ctx)
        with without_autocast(rows.device.type):
            given = d_context, d_rows
            if torch.is_grad_enabled() or is_batched(given):
                args = plan, rows, *with_those_aside(parameters, ctx.aside), bias
                return tuple(gradients_of(Attend.plain, args, needs, given, torch.is_grad_enabled()))
            p = plan.packing
            d_qkv, d_bias = attention_backward(
                d_context, None, qkv, bias, context, lse, p.token, p.cu_seqlens, p.kv_len, p.prefix, plan.heads,
                plan.scale, plan.uniform_empty, *plan.dropout, needs[8],
            )  # fmt: skip
            d_rows, *grads = product_gradients(
                needs[1:8], d_qkv, rows.to(plan.dtype), parameters[:3], p.n_rows, d_rows
            )  # fmt: skip
        d_rows = d_rows if d_rows is None else d_rows.to(rows.dtype)
        return (None, d_rows, *grads, d_bias if needs[8] else None)


class AfterAttention(torch.autograd.Function):
    """context, residual (T, h) and the parameters of BertSelfOutput, BertIntermediate and BertOutput -> rows (T, h).

    Parameters in order: dense weight and bias, LayerNorm weight and bias of the first; dense weight and bias of the
    second; the third as the first.
    """

    @staticmethod
    def _normed(
        ops: Ops, plan: LayerPlan, which: int, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:  # fmt: skip
        to_tokens = plan.to_tokens and which == 1
        return ops.residual_layer_norm(
            x, residual, weight, bias, plan.eps[which], plan.token, plan.n_rows, not to_tokens, to_tokens,
            *plan.dropouts[which],
        )[to_tokens]  # fmt: skip

    @staticmethod
    def _first(
        ops: Ops, plan: LayerPlan, context: Tensor, residual: Tensor, w_out: Tensor, b_out: Tensor, gamma: Tensor,
        beta: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(normalised rows between attention and feed-forward, output of the projection)"""
        projected = ops.linear(context, w_out, b_out, plan.n_rows)
        return AfterAttention._normed(ops, plan, 0, projected, residual, gamma, beta), projected

    @staticmethod
    def _second(
        ops: Ops, plan: LayerPlan, between: Tensor, w_up: Tensor, b_up: Tensor, w_down: Tensor, b_down: Tensor,
        gamma: Tensor, beta: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(output, activation, pre-activation, output of the last projection)"""
        wide, pre = ops.linear_gelu_pre(between.to(plan.dtype), w_up, b_up, plan.n_rows, plan.act)
        down = ops.linear(wide, w_down, b_down, plan.n_rows)
        return AfterAttention._normed(ops, plan, 1, down, between, gamma, beta), wide, pre, down

    @staticmethod
    def forward(ctx: Any, plan: LayerPlan, context: Tensor, residual: Tensor, *params: Tensor) -> Tensor:
        between, projected = AfterAttention._first(FUSED, plan, context, residual, *params[:4])
        out, wide, pre, down = AfterAttention._second(FUSED, plan, between, *params[4:])
        ctx.plan, needs = plan, ctx.needs_input_grad
        ctx.below_up, ctx.below_down = any(needs[1:7]), any(needs[1:9])
        norm1, norm2 = [ctx.below_up] * 2, [True] * 2
        reads = [needs[1], False, *norm1, ctx.below_up, False, ctx.below_down, False, *norm2]
        first = (context, residual, projected) if ctx.below_up else (between, None, None)
        second = pre if ctx.below_down else wide if needs[9] else None
        ctx.save_for_backward(*keep(ctx, params, reads), *first, second, down)
        return out

    @staticmethod
    def plain(plan: LayerPlan, context: Tensor, residual: Tensor, *params: Tensor) -> Tensor:
        between, _ = AfterAttention._first(PLAIN, plan, context, residual, *params[:4])
        return AfterAttention.plain_second(plan, between, *params[4:])

    @staticmethod
    def plain_second(plan: LayerPlan, between: Tensor, *params: Tensor) -> Tensor:
        return AfterAttention._second(PLAIN, plan, between, *params)[0]

    @staticmethod
    def _plainly(ctx: Any, d_out: Tensor, params: Sequence[Tensor | None], first: Sequence[Tensor]) -> Grads:
        needs, again = ctx.needs_input_grad, torch.is_grad_enabled()
        if ctx.below_up:
            args = ctx.plan, *first[:2], *with_those_aside(params, ctx.aside)
            return tuple(gradients_of(AfterAttention.plain, args, needs, [d_out], again))
        args = ctx.plan, first[0], *with_those_aside(params[4:], ctx.aside[4:])
        found = gradients_of(AfterAttention.plain_second, args, (False, False, *needs[7:]), [d_out], again)
        return (*[None] * 7, *found[2:])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Grads:
        params, (*first, second, down) = kept(ctx)
        with without_autocast(down.device.type):
            if torch.is_grad_enabled() or is_batched([d_out]):
                return AfterAttention._plainly(ctx, d_out, params, first)
            return AfterAttention._fused(ctx, d_out, params, first, second, down)

    @staticmethod
    def _fused(
        ctx: Any, d_out: Tensor, params: Sequence[Tensor | None], first: Sequence[Tensor], second: Tensor, down: Tensor
    ) -> Grads:  # fmt: skip
        plan, needs, n_rows = ctx.plan, ctx.needs_input_grad, ctx.plan.n_rows
        w_out, _, gamma1, beta1, w_up, _, w_down, _, gamma2, _ = params
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

        between = first[0]
        if ctx.below_up:
            context, residual, projected = first
            between = AfterAttention._normed(FUSED, plan, 0, projected, residual, gamma1, beta1)
        d_down, d_between, grads[11], grads[12], grads[10] = norm_backward(
            1, d_out, plan.to_tokens, down, between, gamma2, want_norm2 or want_down
        )
        wide = second
        if ctx.below_down:
            d_pre, wide = grad_input_act(d_down, w_down, second, plan.act, n_rows)
        if wanted[6]:
            grads[9], _ = grad_weight(d_down, wide, n_rows, False)
        del wide, d_down
        if want_up:
            grads[7], grads[8] = grad_weight(d_pre, between.to(plan.dtype), n_rows, wanted[5])
        del between
        if ctx.below_up:
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
