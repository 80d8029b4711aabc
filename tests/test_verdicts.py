"""What becomes of a comparison's verdict: the file it is kept in, families that differ, those left out."""

# ruff: noqa: F811  the fixtures of drift_helpers.py are arguments here

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from drift_helpers import ROOT, found, untested  # noqa: F401
from helpers import model_inputs, pair, randomise, tensors_of

import bert_fast
from bert_fast import comparison, families, modeling
from bert_fast.comparison import verdicts
from bert_fast.explain import explanation
from bert_fast.families.bert import BERT
from bert_fast.families.layout import bert_like
from bert_fast.families.mpnet import MPNET
from bert_fast.family import FAMILIES
from bert_fast.installed import TESTED_RELEASES


@pytest.mark.parametrize("text", [None, "the maths"])
def test_a_verdict_is_kept(text, untested, found, tmp_path):
    found += [text] if text else []
    told = BERT.difference()
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["difference"] == text and (text or "") in (told or "")
    comparison._verdicts.clear()  # as another process
    assert BERT.difference() == told and untested == [BERT]


def test_other_versions_and_sources_are_compared_anew(untested, found, monkeypatch, tmp_path):
    BERT.difference()
    file = tmp_path / "cache_utils.py"
    file.write_text("altered")
    files = verdicts._upstream_files(BERT)
    assert {"modeling_bert.py", "masking_utils.py", "cache_utils.py", "sdpa_attention.py"} <= {f.name for f in files}
    changes = [
        (verdicts, "_upstream_files", lambda family: (files - {f for f in files if f.name == file.name}) | {file}),
        (verdicts, "_own_digest", lambda: b"of other sources"),
        (verdicts.transformers, "__version__", "5.98.0"),
        (torch, "__version__", "2.99.0"),
        (verdicts.platform, "python_version", lambda: "3.99.0"),
    ]
    for n, change in enumerate(changes, 2):
        with monkeypatch.context() as patched:
            patched.setattr(*change)
            comparison._verdicts.clear()
            BERT.difference()
        assert len(untested) == n


@pytest.mark.parametrize("text", ["", "{", "[]", '{"difference": 3}', '{"versions": {}}', b"\xff"])
def test_a_broken_file_is_as_good_as_none(text, untested, found, tmp_path):
    BERT.difference()
    (file,) = tmp_path.iterdir()
    good = file.read_text()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    comparison._verdicts.clear()
    assert BERT.difference() is None and untested == [BERT, BERT] and file.read_text() == good


def test_a_cache_that_cannot_be_written_to(untested, found, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BERT_FAST_CACHE", str(tmp_path / "file" / "below"))
    assert BERT.difference() is None
    monkeypatch.delenv("BERT_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert MPNET.difference() is None and untested == [BERT, MPNET]


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BERT_FAST_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert verdicts.folder() == tmp_path / "own"
    monkeypatch.delenv("BERT_FAST_CACHE")
    assert verdicts.folder() == tmp_path / "xdg" / "bert_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / ".cache" / "bert_fast"


# a family that differs


def test_one_warning(untested, found, caplog):
    found.append("the maths")
    with caplog.at_level(logging.WARNING, logger="bert_fast"):
        for cls in ("BertModel", "BertForSequenceClassification"):
            _, ours = pair(cls)
            ours(**model_inputs())
            ours(**model_inputs())
    (record,) = caplog.records
    assert f"transformers {transformers.__version__} was not tested and differs: the maths" in record.getMessage()
    assert "transformers' own forward drives" in record.getMessage()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["auto", "skip"])
def test_all_of_it_is_transformers_code(attn, padding, untested, found):
    found.append("the maths")
    upstream, ours = pair("BertModel", attn)
    ours.set_padding(padding)
    keep = torch.rand(3, 1, 11, 11) > 0.3
    calls = [model_inputs(kind="right", output_attentions=True, output_hidden_states=True)]
    calls += [model_inputs(attention_mask=keep), model_inputs(kind="first", return_dict=False)]
    for inputs in calls:
        with torch.no_grad():
            wanted, out = upstream(**inputs), ours(**inputs)
        got, expected = tensors_of(out), tensors_of(wanted)
        assert got.keys() == expected.keys() and all(torch.equal(got[path], expected[path]) for path in expected)
        assert explanation(ours, **inputs).tier == "upstream"


def test_mpnet_too(untested, found):
    """Its attention has no fused form, and sees to boolean masks."""
    found.append("the maths")
    config = transformers.MPNetConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56
    )
    upstream = randomise(transformers.MPNetModel(config).eval())
    ours = bert_fast.accelerate(copy.deepcopy(upstream))
    inputs = model_inputs(attention_mask=torch.rand(3, 1, 11, 11) > 0.3)
    with torch.no_grad():
        assert torch.equal(ours(**inputs)[0], upstream(**inputs)[0])


def test_a_head_says_nothing_to_transformers_code(untested, found, monkeypatch):
    found.append("the maths")
    upstream, ours = pair("BertForSequenceClassification")
    inputs, given = model_inputs(kind="right"), []

    def run(self, upstream, args, kwargs):
        given.append(kwargs)
        return upstream(*args, **kwargs)

    monkeypatch.setattr(type(ours.bert), "_run", run)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, upstream(**inputs).logits)
    assert given and modeling.FIRST_TOKEN_ONLY not in given[0]


# families that a release has not got


def test_a_tested_release_raises_what_is_wrong(monkeypatch, caplog):
    with pytest.raises(AttributeError, match="gone"), families.left_out_where_it_does_not_fit("BERT"):
        raise AttributeError("gone")
    monkeypatch.setattr(families, "is_tested", lambda: False)
    monkeypatch.setattr(families, "LEFT_OUT", {})
    with caplog.at_level(logging.WARNING, logger="bert_fast"):
        with families.left_out_where_it_does_not_fit("BERT"):
            raise ImportError("gone")
    assert families.LEFT_OUT == {"BERT": "ImportError: gone"}
    assert len(caplog.records) == 1 and "BERT does not fit it" in caplog.text


def test_drop_ins_of_what_is_left_out(monkeypatch):
    monkeypatch.setattr(families, "SWAPS", {})
    with pytest.raises(AttributeError):
        families.drop_ins(["BertModel", "NoSuchModel"])
    monkeypatch.setattr(families, "is_tested", lambda: False)
    assert families.drop_ins(["BertModel", "NoSuchModel"]) == {"BertModel": transformers.BertModel}


def test_a_family_is_registered_whole_or_not_at_all():
    swaps, listed, hf = dict(modeling.SWAPS), list(FAMILIES), transformers.models.bert.modeling_bert
    with pytest.raises(AttributeError, match="BertForNothing"):
        modeling.derive(bert_like(hf, "Bert", first_token_heads=("BertForNothing",)), __name__)
    with pytest.raises(AttributeError, match="NoBertEmbeddings"):
        bert_like(hf, "NoBert")
    without_masks = ModuleType("without_masks")
    vars(without_masks).update(vars(hf))
    del without_masks.create_bidirectional_mask
    with pytest.raises(AttributeError, match="create_bidirectional_mask"):
        modeling.derive(bert_like(without_masks, "Bert"), __name__)
    assert modeling.SWAPS == swaps and FAMILIES == listed


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readme_names_the_tested_releases(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not [release for release in TESTED_RELEASES if release not in text]
