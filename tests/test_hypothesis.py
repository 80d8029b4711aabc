"""Shapes, heads, masks, activations, flags and padding modes drawn together, beside transformers' eager."""

import torch
from helpers import assert_close_fp32, assert_gradients_close, assert_tier, model_inputs, pair, tensors_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def calls(draw, max_S=24, head_dims=(1, 3, 8, 12, 16, 17, 32)):
    B, S = draw(st.integers(1, 4)), draw(st.integers(1, max_S))
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from(head_dims))
    changes = dict(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        intermediate_size=draw(st.sampled_from([1, 16, 37, 64])),
        num_hidden_layers=draw(st.integers(1, 3)),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 1e-2])),
        add_pooling_layer=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )
    inputs = model_inputs(B, S, seed=draw(st.integers(0, 3)))
    if draw(st.booleans()):
        inputs["token_type_ids"] = inputs["input_ids"] % 3
    if draw(st.booleans()):
        inputs["position_ids"] = (torch.arange(S) * 5 % 24)[None].expand(draw(st.sampled_from([1, B])), S)
    if draw(st.booleans()):
        inputs["input_ids"] = inputs["input_ids"].int()
    pattern = draw(st.sampled_from(["none", "2-D", "2-D", "2-D", "4-D"]))
    if pattern == "2-D":
        rows = st.lists(st.booleans(), min_size=S, max_size=S)
        dtype = draw(st.sampled_from([torch.bool, torch.long, torch.float32]))
        inputs["attention_mask"] = torch.tensor(draw(st.lists(rows, min_size=B, max_size=B))).to(dtype)
    elif pattern == "4-D":
        shape = [draw(st.sampled_from([1, full])) for full in (B, heads, S)] + [S]
        inputs["attention_mask"] = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for flag in ("output_hidden_states", "output_attentions"):
        if draw(st.booleans()):
            inputs[flag] = True
    return changes, inputs


def visible(inputs, padding):
    """Rows that must equal eager's: in `skip` the others hold zeros."""
    mask = inputs.get("attention_mask")
    if padding != "skip" or mask is None or mask.ndim != 2:
        return torch.ones(inputs["input_ids"].shape, dtype=torch.bool)
    keep = mask.bool()
    first = torch.arange(keep.shape[1]) == 0
    return keep | first | ~keep.any(1, keepdim=True)


@SETTINGS
@given(call=calls(), padding=st.sampled_from(["auto", "exact", "skip"]))
def test_forward(call, padding):
    changes, inputs = call
    upstream, ours = pair(**changes)
    ours.set_padding(padding)
    told = assert_tier(ours, inputs, "encoder")
    mask = inputs.get("attention_mask")
    if padding != "skip" or (mask is not None and mask.ndim == 2):
        assert told.padding == padding.replace("auto", "exact")
    with torch.no_grad():
        got, wanted = ours(**inputs), upstream(**inputs)
    keep = visible(inputs, padding)
    expected = {}
    for name, tensor in tensors_of(wanted).items():
        rows = {"pooler_output": torch.ones(()), "attentions": keep[:, None, :, None]}.get(name.split(".")[0])
        expected[name] = None if tensor is None else tensor * (keep[..., None] if rows is None else rows)
    assert_close_fp32(tensors_of(got), expected, factor=2e-5)


@settings(SETTINGS, max_examples=20)  # narrower models have gradients of rounding noise only
@given(call=calls(max_S=9, head_dims=(8, 12, 17)), padding=st.sampled_from(["exact", "skip"]))
def test_backward(call, padding):
    changes, inputs = call
    upstream, ours = pair(**changes)
    ours.set_padding(padding)
    keep = visible(inputs, padding)
    for model in (upstream, ours):
        output = model(**inputs)
        loss = output.last_hidden_state[keep].pow(3).sum()
        if output.get("attentions"):
            loss = loss + (output.attentions[-1] * keep[:, None, :, None]).pow(2).sum()
        loss.backward()
    assert_gradients_close(ours, upstream, factor=1e-4)
