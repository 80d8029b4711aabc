"""Silent breaks 6, 12, 19, 21, 22, 25 of the contract: changed weights, odd inputs and sizes, who owns the outputs."""

import copy

import pytest
import torch
from helpers import assert_close_fp32, assert_tier, model_inputs, pair, random_ids, tensors_of
from torch import nn

FLAGS = {"output_hidden_states": True, "output_attentions": True}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


WEIGHTS = {
    "load_state_dict": lambda m, other: m.load_state_dict(other.state_dict()),
    "load_state_dict assign": lambda m, other: m.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
    ".data.mul_": lambda m, other: [p.data.mul_(1.2) for p in m.parameters()],
    ".data =": lambda m, other: [setattr(p, "data", p.data * 0.8) for p in m.parameters()],
    "vector_to_parameters": lambda m, other: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()) * 0.9, m.parameters()
    ),
    "new Parameter": lambda m, other: setattr(
        m.encoder.layer[0].attention.self.query, "weight", nn.Parameter(torch.eye(32))
    ),
    ".double()": lambda m, other: m.double(),
    ".to(float64) and back": lambda m, other: m.to(torch.float64).to(torch.float32),
    ".bfloat16() and back": lambda m, other: m.bfloat16().float(),
    "requires_grad_": lambda m, other: m.requires_grad_(False),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_weights_changed_after_a_first_call(name, cls):
    upstream, ours = pair(cls)
    other = pair(cls, seed=9)[0]
    if name == "new Parameter" and cls != "BertModel":
        upstream, ours = upstream.bert, ours.bert
    for _ in range(3):
        ours(**model_inputs(kind="right"))
    for model in (upstream, ours):
        WEIGHTS[name](model, other)
    inputs = model_inputs(kind="right")
    assert_tier(ours, inputs, *(("upstream", "float64|dtype") if name == ".double()" else ("encoder",)))
    assert_close_fp32(ours(**inputs), upstream(**inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_after_a_first_call(dtype):
    upstream, ours = pair()
    ours(**model_inputs())
    upstream.to(dtype), ours.to(dtype)
    inputs = model_inputs(kind="right", **FLAGS)
    assert_tier(ours, inputs, "encoder")
    assert_close_fp32(ours(**inputs), upstream(**inputs), factor=16 * torch.finfo(dtype).eps)


def test_layer_norms_kept_in_fp32():
    upstream, ours = pair(dtype=torch.bfloat16)
    for model in (upstream, ours):
        [module.float() for module in model.modules() if isinstance(module, nn.LayerNorm)]
    inputs = model_inputs(kind="right", **FLAGS)
    assert_close_fp32(ours(**inputs), upstream(**inputs), factor=16 * torch.finfo(torch.bfloat16).eps)


def test_strided_and_expanded_inputs():
    upstream, ours = pair()
    B, S = 3, 11
    mask = torch.tensor([1] * 7 + [0] * 4)
    types = torch.randint(0, 3, (S, 2 * B)).T[::2]
    embeds = torch.randn(32, S, B).permute(2, 1, 0)
    cases = [
        {"input_ids": random_ids(S, B).T, "attention_mask": mask[:, None].expand(S, B).T},
        {"input_ids": random_ids(B, 2 * S)[:, ::2], "attention_mask": mask.expand(B, S), "token_type_ids": types},
        {"input_ids": random_ids(1, S).expand(B, S), "token_type_ids": types[:1].expand(B, S)},
        {"input_ids": random_ids(B + 2, S + 4)[1:-1, 3:-1], "position_ids": torch.arange(S).flip(0).expand(B, S)},
        {"inputs_embeds": embeds, "attention_mask": mask.expand(B, S).bool()},
        {"inputs_embeds": embeds[:1].expand(B, S, 32), "position_ids": random_ids(S, B).T % 24},
        {"inputs_embeds": torch.randn(B, S, 64)[..., ::2], "token_type_ids": types},
        {"inputs_embeds": torch.randn(B, 1, 32).expand(B, S, 32)},
    ]
    for at, inputs in enumerate(cases):
        assert_tier(ours, inputs, "encoder")
        assert_close_fp32(ours(**inputs, **FLAGS), upstream(**inputs, **FLAGS), f"case {at}")


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_callers_tensors_and_parameters_unchanged(padding):
    _, ours = pair()
    ours.set_padding(padding)
    embeds = torch.randn(3, 11, 32)
    for mask in (torch.ones(3, 11).tril(), torch.randn(3, 1, 11, 11), None):
        inputs = model_inputs(attention_mask=mask, position_ids=torch.arange(11)[None], token_type_ids=random_ids() % 3)
        for used in (inputs, {**inputs, "input_ids": None, "inputs_embeds": embeds}):
            tensors = [t for t in (*used.values(), *ours.state_dict().values(), *ours.buffers()) if t is not None]
            copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
            ours(**used, **FLAGS)
            assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))
            assert [t._version for t in tensors] == versions


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_outputs_belong_to_the_caller(padding):
    _, ours = pair()
    ours.set_padding(padding)
    inputs = model_inputs(kind="right", **FLAGS)
    first = ours(**inputs)
    kept = {name: t.clone() for name, t in tensors_of(first).items()}
    for seed in range(1, 4):
        ours(**model_inputs(kind="left", seed=seed, **FLAGS))
    assert all(torch.equal(t, kept[name]) for name, t in tensors_of(first).items()), "overwritten by a later call"
    for tensor in tensors_of(ours(**inputs)).values():
        tensor.fill_(float("nan"))
    again = ours(**inputs)
    assert all(torch.equal(t, kept[name]) for name, t in tensors_of(again).items()), "a later call sees the caller's"
    storages = [t.untyped_storage().data_ptr() for name, t in tensors_of(again).items() if name != "last_hidden_state"]
    assert len(set(storages)) == len(storages), "two outputs share memory"


@pytest.mark.parametrize("hidden,heads", [(15, 3), (21, 3), (7, 7), (33, 1), (100, 4), (24, 2), (96, 1)])
@pytest.mark.parametrize("B,S", [(1, 1), (3, 1), (1, 24), (2, 17)])
def test_odd_head_dims_and_lengths(hidden, heads, B, S):
    upstream, ours = pair(hidden_size=hidden, num_attention_heads=heads, intermediate_size=2 * hidden + 1)
    for kind in (None, "right", "holes"):
        inputs = model_inputs(B, S, kind, **FLAGS)
        assert_tier(ours, inputs, "encoder")
        assert_close_fp32(ours(**inputs), upstream(**inputs), f"{kind}")


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh", "quick_gelu"])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_activation_eps_and_head_dim(act, eps):
    for head_dim in (8, 32, 64, 80):
        for cls in ("BertModel", "BertForMaskedLM"):
            upstream, ours = pair(cls, hidden_act=act, layer_norm_eps=eps, hidden_size=head_dim, num_attention_heads=1)
            inputs = model_inputs(kind="right")
            if act not in ("tanh", "quick_gelu"):  # others may run unfused or upstream
                assert_tier(ours, inputs, "encoder")
            assert_close_fp32(ours(**inputs), upstream(**inputs), f"{cls} head_dim {head_dim}")
