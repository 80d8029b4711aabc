"""The whole model on a GPU beside transformers' eager and float64, by the error rule pooled over seeds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import VOCAB, assert_error_rule, assert_tier, model_inputs, pair, ragged_mask

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = range(3)
FLAGS = {"output_hidden_states": True, "output_attentions": True}
BASE = dict(  # base's sizes, of which two layers are as good as twelve
    hidden_size=768, num_attention_heads=12, intermediate_size=3072, max_position_embeddings=512
)
ODD = dict(hidden_size=100, num_attention_heads=5, intermediate_size=72, hidden_act="gelu_new", layer_norm_eps=1e-5)
Tensors = list[torch.Tensor]


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


@functools.cache
def built(cls: str, seed: int, changes: tuple[tuple[str, Any], ...]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Drawing the weights takes longer than all that the tests do with them."""
    return pair(cls, seed=seed, **dict(changes))


def trio(seed: int, dtype: torch.dtype, cls: str = "BertModel", **changes: Any) -> list[torch.nn.Module]:
    """(ours, transformers' eager, it in float64) on the GPU, all with the weights as rounded to dtype."""
    eager, ours = (copy.deepcopy(model).to(DEVICE, dtype) for model in built(cls, seed, tuple(changes.items())))
    return [ours, eager, copy.deepcopy(eager).double()]


def kinds_of(output: Any) -> dict[str, Tensors]:
    found = {name: output.get(name) for name in ("last_hidden_state", "pooler_output", "hidden_states", "attentions")}
    return {name: [x] if isinstance(x, torch.Tensor) else list(x) for name, x in found.items() if x is not None}


def assert_model(dtype: torch.dtype, make: Callable[[int], list[dict[str, Tensors]]], seeds: Any = SEEDS) -> None:
    """The rule for every kind of output; `make(seed)` gives {kind: tensors} of ours, eager and float64."""
    sides = [make(seed) for seed in seeds]
    assert sides[0][0], "no output"
    for kind in sides[0][0]:
        assert_error_rule(kind, *([t for seed in sides for t in seed[i][kind]] for i in range(3)), dtype)


@torch.no_grad()
def run(models: list[torch.nn.Module], inputs: dict[str, Any]) -> list[dict[str, Tensors]]:
    inputs = on_device(inputs)
    assert_tier(models[0], inputs, "encoder")
    return [kinds_of(model(**inputs)) for model in models]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [BASE, ODD], ids=["base", "odd"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_outputs(attn: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    """All four outputs, every kind of padding; no sequence is empty, so both implementations agree."""
    B, S = (4, 130) if changes is BASE else (3, 19)

    def make(seed: int) -> list[dict[str, Tensors]]:
        models = trio(seed, dtype, **changes)
        models[0].set_attn_implementation(attn)
        sides: list[dict[str, Tensors]] = [{}, {}, {}]
        for kind in (None, "right", "left", "holes", "first"):
            for side, found in zip(sides, run(models, model_inputs(B, S, kind, seed, **FLAGS)), strict=True):
                for name, tensors in found.items():
                    side.setdefault(name, []).extend(tensors)
        return sides

    assert_model(dtype, make)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "attentions"])
def test_large(flags: dict[str, bool], dtype: torch.dtype) -> None:
    """32 x 512, where every kernel takes its largest tile."""

    def make(seed: int) -> list[dict[str, Tensors]]:
        return run(trio(seed, dtype, **BASE), model_inputs(32, 512, "right", seed, **flags))

    assert_model(dtype, make)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["right", "left", "holes", "first"])
def test_skip(kind: str, dtype: torch.dtype) -> None:
    """Real tokens and position 0 as in eager, zeros everywhere else, in every output; the pooler as ever."""
    B, S = 3, 70

    def make(seed: int) -> list[dict[str, Tensors]]:
        models = trio(seed, dtype, **BASE)
        models[0].set_padding("skip")
        mask = ragged_mask(B, S, kind, seed).to(DEVICE)
        live = mask.bool()
        live[:, 0] = True
        sides = run(models, model_inputs(B, S, kind, seed, **FLAGS))
        for t in (*sides[0]["hidden_states"], *sides[0]["last_hidden_state"]):
            assert (t[~live] == 0).all()
        for t in sides[0]["attentions"]:
            assert (t.transpose(1, 2)[~live] == 0).all() and (t.permute(0, 3, 1, 2)[~mask.bool()] == 0).all()
        for side in sides:
            for name in ("hidden_states", "last_hidden_state"):
                side[name] = [t[live] for t in side[name]]
            side["attentions"] = [t.transpose(1, 2)[live] for t in side["attentions"]]
        return sides

    assert_model(dtype, make)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 1, 19), (1, 4, 19, 19), (3, 4, 19, 19)])
