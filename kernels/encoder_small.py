"""encoder_small: all layers of the encoder on at most 64 rows, in one launch.

A layer, with LN the LayerNorm and softmax over the keys of a row's own sequence:

    a = LN1(x + out(softmax(q k^T * scale) v)),    y = LN2(a + down(act(up(a)))).

For one short text the five launches of each layer cost more than the work in them, which is reading the weights.
The kernel is CUDA C++ (csrc/encoder_small.cuh), since Triton has no barrier over a grid; it is in the library that
kernels/extension.py loads, and this op has no CUDA body where that is absent. On CPU it runs the definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bert_fast.kernels import extension
from bert_fast.kernels.attention_base import attention_ref
from bert_fast.kernels.linear_gelu import linear_gelu_ref
from bert_fast.kernels.linear_layer_norm import linear_layer_norm_ref
from bert_fast.kernels.qkv_linear import qkv_linear_ref
from bert_fast.kernels.registry import register_kernel

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
MAX_ROWS = 64  # of the library, as its other limits: encoder_small_reason asks it
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")  # by number, as csrc/encoder_small.h has them
WEIGHTS, VECTORS = 6, 10  # of a layer, in this order: weights of query, key, value, attention output, up and down; then
# biases of the first four, LayerNorm weight and bias, bias of up, bias of down, LayerNorm weight and bias


def layers_of(parameters: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
    """The 16 parameters of each layer."""
    for first in range(0, len(parameters), WEIGHTS + VECTORS):
        yield parameters[first : first + WEIGHTS + VECTORS]


def encoder_small_ref(
    x: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    parameters: Sequence[torch.Tensor], eps: Sequence[float], heads: int, scale: float, activation: int,
    uniform_empty: bool, want_hidden: bool, want_probs: bool,
) -> Triple:  # fmt: skip
    """x (T, hidden): packed rows, T = B * S; token (T,), cu_seqlens (B + 1,), kv_len (B,) int32 from `pack`.

    parameters: 16 tensors a layer, in the order above. eps: two a layer. activation: index in ACTIVATIONS.

    Returns, in token order with zeros where a token is no row: last (T, hidden); hidden (layers - 1, T, hidden), the
    outputs of all layers but the last, or empty; probs (layers, B, heads, S, S) or empty.
    """
    n_rows = cu_seqlens[-1:]
    states, probs = [], []
    for i, p in enumerate(layers_of(parameters)):
        q, k, v, out, up, down, *vectors = p
        b_q, b_k, b_v, b_out, gamma1, beta1, b_up, b_down, gamma2, beta2 = vectors
        qkv = qkv_linear_ref(x, q, k, v, b_q, b_k, b_v, n_rows)
        prefix = torch.zeros_like(kv_len)
        context, weights, _ = attention_ref(
            qkv, None, token, cu_seqlens, kv_len, prefix, heads, scale, want_probs, uniform_empty
        )
        a, _ = linear_layer_norm_ref(context, out, b_out, x, gamma1, beta1, eps[2 * i], None, n_rows, True, False)
        wide = linear_gelu_ref(a, up, b_up, n_rows, ACTIVATIONS[activation])
        x, state = linear_layer_norm_ref(
            wide, down, b_down, a, gamma2, beta2, eps[2 * i + 1], token, n_rows, True, True
        )  # fmt: skip
        states.append(state)
        probs.append(weights)
    last, empty = states.pop(), x.new_empty(0)
    hidden = torch.stack(states) if states else x.new_empty(0, *last.shape)
    return last, hidden if want_hidden else empty, torch.stack(probs) if want_probs else empty


def _encoder_small_fake(
    x: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    parameters: Sequence[torch.Tensor], eps: Sequence[float], heads: int, scale: float, activation: int,
    uniform_empty: bool, want_hidden: bool, want_probs: bool,
) -> Triple:  # fmt: skip
    (T, hidden), B, layers = x.shape, kv_len.shape[0], len(eps) // 2
    states = x.new_empty((layers - 1, T, hidden) if want_hidden else 0)
    return torch.empty_like(x), states, x.new_empty((layers, B, heads, T // B, T // B) if want_probs else 0)


encoder_small = register_kernel(
    "encoder_small(Tensor x, Tensor token, Tensor cu_seqlens, Tensor kv_len, Tensor[] parameters, float[] eps,"
    " int heads, float scale, int activation, bool uniform_empty, bool want_hidden, bool want_probs)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=encoder_small_ref,
    cuda=None,
    fake=_encoder_small_fake,
)


def encoder_small_reason(
    device: torch.device, dtype: torch.dtype, layers: int, hidden: int, intermediate: int, heads: int, B: int, S: int
) -> str | None:
    """Why the op does not run a model of this shape on B sequences of length S, or None; on CPU it always does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"one launch is for bfloat16 and float16, not {dtype}"
    if device.type != "cuda":
        return None
    missing = extension.load()
    if missing:
        return missing
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.ops.bert_fast_csrc.encoder_small_reason(index, layers, hidden, intermediate, heads, B, S) or None
