"""The encoder tier with all layers in one launch (kernels/encoder_small.py), for a batch of few rows.

Embeddings and pooler are the ops of encoder.py. All rows of the last layer are computed, also where only those of the
first tokens are read, which is no launch more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from bert_fast.encoder import Encoded, _encoded, _first_rows, _padded
from bert_fast.family import LayerView, ModelView
from bert_fast.kernels.encoder_small import ACTIVATIONS, MAX_ROWS, encoder_small, encoder_small_reason
from bert_fast.kernels.runtime import capability
from bert_fast.packing import Packing
from bert_fast.tiers import activation_name

# Compute capability -> rows (batch * length) up to which the CUDA graphs of a forward have one launch. A number here
# follows records in bench/results that show it faster there than the graph of Triton kernels (`bench model
# --one-launch`); there are none. Calls without a graph launch op by op: a replay spares the host 16 tensors a layer.
MEASURED_ROWS: dict[tuple[int, int], int] = {}

_forced: ContextVar[bool | None] = ContextVar("bert_fast_one_launch", default=None)


@contextlib.contextmanager
def one_launch(so: bool) -> Iterator[None]:
    """For benches and tests: within, this thread takes one launch wherever it can (True), or never (False)."""
    before = _forced.set(so)
    try:
        yield
    finally:
        _forced.reset(before)


def is_wanted(rows: int, device: torch.device) -> bool:
    """Whether one launch is the choice for a capacity of `rows`; `one_launch_reason` says whether it can be taken."""
    if rows > MAX_ROWS:
        return False
    forced = _forced.get()
    return rows <= MEASURED_ROWS.get(capability(device), 0) if forced is None else forced


def is_forced() -> bool:
    """Whether this thread is within `one_launch(True)`."""
    return _forced.get() is True


def _parameters(layer: LayerView) -> list[torch.Tensor | None]:
    """In the order of kernels/encoder_small.py."""
    attention = layer.query, layer.key, layer.value, layer.attention_dense
    norm1, up, down, norm2 = layer.attention_norm, layer.up, layer.down, layer.norm
    return [
        *(dense.weight for dense in (*attention, up, down)), *(dense.bias for dense in attention),
        norm1.weight, norm1.bias, up.bias, down.bias, norm2.weight, norm2.bias,
    ]  # fmt: skip


def one_launch_reason(view: ModelView, B: int, S: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a call of capacity (B, S) without a 4-D mask launches op by op; None: `encode_in_one_launch` runs it."""
    if not is_wanted(B * S, device):
        return f"one launch is not the choice for {B} x {S} rows here"
    if torch.is_grad_enabled():
        return "one launch is for no_grad only"
    if view.relative_bias is not None:
        return "the scores have a relative bias"
    layers = view.layers
    for what in ("scale", "heads"):
        if len({getattr(layer, what) for layer in layers}) > 1:
            return f"{what} differs between the layers"
    if len({layer.up.out_features for layer in layers}) > 1:
        return "the intermediate size differs between the layers"
    if len({activation_name(layer.act) for layer in layers}) > 1:
        return "the activation differs between the layers"
    for x in (x for layer in layers for x in _parameters(layer)):
        if x is None:
            return "a dense layer or a LayerNorm has no bias"
        if not x.is_contiguous() or x.data_ptr() % 16:
            return f"a parameter {tuple(x.shape)} at {x.data_ptr():#x} is not dense, or not made of 16-byte units"
    intermediate = layers[0].up.out_features
    return encoder_small_reason(device, dtype, len(layers), view.hidden, intermediate, view.heads, B, S)


def encode_in_one_launch(
    view: ModelView,
    packing: Packing,
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    want_hidden: bool,
    want_attentions: bool,
    first_tokens_only: bool = False,
) -> Encoded:
    """`encode` in one launch: the same arguments and outputs, where one_launch_reason is None."""
    p, layers = packing, view.layers
    inputs = input_ids, token_type_ids, position_ids, inputs_embeds
    rows, padded = _first_rows(view.embeddings, p, inputs, want_hidden)
    last, states, probs = encoder_small(
        rows, p.token, p.cu_seqlens, p.kv_len, [x for layer in layers for x in _parameters(layer)],
        [eps for layer in layers for eps in (layer.attention_norm.eps, layer.norm.eps)], layers[0].heads,
        layers[0].scale, ACTIVATIONS.index(activation_name(layers[0].act)), view.uniform_empty, want_hidden,
        want_attentions,
    )  # fmt: skip
    hidden = []
    if want_hidden:
        hidden = [_padded(rows if p.identity else padded, p), *(_padded(x, p) for x in states)]
    last = _padded(last, p)
    # no views to autograd, as in _padded
    attentions = [torch.ops.aten._unsafe_view(x, x.shape) for x in probs] if want_attentions else []
    return _encoded(view, last[:, :1] if first_tokens_only else last, hidden, attentions, want_hidden)
