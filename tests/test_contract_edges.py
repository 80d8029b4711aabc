"""Corners of the contract: undefined rows under gradients, dead rows, in-place use of outputs, odd parts and shapes."""

import pytest
import torch
from helpers import assert_close_fp32, assert_gradients_close, assert_tier, model_inputs, pair, ragged_mask, random_ids
from torch import nn


def test_attentions_with_gradient_in_skip_are_finite():
    """Rows past the real ones are undefined memory, and 0 * NaN is NaN."""
    _, ours = pair()
    ours.set_padding("skip")
    out = ours(**model_inputs(kind="right"), output_attentions=True)
    out.last_hidden_state.square().sum().backward()
    assert torch.isfinite(out.last_hidden_state).all()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_a_query_without_a_key_has_finite_gradients():
    upstream, ours = pair(attn="sdpa")
    ids, keep = random_ids(), torch.ones(3, 1, 11, 11, dtype=torch.bool)
    keep[0, 0, 2] = False
    for model in (upstream, ours):
        model(input_ids=ids, attention_mask=keep).last_hidden_state.square().sum().backward()
    assert_gradients_close(ours, upstream)


def test_gradients_of_a_fully_masked_sequence_under_eager():
    upstream, ours = pair(attn="eager")
    mask = ragged_mask()
    mask[0] = 0
    for model in (upstream, ours):
        model(input_ids=random_ids(), attention_mask=mask).last_hidden_state[0].square().sum().backward()
    assert_gradients_close(ours, upstream)


def test_a_part_of_no_use_gets_no_gradient():
    """The pooler must keep grad None where only last_hidden_state is used: an optimiser would decay it."""
    _, ours = pair()
    ours(**model_inputs()).last_hidden_state.sum().backward()
    assert ours.pooler.dense.weight.grad is None and ours.encoder.layer[0].output.dense.weight.grad is not None


def test_outputs_made_without_gradient_may_be_changed_in_place():
    _, ours = pair()
    with torch.no_grad():
        hidden = ours(**model_inputs(kind="right")).last_hidden_state
    hidden += nn.Parameter(torch.ones(32))
    assert hidden.requires_grad
    ours(**model_inputs()).last_hidden_state.detach_()


class Around(nn.Module):
    """A user's module around one of BERT's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("part", ["embeddings", "encoder", "attention", "token_type_ids", "pooler"])
def test_a_part_of_another_class(part):
    upstream, ours = pair()
    for model in (upstream, ours):
        if part == "attention":
            model.encoder.layer[1].attention = Around(model.encoder.layer[1].attention).eval()
        elif part == "token_type_ids":
            del model.embeddings.token_type_ids
        else:
            setattr(model, part, Around(getattr(model, part)).eval())
    inputs = model_inputs(kind="right")
    inputs.pop("token_type_ids", None)
    assert_tier(ours, inputs, "module")
    assert_close_fp32(ours(**inputs), upstream(**inputs), part)


def test_half_precision_embeds_in_a_float32_model():
    upstream, ours = pair()
    embeds = torch.randn(3, 11, 32).half()
    assert_close_fp32(ours(inputs_embeds=embeds), upstream(inputs_embeds=embeds), "half embeds")


@pytest.mark.parametrize("positions, types", [((11,), (11,)), ((3, 1), (3, 1)), ((1, 1), ()), ((3, 11), (1, 11))])
def test_indices_that_broadcast(positions, types):
    upstream, ours = pair()
    inputs = {
        "input_ids": random_ids(),
        "position_ids": torch.randint(0, 24, positions),
        "token_type_ids": torch.randint(0, 3, types),
    }
    assert_tier(ours, inputs, "encoder")
    assert_close_fp32(ours(**inputs), upstream(**inputs), f"{positions} {types}")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_the_tiers_agree(attn):
    """A hook moves the call to the module tier; attentions, 4-D keep-masks and empty sequences must not change."""
    _, ours = pair(attn=attn)
    mask = ragged_mask()
    mask[0] = 0
    keep = torch.rand(3, 1, 11, 11) > 0.3
    calls = [{"input_ids": random_ids(), "attention_mask": m, "output_attentions": True} for m in (mask, keep)]
    with torch.no_grad():
        fused = [ours(**call) for call in calls]
    ours.encoder.layer[0].register_forward_hook(lambda *args: None)
    for call, expected in zip(calls, fused, strict=True):
        assert_tier(ours, call, "module")
        with torch.no_grad():
            got = ours(**call)
        assert_close_fp32(got.last_hidden_state, expected.last_hidden_state, "last_hidden_state")
        assert len(got.attentions) == 2
        for mine, theirs in zip(got.attentions, expected.attentions, strict=True):
            assert_close_fp32(mine, theirs, "attentions")


def test_a_strict_replacement_of_the_inner_forward():
    """A first-token head passes nothing to its BertModel that the model's own signature does not have."""
    upstream, ours = pair("BertForSequenceClassification")
    inputs = model_inputs(kind="right")
    inner, seen = ours.bert.forward, []

    def strict(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict):
        out = inner(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=return_dict)
        seen.append(out.last_hidden_state)
        return out

    ours.bert.forward = lambda input_ids=None, **kwargs: strict(input_ids, **kwargs)
    assert_close_fp32(ours(**inputs).logits, upstream(**inputs).logits, "logits")
    assert (seen[0][inputs["attention_mask"] == 0] != 0).any()


def test_selection_after_layers_were_removed():
    upstream, ours = pair(num_hidden_layers=4)
    for model in (upstream, ours):
        model.encoder.layer = model.encoder.layer[:2]
    for wanted in ([-1], [-3], [0, 1], -2, True):
        got = ours(**model_inputs(), output_hidden_states=wanted).hidden_states
        expected = upstream(**model_inputs(), output_hidden_states=wanted).hidden_states
        assert [h is None for h in got] == [h is None for h in expected], wanted
