"""Models that people build by hand: pruned heads, layers dropped, repeated or shared, tables grown; NaN at padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close_fp32, assert_gradients_close, assert_tier, ragged_mask
from test_explain_truth import assert_told_the_truth
from test_families import inputs_of, pair
from torch import nn

FLAGS = {"output_hidden_states": True, "output_attentions": True}


def encoder(model: Any) -> Any:
    return model.transformer if hasattr(model, "transformer") else model.encoder


@torch.no_grad()
def pruned(layer: Any, keep: list[int], distil: bool = False) -> None:
    """As `prune_heads` left a layer: smaller projections, fewer heads, heads of the same size."""
    own = layer.attention if distil else layer.attention.self
    names = ("q_lin", "k_lin", "v_lin") if distil else ("query", "key", "value")
    rows = torch.cat([torch.arange(8) + 8 * head for head in keep])

    def cut(dense: nn.Linear, dim: int) -> nn.Linear:
        weight = dense.weight.index_select(dim, rows)
        new = nn.Linear(weight.shape[1], weight.shape[0]).train(dense.training)
        new.weight.copy_(weight)
        new.bias.copy_(dense.bias if dim else dense.bias[rows])
        return new

    for name in names:
        setattr(own, name, cut(getattr(own, name), 0))
    if distil:
        own.out_lin, own.n_heads, own.dim = cut(own.out_lin, 1), len(keep), len(rows)
    else:
        layer.attention.output.dense = cut(layer.attention.output.dense, 1)
        own.num_attention_heads, own.all_head_size = len(keep), len(rows)


def prune_first(model: Any) -> None:
    pruned(encoder(model).layer[0], [0, 2, 3], hasattr(model, "transformer"))


def prune_both(model: Any) -> None:
    pruned(encoder(model).layer[0], [1], hasattr(model, "transformer"))
    pruned(encoder(model).layer[1], [0, 1, 3], hasattr(model, "transformer"))


def drop(model: Any) -> None:
    encoder(model).layer = nn.ModuleList(list(encoder(model).layer)[:1])


def drop_and_tell(model: Any) -> None:
    drop(model)
    model.config.num_hidden_layers = 1


def repeat(model: Any) -> None:
    layers = list(encoder(model).layer)
    encoder(model).layer = nn.ModuleList([layers[0], copy.deepcopy(layers[0]), *layers[1:]])
    model.config.num_hidden_layers = 3


def share(model: Any) -> None:
    layers = list(encoder(model).layer)
    encoder(model).layer = nn.ModuleList([*layers, *layers])
    model.config.num_hidden_layers = 4


def share_parts(model: Any) -> None:
    first, second = list(encoder(model).layer)[:2]
    second.attention = first.attention


def share_weights(model: Any) -> None:
    for first, second in zip(encoder(model).layer[0].modules(), encoder(model).layer[1].modules(), strict=True):
        for name in list(first._parameters):
            setattr(second, name, getattr(first, name))


# name: change, tier, pattern of the reason
MODELS: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "heads pruned in a layer": (prune_first, "module", "layer.0.attention.* (has heads|weight has shape)"),
    "other heads in every layer": (prune_both, "module", "layer.0.attention.* (has heads|weight has shape)"),
    "a layer dropped": (drop, "encoder", ""),
    "a layer dropped, the config told": (drop_and_tell, "encoder", ""),
    "a layer repeated": (repeat, "encoder", ""),
    "layers shared": (share, "encoder", ""),
    "attention shared": (share_parts, "module", "belongs to two layers"),
    "weights shared": (share_weights, "encoder", ""),
}


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_made_by_hand(name: str, attn: str, family: str) -> None:
    change, tier, reason = MODELS[name]
    upstream, ours = pair(family, attn)
    for model in (upstream, ours):
        change(model)
    inputs = inputs_of(family)
    assert_tier(ours, inputs, tier, reason)
    assert_told_the_truth(ours, inputs)
    calls = [{}, {"output_hidden_states": True}, *([FLAGS] if attn == "eager" else [])]
    for flags in calls:
        with torch.no_grad():
            assert_close_fp32(ours(**inputs, **flags), upstream(**inputs, **flags))
    for model in (upstream, ours):
        model(**inputs).last_hidden_state.pow(2).sum().backward()
    assert_gradients_close(ours, upstream)


@torch.no_grad()
def grow(model: Any, buffers: tuple[str, ...]) -> None:
    embeddings, table = model.embeddings, nn.Embedding(40, 32)
    table.weight.copy_(embeddings.position_embeddings.weight.repeat(2, 1)[:40])
    embeddings.position_embeddings = table.train(model.training)
    model.config.max_position_embeddings = 40
    for name in buffers:
        size = torch.arange(40)[None] if name == "position_ids" else torch.zeros(1, 40, dtype=torch.long)
        embeddings.register_buffer(name, size, persistent=False)


def outcome(model: Any, inputs: dict[str, Any]) -> Any:
    try:
        with torch.no_grad():
            return model(**inputs).last_hidden_state
    except (IndexError, RuntimeError) as error:
        return error


def assert_same_outcome(ours: Any, upstream: Any, inputs: dict[str, Any], what: str) -> None:
    theirs, mine = outcome(upstream, inputs), outcome(ours, inputs)
    if isinstance(theirs, Exception) or isinstance(mine, Exception):
        assert type(theirs) is type(mine), f"{what}: {theirs!r}, {mine!r}"
    else:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=what)


GIVEN: dict[str, Callable[[int], dict[str, Any]]] = {
    "nothing": lambda S: {},
    "positions": lambda S: {"position_ids": torch.arange(S)[None]},
    "the last positions": lambda S: {"position_ids": torch.arange(40 - S, 40)[None]},
    "types": lambda S: {"token_type_ids": torch.zeros(2, S, dtype=torch.long)},
    "both": lambda S: {
        "position_ids": torch.arange(40 - S, 40)[None],
        "token_type_ids": torch.ones(2, S, dtype=torch.long),
    },
}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("hook", [False, True], ids=["encoder", "module"])
@pytest.mark.parametrize("buffers", [(), ("position_ids",), ("token_type_ids",), ("position_ids", "token_type_ids")])
def test_a_position_table_grown_by_hand(buffers: tuple[str, ...], hook: bool, attn: str) -> None:
    upstream, ours = pair("bert", attn)
    for model in (upstream, ours):
        grow(model, buffers)
        if hook:
            model.pooler.register_forward_hook(lambda *args: None)
    for S in (20, 30):
        ids = torch.randint(2, 50, (2, S), generator=torch.Generator().manual_seed(S))
        for name, given in GIVEN.items():
            assert_same_outcome(ours, upstream, {"input_ids": ids} | given(S), f"{S} tokens, {name}")
    assert_tier(ours, {"input_ids": ids}, "module" if hook else "encoder", "hook")


def shrink(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        table = getattr(model.embeddings, name)
        table.weight = nn.Parameter(table.weight[: len(table.weight) // 2].clone())

    return change


def other_buffer(name: str, value: int) -> Callable[[Any], None]:
    return lambda model: getattr(model.embeddings, name)[:, 4].fill_(value)


READ: dict[str, Callable[[Any], None]] = {
    "fewer words": shrink("word_embeddings"),
    "fewer positions": shrink("position_embeddings"),
    "fewer types": shrink("token_type_embeddings"),
    "another type by default": other_buffer("token_type_ids", 2),
    "a type that is none": other_buffer("token_type_ids", 3),
    "a negative type": other_buffer("token_type_ids", -1),
    "another position by default": other_buffer("position_ids", 9),
    "a position that is none": other_buffer("position_ids", 26),
    "a negative position": other_buffer("position_ids", -1),
}


@pytest.mark.parametrize("hook", [False, True], ids=["encoder", "module"])
@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_what_is_checked(name: str, hook: bool) -> None:
    upstream, ours = pair("bert")
    for model in (upstream, ours):
        model.embeddings.position_ids = model.embeddings.position_ids.clone()
        model.embeddings.token_type_ids = model.embeddings.token_type_ids.clone()
        READ[name](model)
        if hook:
            model.pooler.register_forward_hook(lambda *args: None)
    for S in (4, 11, 20):
        ids = torch.randint(2, 50, (2, S), generator=torch.Generator().manual_seed(S))
        types, positions = torch.zeros_like(ids), torch.arange(S).expand(2, S)
        for given in ({}, {"token_type_ids": types}, {"position_ids": positions}, {"position_ids": positions % 5}):
            assert_same_outcome(ours, upstream, {"input_ids": ids} | given, f"{S} tokens, {sorted(given)}")


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["auto", "exact", "skip"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_stands_at_padding_reaches_no_real_token(
    family: str, attn: str, padding: str, grad: bool, value: float
) -> None:
    """transformers spreads a NaN at a masked position over the whole sequence; here masked keys are not read.

    Gradients of weights are sums over all rows, of which "skip" alone leaves the masked ones out.
    """
    _, ours = pair(family, attn)
    ours.set_padding(padding)
    mask = ragged_mask(kind="right")
    real = mask.bool()
    size = ours.get_input_embeddings().weight.shape[1]
    clean = torch.randn(3, 11, size, generator=torch.Generator().manual_seed(1))
    spoilt = torch.where(real[..., None], clean, value).requires_grad_(grad)
    clean.requires_grad_(grad)
    outputs = []
    for embeds in (clean, spoilt):
        with torch.set_grad_enabled(grad):
            out = ours(inputs_embeds=embeds, attention_mask=mask, **FLAGS)
            if grad and padding == "skip":
                ours.zero_grad()
                out.last_hidden_state[real].sum().backward()
        outputs.append(out)
    wanted, got = outputs
    assert torch.equal(got.last_hidden_state[real], wanted.last_hidden_state[real])
    for theirs, mine in zip(wanted.attentions, got.attentions, strict=True):
        rows = real[:, None, :, None].expand_as(theirs)
        assert torch.equal(mine[rows], theirs[rows])
    if grad and padding == "skip":
        torch.testing.assert_close(spoilt.grad[real], clean.grad[real])
        assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)