def test_additive_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def make(seed: int) -> list[dict[str, Tensors]]:
        models, inputs = trio(seed, dtype), on_device(model_inputs(3, 19, seed=seed, **FLAGS))
        mask = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
        mask[..., 5] = torch.finfo(dtype).min
        assert_tier(models[0], {**inputs, "attention_mask": mask}, "encoder")
        with torch.no_grad():
            return [kinds_of(model(**inputs, attention_mask=mask.to(model.dtype))) for model in models]

    assert_model(dtype, make)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_fully_masked(padding: str, attn: str) -> None:
    """The configured implementation's rule: under eager a uniform mean, under sdpa a context of zeros."""
    eager, ours = (model.to(DEVICE) for model in pair(attn=attn))
    mask = ragged_mask(3, 11, "ones")
    mask[1] = 0
    inputs = on_device({**model_inputs(3, 11), "attention_mask": mask})
    with torch.no_grad():
        found, expected = ours.set_padding(padding)(**inputs), eager(**inputs)
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5 * float(expected[name].abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", ["BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering"])
def test_heads(cls: str, dtype: torch.dtype) -> None:
    """The masked-LM transform's own kernels; a first-token head, which skips padding; a head over positions."""

    def make(seed: int) -> list[dict[str, Tensors]]:
        models, inputs = trio(seed, dtype, cls), on_device(model_inputs(3, 19, "first", seed))
        with torch.no_grad():
            outputs = [model(**inputs) for model in models]
        return [{name: [t] for name, t in output.items()} for output in outputs]

    assert_model(dtype, make)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype) -> None:
    """Eval mode with grad: one backward through the fused forward."""

    def make(seed: int) -> list[dict[str, Tensors]]:
        sides = []
        for model in trio(seed, dtype):
            output = model(**on_device(model_inputs(3, 19, "holes", seed)))
            slope = torch.randn(output.last_hidden_state.shape, generator=torch.Generator().manual_seed(seed))
            (output.last_hidden_state * slope.to(DEVICE, model.dtype)).sum().backward()
            named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
            kinds = {"weights": [g for n, g in named if g.ndim == 2 and "embeddings" not in n]}
            kinds["embeddings"] = [g for n, g in named if g.ndim == 2 and "embeddings" in n]
            kinds["biases"] = [g for n, g in named if g.ndim == 1 and not n.endswith("key.bias")]
            kinds["key.bias"] = [g for n, g in named if n.endswith("key.bias")]
            sides.append(kinds)
        return sides

    assert_model(dtype, make)


@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "attentions"])
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_forward_never_synchronises(padding: str, flags: dict[str, bool]) -> None:
    """One call to compile, then a call in which every wait for the GPU is an error."""
    _, ours = pair(dtype=torch.bfloat16)
    ours = ours.to(DEVICE).set_padding(padding)
    inputs = on_device(model_inputs(3, 11, "holes", **flags))
    with torch.no_grad():
        first = ours(**inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = ours(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)


def test_ids_outside_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unchecked they read nothing outside and their rows are NaN; BERT_FAST_CHECK=1 raises as on the CPU."""
    _, ours = pair()
    ours, inputs = ours.to(DEVICE), on_device(model_inputs(2, 7))
    inputs["input_ids"][1, 3] = VOCAB
    monkeypatch.delenv("BERT_FAST_CHECK", raising=False)
    with torch.no_grad():
        last = ours(**inputs).last_hidden_state
    torch.cuda.synchronize()
    assert torch.isfinite(last[0]).all() and last[1, 3].isnan().all()
    monkeypatch.setenv("BERT_FAST_CHECK", "1")
    with pytest.raises(IndexError, match="input_ids"):
        ours(**inputs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    """The model on cuda:1 while cuda:0 is current."""
    eager, ours = pair()
    inputs = model_inputs(3, 11, "holes", **FLAGS)
    with torch.no_grad():
        expected = eager(**inputs)
        moved = {name: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        found = ours.to("cuda:1")(**moved)
    assert torch.cuda.current_device() == 0
    for got, want in zip(found.to_tuple()[:2], expected.to_tuple()[:2], strict=True):
        assert got.device == torch.device("cuda:1")
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=2e-5 * float(want.abs().max()))
