"""Every family beside transformers: outputs, gradients, dropout, heads, tiers, copies, on random weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from dropout_helpers import our_dropout
from fake_graphs import backend, directly, inference  # noqa: F401
from helpers import (
    MASK_KINDS,
    VOCAB,
    assert_close_fp32,
    assert_error_rule,
    assert_gradients_close,
    assert_tier,
    ragged_mask,
    tensors_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bert_fast
from bert_fast import direct
from bert_fast.family import UPSTREAM

PAD = 1
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=56,
    max_position_embeddings=26,
    pad_token_id=PAD,
    num_labels=3,
)
DISTIL = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# name -> base model, fixed changes of the config
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {"type_vocab_size": 3}),
    "roberta": ("RobertaModel", {"type_vocab_size": 3}),
    "xlm_roberta": ("XLMRobertaModel", {"type_vocab_size": 1}),
    "camembert": ("CamembertModel", {}),
    "electra": ("ElectraModel", {"embedding_size": 24, "type_vocab_size": 3}),
    "electra_equal": ("ElectraModel", {"embedding_size": 32}),
    "bert_generation": ("BertGenerationEncoder", {}),
    "distilbert": ("DistilBertModel", {}),
    "mpnet": ("MPNetModel", {"relative_attention_num_buckets": 32}),
}
NO_TYPES = ("bert_generation", "distilbert", "mpnet")
EVERY = pytest.mark.parametrize("family", FAMILIES)
HEADS = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
}
TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")


def config_of(cls: Any, attn: str = "eager", **changes: Any) -> Any:
    changes = SIZES | changes
    name = cls.config_class.__name__ if cls.config_class else cls.__name__
    if name == "DistilBertConfig":
        changes = {DISTIL.get(k, k): v for k, v in changes.items()}
        changes.pop("layer_norm_eps", None)
    if name == "MPNetConfig":
        attn = "eager"  # it has no other
    return cls.config_class(**changes, attn_implementation=attn)


@torch.no_grad()
def randomise(model: Any, seed: int) -> Any:
    """Biases and norms far from 0 and 1, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_((1 if "norm.weight" in name.lower() else 0) + 0.2 * noise)
        elif "embeddings" in name or "relative" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(1.2 * noise / parameter.shape[1] ** 0.5)
    return model


def pair(family: str, attn: str = "eager", seed: int = 0, cls: str | None = None, **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, the same accelerated), in eval mode."""
    base, fixed = FAMILIES[family]
    upstream_class = getattr(transformers, cls or base)
    torch.manual_seed(seed)
    upstream = upstream_class(config_of(upstream_class, attn, **(fixed | changes))).eval()
    upstream = randomise(upstream, seed)
    return upstream, bert_fast.accelerate(copy.deepcopy(upstream))


def inputs_of(family: str, B: int = 3, S: int = 11, kind: str | None = "right", seed: int = 0) -> dict[str, Any]:
    """Token ids with the padding token where the mask says so, and token types where the family has them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (B, S), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind is not None:
        mask = ragged_mask(B, S, kind, seed)
        inputs = {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}
    if family in ("bert", "roberta", "electra"):
        inputs["token_type_ids"] = torch.randint(0, 3, (B, S), generator=generator)
    return inputs


FLAGS = {"output_hidden_states": True, "output_attentions": True}


@EVERY
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [None, "dead", "4-D", *MASK_KINDS])
def test_outputs(family: str, attn: str, kind: str | None) -> None:
    upstream, ours = pair(family, attn)
    inputs = inputs_of(family, kind="right" if kind in ("dead", "4-D") else kind)
    if kind == "dead":
        inputs["attention_mask"][1] = 0
    if kind == "4-D":
        inputs["attention_mask"] = torch.randn(3, 4, 11, 11, generator=torch.Generator().manual_seed(5))
    assert_tier(ours, inputs, "encoder")
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))
        got = ours(**inputs, **FLAGS)
        if attn == "sdpa" and kind == "dead":  # a context of zeros there; eager's weights are uniform
            return
        upstream.set_attn_implementation("eager")
        wanted = upstream(**inputs, **FLAGS)
        assert type(got) is type(wanted) and list(got) == list(wanted)
        assert len(got.attentions) == 2 and len(got.hidden_states) == 3
        assert_close_fp32(got, wanted)
        assert got.hidden_states[-1] is got.last_hidden_state
        assert_close_fp32(ours(**inputs, **FLAGS, return_dict=False), upstream(**inputs, **FLAGS, return_dict=False))


