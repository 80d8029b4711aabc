"""Silent breaks 5, 7-11, 17 of the contract: losses, gradients, dropout and its random numbers."""

import contextlib

import pytest
import torch
from dropout_helpers import our_dropout
from helpers import (
    CLASSES,
    assert_close_fp32,
    assert_gradients_close,
    assert_tier,
    head_inputs,
    model_inputs,
    pair,
    tensors_of,
)

FLAGS = {"output_hidden_states": True, "output_attentions": True}
WITH_LOSS = [cls for cls in CLASSES if cls != "BertModel"]


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SGD = torch.optim.SGD  # Adam turns rounding noise in the gradient of key.bias into whole steps


def losses(model, inputs, steps=3, around=contextlib.nullcontext):
    """Loss of each of `steps` optimizer steps, always on the same random numbers; around: every forward."""
    torch.manual_seed(11)
    optimizer, found = SGD(model.parameters(), lr=0.01), []
    for _ in range(steps):
        with around():
            loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("cls", WITH_LOSS)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_three_steps_in_training_mode(cls, attn, monkeypatch):
    upstream, ours = pair(cls)
    ours.set_attn_implementation(attn)
    inputs = head_inputs(cls, labels=True)
    assert_tier(ours.train(), inputs, "encoder")
    mask = inputs["attention_mask"].view(-1, 11)
    got = losses(ours, inputs)
    wanted = losses(upstream.train(), inputs, around=lambda: our_dropout(monkeypatch, mask))
    assert wanted[0] != wanted[2]
    assert_close_fp32(got, wanted, cls, 1e-4)
    assert_tier(ours.eval(), inputs, "encoder")
    assert_close_fp32(ours(**inputs), upstream.eval()(**inputs), "after the steps", 1e-4)


@pytest.mark.parametrize("cls", WITH_LOSS)
def test_three_steps_in_eval_mode(cls):
    upstream, ours = pair(cls)
    inputs = head_inputs(cls, labels=True)
    assert_tier(ours, inputs, "encoder")
    assert_close_fp32(losses(ours, inputs), losses(upstream, inputs), cls, 1e-4)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_gradients_in_eval_mode(cls, attn):
    upstream, ours = pair(cls)
    ours.set_attn_implementation(attn)
    inputs = head_inputs(cls, kind="holes")
    for flags in ({}, FLAGS):
        assert_tier(ours, {**inputs, **flags}, "encoder")
        for model in (upstream, ours):
            model.zero_grad()
            outputs = tensors_of(model(**inputs, **flags))
            sum((t * torch.arange(1.0, 1 + t.numel()).cos().view(t.shape)).sum() for t in outputs.values()).backward()
        assert_gradients_close(ours, upstream)
        assert upstream.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [(3, 1, 11, 11), (1, 4, 11, 11), (3, 1, 1, 11)], ids=str)
def test_gradients_of_embeds_and_of_an_additive_mask(attn, shape):
    upstream, ours = pair()
    ours.set_attn_implementation(attn)
    found = []
    for model in (upstream, ours):
        embeds = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
        output = model(inputs_embeds=embeds, attention_mask=bias, output_attentions=True)
        (output.last_hidden_state[:, 3].square().sum() + output.attentions[1].square().sum()).backward()
        found.append((embeds.grad, bias.grad))
    assert_close_fp32(found[1], found[0], factor=2e-5)
    assert_gradients_close(ours, upstream)


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_padding_modes_give_the_same_gradients_where_the_loss_sees_real_rows(padding):
    upstream, ours = pair()
    ours.set_padding(padding)
    inputs = model_inputs(kind="left")
    assert assert_tier(ours, inputs, "encoder").padding == padding
    for model in (upstream, ours):
        output = model(**inputs)
        (output.last_hidden_state[inputs["attention_mask"].bool()].sum() * 3 + output.pooler_output.sum()).backward()
    assert_gradients_close(ours, upstream)


@pytest.mark.parametrize("frozen", [None, "embeddings", "encoder.layer.0", "encoder", "pooler", ""])
def test_requires_grad_of_every_output(frozen):
    upstream, ours = pair()
    inputs = model_inputs(kind="right", **FLAGS)
    for model in (upstream, ours):
        if frozen is not None:
            model.get_submodule(frozen).requires_grad_(False)
    assert_tier(ours, inputs, "encoder")
    got, wanted = tensors_of(ours(**inputs)), tensors_of(upstream(**inputs))
    assert {n: t.requires_grad for n, t in got.items()} == {n: t.requires_grad for n, t in wanted.items()}
    assert got["last_hidden_state"].requires_grad == (frozen != "")
    with torch.inference_mode():
        assert all(t.is_inference() for t in tensors_of(ours(**inputs)).values())
        assert_close_fp32(ours(**inputs), upstream(**inputs))


def test_partly_frozen():
    upstream, ours = pair("BertForMaskedLM")
    inputs = head_inputs("BertForMaskedLM", labels=True)
    for model in (upstream, ours):
        model.bert.embeddings.requires_grad_(False)
        model.bert.encoder.layer[0].requires_grad_(False)
        model.bert.encoder.layer[1].attention.self.key.requires_grad_(False)
        model.bert.encoder.layer[1].output.LayerNorm.bias.requires_grad_(False)
        model(**inputs).loss.backward()
    assert_gradients_close(ours, upstream)


