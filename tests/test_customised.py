"""What people change in a model afterwards, in ways that no hook or class shows: transformers' result all the same."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_close_fp32, assert_gradients_close, assert_tier
from test_families import inputs_of, pair
from torch import nn
from transformers import AttentionInterface, activations
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.mpnet import modeling_mpnet

import bert_fast


class Mean(nn.Module):
    """A classifier that reads every position."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return x.mean(1)[:, :3]


def first_layer(model: Any) -> Any:
    return (model.transformer if hasattr(model, "transformer") else model.encoder).layer[0]


PREFIX = {"roberta": "Roberta", "xlm_roberta": "XLMRoberta", "camembert": "Camembert", "electra": "Electra"}


@pytest.mark.parametrize("family", PREFIX)
@pytest.mark.parametrize("how", ["classifier", "hook"])
def test_a_classifier_that_sees_the_whole_sequence(family: str, how: str) -> None:
    upstream, ours = pair(family, cls=PREFIX[family] + "ForSequenceClassification")
    inputs, seen = inputs_of(family), []
    assert bert_fast.explain(ours, **inputs).padding == "skip"
    for model in (upstream, ours):
        if how == "classifier":
            model.classifier = Mean()
        else:
            model.classifier.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    assert bert_fast.explain(ours, **inputs).padding == "exact"
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))
    if how == "hook":
        assert_close_fp32(seen[0], seen[1])
    assert_close_fp32(ours(**inputs), upstream(**inputs))


def test_a_subclass_of_the_drop_in_class() -> None:
    class Pooled(bert_fast.RobertaForSequenceClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.classifier = Mean()

    upstream, _ = pair("roberta", cls="RobertaForSequenceClassification")
    upstream.classifier = Mean()
    ours = Pooled(upstream.config).eval()
    ours.load_state_dict(upstream.state_dict())
    with torch.no_grad():
        assert_close_fp32(ours(**inputs_of("roberta")), upstream(**inputs_of("roberta")))


def test_a_head_whose_forward_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = modeling_bert.BertForSequenceClassification

    def forward(self: Any, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, **k: Any) -> Any:
        return self.classifier(self.bert(input_ids, attention_mask, token_type_ids, **k)[0].mean(1))

    upstream, ours = pair("bert", cls="BertForSequenceClassification")
    monkeypatch.setattr(cls, "forward", forward)
    inputs = inputs_of("bert")
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))


def shared(model: Any) -> None:
    model.encoder.layer[1].forward = model.encoder.layer[0].forward


def chunk(model: Any) -> None:
    first_layer(model).ffn.ff_chunk = lambda x: x * 0


def own_config(model: Any) -> None:
    attention = first_layer(model).attention.self
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = "twice"


def activation(model: Any) -> None:
    first_layer(model).intermediate.intermediate_act_fn.act = torch.relu


def project(model: Any) -> None:
    model.embeddings_project = nn.Linear(32, 32)


def scaling(model: Any) -> None:
    first_layer(model).attention.attn.scaling = 3.0


def position_bias(model: Any) -> None:
    model.encoder.compute_position_bias = lambda x: x.mean((1, 2))[:, None, None, None].expand(-1, 4, 11, 11)


def pooler(model: Any) -> None:
    model.pooler = nn.Linear(32, 32)


CHANGES: dict[str, tuple[str, Callable[[Any], None], str, str]] = {
    "another layer's forward": ("bert", shared, "module", "replaced forward"),
    "ff_chunk": ("distilbert", chunk, "module", "ff_chunk"),
    "config of one attention": ("bert", own_config, "module", "by itself"),
    "function of an activation": ("bert", activation, "module", "another function"),
    "a dense of ELECTRA's name": ("bert", project, "encoder", ""),
    "scaling that MPNet does not read": ("mpnet", scaling, "encoder", ""),
    "MPNet's bias": ("mpnet", position_bias, "module", "compute_position_bias"),
    "a pooler that DistilBERT has not": ("distilbert", pooler, "encoder", ""),
    "a pooler that ELECTRA has not": ("electra", pooler, "encoder", ""),
}