@EVERY
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_gradients(family: str, padding: str) -> None:
    """Of every parameter, through last_hidden_state, hidden states and attentions of real tokens."""
    upstream, ours = pair(family)
    bert_fast.accelerate(ours, padding=padding)
    inputs = inputs_of(family, kind="holes")
    keep = inputs["attention_mask"].bool()
    for flags in ({}, FLAGS):
        for model in (upstream, ours):
            model.zero_grad()
            out = model(**inputs, **flags)
            loss = out.last_hidden_state[keep].pow(3).sum()
            if flags:
                loss = loss + out.hidden_states[0][keep].sin().sum()
                loss = loss + (out.attentions[0] * keep[:, None, :, None]).pow(2).sum()
            loss.backward()
        assert_gradients_close(ours, upstream, 1e-4)
    assert_tier(ours, inputs, "encoder")


@EVERY
def test_gradients_of_padding_tokens_without_a_mask(family: str) -> None:
    """The padding rows of the tables have none, though their tokens count."""
    upstream, ours = pair(family)
    inputs = inputs_of(family, kind="holes")
    del inputs["attention_mask"]
    for model in (upstream, ours):
        model(**inputs).last_hidden_state.pow(3).sum().backward()
    assert_gradients_close(ours, upstream, 1e-4)
    assert (ours.get_input_embeddings().weight.grad[PAD] == 0).all()


@EVERY
def test_the_embeddings_by_themselves(family: str) -> None:
    """Given ids and embeds both, each family takes its own choice; positional arguments in its own order."""
    upstream, ours = (model.embeddings for model in pair(family))
    ids = inputs_of(family)["input_ids"]
    embeds = torch.randn(*ids.shape, upstream.word_embeddings.weight.shape[1])
    with torch.no_grad():
        assert_close_fp32(ours(ids), upstream(ids))
        alone = {"inputs_embeds": embeds} | ({"input_ids": None} if family == "distilbert" else {})
        assert_close_fp32(ours(**alone), upstream(**alone))
        assert_close_fp32(ours(ids, inputs_embeds=embeds), upstream(ids, inputs_embeds=embeds))
        second = embeds if family == "distilbert" else torch.zeros_like(ids)
        assert_close_fp32(ours(ids, second), upstream(ids, second))


@pytest.mark.parametrize("pooler", [False, True])
def test_tuple_of_mpnet(pooler: bool) -> None:
    """It keeps a None where there is no pooler."""
    config = config_of(transformers.MPNetModel, relative_attention_num_buckets=32)
    upstream = transformers.MPNetModel(config, add_pooling_layer=pooler).eval()
    ours = bert_fast.accelerate(copy.deepcopy(upstream))
    inputs = inputs_of("mpnet")
    with torch.no_grad():
        got, wanted = (m(**inputs, return_dict=False, output_attentions=True) for m in (ours, upstream))
    assert [type(x) for x in got] == [type(x) for x in wanted]
    assert_close_fp32(got, wanted)


