"""Every family on a GPU: outputs and gradients by the error rule, graphs, and attn_implementation="bert_fast"."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close_fp32, assert_error_rule, assert_tier
from interface_models import inputs_of as interface_inputs
from interface_models import model_of, tensors
from test_families import FAMILIES, inputs_of, pair
from test_gpu_model import DEVICE, on_device

import bert_fast

pytestmark = pytest.mark.gpu
FLAGS = {"output_hidden_states": True, "output_attentions": True}
WIDE = dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536, max_position_embeddings=200)
# max_position_embeddings leaves RoBERTa room for 130 tokens after its padding row


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients(family: str, dtype: torch.dtype) -> None:
    found: dict[str, list[list[torch.Tensor]]] = {}
    changes = WIDE | ({"embedding_size": 384} if family == "electra_equal" else {})
    for seed in range(3):
        eager, ours = (model.to(DEVICE, dtype) for model in pair(family, seed=seed, **changes))
        models = ours, eager, copy.deepcopy(eager).double()
        inputs = on_device(inputs_of(family, 4, 130, ("right", "left", "holes")[seed], seed))
        assert_tier(ours, inputs, "encoder")
        for i, model in enumerate(models):
            out = model(**inputs, **FLAGS)
            ramp = torch.linspace(-1, 1, 384, device=DEVICE, dtype=out[0].dtype)
            out.last_hidden_state.pow(2).mul(ramp).sum().backward()
            weights = [p.grad for p in model.parameters() if p.grad is not None and p.ndim == 2]
            sides = {"last": [out[0]], "hidden": out.hidden_states, "attentions": out.attentions, "weights": weights}
            for kind, values in sides.items():
                found.setdefault(kind, [[], [], []])[i].extend(values)
    for kind, (mine, eager_, truth64) in found.items():
        assert_error_rule(kind, mine, eager_, truth64, dtype)


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "bert_generation"])
@torch.no_grad()
def test_graphs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays of a bucket beside direct calls, after other inputs lay in its buffers."""
    _, ours = pair(family)
    ours.to(DEVICE)
    for S, kind in ((11, "right"), (24, None), (9, "left"), (24, "holes"), (11, "right")):
        inputs = on_device(inputs_of(family, S=S, kind=kind, seed=S))
        for _ in range(3):
            got = ours(**inputs, **FLAGS)
        with monkeypatch.context() as patch:
            patch.setenv("BERT_FAST_GRAPHS", "0")
            assert_close_fp32(got, ours(**inputs, **FLAGS))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "ModernBert", "T5", "Bart"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@torch.no_grad()
def test_attention_of_other_models(name: str, padding: str | None) -> None:
    inputs: dict[str, Any] = on_device(interface_inputs(name, padding))
    found = []
    for impl in ("eager", bert_fast.attention_interface.NAME):
        model = copy.deepcopy(model_of(name, impl)).to(DEVICE)
        found.append(tensors(model(**inputs, output_attentions=True)))
    assert list(found[0]) == list(found[1])
    for key, wanted in found[0].items():
        worst = (found[1][key] - wanted).abs().max().item()
        assert worst <= 1e-3 * max(wanted.abs().max().item(), 1.0), f"{key}: {worst:.3g}"
