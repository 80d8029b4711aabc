"""The encoder tier with LayerNorm folded into its neighbours: no launch normalises rows between the layers.

Between two products the rows are a stream (kernels/linear_to_stream.py), h * gamma and sums of h and h^2. A layer:
fold_vectors and folded_linear (query, key, value), attention, linear_to_stream, fold_vectors and folded_linear
(intermediate, with the activation), linear_to_stream. As many launches as in encoder.py, but two of them read some
megabytes of weights where the LayerNorm passes go over all rows three times. `normalise` ends the stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn

from bert_fast.encoder import Encoded, _attend, _encoded, _first_rows, _first_tokens, _padded
from bert_fast.family import LayerView, ModelView
from bert_fast.kernels.fold_vectors import fold_vectors
from bert_fast.kernels.folded_linear import folded_linear
from bert_fast.kernels.linear_to_stream import linear_to_stream, stream_reason
from bert_fast.kernels.normalise import normalise
from bert_fast.kernels.qkv_linear import qkv_linear
from bert_fast.packing import Packing
from bert_fast.tiers import activation_name

# Rows (batch * length) from which on a GPU folds; None: never. A number here follows a measurement of both forms
# (`folding` below selects them), and there is none yet.
FOLDED_FROM_ROWS: int | None = None

_forced: ContextVar[tuple[int | None] | None] = ContextVar("bert_fast_folding", default=None)


@contextlib.contextmanager
def folding(from_rows: int | None) -> Iterator[None]:
    """For benches and tests: within, this thread folds from `from_rows` rows on (None: never), on the CPU as well."""
    before = _forced.set((from_rows,))
    try:
        yield
    finally:
        _forced.reset(before)


def _dense_of(layer: LayerView) -> tuple[nn.Linear, ...]:
    return layer.query, layer.key, layer.value, layer.attention_dense, layer.up, layer.down


def folded_reason(view: ModelView, packing: Packing, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `encode` and not `encode_folded` runs a call of a model whose modules are plain; None: the latter."""
    forced = _forced.get()
    (least,) = forced or (FOLDED_FROM_ROWS if device.type == "cuda" else None,)
    rows = packing.B * packing.S
    if least is None:
        return "LayerNorm is not folded here"
    if rows < least:
        return f"{rows} rows: LayerNorm is folded from {least} on"
    if torch.is_grad_enabled():
        return "LayerNorm is folded under no_grad only"
    reason = stream_reason(dtype, device)
    if reason is not None:
        return reason
    for weight in (dense.weight for layer in view.layers for dense in _dense_of(layer)):
        if any(n * weight.element_size() % 16 for n in weight.shape) or weight.data_ptr() % 16:
            return f"a weight {tuple(weight.shape)} at {weight.data_ptr():#x} is not made of 16-byte units"
    return None


class Stream(NamedTuple):
    """Rows before a LayerNorm, and that LayerNorm."""

    g: torch.Tensor
    sums: torch.Tensor
    norm: nn.Module


def _to_stream(
    x: torch.Tensor, dense: nn.Linear, norm: nn.LayerNorm, residual: Stream | torch.Tensor, p: Packing
) -> Stream:
    """Projection and residual; the LayerNorm is left to whoever reads the stream."""
    if isinstance(residual, Stream):
        g, sums, old = residual
        given, eps = (g, sums, old.weight, old.bias), old.eps
    else:
        given, eps = (residual, None, None, None), norm.eps
    return Stream(*linear_to_stream(x, dense.weight, dense.bias, *given, norm.weight, eps, p.n_rows), norm)


def _from_stream(stream: Stream, denses: Sequence[nn.Module], act: str, p: Packing) -> torch.Tensor:
    """act(dense(LayerNorm(h))) for one or three dense layers, side by side."""
    g, sums, norm = stream
    absent = [None] * (3 - len(denses))
    weights = [*(d.weight for d in denses), *absent]
    u, c = fold_vectors(*weights, *(d.bias for d in denses), *absent, norm.weight, norm.bias)
    return folded_linear(g, sums, *weights, u, c, norm.eps, act, p.n_rows)


def _rows(state: Stream | torch.Tensor, p: Packing) -> torch.Tensor:
    """(T, hidden), normalised."""
    if isinstance(state, torch.Tensor):
        return state
    g, sums, norm = state
    return normalise(g, sums, norm.weight, norm.bias, norm.eps, None, p.n_rows, True, False)[0]


def _leaving(stream: Stream, p: Packing) -> torch.Tensor:
    """(B, S, hidden), normalised, as it leaves the model."""
    if p.identity:
        return _padded(_rows(stream, p), p)
    g, sums, norm = stream
    return _padded(normalise(g, sums, norm.weight, norm.bias, norm.eps, p.token, p.n_rows, False, True)[1], p)


def encode_folded(
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
    """`encode` with LayerNorm folded: the same arguments and outputs, where folded_reason is None."""
    p, layers, uniform_empty = packing, view.layers, view.uniform_empty
    inputs = input_ids, token_type_ids, position_ids, inputs_embeds
    rows, padded = _first_rows(view.embeddings, p, inputs, want_hidden)
    hidden = [_padded(rows if p.identity else padded, p)] if want_hidden else []
    attentions: list[torch.Tensor] = []
    state: Stream | torch.Tensor = rows  # the embeddings' LayerNorm has run: it follows no product
    for layer in layers[:-1] if first_tokens_only else layers:
        if isinstance(state, Stream):
            if want_hidden:
                hidden.append(_leaving(state, p))
            qkv = _from_stream(state, (layer.query, layer.key, layer.value), "none", p)
        else:
            qkv = qkv_linear(
                state, layer.query.weight, layer.key.weight, layer.value.weight, layer.query.bias, layer.key.bias,
                layer.value.bias, p.n_rows,
            )  # fmt: skip
        context, probs = _attend(layer, qkv, p, want_attentions, uniform_empty)
        if want_attentions:
            attentions.append(probs)
        attended = _to_stream(context, layer.attention_dense, layer.attention_norm, state, p)
        wide = _from_stream(attended, (layer.up,), activation_name(layer.act), p)
        state = _to_stream(wide, layer.down, layer.norm, attended, p)
    if first_tokens_only:
        last = _first_tokens(layers[-1], _rows(state, p), p, uniform_empty)[:, None]
    else:
        last = _leaving(state, p)
    return _encoded(view, last, hidden, attentions, want_hidden)