@EVERY
def test_whose_training_flag_counts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights' dropout: the attention module's in most families, its own in MPNet, which calls it."""
    upstream, ours = pair(family, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    inputs = inputs_of(family)
    for which in ("attention", "dropout"):
        outputs = []
        for model in (ours, upstream):
            model.train()
            for name, module in model.named_modules():
                is_attention = hasattr(module, "attention_head_size")
                if (is_attention if which == "attention" else name.endswith(OWN_DROPOUT[family])):
                    module.training = False
            torch.manual_seed(3)
            mask = None if family == "mpnet" else inputs["attention_mask"]
            with our_dropout(monkeypatch, mask, places=2 if family == "distilbert" else 3):
                outputs.append(model(**inputs)[0])
        assert_close_fp32(*outputs)
        without = (which == "attention") != (family == "mpnet")
        assert torch.allclose(outputs[0], ours.eval()(**inputs)[0], atol=1e-4) == without


OWN_DROPOUT = dict.fromkeys(FAMILIES, "attention.self.dropout")
OWN_DROPOUT |= {"distilbert": "attention.dropout", "mpnet": "attn.dropout"}


@EVERY
def test_inputs_embeds_and_their_gradient(family: str) -> None:
    upstream, ours = pair(family)
    inputs = inputs_of(family)
    del inputs["input_ids"]
    size = upstream.get_input_embeddings().weight.shape[1]
    found = []
    for model in (upstream, ours):
        embeds = torch.randn(3, 11, size, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = model(inputs_embeds=embeds, **inputs)
        (gradient,) = torch.autograd.grad(out[0].pow(3).sum(), embeds)
        found.append((*out.to_tuple(), gradient))
    assert_close_fp32(found[1], found[0], factor=5e-5)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_rule(family: str, dtype: torch.dtype) -> None:
    found: dict[str, list[list[torch.Tensor]]] = {}
    for seed in range(3):
        upstream, ours = pair(family, seed=seed)
        truth = copy.deepcopy(upstream).double()
        inputs = inputs_of(family, seed=seed)
        for i, model in enumerate((ours.to(dtype), upstream.to(dtype), truth)):
            out = model(**inputs, **FLAGS)
            out.last_hidden_state.to(truth.dtype).pow(2).mul(torch.arange(32)).sum().backward()
            gradient = dict(model.named_parameters())
            weights = [p.grad for n, p in gradient.items() if p.grad is not None and p.ndim == 2]
            sides = {"last": [out[0]], "hidden": out.hidden_states, "attentions": out.attentions, "weights": weights}
            for kind, tensors in sides.items():
                found.setdefault(kind, [[], [], []])[i].extend(tensors)
    for kind, (ours_, eager, truth64) in found.items():
        assert_error_rule(kind, ours_, eager, truth64, dtype)


@EVERY
@pytest.mark.parametrize("attentions", [False, True])
def test_training_with_dropout(family: str, attentions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers, made to drop what ours drops, has the same outputs and gradients."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    upstream, ours = pair(family, **rates)
    inputs = inputs_of(family, kind="left")
    assert_tier(ours.train(), inputs, "encoder")
    places = 2 if family == "distilbert" else 3
    rows_are_tokens = family == "mpnet"  # as with a 4-D mask
    outputs = []
    for model in (ours, upstream.train()):
        torch.manual_seed(3)
        mask = None if rows_are_tokens else inputs["attention_mask"]
        with our_dropout(monkeypatch, mask, places=places):
            out = model(**inputs, output_attentions=attentions)
        out.last_hidden_state.pow(3).sum().backward()
        outputs.append(out)
    assert_close_fp32(*outputs, factor=5e-5)
    assert_gradients_close(ours, upstream, 1e-4)
    torch.manual_seed(4)
    assert not torch.equal(ours(**inputs)[0], outputs[0][0])
    assert_close_fp32(ours.eval()(**inputs), upstream.eval()(**inputs))


@EVERY
def test_autocast(family: str) -> None:
    """Dtypes of every output, and values, as transformers has them."""
    upstream, ours = pair(family)
    inputs = inputs_of(family)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, wanted = ours(**inputs, **FLAGS), upstream(**inputs, **FLAGS)
    assert_tier(ours, inputs, "encoder")
    for name, tensor in tensors_of(wanted).items():
        mine = tensors_of(got)[name]
        assert mine.dtype == tensor.dtype, f"{name}: {mine.dtype}, expected {tensor.dtype}"
        assert (mine - tensor).abs().max() <= 0.1 * tensor.abs().max(), name


@EVERY
def test_skip(family: str) -> None:
    """Real tokens are eager's, others zero; a family with relative positions computes all, and says so."""
    upstream, ours = pair(family)
    inputs = inputs_of(family, kind="left")
    bert_fast.accelerate(ours, padding="skip")
    keep = inputs["attention_mask"].bool() | (torch.arange(11) == 0)
    if family == "mpnet":
        assert bert_fast.explain(ours, **inputs).padding == "exact"
        keep = torch.ones_like(keep)
    else:
        assert bert_fast.explain(ours, **inputs).padding == "skip"
    with torch.no_grad():
        got, wanted = ours(**inputs, output_hidden_states=True), upstream(**inputs, output_hidden_states=True)
    for mine, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert_close_fp32(mine, theirs * keep[..., None])


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("task", TASKS)
def test_heads(family: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, logits and gradients; classification skips padding by itself unless somebody could see it."""
    changes = {"num_labels": 2} if task == "ForQuestionAnswering" else {}
    upstream, ours = pair(family, cls=HEADS[family] + task, **changes)
    assert UPSTREAM[type(ours)] is type(upstream)
    inputs = inputs_of(family)
    if task == "ForQuestionAnswering":
        inputs |= {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 2, 5])}
    else:
        inputs["labels"] = torch.tensor([0, 1, 2]) if "Sequence" in task else inputs["input_ids"] % 3
    told = assert_tier(ours, inputs, "encoder")
    skips = task == "ForSequenceClassification" and family != "mpnet"
    assert told.padding == ("skip" if skips else "exact")
    assert bert_fast.explain(ours, **inputs, output_attentions=True).padding == "exact"
    skipped: list[bool] = []
    make_packing = direct.make_packing
    monkeypatch.setattr(direct, "make_packing", lambda *a: skipped.append(a[4]) or make_packing(*a))
    for model in (upstream, ours):
        model(**inputs).loss.backward()
    assert skipped == [skips]
    assert_close_fp32(ours(**inputs), upstream(**inputs))
    assert_gradients_close(ours, upstream, 1e-4)
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))  # the first tokens alone in the last layer
        assert_close_fp32(ours(**inputs, **FLAGS), upstream(**inputs, **FLAGS))


@pytest.mark.parametrize("cls", ["RobertaForMultipleChoice", "DistilBertForMultipleChoice", "ElectraForMultipleChoice"])
def test_multiple_choice(cls: str) -> None:
    family = cls.removesuffix("ForMultipleChoice").lower()
    upstream, ours = pair(family, cls=cls)
    inputs = {name: x.view(3, 2, 11) for name, x in inputs_of(family, B=6).items()}
    assert_tier(ours, inputs, "encoder")
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))


@EVERY
def test_a_hook_on_any_submodule(family: str) -> None:
    """Counts as often as in transformers and sees the same output; its neighbours stay fused."""
    upstream, ours = pair(family)
    inputs = inputs_of(family)
    for name, module in upstream.named_modules():
        calls: list[list[torch.Tensor]] = [[], []]
        handles = [
            m.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            for m, seen in zip((module, ours.get_submodule(name)), calls, strict=True)
        ]
        with torch.no_grad():
            wanted, got = upstream(**inputs), ours(**inputs)
        for handle in handles:
            handle.remove()
        assert_close_fp32(got, wanted)
        assert len(calls[0]) == len(calls[1]), name
        if not name.endswith("layer"):
            assert_close_fp32([first(x) for x in calls[1]], [first(x) for x in calls[0]], name)
    ours.get_submodule(FAMILY_LAYERS[family]).register_forward_hook(lambda *_: None)
    assert_tier(ours, inputs, "module", "hook")


FAMILY_LAYERS = dict.fromkeys(FAMILIES, "encoder.layer.0") | {"distilbert": "transformer.layer.0"}


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)


@EVERY
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", ["right", "dead"])
def test_module_tier(family: str, attn: str, mask: str) -> None:
    """transformers' forward drives: attentions stay real under sdpa, dropout and gradients are right."""
    upstream, ours = pair(family, attn)
    inputs = inputs_of(family)
    if mask == "dead":
        inputs["attention_mask"][1] = 0
    ours.get_submodule(FAMILY_LAYERS[family]).register_forward_hook(lambda *_: None)
    assert_tier(ours, inputs, "module", "hook")
    for model in (ours, upstream):
        model(**inputs)[0].pow(3).sum().backward()
    assert_gradients_close(ours, upstream, 1e-4)
    upstream.set_attn_implementation("eager")
    with torch.no_grad():
        got = ours(**inputs, **FLAGS)
        if attn == "eager" or mask != "dead" or family == "mpnet":
            assert_close_fp32(got, upstream(**inputs, **FLAGS))
        else:
            assert (got.attentions[0][1] == 0).all()


@EVERY
def test_copies_and_files(family: str, tmp_path: Any) -> None:
    upstream, ours = pair(family)
    inputs = inputs_of(family)
    ours.save_pretrained(tmp_path)
    again = type(upstream).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = upstream(**inputs)
        pickled = pickle.loads(pickle.dumps(ours))
        assert type(pickled) is type(upstream)
        for twin in (copy.deepcopy(ours), bert_fast.accelerate(pickled), bert_fast.accelerate(again)):
            assert type(twin) is type(ours)
            assert_tier(twin, inputs, "encoder")
            assert_close_fp32(twin(**inputs), wanted)
    state = ours.state_dict()
    assert list(state) == list(upstream.state_dict())
    assert not again.load_state_dict(state).missing_keys
    assert bert_fast.restore(again) is again and type(again) is type(upstream)
    assert [type(m) for m in again.modules()] == [type(m) for m in upstream.modules()]


DROP_IN = [f"{HEADS[f]}{t}" for f in ("roberta", "xlm_roberta", "distilbert") for t in ("Model", *TASKS)]


@pytest.mark.parametrize("cls", [*DROP_IN, "RobertaForCausalLM", "XLMRobertaForMultipleChoice"])
def test_drop_in_classes(cls: str, tmp_path: Any) -> None:
    """The same numbers drawn in construction, the same file, the same result as transformers' class of that name."""
    models, states = [], []
    for package in (transformers, bert_fast):
        torch.manual_seed(4)
        labels = 2 if "Question" in cls else 3
        models.append(getattr(package, cls)(config_of(getattr(transformers, cls), num_labels=labels)).eval())
        states.append(torch.get_rng_state())
    upstream, ours = models
    assert torch.equal(*states)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in upstream.state_dict().items())
    upstream.save_pretrained(tmp_path)
    loaded = getattr(bert_fast, cls).from_pretrained(tmp_path, padding="skip").eval()
    assert loaded.padding == loaded.base_model.padding == "skip"
    loaded.set_padding("exact")
    ids = inputs_of("distilbert", kind=None)
    if "MultipleChoice" in cls:
        ids = {"input_ids": ids["input_ids"][:2, None]}
    with torch.no_grad():
        assert_close_fp32(loaded(**ids), upstream(**ids))


