"""The error rule for every kind of output and gradient: fp32, bf16 and fp16 against float64, pooled over seeds."""

import copy
from collections import defaultdict

import pytest
import torch
from helpers import assert_error_rule, assert_tier, model_inputs, pair

SEEDS = range(4)
FLAGS = {"output_hidden_states": True, "output_attentions": True}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODELS = {
    "plain": dict(hidden_size=64, num_attention_heads=2, intermediate_size=200),
    "small heads": dict(hidden_size=48, num_attention_heads=6, num_hidden_layers=3),
    "tanh": dict(hidden_size=40, num_attention_heads=2, hidden_act="gelu_new", layer_norm_eps=1e-5),
}


def kinds_of(output):
    return {
        "last_hidden_state": [output.last_hidden_state],
        "pooler_output": [output.pooler_output],
        "hidden_states": list(output.hidden_states),
        "attentions": list(output.attentions),
    }


def gradient_kind(name):
    if name.endswith("key.bias"):
        return "key.bias"
    if "embeddings.weight" in name:
        return "gradients of embeddings"
    return f"gradients of {'biases' if name.endswith('bias') else 'weights'}"


def trio(seed, dtype, **changes):
    """(ours, eager, eager in float64), all on the weights as rounded to `dtype`."""
    eager, ours = pair(dtype=dtype, seed=seed, **changes)
    return ours, eager, copy.deepcopy(eager).double()


def pooled(make, seeds=SEEDS):
    """{kind: (ours, eager, truth)} over seeds; `make(seed)` gives the three {kind: tensors}."""
    found = defaultdict(lambda: ([], [], []))
    for seed in seeds:
        for side, kinds in enumerate(make(seed)):
            for kind, tensors in kinds.items():
                found[kind][side].extend(tensors)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_outputs(dtype, name, attn):
    def make(seed):
        models = trio(seed, dtype, **MODELS[name])
        models[0].set_attn_implementation(attn)
        kind = (None, "right", "holes", "left")[seed % 4]
        inputs = model_inputs(3, 20, kind, seed, **FLAGS)
        assert_tier(models[0], inputs, "encoder")
        with torch.no_grad():
            return [kinds_of(model(**inputs)) for model in models]

    for kind, sides in pooled(make).items():
        assert_error_rule(kind, *sides, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_with_an_additive_mask(dtype):
    def make(seed):
        models = trio(seed, dtype, **MODELS["plain"])
        bias = torch.randn(3, 2, 20, 20, generator=torch.Generator().manual_seed(seed)).to(dtype)
        inputs = model_inputs(3, 20, seed=seed, **FLAGS)
        assert_tier(models[0], {**inputs, "attention_mask": bias}, "encoder")
        with torch.no_grad():
            return [kinds_of(model(**inputs, attention_mask=bias.to(model.dtype))) for model in models]

    for kind, sides in pooled(make).items():
        assert_error_rule(kind, *sides, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_activations(dtype):
    """As in trained models: feed-forward outputs in the hundreds, attention close to one-hot."""

    def make(seed):
        models = trio(seed, dtype, **MODELS["plain"])
        with torch.no_grad():
            for model in models:
                for layer in model.encoder.layer:
                    layer.output.dense.weight.mul_(32)
                    layer.attention.self.query.weight.mul_(2)
            inputs = model_inputs(3, 20, "right", seed, **FLAGS)
            return [kinds_of(model(**inputs)) for model in models]

    for kind, sides in pooled(make).items():
        assert_error_rule(kind, *sides, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", [{}, FLAGS])
def test_gradients(dtype, flags):
    def make(seed):
        sides = []
        models = trio(seed, dtype, **MODELS["plain"])
        inputs = model_inputs(3, 20, ("right", "holes")[seed % 2], seed, **flags)
        assert_tier(models[0], inputs, "encoder")
        generator = torch.Generator().manual_seed(seed)
        slopes = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 20, 64), (3, 64), (3, 2, 20, 20))]
        for model in models:
            output = model(**inputs)
            parts = [output.last_hidden_state, output.pooler_output, *(output.attentions or ())[:1]]
            sum((part * slope.to(part.dtype)).sum() for part, slope in zip(parts, slopes, strict=False)).backward()
            kinds = defaultdict(list)
            for parameter_name, parameter in model.named_parameters():
                kinds[gradient_kind(parameter_name)].append(parameter.grad)
            sides.append(kinds)
        return sides

    for kind, sides in pooled(make).items():
        assert_error_rule(kind, *sides, dtype)
