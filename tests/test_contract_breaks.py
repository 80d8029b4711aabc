"""Silent breaks 1-4 of the contract and their kin: whatever was done to the modules, transformers' result."""

from collections import Counter

import pytest
import torch
from helpers import assert_close_fp32, assert_tier, head_inputs, leave_capture_hooks, model_inputs, pair, random_ids
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

FLAGS = {"output_hidden_states": True, "output_attentions": True}
BASE_AND_HEADS = ("BertModel", "BertForMaskedLM", "BertForSequenceClassification")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def agree(upstream, ours, what="", **changes):
    inputs = {**model_inputs(kind="right"), **changes}
    assert_close_fp32(ours(**inputs), upstream(**inputs), what)


@pytest.mark.parametrize("cls", BASE_AND_HEADS)
def test_hooks_on_every_submodule_count_the_same(cls):
    models, inputs = pair(cls), head_inputs(cls)
    counts = []
    for model in models:
        seen = Counter()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name, seen=seen: seen.update([f"after {name}"]))
            module.register_forward_pre_hook(lambda *_, name=name, seen=seen: seen.update([f"before {name}"]))
        model(**inputs)
        counts.append(seen)
    assert counts[0] == counts[1]
    assert counts[0]["after encoder.layer.1.output" if cls == "BertModel" else "after bert"] == 1
    rows = assert_tier(models[1], inputs, "module", "hook").rows
    fused = {name.removeprefix("bert.") for name, how, _ in rows if how == "fused"}
    assert fused == {f"encoder.layer.{i}.attention.self" for i in (0, 1)}, "it alone calls no module of its own"


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_one_hook_on_any_one_submodule(cls):
    upstream, ours = pair(cls)
    inputs, modules = head_inputs(cls), dict(ours.named_modules())
    for name, module in upstream.named_modules():
        seen, twins = [[], []], [module, modules[name]]
        handles = [twins[i].register_forward_hook(lambda *_, i=i, seen=seen: seen[i].append(1)) for i in (0, 1)]
        got, wanted = ours(**inputs), upstream(**inputs)
        assert seen[0] == seen[1], f"{name}: {len(seen[1])} calls, expected {len(seen[0])}"
        assert_close_fp32(got, wanted, name)
        if seen[0] and (name.startswith("bert.") if cls != "BertModel" else name):  # the others are always called
            assert_tier(ours, inputs, "module", "hook")
        for handle in handles:
            handle.remove()
    assert_tier(ours, inputs, "encoder")


def test_global_hooks_count_the_same():
    counts = []
    for model in pair():
        seen = Counter()
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_, s=seen: s.update([type(m).__name__]))
        model(**model_inputs())
        handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1] and counts[0]["BertLayer"] == 2


REPLACING = {
    "encoder.layer.0": lambda m, args, out: out * 2,
    "encoder.layer.1.attention.self": lambda m, args, out: (out[0] + 1, out[1]),
    "encoder.layer.1.attention.self.value": lambda m, args, out: out * 0.5,
    "encoder.layer.0.intermediate.dense": lambda m, args, out: out - 0.3,
    "encoder.layer.1.output.LayerNorm": lambda m, args, out: out.relu(),
    "embeddings": lambda m, args, out: out.flip(0),
    "embeddings.word_embeddings": lambda m, args, out: out * 2,
    "pooler.activation": lambda m, args, out: out.square(),
}


@pytest.mark.parametrize("name", REPLACING)
def test_a_hook_that_replaces_an_output(name):
    upstream, ours = pair()
    inputs = model_inputs(kind="right")
    before = ours(**inputs)
    for model in (upstream, ours):
        model.get_submodule(name).register_forward_hook(REPLACING[name])
    assert_tier(ours, inputs, "module", "hook")
    agree(upstream, ours)
    agree(upstream, ours, "with outputs", **FLAGS)
    assert (ours(**inputs).pooler_output - before.pooler_output).abs().max() > 1e-3


def test_a_hook_on_eager_self_attention_sees_the_weights():
    """Without asking for them: transformers' eager attention always has them."""
    seen = []
    for model in pair(attn="eager"):
        model.encoder.layer[1].attention.self.register_forward_hook(lambda m, args, out: seen.append(out[1]))
        model(**model_inputs(kind="right"))
    assert_close_fp32(seen[1], seen[0])


def test_capture_hooks_left_by_an_upstream_call_do_not_end_the_encoder_tier():
    upstream, ours = pair()
    inputs = model_inputs(kind="right")
    leave_capture_hooks(ours, inputs)
    assert_tier(ours, inputs, "encoder")
    agree(upstream, ours, **FLAGS)


class LowRank(nn.Module):
    """As PEFT's: not an nn.Linear, and its .weight is the base weight."""

    def __init__(self, base):
        super().__init__()
        generator = torch.Generator().manual_seed(base.out_features)
        self.base_layer = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator) * 0.1)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replace(model, leaf, wrap):
    for name, module in list(model.named_modules()):
        if name.endswith(leaf) and "1" in name:
            setattr(model.get_submodule(name.rpartition(".")[0]), leaf, wrap(module))


def doubled(old):
    new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    return new


