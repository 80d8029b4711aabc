"""Masks of every kind, in the padding modes, beside transformers with the same mask."""

import pytest
import torch
from helpers import (
    CLASSES,
    FIRST_TOKEN_HEADS,
    MASK_KINDS,
    assert_close_fp32,
    assert_tier,
    head_inputs,
    model_inputs,
    pair,
    ragged_mask,
)

import bert_fast

B, S, H = 3, 11, 4
FLAGS = {"output_hidden_states": True, "output_attentions": True}
DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES += (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BIASES = ((B, 1, 1, S), (B, 1, S, S), (B, H, S, S), (1, 1, S, S), (1, H, S, S), (1, H, 1, 1))
MIN = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def empty_mask(kind="right"):
    """Sequence 1 has no real token at all."""
    mask = ragged_mask(B, S, kind)
    mask[1] = 0
    return mask


def kept_rows(mask):
    """Rows that `skip` computes: real tokens, position 0, and every row of a sequence without real tokens."""
    keep = mask.bool().clone()
    keep[:, 0] = True
    return keep | ~mask.bool().any(1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mask_dtype(dtype):
    upstream, ours = pair()
    inputs = model_inputs(kind="holes", **FLAGS)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert_tier(ours, inputs, "encoder")
    assert_close_fp32(ours(**inputs), upstream(**inputs))


@pytest.mark.parametrize("factor", [7, -1, 0.25])
def test_any_non_zero_entry_is_real(factor):
    upstream, ours = pair()
    inputs = model_inputs(kind="holes", **FLAGS)
    inputs["attention_mask"] = inputs["attention_mask"] * factor
    assert_close_fp32(ours(**inputs), upstream(**inputs))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_exact_equals_eager_at_every_position(attn, kind):
    upstream, ours = pair()
    ours.set_attn_implementation(attn)
    for seed in range(3):
        inputs = model_inputs(kind=kind, seed=seed, **FLAGS)
        assert assert_tier(ours, inputs, "encoder").padding == "exact"
        assert_close_fp32(ours(**inputs), upstream(**inputs), f"{kind} {seed}")


def test_all_ones_is_no_mask():
    upstream, ours = pair()
    inputs = model_inputs(**FLAGS)
    wanted = upstream(**inputs)
    for padding in ("auto", "exact", "skip"):
        ours.set_padding(padding)
        assert_close_fp32(ours(**inputs), wanted, "no mask")
        assert_close_fp32(ours(**inputs, attention_mask=torch.ones(B, S)), wanted, "all ones")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["exact", "skip"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_fully_masked_sequence_follows_the_implementation(attn, padding, everywhere):
    upstream, ours = pair(attn=attn)
    ours.set_padding(padding)
    mask = torch.zeros(B, S) if everywhere else empty_mask()
    inputs = model_inputs(attention_mask=mask, output_hidden_states=True)
    assert_tier(ours, inputs, "encoder")
    got, wanted = ours(**inputs), upstream(**inputs)
    keep = kept_rows(mask)[..., None] if padding == "skip" else 1
    assert_close_fp32(got.hidden_states, tuple(h * keep for h in wanted.hidden_states))
    assert_close_fp32(got.pooler_output, wanted.pooler_output)
    attentions = ours(**inputs, output_attentions=True).attentions
    expected = 1 / S if attn == "eager" else 0.0
    for probabilities in attentions:
        assert_close_fp32(probabilities[1], torch.full((H, S, S), expected), "weights of the empty sequence")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [*MASK_KINDS, "empty"])
def test_skip_computes_real_rows_and_position_0_and_zeros_the_rest(attn, kind):
    upstream, ours = pair()
    ours.set_attn_implementation(attn)
    ours.set_padding("skip")
    mask = ragged_mask(B, S, kind) if kind != "empty" else empty_mask("left")
    upstream.set_attn_implementation(attn)
    inputs = model_inputs(attention_mask=mask)
    assert assert_tier(ours, inputs, "encoder").padding == "skip"
    keep = kept_rows(mask)
    wanted = upstream(**inputs)
    for flags in ({}, {"output_hidden_states": True}, {"output_attentions": True}, FLAGS):
        got = ours(**inputs, **flags)
        assert_close_fp32(got.last_hidden_state, wanted.last_hidden_state * keep[..., None], f"last {flags}")
        assert_close_fp32(got.pooler_output, wanted.pooler_output, f"pooler {flags}")
        assert (got.last_hidden_state[~keep] == 0).all()
    upstream.set_attn_implementation("eager")
    if kind != "empty" or attn == "eager":
        wanted = upstream(**inputs, **FLAGS)
        assert_close_fp32(got.hidden_states, tuple(h * keep[..., None] for h in wanted.hidden_states))
        assert_close_fp32(got.attentions, tuple(a * keep[:, None, :, None] for a in wanted.attentions))


@pytest.mark.parametrize("cls", ["BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_skip_per_token_logits_at_padding_are_those_of_a_zero_vector(cls):
    upstream, ours = pair(cls)
    ours.set_padding("skip")
    inputs = model_inputs(kind="first")
    keep = kept_rows(inputs["attention_mask"])
    assert assert_tier(ours, inputs, "encoder").padding == "skip"
    got, wanted = ours(**inputs), upstream(**inputs)
    zero = torch.zeros(1, 1, upstream.config.hidden_size)
    head = {"BertForMaskedLM": "cls", "BertForTokenClassification": "classifier"}.get(cls, "qa_outputs")
    at_padding = getattr(upstream, head)(zero)[0, 0]
    for i, (name, logits) in enumerate(wanted.items()):
        assert_close_fp32(got[name][keep], logits[keep], name)
        expected = at_padding[i] if head == "qa_outputs" else at_padding
        assert_close_fp32(got[name][~keep], expected.expand_as(got[name][~keep]), f"{name} at padding")


@pytest.mark.parametrize("cls", CLASSES)
def test_auto_skips_only_where_nobody_can_see_it(cls):
    upstream, ours = pair(cls)
    inputs = head_inputs(cls, kind="right")
    expected = "skip" if cls in FIRST_TOKEN_HEADS else "exact"
    assert ours.padding == "auto"
    assert assert_tier(ours, inputs, "encoder").padding == expected
    for flags in ({"output_hidden_states": True}, {"output_attentions": True}, {"output_hidden_states": [0]}):
        assert assert_tier(ours, {**inputs, **flags}, "encoder").padding == "exact"
        assert_close_fp32(ours(**inputs, **flags), upstream(**inputs, **flags), f"{flags}")
    assert ours.set_padding("exact") is ours and ours.padding == "exact"
    assert bert_fast.explain(ours, **inputs).padding == "exact"
    ours.set_padding("auto").config.output_hidden_states = True
    assert bert_fast.explain(ours, **inputs).padding == "exact"


@pytest.mark.parametrize("cls", FIRST_TOKEN_HEADS)
@pytest.mark.parametrize("padding", ["auto", "exact", "skip"])
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_first_token_heads_under_every_mask(cls, padding, kind):
    upstream, ours = pair(cls)
    ours.set_padding(padding)
    for seed in range(2):
        inputs = head_inputs(cls, labels=True, kind=kind, seed=seed)
        assert_tier(ours, inputs, "encoder")
        assert_close_fp32(ours(**inputs), upstream(**inputs), f"{kind} {seed}")
        mask = inputs["attention_mask"]
        mask[1 : 2 if kind == "left" else 3] = 0
        assert_close_fp32(ours(**inputs), upstream(**inputs), f"{kind} {seed}, empty sequences")


def test_the_base_model_inside_a_head_stays_exact():
    upstream, ours = pair("BertForSequenceClassification")
    inputs = model_inputs(kind="first", **FLAGS)
    ours(**model_inputs(kind="first"))
    assert_close_fp32(ours.bert(**inputs), upstream.bert(**inputs))
    del inputs["output_hidden_states"], inputs["output_attentions"]
    assert_close_fp32(ours.bert(**inputs), upstream.bert(**inputs))


def test_explicit_exact_and_back():
    upstream, ours = pair()
    inputs = model_inputs(kind="left")
    exact = upstream(**inputs).last_hidden_state
    skipped = exact * kept_rows(inputs["attention_mask"])[..., None]
    for padding, wanted in (("skip", skipped), ("exact", exact), ("skip", skipped), ("auto", exact)):
        assert_close_fp32(ours.set_padding(padding)(**inputs).last_hidden_state, wanted, padding)
    with pytest.raises(ValueError, match="padding"):
        ours.set_padding("sometimes")
    assert ours.padding == "auto"


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", BIASES, ids=str)
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_additive_4d(attn, shape, padding):
    upstream, ours = pair()
    ours.set_attn_implementation(attn)
    ours.set_padding(padding)  # an additive mask has no padding rows: the modes agree
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if shape[-1] == S:
        bias = bias.masked_fill(torch.arange(S) > 7, MIN)
    inputs = model_inputs(attention_mask=bias, **FLAGS)
    assert_tier(ours, inputs, "encoder")
    assert_close_fp32(ours(**inputs), upstream(**inputs))


def test_additive_4d_strided():
    upstream, ours = pair()
    bias = torch.randn(S, S, H, B).permute(3, 2, 0, 1)
    cases = (bias, bias[:, :1].expand(B, H, S, S), bias.mT, torch.randn(B, H, S, 2 * S)[..., ::2], bias[:1, :, :1])
    for at, mask in enumerate(cases):
        inputs = model_inputs(attention_mask=mask, **FLAGS)
        assert_close_fp32(ours(**inputs), upstream(**inputs), f"case {at}")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_additive_4d_with_infinities_and_blocked_rows(attn):
    upstream, ours = pair(attn=attn)
    infinite = torch.zeros(B, 1, S, S).masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf"))
    blocked = torch.zeros(B, 1, S, S)
    blocked[1, :, 4:6] = MIN
    for name, mask in {"-inf": infinite, "rows at the minimum": blocked}.items():
        inputs = model_inputs(attention_mask=mask)
        assert_tier(ours, inputs, "encoder")
        assert_close_fp32(ours(**inputs), upstream(**inputs), name)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", BIASES[:4], ids=str)
def test_boolean_4d_is_a_keep_mask(attn, shape):
    upstream, ours = pair(attn="sdpa")
    ours.set_attn_implementation(attn)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[..., 2] = True
    inputs = model_inputs(attention_mask=keep)
    assert_close_fp32(ours(**inputs), upstream(**inputs))
    additive = torch.zeros(shape).masked_fill(~keep, MIN)
    upstream.set_attn_implementation("eager")
    wanted = upstream(**model_inputs(attention_mask=additive, **FLAGS))
    assert_close_fp32(ours(**inputs, **FLAGS), wanted, "against the additive form")


def test_boolean_4d_with_a_blocked_row_under_sdpa():
    upstream, ours = pair(attn="sdpa")
    keep = torch.ones(B, 1, S, S, dtype=torch.bool).tril()
    keep[1, :, 3] = False
    inputs = model_inputs(attention_mask=keep)
    assert_close_fp32(ours(**inputs), upstream(**inputs))