@pytest.mark.parametrize("family", ["roberta", "xlm_roberta", "camembert", "mpnet"])
def test_counted_positions(family: str) -> None:
    """Padding tokens anywhere, more of them than the table has rows; given positions; too many tokens."""
    upstream, ours = pair(family)
    ids = inputs_of(family, S=31, kind=None)["input_ids"]
    ids[:, 5::2] = PAD  # 18 tokens remain; the table has 26 rows
    cases = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": (ids != PAD).long()}]
    cases.append({"input_ids": ids[:, :9], "position_ids": torch.arange(9)[None] * 2 + 1})
    with torch.no_grad():
        for inputs in cases:
            assert_tier(ours, inputs, "encoder")
            assert_close_fp32(ours(**inputs), upstream(**inputs))
        too_many = torch.full((1, 25), 7)
        error = IndexError if family == "mpnet" else RuntimeError
        for model in (upstream, ours):
            with pytest.raises(error, match="out of (range|bounds)|index out"):
                model(too_many)
        table = "position_embeddings" if family == "mpnet" else "the buffer token_type_ids"
        with pytest.raises(error, match=f"position_ids counted from input_ids holds 26: .*, {table} has rows 0 to 25"):
            ours(too_many)


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "bert_generation"])
def test_graphs(family: str, backend: Any, inference: None) -> None:  # noqa: F811
    """Replays of a bucket give what a direct call gives, whatever lay in its buffers before."""
    _, ours = pair(family)
    for S, kind in ((11, "right"), (24, None), (9, "left"), (24, "holes"), (11, "right")):
        inputs = inputs_of(family, S=S, kind=kind, seed=S) | FLAGS
        for _ in range(3):
            got = ours(**inputs)
        assert_close_fp32(got, directly(ours, **inputs))
    assert backend.replays > 5


