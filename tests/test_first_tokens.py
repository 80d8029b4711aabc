"""Heads that read the pooler alone: the last layer computes one row a sequence, and nobody can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    FIRST_TOKEN_HEADS,
    MASK_KINDS,
    assert_close_fp32,
    assert_gradients_close,
    assert_tier,
    head_inputs,
    pair,
    ragged_mask,
    random_ids,
)

from bert_fast import encoder


@pytest.fixture
def feed_forward_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every feed-forward that runs, layer after layer."""
    rows: list[int] = []
    op = encoder.linear_gelu
    monkeypatch.setattr(encoder, "linear_gelu", lambda x, *args: rows.append(len(x)) or op(x, *args))
    return rows


@pytest.mark.parametrize("padding", ["auto", "exact", "skip"])
@pytest.mark.parametrize("kind", [None, *MASK_KINDS])
@pytest.mark.parametrize("cls", FIRST_TOKEN_HEADS)
def test_one_row_a_sequence(cls: str, kind: str | None, padding: str, feed_forward_rows: list[int]) -> None:
    upstream, ours = pair(cls)
    inputs = head_inputs(cls, labels=True, kind=kind or "ones")
    if kind is None:
        del inputs["attention_mask"]
    with torch.no_grad():
        assert_close_fp32(ours.set_padding(padding)(**inputs), upstream(**inputs))
    B = inputs["input_ids"].numel() // inputs["input_ids"].shape[-1]
    assert len(feed_forward_rows) == 2 and feed_forward_rows[-1] == B < feed_forward_rows[0]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_sequence_without_a_real_token(attn: str, feed_forward_rows: list[int]) -> None:
    upstream, ours = pair("BertForSequenceClassification", attn)
    inputs = {"input_ids": random_ids(), "attention_mask": ragged_mask()}
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))
    assert feed_forward_rows[-1] == 3


def test_gradients() -> None:
    """In eval mode they flow through the one row, and reach what upstream's reach."""
    upstream, ours = pair("BertForSequenceClassification")
    inputs = head_inputs("BertForSequenceClassification", labels=True, kind="first")
    for model in (upstream, ours):
        model(**inputs).loss.backward()
    assert_gradients_close(ours, upstream)


@pytest.mark.parametrize(
    "change",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"attention_mask": torch.zeros(3, 1, 11, 11)},  # could have a bias for every query
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_row_where_more_is_read(change: dict[str, Any], feed_forward_rows: list[int]) -> None:
    upstream, ours = pair("BertForSequenceClassification")
    inputs = {"input_ids": random_ids(), **change}
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))
    assert feed_forward_rows == [33, 33]


def test_a_hook_on_the_model_sees_every_position(feed_forward_rows: list[int]) -> None:
    """It reads last_hidden_state, so the head says nothing; the hook itself sends the call to transformers' code."""
    _, ours = pair("BertForSequenceClassification")
    shapes: list[tuple[int, ...]] = []
    ours.bert.register_forward_hook(lambda module, args, output: shapes.append(tuple(output[0].shape)))
    with torch.no_grad():
        ours(input_ids=random_ids())
        ours.bert(input_ids=random_ids())
    assert shapes == [(3, 11, 32)] * 2


def test_the_bare_model_returns_every_position(feed_forward_rows: list[int]) -> None:
    _, ours = pair("BertForSequenceClassification")
    assert_tier(ours, {"input_ids": random_ids()}, "encoder")
    with torch.no_grad():
        assert ours.bert(input_ids=random_ids()).last_hidden_state.shape == (3, 11, 32)
    assert feed_forward_rows == [33, 33]


@pytest.mark.parametrize("cls", FIRST_TOKEN_HEADS[:2])
def test_a_bias_for_every_query(cls):
    """A 4-D mask: the last layer is computed whole."""
    upstream, ours = pair(cls)
    inputs = head_inputs(cls) | {"attention_mask": torch.randn(3, 4, 11, 11)}
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))