def masks(monkeypatch, on, inputs):
    """Our dropout masks, for a forward of transformers."""
    return our_dropout(monkeypatch, inputs["attention_mask"]) if on else contextlib.nullcontext()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_dropout_is_on_and_a_changed_p_takes_effect(attn, monkeypatch):
    upstream, ours = pair()
    ours.set_attn_implementation(attn)
    inputs, found = model_inputs(kind="right"), []
    for model in (upstream.train(), ours.train()):
        runs = []
        for p in (0.1, 0.1, 0.0, 0.9):
            for layer in model.encoder.layer:
                layer.attention.self.dropout.p = p
            for seed in (3, 3, 4):
                torch.manual_seed(seed)
                with masks(monkeypatch, model is upstream, inputs):
                    runs.append(model(**inputs).last_hidden_state)
        found.append(runs)
    assert_close_fp32(found[1], found[0], factor=2e-5)
    same, other = found[1][0] - found[1][1], found[1][0] - found[1][2]
    assert same.abs().max() == 0 and other.abs().max() > 0.1
    assert (found[1][0] - found[1][6]).abs().max() > 1e-2, "p has no effect"


def test_training_without_dropout_equals_eval():
    upstream, ours = pair(**NO_DROPOUT)
    inputs = model_inputs(kind="right", **FLAGS)
    assert_close_fp32(ours.train()(**inputs), upstream(**inputs))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_modes_of_single_modules(attn, monkeypatch):
    upstream, ours = pair()
    ours.set_attn_implementation(attn)
    inputs = model_inputs(kind="right")
    first = ours(**inputs).last_hidden_state
    parts = {
        "layer.attention.eval() in training": (True, lambda m: m.encoder.layer[0].attention.eval()),
        "one layer in training": (False, lambda m: m.encoder.layer[1].train()),
        "Monte Carlo dropout": (False, lambda m: [d.train() for d in m.modules() if type(d) is torch.nn.Dropout]),
        "self-attention in training": (False, lambda m: m.encoder.layer[0].attention.self.train()),
        "embeddings in training": (False, lambda m: m.embeddings.dropout.train()),
    }
    for name, (training, change) in parts.items():
        found = []
        for model in (upstream, ours):
            change(model.train(training)), torch.manual_seed(7)
            with masks(monkeypatch, model is upstream, inputs):
                found.append(model(**inputs).last_hidden_state)
        assert_tier(ours, inputs, "encoder")
        assert_close_fp32(found[1], found[0], name)
        assert (found[1] - first).abs().max() > 1e-2, f"{name}: no dropout"
    assert_tier(ours.eval(), inputs, "encoder")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attentions_in_training_are_dropped_and_differentiable(attn, monkeypatch):
    upstream, ours = pair()
    ours.set_attn_implementation(attn)
    inputs = model_inputs(kind="right", output_attentions=True, output_hidden_states=True)
    torch.manual_seed(1)
    got = ours.train()(**inputs)
    assert len(got.attentions) == 2 and len(got.hidden_states) == 3 and got.cross_attentions == ()
    zeros = (got.attentions[0][..., :5] == 0).float().mean()
    assert 0.02 < zeros < 0.3
    for tensor in (got.attentions[0], got.hidden_states[1]):
        tensor.retain_grad()
    (got.last_hidden_state.square().sum() + got.attentions[1].square().sum()).backward()
    assert got.attentions[0].grad.abs().sum() > 0 and got.hidden_states[1].grad.abs().sum() > 0
    torch.manual_seed(1)
    with masks(monkeypatch, True, inputs):
        wanted = upstream.train()(**inputs)
    (wanted.last_hidden_state.square().sum() + wanted.attentions[1].square().sum()).backward()
    assert_close_fp32(got, wanted)
    assert_gradients_close(ours, upstream)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    upstream, ours = pair("BertForSequenceClassification", **NO_DROPOUT)
    inputs = head_inputs("BertForSequenceClassification", labels=True)
    for model in (upstream.train(), ours.train()):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs).loss.backward()
    assert ours.is_gradient_checkpointing
    assert_tier(ours, inputs, "module", "hook")  # of transformers, on the word embeddings
    ours.disable_input_require_grads()
    assert_tier(ours, inputs, "module", "checkpointed")
    assert_gradients_close(ours, upstream)
    assert_close_fp32(ours.eval()(**inputs), upstream.eval()(**inputs))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_is_computed_again_with_the_same_dropout(reentrant):
    twins = [pair("BertForSequenceClassification")[1].train() for _ in range(2)]
    inputs = head_inputs("BertForSequenceClassification", labels=True)
    twins[0].bert.encoder.layer[0].register_forward_hook(lambda *_: None)  # the module tier too, so the same numbers
    twins[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    twins[1].disable_input_require_grads()
    for model, reason in zip(twins, ("hook", "checkpointed"), strict=True):
        assert_tier(model, inputs, "module", reason)
        torch.manual_seed(2)
        model(**inputs).loss.backward()
    assert_gradients_close(*twins)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_gradients_at_the_returned_tensors_in_eval_mode(attn):
    """Attribution methods ask for d loss / d attentions and d loss / d hidden_states of a model in eval mode."""
    upstream, ours = pair()
    ours.set_attn_implementation(attn)
    inputs, found = model_inputs(kind="right", **FLAGS), []
    for model in (upstream, ours):
        output = model(**inputs)
        asked = (*output.attentions, *output.hidden_states[:-1])
        loss = output.pooler_output.square().sum() + output.last_hidden_state.sum(-1).square().sum()
        found.append(torch.autograd.grad(loss, asked))
    assert_close_fp32(found[1], found[0], factor=2e-5)