def test_relative_bias_has_no_graphs(backend: Any, inference: None) -> None:  # noqa: F811
    _, ours = pair("mpnet")
    inputs = inputs_of("mpnet")
    for _ in range(3):
        ours(**inputs)
    assert backend.captures == 0 and "relative bias" in bert_fast.explain(ours, **inputs).graph


CHANGES: dict[str, Callable[[Any], Any]] = {
    "electra": lambda m: setattr(m, "embeddings_project", torch.nn.Sequential(m.embeddings_project)),
    "mpnet": lambda m: setattr(m.encoder, "relative_attention_bias", Scaled(32, 4)),
    "distilbert": lambda m: setattr(m.transformer.layer[1].attention, "out_lin", Doubled(32, 32)),
    "roberta": lambda m: setattr(m.embeddings, "create_position_ids_from_input_ids", lambda ids, *a: ids * 0 + 2),
}


class Scaled(torch.nn.Embedding):
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return super().forward(index) * 2 + 1


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("family", CHANGES)
def test_parts_of_a_family_that_are_not_plain(family: str) -> None:
    upstream, ours = pair(family)
    inputs = inputs_of(family)
    with torch.no_grad():
        ours(**inputs)  # a snapshot of the plain model
        CHANGES[family](upstream)
        CHANGES[family](ours)
        ours.load_state_dict(upstream.state_dict())
        assert_tier(ours, inputs, "module", "Sequential|Scaled|Doubled|replaced")
        assert_close_fp32(ours(**inputs), upstream(**inputs))