@pytest.fixture
def twice() -> Iterator[None]:
    def attend(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)[0] * 2, None

    AttentionInterface.register("twice", attend)
    yield
    AttentionInterface._global_mapping.pop("twice", None)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("warm", [False, True])
def test_changes_of_one_instance(name: str, warm: bool, twice: None) -> None:
    """Before a first call, and after it."""
    family, change, tier, reason = CHANGES[name]
    upstream, ours = pair(family, "eager" if family == "mpnet" else "sdpa")
    inputs = inputs_of(family)
    with torch.no_grad():
        if warm:
            ours(**inputs)
        for model in (upstream, ours):
            torch.manual_seed(0)
            change(model)
        assert_tier(ours, inputs, tier, reason)
        assert_close_fp32(ours(**inputs), upstream(**inputs))


def doubled(cls: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = getattr(cls, name)

    @functools.wraps(inner)  # transformers counts the arguments of what it chunks
    def twofold(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    monkeypatch.setattr(cls, name, twofold)


PATCHES = {
    "feed_forward_chunk": ("bert", modeling_bert.BertLayer, "feed_forward_chunk"),
    "ff_chunk": ("distilbert", modeling_distilbert.FFN, "ff_chunk"),
    "GELU": ("bert", activations.GELUActivation, "forward"),
    "Tanh": ("bert", nn.Tanh, "forward"),
    "bias": ("mpnet", modeling_mpnet.MPNetEncoder, "compute_position_bias"),
    "masks": ("bert", modeling_bert, "create_bidirectional_mask"),
    "masks of DistilBERT": ("distilbert", modeling_distilbert, "create_bidirectional_mask"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_changes_for_everybody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, cls, attribute = PATCHES[name]
    upstream, ours = pair(family)
    inputs = inputs_of(family)
    with torch.no_grad():
        plain = list(ours(**inputs).values())[-1]
        if "masks" in name:  # none: padding is seen
            monkeypatch.setattr(cls, attribute, lambda **kwargs: None)
        else:
            doubled(cls, attribute, monkeypatch)
        got = ours(**inputs)
        assert_close_fp32(got, upstream(**inputs))
        assert not torch.allclose(list(got.values())[-1], plain, atol=1e-3)


def test_the_transform_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, ours = pair("bert", cls="BertForMaskedLM")
    doubled(modeling_bert.BertPredictionHeadTransform, "forward", monkeypatch)
    with torch.no_grad():
        assert_close_fp32(ours(**inputs_of("bert")), upstream(**inputs_of("bert")))


PARTS = ["embeddings", "encoder.layer.0.attention.self", "encoder.layer.1.intermediate", "pooler"]


@pytest.mark.parametrize("part", PARTS)
def test_the_forward_of_our_own_class(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`type(module).forward = ...`, as people patch what they have in their hands."""
    upstream, ours = pair("bert")
    inputs, outputs = inputs_of("bert"), []
    with torch.no_grad():
        ours(**inputs)
        for model in (upstream, ours):
            with monkeypatch.context() as patch:
                doubled(type(model.get_submodule(part)), "forward", patch)
                outputs.append(model(**inputs))
    assert_close_fp32(outputs[1], outputs[0])


def test_a_padding_row_of_token_types() -> None:
    upstream, ours = pair("bert")
    for model in (upstream, ours):
        model.embeddings.token_type_embeddings.padding_idx = 0
        model(**inputs_of("bert"))[0].pow(3).sum().backward()
    assert_gradients_close(ours, upstream, 1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_eager_attention_hands_on_its_weights(family: str) -> None:
    """In the module tier too, asked for or not: a hook, or somebody's own layer, may read them."""
    seen: list[Any] = []
    upstream, ours = pair(family)
    for model in (upstream, ours):
        model.encoder.layer[0].attention.register_forward_hook(lambda m, i, out: seen.append(out[1]))
        with torch.no_grad():
            model(**inputs_of(family))
    assert_close_fp32(seen[1], seen[0])


def test_a_dropout_that_stands_in_two_places() -> None:
    """Only the weights' own is not called; one that is called elsewhere has hooks and a training flag."""
    _, ours = pair("bert")
    inputs, dropout = inputs_of("bert"), nn.Dropout(0.5).eval()
    ours.encoder.layer[0].attention.self.dropout = ours.encoder.layer[0].output.dropout = dropout
    with torch.no_grad():
        ours(**inputs)
        dropout.train()
        assert not torch.equal(ours(**inputs)[0], ours(**inputs)[0])


def test_bool_masks_of_mpnet() -> None:
    """Of four dimensions they say what to keep, in both tiers, where transformers would add 0 and 1."""
    upstream, ours = pair("mpnet")
    inputs = inputs_of("mpnet")
    with torch.no_grad():
        wanted = upstream(**inputs)
        inputs["attention_mask"] = inputs["attention_mask"].bool()[:, None, None].expand(3, 1, 11, 11)
        assert_tier(ours, inputs, "encoder")
        assert_close_fp32(ours(**inputs), wanted)
        ours.encoder.layer[0].register_forward_hook(lambda *_: None)
        assert_tier(ours, inputs, "module", "hook")
        assert_close_fp32(ours(**inputs), wanted)


@pytest.mark.parametrize("flag", [True, 1, [0, -1], [7], "yes", 0, None])
def test_flags_of_mpnet(flag: Any) -> None:
    """Taken by their truth, as its own forward does."""
    upstream, ours = pair("mpnet")
    inputs = inputs_of("mpnet") | {"output_hidden_states": flag}
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))
        for return_dict in (0, 1, None):
            got, wanted = (m(**inputs, return_dict=return_dict) for m in (ours, upstream))
            assert type(got) is type(wanted)
            assert_close_fp32(got, wanted)


def test_heads_of_one_number() -> None:
    upstream, ours = pair("camembert", hidden_size=4, num_attention_heads=4)
    for model in (upstream, ours):
        model(**inputs_of("camembert", B=1), output_attentions=True)[0].pow(3).sum().backward()
    assert_gradients_close(ours, upstream, 1e-4)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_a_batch_by_broadcast(name: str) -> None:
    """One sequence under several rows of positions or types."""
    upstream, ours = pair("bert")
    inputs = inputs_of("bert", B=1, kind=None) | {name: torch.arange(22).view(2, 11) % 2}
    if name == "position_ids":
        del inputs["token_type_ids"]
    with torch.no_grad():
        try:
            wanted = upstream(**inputs)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                ours(**inputs)
        else:
            assert_close_fp32(ours(**inputs), wanted)


@pytest.mark.parametrize("way", ["float64", "compiled", "head_dim"])
def test_gradients_of_a_query_without_a_key(way: str) -> None:
    """attn_implementation="bert_fast" where transformers' functions run instead."""
    changes = {"hidden_size": 160, "num_attention_heads": 1} if way == "head_dim" else {}
    upstream, _ = pair("bert", **changes)
    ours = copy.deepcopy(upstream)
    ours.set_attn_implementation("bert_fast")
    inputs = inputs_of("bert")
    inputs["attention_mask"][1] = 0
    for model in (upstream, ours):
        if way == "float64":
            model.double()
        run = torch.compile(model, backend="aot_eager") if way == "compiled" and model is ours else model
        out = run(**inputs)
        (out.last_hidden_state.pow(3).sum() + out.pooler_output.sum()).backward()
    assert_gradients_close(ours, upstream, 1e-4)


def test_what_explain_says_of_heads() -> None:
    _, ours = pair("bert", cls="BertForSequenceClassification")
    inputs = inputs_of("bert")
    assert bert_fast.explain(nn.Sequential(ours), **inputs).padding == "skip", "a wrapper changes nothing"
    told = bert_fast.explain(ours, **inputs, labels=torch.tensor([0, 1, 2]))
    assert told.tier == "encoder" and told.padding == "skip"
    assert_tier(ours, inputs | {"of_nobody": 1}, "module", "'of_nobody'")
    ours.bert.register_forward_hook(lambda *_: None)
    assert bert_fast.explain(ours, **inputs).padding == "exact"
