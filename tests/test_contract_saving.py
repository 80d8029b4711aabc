"""Silent break 23 of the contract: state_dict, seeds, checkpoints, copies, subclasses, the attention implementation."""

import contextlib
import copy
import pickle

import pytest
import torch
import transformers
from dropout_helpers import our_dropout
from helpers import (
    CLASSES,
    assert_close_fp32,
    assert_tier,
    head_inputs,
    leave_capture_hooks,
    model_inputs,
    pair,
    tiny_config,
)
from safetensors import safe_open
from transformers.utils import output_capturing

import bert_fast

FLAGS = {"output_hidden_states": True, "output_attentions": True}
TIED = ("BertForPreTraining", "BertForMaskedLM", "BertLMHeadModel")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def is_tied(model):
    decoder, words = model.get_output_embeddings(), model.get_input_embeddings()
    return decoder.weight is words.weight and decoder.bias is model.cls.predictions.bias


@pytest.mark.parametrize("cls", CLASSES)
def test_construction_is_transformers_construction(cls):
    models, states = [], []
    for package in (transformers, bert_fast):
        torch.manual_seed(4)
        models.append(getattr(package, cls)(tiny_config()))
        states.append(torch.get_rng_state())
    upstream, ours = (model.state_dict() for model in models)
    assert list(upstream) == list(ours)
    assert all(torch.equal(ours[name], value) for name, value in upstream.items())
    assert torch.equal(*states), "construction drew other random numbers"
    assert [n for n, _ in models[1].named_parameters()] == [n for n, _ in models[0].named_parameters()]
    assert [n for n, _ in models[1].named_buffers()] == [n for n, _ in models[0].named_buffers()]
    for (name, mine), (_, theirs) in zip(models[1].named_modules(), models[0].named_modules(), strict=True):
        assert type(mine).__name__ == type(theirs).__name__, name
        assert isinstance(mine, type(theirs)), name
    if cls in TIED:
        assert is_tied(models[1])
    if cls != "BertModel":
        assert type(models[1].bert) is bert_fast.BertModel


@pytest.mark.parametrize("cls", CLASSES)
def test_save_pretrained_round_trips(cls, tmp_path):
    upstream, ours = pair(cls)
    inputs = head_inputs(cls)
    wanted = upstream(**inputs)
    files = []
    for model, name in ((upstream, "theirs"), (ours, "mine")):
        model.save_pretrained(tmp_path / name)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as stored:
            files.append(sorted(stored.keys()))
    assert files[0] == files[1]
    assert transformers.BertConfig.from_pretrained(tmp_path / "mine").architectures == [cls]
    for package in (transformers, bert_fast):
        for name in ("theirs", "mine"):
            loaded, report = getattr(package, cls).from_pretrained(
                tmp_path / name, attn_implementation="eager", output_loading_info=True
            )
            assert not report["missing_keys"] and not report["unexpected_keys"]
            assert not loaded.training
            assert_close_fp32(loaded(**inputs), wanted, f"{package.__name__} from {name}")
            if package is bert_fast:
                assert type(loaded) is getattr(bert_fast, cls)
                assert_tier(loaded, inputs, "encoder")
                assert cls not in TIED or is_tied(loaded)


def test_from_pretrained_arguments(tmp_path):
    _, ours = pair("BertForSequenceClassification")
    ours.save_pretrained(tmp_path)
    load = bert_fast.BertForSequenceClassification.from_pretrained
    assert load(tmp_path).padding == "auto"
    for padding in ("auto", "exact", "skip"):
        loaded = load(tmp_path, padding=padding)
        assert loaded.padding == padding
        assert bert_fast.explain(loaded, **model_inputs(kind="right")).padding == padding.replace("auto", "skip")
    assert load(tmp_path, dtype=torch.bfloat16, padding="skip").dtype == torch.bfloat16
    assert load(tmp_path, num_labels=5, ignore_mismatched_sizes=True).classifier.out_features == 5
    with pytest.raises(ValueError, match="padding"):
        load(tmp_path, padding="sometimes")


