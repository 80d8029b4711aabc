"""What comes out: keys, order, tuples, identities, selections, the nine classes. Everything beside transformers."""

import inspect

import pytest
import torch
import transformers
from helpers import (
    CLASSES,
    assert_close_fp32,
    assert_tier,
    head_inputs,
    model_inputs,
    pair,
    tensors_of,
    tiny_config,
)

import bert_fast

LAYERS = 3
# one hidden state (5.23), several, negative, repeated, out of range, none; both list-likes and flags
SELECTIONS = (True, False, None, 0, 1, -1, LAYERS, [0], [-1], [0, -1], [1, 2], (0, 2), {1}, [LAYERS], [7], [-9], [])
FLAGS = {"output_hidden_states": True, "output_attentions": True}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("flags", [{}, {"output_hidden_states": True}, {"output_attentions": True}, FLAGS])
@pytest.mark.parametrize("return_dict", [None, True, False])
def test_base_model_structure(flags, return_dict):
    upstream, ours = pair()
    inputs = model_inputs(kind="right", **flags)
    if return_dict is not None:
        inputs["return_dict"] = return_dict
    assert_tier(ours, inputs, "encoder")
    got, wanted = ours(**inputs), upstream(**inputs)
    assert type(got) is type(wanted)
    if return_dict is not False:
        assert list(got.keys()) == list(wanted.keys())
    assert len(got) == len(wanted)
    assert_close_fp32(got, wanted)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("labels", [False, True])
def test_every_class(cls, labels):
    upstream, ours = pair(cls)
    inputs = head_inputs(cls, labels)
    assert_tier(ours, inputs, "encoder")
    for extra in ({}, FLAGS, {"return_dict": False}, {**FLAGS, "return_dict": False}):
        got, wanted = ours(**inputs, **extra), upstream(**inputs, **extra)
        assert type(got) is type(wanted)
        assert_close_fp32(got, wanted, f"{cls} {extra}")


@pytest.mark.parametrize("cls", CLASSES)
def test_classes_are_transformers_classes(cls):
    mine, theirs = getattr(bert_fast, cls), getattr(transformers, cls)
    assert issubclass(mine, theirs) and mine is not theirs
    assert mine.__name__ == theirs.__name__
    signatures = inspect.signature(mine.forward).parameters, inspect.signature(theirs.forward).parameters
    assert list(signatures[0]) == list(signatures[1])
    assert [p.kind for p in signatures[0].values()] == [p.kind for p in signatures[1].values()]
    assert bert_fast.BertConfig is transformers.BertConfig
    assert bert_fast.BertPreTrainedModel is transformers.BertPreTrainedModel


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attentions_are_real(attn):
    upstream, ours = pair(attn="eager")
    ours.set_attn_implementation(attn)
    inputs = model_inputs(kind="holes", output_attentions=True)
    assert_tier(ours, inputs, "encoder")
    got, wanted = ours(**inputs), upstream(**inputs)
    assert got.cross_attentions == () and wanted.cross_attentions == ()
    assert list(got.keys()) == list(wanted.keys())
    assert len(got.attentions) == 2
    assert_close_fp32(got, wanted)
    assert ours.config._attn_implementation == attn
    assert_close_fp32(torch.stack(got.attentions).sum(-1), torch.ones(2, 3, 4, 11), "row sums")


def test_default_implementation_is_upstreams():
    for package in (transformers, bert_fast):
        config = tiny_config(attn=None)
        assert package.BertModel(config).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_hidden_state_selections(selection):
    upstream, ours = pair(num_hidden_layers=LAYERS)
    inputs = model_inputs(kind="right", output_hidden_states=selection)
    assert_tier(ours, inputs, "encoder")
    got, wanted = ours(**inputs), upstream(**inputs)
    assert list(got.keys()) == list(wanted.keys())
    assert [None if v is None else tuple(v.shape) for v in tensors_of(got).values()] == [
        None if v is None else tuple(v.shape) for v in tensors_of(wanted).values()
    ]
    assert_close_fp32(got, wanted)
    if wanted.hidden_states:
        same = wanted.hidden_states[-1] is wanted.last_hidden_state
        assert (got.hidden_states[-1] is got.last_hidden_state) == same


