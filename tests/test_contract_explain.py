"""`explain` states the tier that really runs, and why; its table and its object agree."""

import functools

import pytest
import torch
from helpers import CLASSES, assert_close_fp32, assert_tier, head_inputs, model_inputs, pair
from recorder import recording
from transformers.models.bert import modeling_bert

import bert_fast
from bert_fast import tiers


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
    ours.encoder.layer[0].register_forward_hook(lambda *_: None)
    told = bert_fast.explain(ours, **model_inputs())
    assert told.tier == "module" and "hook" in told.reason
    assert told.reason in str(told) and told.reason in capsys.readouterr().out


def checkpoint(model):
    model.train().gradient_checkpointing_enable()
    model.disable_input_require_grads()  # a hook, which is the reason told first


SITUATIONS = {
    "gradient checkpointing": (checkpoint, "layer.0 is checkpointed"),
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
    "an instance's forward": (
        lambda m: setattr(m.encoder.layer[0], "forward", functools.partial(m.encoder.layer[0].forward)),
        "forward",
    ),
    "a parametrization": (
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.encoder.layer[0].output.dense),
        "parametri",
    ),
    "another module": (
        lambda m: setattr(m.encoder.layer[0].attention.output, "dense", torch.nn.Identity().eval()),
        "dense|identity|linear",
    ),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", SITUATIONS)
def test_situations_of_the_other_tiers(name):
    _, ours = pair()
    assert_tier(ours, model_inputs(kind="right"), "encoder")
    change, reason = SITUATIONS[name]
    change(ours)
    told = assert_tier(ours, model_inputs(kind="right"), "upstream" if name == "float64" else "module", reason)
    assert told.rows[0][1:] == ("transformers", told.reason)
    assert ("fused" in [how for _, how, _ in told.rows]) == (told.tier == "module")


def test_training_is_of_the_encoder_tier():
    _, ours = pair()
    ours.encoder.layer[1].attention.self.train()
    assert_tier(ours, model_inputs(kind="right"), "encoder")
    assert_tier(ours.train(), model_inputs(kind="right"), "encoder")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_tier(ours, model_inputs(kind="right"), "encoder")


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


@pytest.mark.parametrize("expected", ["encoder", "module", "upstream"])
def test_the_tier_told_is_the_tier_that_runs(expected, monkeypatch):
    """Transformers' own forward runs in all tiers but the first, our ops in all but the last."""
    _, ours = pair()
    if expected == "upstream":
        ours.double()
    elif expected == "module":
        ours.encoder.layer[0].attention.self.value = torch.nn.Sequential(
            ours.encoder.layer[0].attention.self.value
        ).eval()
    calls = []
    upstream = modeling_bert.BertModel
    inner = upstream.forward
    monkeypatch.setattr(upstream, "forward", lambda self, *a, **k: (calls.append(1), inner(self, *a, **k))[1])
    monkeypatch.setitem(tiers.FORWARDS, upstream, upstream.forward)  # no replacement, but what was there from the start
    inputs = model_inputs(kind="right")
    assert_tier(ours, inputs, expected)
    with recording() as ran:
        ours(**inputs)
    assert len(calls) == (0 if expected == "encoder" else 1)
    assert bool(ran.ops) == (expected != "upstream")


@pytest.mark.parametrize("name", ["BertLayer", "BertSelfAttention", "BertIntermediate", "BertModel"])
def test_a_forward_replaced_for_the_whole_class_takes_effect(name, monkeypatch):
    upstream, ours = pair()
    cls = getattr(modeling_bert, name)
    inner = cls.forward

    def doubled(self, *args, **kwargs):
        out = inner(self, *args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    def flipped(self, ids, **kwargs):
        return inner(self, ids.flip(0), **kwargs)

    monkeypatch.setattr(cls, "forward", flipped if name == "BertModel" else doubled)
    inputs = model_inputs(kind="right")
    assert "was replaced" in assert_tier(ours, inputs, "module").reason
    ids = inputs.pop("input_ids")
    assert_close_fp32(ours(ids, **inputs), upstream(ids, **inputs), name)