def test_old_checkpoints(tmp_path):
    """gamma and beta, a stray position_ids, and the base model inside a head's checkpoint."""
    upstream, ours = pair("BertForMaskedLM")
    ours.config.save_pretrained(tmp_path)
    state = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for n, v in ours.state_dict().items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(24)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    inputs = model_inputs(kind="right")
    head = bert_fast.BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_close_fp32(head(**inputs), upstream(**inputs))
    base = bert_fast.BertModel.from_pretrained(tmp_path, attn_implementation="eager", add_pooling_layer=False)
    assert_close_fp32(base(**inputs), upstream.bert(**inputs))


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_copies(cls, tmp_path):
    upstream, ours = pair(cls)
    inputs = head_inputs(cls, kind="first")
    ours.set_padding("skip")(**inputs)
    torch.save(ours, tmp_path / "model.pt")
    copies = {
        "pickle": pickle.loads(pickle.dumps(ours)),
        "torch.save": torch.load(tmp_path / "model.pt", weights_only=False),
        "deepcopy": copy.deepcopy(ours),
    }
    leave_capture_hooks(ours, inputs)  # with which no transformers model can be pickled
    copies["deepcopy with capture hooks"] = copy.deepcopy(ours)
    wanted = ours(**inputs)
    for name, twin in copies.items():
        assert type(twin) is type(ours) and twin.padding == "skip"
        assert_tier(twin, inputs, "encoder")
        assert_close_fp32(twin(**inputs), wanted, name)
        assert cls not in TIED or is_tied(twin)
        twin.get_input_embeddings().weight.zero_()
        assert (twin(**inputs)[0] - wanted[0]).abs().max() > 1e-3, f"{name} does not use its own weights"
    assert_close_fp32(ours(**inputs), wanted, "the original after its copies changed")
    assert_close_fp32(ours.set_padding("exact")(**inputs), upstream(**inputs))


def test_subclasses_and_mixed_heads_still_capture_outputs(monkeypatch):
    class Mine(bert_fast.BertModel):
        pass

    class MyHead(bert_fast.BertForTokenClassification):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    upstream, ours = pair("BertForTokenClassification")
    theirs = copy.deepcopy(upstream)
    theirs.bert = ours.bert
    subclass = MyHead(ours.config).eval()
    subclass.load_state_dict(ours.state_dict())
    inputs = head_inputs("BertForTokenClassification")
    for head in (theirs, subclass):
        assert_close_fp32(head(**inputs, **FLAGS), upstream(**inputs, **FLAGS), type(head).__name__)
        torch.manual_seed(3)
        got = head.train()(**inputs, **FLAGS)
        torch.manual_seed(3)
        with our_dropout(monkeypatch, inputs["attention_mask"]):
            wanted = upstream.train()(**inputs, **FLAGS)
        assert_close_fp32(got, wanted, f"training {type(head).__name__}")
        head.eval(), upstream.eval()
    base = Mine(ours.config, add_pooling_layer=False).eval()
    base.load_state_dict(ours.bert.state_dict())
    for mode in (False, True):
        torch.manual_seed(3)
        got = base.train(mode)(**inputs, **FLAGS)
        torch.manual_seed(3)
        with our_dropout(monkeypatch, inputs["attention_mask"]):
            wanted = upstream.bert.train(mode)(**inputs, **FLAGS)
        assert_close_fp32(got, wanted, f"subclass, training {mode}")


def test_a_head_built_first_captures_outputs_in_training(monkeypatch):
    """Transformers looks up what to capture by class: swapping the class of a head's base model must register it."""
    output_capturing._CAN_RECORD_REGISTRY.pop(str(bert_fast.BertModel), None)  # as in a fresh process
    upstream, ours = pair("BertForTokenClassification")
    inputs, found = {**head_inputs("BertForTokenClassification"), **FLAGS}, []
    ours.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert_tier(ours.train(), inputs, "module", "hook")
    for model in (upstream.train(), ours):
        torch.manual_seed(3)
        with our_dropout(monkeypatch, per_module=True) if model is upstream else contextlib.nullcontext():
            found.append(model(**inputs))
    bert_fast.BertModel(ours.config)  # registers it whatever the outcome
    assert len(found[1].hidden_states) == 3 and len(found[1].attentions) == 2
    assert_close_fp32(found[1], found[0])


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_set_attn_implementation(cls):
    upstream, ours = pair(cls)
    inputs = head_inputs(cls)
    inputs["attention_mask"][1] = 0  # eager and sdpa disagree about a sequence without real tokens
    for attn in ("sdpa", "eager", "sdpa"):
        for model in (upstream, ours):
            model.set_attn_implementation(attn)
            assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {attn}
        assert_tier(ours, inputs, "encoder")
        assert_close_fp32(ours(**inputs), upstream(**inputs), attn)


@pytest.mark.parametrize("attn", ["flash_attention_2", "flex_attention", "nonsense"])
def test_other_implementations_are_upstreams(attn):
    upstream, ours = pair()
    outcomes = []
    for model in (upstream, ours):
        try:
            model.set_attn_implementation(attn)
            outcomes.append(model.config._attn_implementation)
        except (ImportError, ValueError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    if ours.config._attn_implementation == attn:
        assert_tier(ours, model_inputs(), "module", "attention|attn")


def test_a_registered_attention_function_is_called():
    calls = []

    def doubled(module, query, key, value, attention_mask, **kwargs):
        calls.append(1)
        context, weights = transformers.AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, **kwargs
        )
        return 2 * context, weights

    transformers.AttentionInterface.register("doubled", doubled)
    upstream, ours = pair()
    for model in (upstream, ours):
        model.set_attn_implementation("doubled")
    inputs = model_inputs()
    assert_tier(ours, inputs, "module", "attention|attn|doubled")
    assert_close_fp32(ours(**inputs), upstream(**inputs))
    assert len(calls) == 4