@pytest.mark.parametrize("leaf", ["query", "key", "value", "dense"])
@pytest.mark.parametrize(
    "wrap", [LowRank, doubled, lambda old: nn.Sequential(old, nn.ReLU())], ids="lora sub seq".split()
)
def test_wrapped_linear_layers(leaf, wrap):
    upstream, ours = pair()
    agree(upstream, ours)
    for model in (upstream, ours):
        replace(model, leaf, wrap)
        model.eval()
    told = assert_tier(ours, model_inputs(), "module", r"linear|lowrank|doubled|sequential|query|key|value|dense")
    if leaf != "dense":
        assert f"without its projections: {leaf} is a" in str(told)
    agree(upstream, ours, **FLAGS)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation():
    if not [e for e in torch.backends.quantized.supported_engines if e != "none"]:
        pytest.skip("this torch has no quantised engine")
    models = [torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8) for m in pair("BertForMaskedLM")]
    models = [model.eval() for model in models]
    assert_tier(models[1], model_inputs(), "module", "linear|quant|query|dense")
    agree(*models)


def half_forward(model):
    module = model.encoder.layer[0].intermediate
    inner = module.forward
    module.forward = lambda x: inner(x) * 0.5


class Scaled(nn.Module):
    def forward(self, x):
        return x * 1.5


def normed(model):
    module = parametrizations.weight_norm(model.encoder.layer[0].attention.self.query)
    module.parametrizations.weight.original0.mul_(2)


def more_dense(model):
    model.encoder.layer[0].output.dense = nn.Sequential(model.encoder.layer[0].output.dense, Scaled())


CHANGES = {
    "LayerNorm.eps": lambda m: setattr(m.encoder.layer[1].output.LayerNorm, "eps", 0.3),
    "embedding LayerNorm.eps": lambda m: setattr(m.embeddings.LayerNorm, "eps", 0.3),
    "LayerNorm without parameters": lambda m: setattr(
        m.encoder.layer[0].attention.output, "LayerNorm", nn.LayerNorm(32, elementwise_affine=False)
    ),
    "LayerNorm replaced": lambda m: setattr(m.embeddings, "LayerNorm", nn.Identity()),
    "activation of one layer": lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", nn.ReLU()),
    "activation of an unknown kind": lambda m: setattr(
        m.encoder.layer[0].intermediate, "intermediate_act_fn", Scaled()
    ),
    "scaling": lambda m: setattr(m.encoder.layer[0].attention.self, "scaling", 1.0),
    "no query bias": lambda m: setattr(m.encoder.layer[0].attention.self.query, "bias", None),
    "no value bias": lambda m: setattr(m.encoder.layer[1].attention.self.value, "bias", None),
    "no output bias": lambda m: setattr(m.encoder.layer[1].output.dense, "bias", None),
    "max_norm": lambda m: setattr(m.embeddings.word_embeddings, "max_norm", 0.5),
    "chunked feed-forward": lambda m: [setattr(layer, "chunk_size_feed_forward", 1) for layer in m.encoder.layer],
    "pooler activation": lambda m: setattr(m.pooler, "activation", nn.ReLU()),
    "one layer less": lambda m: setattr(m.encoder, "layer", m.encoder.layer[:1]),
    "shared layers": lambda m: m.encoder.layer.append(m.encoder.layer[0]),
    "layers swapped": lambda m: setattr(m.encoder, "layer", m.encoder.layer[::-1]),
    "position buffer": lambda m: m.embeddings.position_ids.copy_(m.embeddings.position_ids.flip(1)),
    "token type buffer": lambda m: m.embeddings.token_type_ids.fill_(1),
    "instance forward": half_forward,
    "dense replaced": more_dense,
    "pruned": lambda m: prune.l1_unstructured(m.encoder.layer[0].attention.self.key, "weight", 0.5),
    "parametrized": lambda m: parametrize.register_parametrization(m.encoder.layer[1].output.dense, "weight", Scaled()),
    "weight norm": normed,
    "more words": lambda m: m.resize_token_embeddings(70, mean_resizing=False),
    "more heads": lambda m: [setattr(layer.attention.self, "attention_head_size", 4) for layer in m.encoder.layer],
}


@pytest.mark.parametrize("name", CHANGES)
def test_modules_changed_after_a_first_call(name):
    upstream, ours = pair()
    inputs = model_inputs(kind="right")
    before = ours(**inputs)
    for model in (upstream, ours):
        torch.manual_seed(5)
        CHANGES[name](model)
    got, wanted = ours(**inputs, **FLAGS), upstream(**inputs, **FLAGS)
    assert_close_fp32(got, wanted)
    if name not in ("chunked feed-forward", "more words"):
        moved = max((got[k] - before[k]).abs().max() for k in ("last_hidden_state", "pooler_output"))
        assert moved > 1e-3, "the change changed nothing: the test tests nothing"


def test_pooler_removed_and_table_grown():
    upstream, ours = pair()
    for model in (upstream, ours):
        torch.manual_seed(5)
        model.pooler = None
        model.resize_token_embeddings(70, mean_resizing=False)
    agree(upstream, ours, input_ids=random_ids() + 20)


def test_causal_attention_and_chunks_that_do_not_divide():
    upstream, ours = pair(attn="sdpa")
    for model in (upstream, ours):
        model.encoder.layer[1].attention.self.is_causal = True
    assert_close_fp32(ours(**model_inputs()), upstream(**model_inputs()), "is_causal without a mask")
    for model in pair(chunk_size_feed_forward=4):
        with pytest.raises(ValueError, match="4"):
            model(**model_inputs(S=11))