@st.composite
def calls(draw: Any) -> tuple[str, dict[str, Any], dict[str, Any], str]:
    family = draw(st.sampled_from(list(FAMILIES)))
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([4, 8, 12, 16, 32]))
    changes = dict(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        intermediate_size=draw(st.sampled_from([1, 16, 37])),
        num_hidden_layers=draw(st.integers(1, 3)),
        hidden_act=draw(st.sampled_from(["gelu", "relu", "silu"] if family == "distilbert" else ["gelu", "gelu_new"])),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 1e-2])),
        attn=draw(st.sampled_from(["eager", "sdpa"])),
        seed=draw(st.integers(0, 3)),
    )
    if family == "electra":
        changes["embedding_size"] = draw(st.sampled_from([8, 24, heads * head_dim]))
    if family == "electra_equal":
        changes["embedding_size"] = heads * head_dim
    kind = draw(st.sampled_from([None, *MASK_KINDS]))
    inputs = inputs_of(family, draw(st.integers(1, 4)), draw(st.integers(1, 20)), kind, draw(st.integers(0, 3)))
    if draw(st.booleans()):
        S = inputs["input_ids"].shape[1]
        inputs["position_ids"] = (torch.arange(S) * 3 % 26)[None]
    if draw(st.booleans()):
        inputs["output_hidden_states"] = True
    return family, changes, inputs, draw(st.sampled_from(["exact", "skip"]))


@settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(call=calls())
def test_random_configs(call: Any) -> None:
    family, changes, inputs, padding = call
    upstream, ours = pair(family, **changes)
    bert_fast.accelerate(ours, padding=padding)
    told = assert_tier(ours, inputs, "encoder")
    keep = torch.ones(inputs["input_ids"].shape, dtype=torch.bool)
    if told.padding == "skip":
        keep = inputs["attention_mask"].bool() | (torch.arange(keep.shape[1]) == 0)
    with torch.no_grad():
        got, wanted = ours(**inputs), upstream(**inputs)
    rows = {"pooler_output": torch.ones(())}
    expected = {n: t * rows.get(n.split(".")[0], keep[..., None]) for n, t in tensors_of(wanted).items()}
    assert_close_fp32(tensors_of(got), expected, factor=3e-5)