def test_hidden_states_identities():
    upstream, ours = pair(num_hidden_layers=LAYERS)
    inputs = model_inputs(kind="right", output_hidden_states=True)
    got = ours(**inputs)
    assert len(got.hidden_states) == LAYERS + 1
    assert got.hidden_states[-1] is got.last_hidden_state
    embedded = upstream.embeddings(inputs["input_ids"])
    assert_close_fp32(got.hidden_states[0], embedded, "embedding output")
    storages = {h.untyped_storage().data_ptr() for h in (*got.hidden_states, got.pooler_output)}
    assert len(storages) == LAYERS + 2, "outputs share memory"


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("cls", ["BertModel", "BertForTokenClassification"])
def test_flags_from_the_config(cls, name):
    upstream, ours = pair(cls)
    for model in (upstream, ours):
        setattr(model.config, name, True)
    inputs = head_inputs(cls)
    assert_tier(ours, inputs, "encoder")
    got = ours(**inputs)
    assert name.removeprefix("output_") in got.keys()
    assert_close_fp32(got, upstream(**inputs))
    off = {name: False}
    assert_close_fp32(ours(**inputs, **off), upstream(**inputs, **off), "switched off per call")


def test_config_attentions_raise_off_eager():
    upstream, ours = pair(attn="sdpa")
    for model in (upstream, ours):
        with pytest.raises(ValueError, match="output_attentions"):
            model.config.output_attentions = True


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_return_dict_from_the_config(cls):
    upstream, ours = pair(cls)
    for model in (upstream, ours):
        model.config.return_dict = False
    inputs = head_inputs(cls, labels=True)
    got, wanted = ours(**inputs), upstream(**inputs)
    assert type(wanted) is type(got) is tuple
    assert_close_fp32(got, wanted)


@pytest.mark.parametrize("flags", [{}, FLAGS])
def test_without_pooling_layer(flags):
    upstream, ours = pair(add_pooling_layer=False)
    inputs = model_inputs(kind="right", **flags)
    assert_tier(ours, inputs, "encoder")
    got, wanted = ours(**inputs), upstream(**inputs)
    assert got.pooler_output is None and list(got.keys()) == list(wanted.keys())
    assert_close_fp32(got, wanted)
    assert_close_fp32(ours(**inputs, return_dict=False), upstream(**inputs, return_dict=False))


def test_arguments_by_position_and_unknown_ones():
    upstream, ours = pair()
    inputs = head_inputs("BertModel")
    positions = torch.arange(11).flip(0)[None]
    arguments = (inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"], positions)
    assert_close_fp32(ours(*arguments), upstream(*arguments))
    assert_close_fp32(ours(*arguments, num_items_in_batch=3), upstream(*arguments))


@pytest.mark.parametrize("kind", [None, "right"])
def test_positions_types_and_embeds(kind):
    upstream, ours = pair()
    S, types = 11, torch.randint(0, 3, (3, 11))
    for extra in (
        {"position_ids": torch.arange(S)[None] + 5},
        {"position_ids": torch.randint(0, 24, (3, S))},
        {"token_type_ids": types},
        {"token_type_ids": types[:1]},
        {"token_type_ids": types.int(), "position_ids": torch.arange(S).flip(0)[None]},
    ):
        inputs = model_inputs(kind=kind, **extra)
        assert_tier(ours, inputs, "encoder")
        assert_close_fp32(ours(**inputs), upstream(**inputs), str(extra.keys()))
        inputs["input_ids"] = inputs["input_ids"].int()
        assert_close_fp32(ours(**inputs), upstream(**inputs), "int32 ids")
        del inputs["input_ids"]
        inputs["inputs_embeds"] = torch.randn(3, S, 32)
        assert_tier(ours, inputs, "encoder")
        assert_close_fp32(ours(**inputs), upstream(**inputs), f"embeds, {extra.keys()}")


def test_past_the_position_table_with_position_ids():
    upstream, ours = pair()
    inputs = model_inputs(2, 30, "right", position_ids=(torch.arange(30) % 24)[None])
    assert_close_fp32(ours(**inputs), upstream(**inputs))


@pytest.mark.parametrize("keep", [0, 1, 4, torch.tensor([0, 5])], ids=str)
def test_logits_to_keep(keep):
    upstream, ours = pair("BertLMHeadModel")
    inputs = model_inputs(kind="right", logits_to_keep=keep)
    assert_close_fp32(ours(**inputs), upstream(**inputs))


@pytest.mark.parametrize("cache", [False, True])
def test_decoder_mode(cache):
    upstream, ours = pair("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    inputs = model_inputs(kind="right", use_cache=cache, encoder_hidden_states=torch.randn(3, 5, 32), **FLAGS)
    assert_tier(ours, inputs, "module", "decoder")
    got, wanted = ours(**inputs), upstream(**inputs)
    assert list(got.keys()) == list(wanted.keys())
    for key in ("logits", "hidden_states", "attentions", "cross_attentions"):
        assert_close_fp32(got[key], wanted[key], key)
    ids = model_inputs(2, 4)["input_ids"]
    upstream, ours = pair("BertLMHeadModel", is_decoder=True)
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert ours.generate(ids, **settings).tolist() == upstream.generate(ids, **settings).tolist()
