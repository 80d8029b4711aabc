"""The whole model on its Triton kernels, in the interpreter: every launch that a GPU would get, on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import MASK_KINDS, assert_error_rule, model_inputs, pair, ragged_mask
from kernel_helpers import body

from bert_fast import encoder, packing

pytestmark = pytest.mark.interpreter
FLAGS = {"output_hidden_states": True, "output_attentions": True}
OPS = ("attention", "embed_layer_norm", "first_rows", "first_token_attention", "linear", "linear_gelu")
OPS += ("linear_layer_norm", "pool", "qkv_linear")
S = 13
SIZES = dict(hidden_size=40, num_attention_heads=2, intermediate_size=56, max_position_embeddings=40)


@pytest.fixture(autouse=True)
def launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in OPS:
        monkeypatch.setattr(encoder, op, body(op, "triton"))
    monkeypatch.setattr(packing, "pack", body("pack", "triton"))


def run(cls: str, dtype: torch.dtype, padding: str, seed: int, inputs: dict[str, Any], **changes: Any) -> list[Any]:
    """[ours, eager's, float64's] outputs as {name: [tensors]}; positions that skip drops are left out of all."""
    upstream, ours = pair(cls, seed=seed, dtype=dtype, **SIZES, **changes)
    models = [ours.set_padding(padding), upstream, pair(cls, seed=seed, dtype=dtype, **SIZES, **changes)[0].double()]
    models[2].load_state_dict(upstream.state_dict())
    with torch.no_grad():
        outputs = [model(**inputs) for model in models]
    found = [{k: [v] if torch.is_tensor(v) else list(v) for k, v in out.items() if len(v)} for out in outputs]
    if padding == "skip" and cls == "BertModel":
        live = inputs["attention_mask"].bool()
        live[:, 0] = True
        for side in found:
            for name in ("last_hidden_state", "hidden_states"):
                side[name] = [t[live] for t in side.get(name, [])]
            side["attentions"] = [t.transpose(1, 2)[live] for t in side.get("attentions", [])]
    return found


def assert_rule(sides: list[list[dict[str, list[torch.Tensor]]]], dtype: torch.dtype) -> None:
    for name in sides[0][1]:
        if sides[0][1][name]:
            assert_error_rule(name, *([t for side in sides for t in side[i][name]] for i in range(3)), dtype)


@pytest.mark.parametrize(
    "kind,padding,dtype",
    [
        *((kind, "skip", torch.bfloat16) for kind in MASK_KINDS),
        *(("holes", "exact", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        ("left", "exact", torch.bfloat16),
    ],
)
def test_outputs(kind: str, padding: str, dtype: torch.dtype) -> None:
    def make(seed: int) -> list[Any]:
        return run("BertModel", dtype, padding, seed, model_inputs(2, S, kind, seed, **FLAGS))

    assert_rule([make(seed) for seed in range(3)], dtype)


@pytest.mark.parametrize("kind,dtype", [(None, torch.bfloat16), ("left", torch.float32), ("first", torch.bfloat16)])
def test_first_token_head(kind: str | None, dtype: torch.dtype) -> None:
    def make(seed: int) -> list[Any]:
        return run("BertForSequenceClassification", dtype, "auto", seed, model_inputs(2, S, kind, seed))

    assert_rule([make(seed) for seed in range(3)], dtype)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_sequence_without_a_real_token(attn: str) -> None:
    upstream, ours = pair(attn=attn, **SIZES)
    mask = ragged_mask(3, S)
    mask[1] = 0
    inputs = {**model_inputs(3, S), "attention_mask": mask}
    live = mask.bool()
    live[1] = live[:, 0] = True
    with torch.no_grad():
        got, expected = ours.set_padding("skip")(**inputs).last_hidden_state, upstream(**inputs).last_hidden_state
    torch.testing.assert_close(got[live], expected[live], rtol=0, atol=2e-5)
    assert not got[~live].any()
