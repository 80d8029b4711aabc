"""`explain` states the tier that really runs, and why; its table and its object agree."""

import pytest
import torch
from helpers import CLASSES, assert_close_fp32, assert_tier, head_inputs, model_inputs, pair
from transformers.models.bert import modeling_bert

import bert_fast


@pytest.mark.parametrize("cls", CLASSES)
def test_the_table(cls, capsys):
    _, ours = pair(cls)
    inputs = head_inputs(cls)
    told = bert_fast.explain(ours, **inputs)
    assert (told.tier, told.reason) == ("encoder", None)
    assert told.padding in ("exact", "skip")
    assert told.rows and all(len(row) == 3 for row in told.rows)
    assert str(told).strip() in capsys.readouterr().out
    for name, how, _ in told.rows:
        assert str(name) in str(told) and str(how) in str(told)


def test_the_reason_is_in_the_table(capsys):
    _, ours = pair()
    told = bert_fast.explain(ours.train(), **model_inputs())
    assert told.tier == "upstream" and "training" in told.reason
    assert told.reason in str(told) and told.reason in capsys.readouterr().out


SITUATIONS = {
    "training": (lambda m: m.train(), "training"),
    "one module in training": (lambda m: m.encoder.layer[1].attention.self.train(), "training"),
    "a hook": (lambda m: m.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None), "hook"),
    "a pre-hook": (lambda m: m.encoder.layer[0].register_forward_pre_hook(lambda *_: None), "hook"),
    "a backward hook": (lambda m: m.encoder.layer[0].register_full_backward_hook(lambda *_: None), "hook"),
    "a negative scale": (lambda m: setattr(m.encoder.layer[0].attention.self, "scaling", -0.1), "scaling -0.1"),
    "float64": (lambda m: m.double(), "float64|dtype"),
    "one layer in bfloat16": (lambda m: m.encoder.layer[1].bfloat16(), "bfloat16|dtype"),
    "a custom activation": (
        lambda m: setattr(m.encoder.layer[0].intermediate, "intermediate_act_fn", torch.nn.Softplus().eval()),
        "activation|softplus|act_fn",
    ),
    "an instance's forward": (lambda m: setattr(m.encoder.layer[0], "forward", m.encoder.layer[0].forward), "forward"),
    "a parametrization": (
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.encoder.layer[0].output.dense),
        "parametri",
    ),
    "another module": (
        lambda m: setattr(m.encoder.layer[0].attention.output, "dense", torch.nn.Identity().eval()),
        "dense|identity|linear",
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_situations_of_the_upstream_tier(name):
    _, ours = pair()
    assert_tier(ours, model_inputs(kind="right"), "encoder")
    change, reason = SITUATIONS[name]
    change(ours)
    assert_tier(ours, model_inputs(kind="right"), "upstream", reason)


def test_explain_leaves_no_trace():
    _, ours = pair()
    inputs = model_inputs(kind="right", output_hidden_states=True)
    copies = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
    hooks = [len(m._forward_hooks) for m in ours.modules()]
    state = torch.get_rng_state()
    bert_fast.explain(ours, **inputs)
    bert_fast.explain(ours.train(), **inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert [len(m._forward_hooks) for m in ours.modules()] == hooks
    assert all(torch.equal(inputs[name], value) for name, value in copies.items())


@pytest.mark.parametrize("expected", ["encoder", "upstream"])
def test_the_tier_told_is_the_tier_that_runs(expected, monkeypatch):
    """Transformers' own forward runs in the upstream tier, and only there."""
    _, ours = pair()
    if expected == "upstream":
        ours.encoder.layer[0].attention.self.value = torch.nn.Sequential(
            ours.encoder.layer[0].attention.self.value
        ).eval()
    calls = []
    upstream = modeling_bert.BertModel
    inner = upstream.forward
    monkeypatch.setattr(upstream, "forward", lambda self, *a, **k: (calls.append(1), inner(self, *a, **k))[1])
    inputs = model_inputs(kind="right")
    assert_tier(ours, inputs, expected)
    ours(**inputs)
    assert len(calls) == (1 if expected == "upstream" else 0)


@pytest.mark.parametrize("name", ["BertLayer", "BertSelfAttention", "BertIntermediate"])
def test_a_forward_replaced_for_the_whole_class_takes_effect(name, monkeypatch):
    upstream, ours = pair()
    cls = getattr(modeling_bert, name)
    inner = cls.forward

    def doubled(self, *args, **kwargs):
        out = inner(self, *args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    monkeypatch.setattr(cls, "forward", doubled)
    inputs = model_inputs(kind="right")
    assert "forward was replaced" in assert_tier(ours, inputs, "upstream").reason
    assert_close_fp32(ours(**inputs), upstream(**inputs), name)
