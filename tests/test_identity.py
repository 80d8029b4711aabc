"""Who others think our classes are: imported ones are ours, an accelerated object is transformers' to its readers."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_close_fp32, assert_tier, model_inputs
from test_families import FAMILIES, TASKS, inputs_of, pair
from torch import nn

import bert_fast
from bert_fast.demo import minilm_dir
from bert_fast.family import UPSTREAM

HEADED = [("bert", "Bert" + task) for task in TASKS]
CASES = [*((family, None) for family in FAMILIES), *HEADED, ("electra", "ElectraForSequenceClassification")]


def changed(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module) in UPSTREAM)


@pytest.mark.parametrize(("family", "cls"), CASES)
def test_an_accelerated_object_looks_like_transformers_own(family: str, cls: str | None) -> None:
    upstream, ours = pair(family, cls=cls, num_labels=2)
    assert repr(ours) == repr(upstream)
    theirs = dict(upstream.named_modules())
    kinds = {type(module): type(theirs[path]) for path, module in ours.named_modules()}
    for mine, own in kinds.items():
        assert issubclass(mine, own) and str(mine) == str(own)
        assert (mine.__module__, mine.__qualname__, mine.__name__) == (own.__module__, own.__qualname__, own.__name__)
        assert mine.__doc__ == own.__doc__
        if mine is own:
            continue
        assert UPSTREAM[mine] is own
        assert inspect.getsource(mine) == inspect.getsource(own) and inspect.getfile(mine) == inspect.getfile(own)
        assert inspect.signature(mine) == inspect.signature(own)
        for name in ("forward", "__init__"):
            assert inspect.signature(getattr(mine, name)) == inspect.signature(getattr(own, name))
            assert inspect.getsource(getattr(mine, name)) == inspect.getsource(getattr(own, name))
    assert any(changed(ours))


@pytest.mark.parametrize("cls", ["BertModel", "BertForSequenceClassification", "RobertaForMaskedLM", "DistilBertModel"])
def test_an_imported_class_is_ours(cls: str) -> None:
    ours = getattr(bert_fast, cls)
    own = getattr(transformers, cls)
    assert ours.__module__.startswith("bert_fast.families.") and getattr(sys.modules[ours.__module__], cls) is ours
    assert inspect.signature(ours) == inspect.signature(own)
    assert inspect.signature(ours.forward) == inspect.signature(own.forward)
    _, accelerated = pair(cls.partition("For")[0].removesuffix("Model").lower(), cls=cls)
    assert isinstance(accelerated, ours) and type(accelerated) is not ours
    model = ours(accelerated.config)
    kinds = [type(m) for m in changed(model)]
    assert all(kind.__module__.startswith("bert_fast.") for kind in kinds)
    assert bert_fast.accelerate(model) is model and [type(m) for m in changed(model)] == kinds
    again = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]


UNPICKLE = """
import pickle, sys, torch
model = pickle.load(open(sys.argv[1], "rb"))
ids, mask, wanted = pickle.load(open(sys.argv[2], "rb"))
assert not [name for name in sys.modules if name.startswith("bert_fast")], "bert_fast was imported"
assert type(model).__module__.startswith("transformers.models."), type(model)
torch.testing.assert_close(model(ids, attention_mask=mask)[0], wanted, rtol=1e-4, atol=1e-5)
"""


@torch.no_grad()
@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_what_is_pickled_is_transformers_own(save: Any, tmp_path: Path) -> None:
    upstream, ours = pair("bert", cls="BertForMaskedLM")
    bert_fast.accelerate(ours, padding="skip")
    inputs = inputs_of("bert", kind="ones")
    inputs.pop("token_type_ids")
    with (tmp_path / "model").open("wb") as file:
        save(ours, file)
    assert b"bert_fast" not in (tmp_path / "model").read_bytes()
    if save is pickle.dump:
        with (tmp_path / "call").open("wb") as file:
            pickle.dump((*inputs.values(), upstream(**inputs).logits), file)
        command = [sys.executable, "-c", UNPICKLE, str(tmp_path / "model"), str(tmp_path / "call")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    again = torch.load(tmp_path / "model", weights_only=False) if save is torch.save else None
    if again is not None:
        assert [type(m) for m in again.modules()] == [type(m) for m in upstream.modules()]
        assert vars(again).keys() == vars(upstream).keys()


@torch.no_grad()
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol: int) -> None:
    upstream, ours = pair("bert")
    again = pickle.loads(pickle.dumps(ours, protocol))
    assert [type(m) for m in again.modules()] == [type(m) for m in upstream.modules()]
    assert_close_fp32(again(**inputs_of("bert")), upstream(**inputs_of("bert")))


@torch.no_grad()
def test_copies_stay_accelerated() -> None:
    upstream, ours = pair("bert", cls="BertForSequenceClassification")
    ours.set_padding("exact")
    inputs = model_inputs(kind="right")
    for again in (copy.deepcopy(ours), copy.copy(ours)):
        assert [type(m) for m in again.modules()] == [type(m) for m in ours.modules()]
        assert again.padding == "exact"
        assert_tier(again, inputs, "encoder")
        assert_close_fp32(again(**inputs), upstream(**inputs))
    deep, shallow = copy.deepcopy(ours), copy.copy(ours)
    assert deep.bert is not ours.bert and shallow.bert is ours.bert
    deep.bert.pooler.dense.weight.zero_()
    assert ours.bert.pooler.dense.weight.any()
    shared = nn.ModuleList([ours.bert, ours.bert])
    assert (two := copy.deepcopy(shared))[0] is two[1]


def test_another_one_of_its_class() -> None:
    """As adapter libraries and trainers build them: type(model)(config), type(model).from_pretrained."""
    upstream, ours = pair("bert", cls="BertForTokenClassification")
    for again in (type(ours)(ours.config), type(ours)._from_config(ours.config)):
        assert [type(m) for m in again.modules()] == [type(m) for m in ours.modules()]


def test_what_is_saved_does_not_name_us(tmp_path: Path) -> None:
    upstream, ours = pair("bert", cls="BertForSequenceClassification")
    for model, name in ((upstream, "theirs"), (ours, "ours")):
        model.save_pretrained(tmp_path / name)
    for file in (tmp_path / "theirs").iterdir():
        assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes(), file.name
    again = type(ours).from_pretrained(tmp_path / "ours")
    assert type(again) is type(ours)


def test_adapters_of_peft_name_transformers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    upstream, ours = pair("bert", cls="BertForSequenceClassification")
    for model, name in ((upstream, "theirs"), (ours, "ours")):
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], r=2))
        adapted.save_pretrained(tmp_path / name)
    saved = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    assert saved[0] == saved[1] and "bert_fast" not in json.dumps(saved[1])
    assert saved[1]["auto_mapping"]["parent_library"] == "transformers.models.bert.modeling_bert"


def test_restore_takes_both_kinds_back() -> None:
    upstream, ours = pair("bert")
    assert all(type(m) not in UPSTREAM for m in bert_fast.restore(ours).modules())
    imported = bert_fast.BertModel(upstream.config)
    assert [type(m) for m in bert_fast.restore(imported).modules()] == [type(m) for m in upstream.modules()]
    assert [type(m).__module__ for m in bert_fast.accelerate(imported).modules()] == [
        type(m).__module__ for m in upstream.modules()
    ]


def test_a_sentence_transformer_is_recognised() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    plain = sentence_transformers.SentenceTransformer(str(minilm_dir()), device="cpu")
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    assert "sentence_transformers" in str(type(ours)) and str(type(ours)) == str(type(plain))  # as KeyBERT asks
    assert inspect.signature(ours.encode) == inspect.signature(plain.encode)
    assert inspect.getsource(type(ours)) == inspect.getsource(type(plain))
    assert type(copy.deepcopy(ours)) is type(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    assert b"bert_fast" not in file.getvalue()
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
