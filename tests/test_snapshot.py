"""The snapshot that stands for a walk over all modules: whatever changes a walk's answer or an address ends it."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import leave_capture_hooks, model_inputs, pair
from torch import nn
from transformers.models.bert import modeling_bert as hf

from bert_fast import snapshot, tiers

HOOK = staticmethod(lambda *args: None)
Change = Callable[[Any, pytest.MonkeyPatch], Any]


def layer(model: Any) -> Any:
    return model.encoder.layer[1]


def set_data(parameter: torch.Tensor, data: torch.Tensor) -> None:
    parameter.data = data


# what the walk then says against the model
NOT_PLAIN: dict[str, Change] = {
    "forward hook": lambda m, _: layer(m).register_forward_hook(HOOK),
    "pre-hook": lambda m, _: layer(m).attention.self.query.register_forward_pre_hook(HOOK),
    "backward hook": lambda m, _: m.pooler.dense.register_full_backward_hook(HOOK),
    "backward pre-hook": lambda m, _: m.embeddings.register_full_backward_pre_hook(HOOK),
    "hook in a new dict": lambda m, _: (
        setattr(layer(m).output, "_forward_hooks", OrderedDict()),
        layer(m).output.register_forward_hook(HOOK),
    ),
    "forward": lambda m, _: setattr(layer(m).output.dense, "forward", lambda x: x),
    "feed_forward_chunk": lambda m, _: setattr(layer(m), "feed_forward_chunk", lambda x: x),
    "other class": lambda m, _: setattr(layer(m).output.dense, "__class__", type("Other", (nn.Linear,), {})),
    "other module": lambda m, _: setattr(layer(m).attention.self, "query", nn.Sequential()),
    "other activation": lambda m, _: setattr(layer(m).intermediate, "intermediate_act_fn", nn.Tanh()),
    "parametrization": lambda m, _: nn.utils.parametrizations.weight_norm(layer(m).output.dense),
    "layers in another list": lambda m, _: setattr(m.encoder, "layer", nn.Sequential(*m.encoder.layer)),
    "other dtype": lambda m, _: m.double(),
    "one of another dtype": lambda m, _: m.pooler.dense.half(),
    "other device": lambda m, _: m.to("meta"),
    "no bias": lambda m, _: setattr(layer(m).output.dense, "bias", None),
    "removed weight": lambda m, _: delattr(layer(m).output.dense, "weight"),
    "removed buffer": lambda m, _: delattr(m.embeddings, "token_type_ids"),
    "max_norm": lambda m, _: setattr(m.embeddings.word_embeddings, "max_norm", 1.0),
    "causal": lambda m, _: setattr(layer(m).attention.self, "is_causal", True),
    "chunks": lambda m, _: setattr(layer(m), "chunk_size_feed_forward", 2),
    "decoder": lambda m, _: setattr(m.config, "is_decoder", True),
    "implementation": lambda m, patch: setattr(m.config, "_attn_implementation", "flex_attention"),
    "masks of its own": lambda m, _: setattr(m, "_create_attention_masks", lambda *args: None),
    "class's forward": lambda m, patch: patch.setattr(nn.LayerNorm, "forward", lambda self, x: x),
    "layer's forward": lambda m, patch: patch.setattr(hf.BertLayer, "forward", lambda self, x: x),
    "attention function": lambda m, patch: patch.setattr(hf, "eager_attention_forward", lambda *args: None),
}
# still plain, but not what a graph has captured
MOVED: dict[str, Change] = {
    "train": lambda m, _: m.train(),
    "one module in train": lambda m, _: layer(m).output.dropout.train(),
    "parameter": lambda m, _: setattr(layer(m).output.dense, "bias", nn.Parameter(torch.ones(32))),
    "data": lambda m, _: set_data(layer(m).output.dense.bias, torch.ones(32)),
    "buffer": lambda m, _: setattr(m.embeddings, "position_ids", m.embeddings.position_ids.clone()),
    "cast and back": lambda m, _: (set_data(p := m.pooler.dense.bias, old := p.data.clone()), old),
    "eps": lambda m, _: setattr(layer(m).output.LayerNorm, "eps", 1e-3),
    "scaling": lambda m, _: setattr(layer(m).attention.self, "scaling", 0.1),
    "activation": lambda m, _: setattr(layer(m).intermediate, "intermediate_act_fn", nn.ReLU().eval()),
    "one layer fewer": lambda m, _: m.encoder.layer.__delitem__(1),
    "two layers swapped": lambda m, _: setattr(m.encoder, "layer", nn.ModuleList([*m.encoder.layer][::-1])),
    "implementation": lambda m, _: m.set_attn_implementation("sdpa"),
}


def plain_model() -> Any:
    _, ours = pair()
    assert tiers.model_reason(ours) is None
    return ours


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_not_plain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = plain_model()
    taken = snapshot.take(ours)
    assert taken.holds(ours) and taken.holds(ours)
    NOT_PLAIN[name](ours, monkeypatch)
    assert not taken.holds(ours) and snapshot.held(ours) is None
    assert tiers.model_reason(ours) is not None


@pytest.mark.parametrize("name", MOVED)
def test_moved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = plain_model()
    taken = snapshot.take(ours)
    MOVED[name](ours, monkeypatch)
    assert not taken.holds(ours) and tiers.model_reason(ours) is None
    assert snapshot.take(ours).holds(ours) and snapshot.held(ours) is not taken


def test_what_changes_nothing() -> None:
    ours = plain_model()
    taken = snapshot.take(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(2)
            parameter.data.add_(1)
    ours.requires_grad_(False).to("cpu").train().eval()
    nn.Linear(1, 1).register_forward_hook(HOOK)  # on another model
    ours.register_forward_hook(HOOK)  # of the model itself: its call runs it
    assert taken.holds(ours)


def test_hooks_come_and_go() -> None:
    ours = plain_model()
    taken = snapshot.take(ours)
    for _ in range(3):
        handle = layer(ours).register_forward_hook(HOOK)
        assert not taken.holds(ours)
        handle.remove()
        assert taken.holds(ours)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_checkpointing_comes_and_goes() -> None:
    ours = plain_model().train()
    for _ in range(2):  # the second time no module has one attribute more
        taken = snapshot.take(ours)
        assert taken.holds(ours)
        ours.gradient_checkpointing_enable()
        ours.disable_input_require_grads()  # a hook
        assert not taken.holds(ours) and snapshot.held(ours) is None
        assert "checkpointed" in str(tiers.model_reason(ours))
        ours.gradient_checkpointing_disable()
        assert tiers.model_reason(ours) is None
    ours.gradient_checkpointing_enable()
    ours.disable_input_require_grads()
    assert tiers.model_reason(ours.eval()) is None  # at work in training only


def test_capture_hooks_of_transformers_pass() -> None:
    """A first upstream call that asks for outputs leaves them on the modules for ever."""
    _, ours = pair()
    leave_capture_hooks(ours, model_inputs(3, 11))
    assert tiers.model_reason(ours) is None
    assert snapshot.take(ours).holds(ours)
    layer(ours).register_forward_hook(HOOK)
    assert snapshot.held(ours) is None


def test_one_walk_for_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_fast import modeling

    walks = []
    monkeypatch.setattr(modeling, "model_reason", lambda model: walks.append(model) or tiers.model_reason(model))
    _, ours = pair()
    for _ in range(3):
        ours(**model_inputs(3, 11))
    assert len(walks) == 1
    for _ in range(2):
        ours.train()(**model_inputs(3, 11))
        ours.eval()(**model_inputs(3, 11))
    assert len(walks) == 2  # one for each mode, and what was found before is still so
    layer(ours).output.dense.double()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            ours(**model_inputs(3, 11))
    assert len(walks) == 4


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    ours = plain_model()
    taken = snapshot.take(ours)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(32))
    layer(ours).output.dense._parameters["bias"] = fake
    assert not taken.holds(ours) and tiers.model_reason(ours) is not None


def test_a_model_dies() -> None:
    ours = plain_model()
    snapshot.take(ours)
    gone = weakref.ref(ours)
    del ours
    gc.collect()
    assert gone() is None
