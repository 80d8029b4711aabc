"""What is put around a call sees transformers' calls: replaced functions, modes, tensor subclasses, tracers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close_fp32, assert_tier
from recorder import recording
from test_families import FAMILIES, inputs_of, pair
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bert_fast

FUNCTIONS = [
    *((nn.functional, name) for name in ("linear", "layer_norm", "softmax", "dropout", "embedding", "gelu", "relu")),
    *((nn.functional, name) for name in ("silu", "scaled_dot_product_attention")),
    *((torch, name) for name in ("matmul", "tanh")),
]
EVERY_FUNCTION = pytest.mark.parametrize(("owner", "name"), FUNCTIONS, ids=[name for _, name in FUNCTIONS])


@torch.no_grad()
@EVERY_FUNCTION
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
@pytest.mark.parametrize("hook", [False, True], ids=["encoder", "module"])
def test_a_replaced_function_sees_its_calls(
    owner: Any, name: str, family: str, hook: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn = "sdpa" if name.startswith("scaled") and family != "mpnet" else "eager"
    models, counts, inputs = pair(family, attn), [], inputs_of(family)
    if hook:
        for model in models:
            model.embeddings.register_forward_hook(lambda *args: None)
    own = getattr(owner, name)
    for model in models:
        model(**inputs)  # a snapshot is there
        counts.append(0)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[-1] += 1
            return own(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted)
            out = model(**inputs)
            if model is models[1]:
                assert_tier(model, inputs, "upstream", name)
                with recording() as ran:
                    model(**inputs)
                assert not ran.ops
                counts[-1] //= 2
        assert_close_fp32(out, models[0](**inputs))
    assert counts[0] == counts[1]
    assert bert_fast.explain(models[1], **inputs).tier == ("module" if hook else "encoder")


BEFORE = """
import sys
import torch
import torch.nn.functional as F
own, calls = getattr({owner}, "{name}"), []
def counted(*args, **kwargs):
    calls.append(1)
    return own(*args, **kwargs)
setattr({owner}, "{name}", counted)
import transformers, bert_fast
config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                 vocab_size=9, attn_implementation="eager")
counts, ids = [], torch.ones(1, 3, dtype=torch.long)
for model in (transformers.BertModel(config), bert_fast.BertModel(config)):
    del calls[:]
    model.eval()(ids)
    counts.append(len(calls))
assert counts[0] == counts[1] > 0, counts
"""


@pytest.mark.parametrize("name", ["linear", "softmax"])
def test_a_function_replaced_before_the_import(name: str) -> None:
    script = BEFORE.format(owner="F", name=name)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("linear", "softmax", "layer_norm", "embedding", "matmul"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("mode", [Counting, Dispatching])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mode_sees_the_calls(mode: type, family: str) -> None:
    models, seen, inputs = pair(family), [], inputs_of(family)
    for model in models:
        model(**inputs)
        with mode() as counting:
            model(**inputs)
        seen.append(counting.calls)
    assert seen[0] == seen[1] and seen[0]
    with mode():
        assert_tier(models[1], inputs, "upstream", "Mode")
    assert_tier(models[1], inputs, "encoder")


def test_floating_point_operations_are_counted() -> None:
    flops = []
    for model in pair("bert"):
        with FlopCounterMode(display=False) as counter:
            model(**inputs_of("bert")).pooler_output.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


@pytest.mark.parametrize("around", [lambda: torch.device("cpu"), torch.no_grad, torch.inference_mode])
def test_what_changes_nothing(around: Callable[[], Any]) -> None:
    _, ours = pair("bert")
    with around():
        assert_tier(ours, inputs_of("bert"), "encoder")


class Tagged(torch.Tensor):
    """A subclass that says so of what comes of it."""


@torch.no_grad()
@pytest.mark.parametrize("argument", ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"])
@pytest.mark.parametrize("hook", [False, True], ids=["encoder", "module"])
def test_a_tensor_subclass_goes_through_transformers(argument: str, hook: bool) -> None:
    models, outputs = pair("bert"), []
    inputs = inputs_of("bert") | {"position_ids": torch.arange(11)[None]}
    if argument == "inputs_embeds":
        inputs = {"inputs_embeds": torch.randn(3, 11, 32)}
    inputs[argument] = inputs[argument].as_subclass(Tagged)
    for model in models:
        if hook:
            model.pooler.register_forward_hook(lambda *args: None)
        outputs.append(model(**inputs).last_hidden_state)
    assert type(outputs[0]) is type(outputs[1])
    torch.testing.assert_close(outputs[1].as_subclass(torch.Tensor), outputs[0].as_subclass(torch.Tensor))


PARTS = {
    "embeddings": (),
    "encoder.layer.0.attention.output": (torch.randn(2, 5, 32), torch.randn(2, 5, 32)),
    "encoder.layer.0.intermediate": (torch.randn(2, 5, 32),),
    "encoder.layer.0.output": (torch.randn(2, 5, 56), torch.randn(2, 5, 32)),
    "pooler": (torch.randn(2, 5, 32),),
}


@torch.no_grad()
@pytest.mark.parametrize("part", PARTS)
def test_symbolic_trace(part: str) -> None:
    graphs = [torch.fx.symbolic_trace(model.get_submodule(part)) for model in pair("bert")]
    assert [str(node) for node in graphs[0].graph.nodes] == [str(node) for node in graphs[1].graph.nodes]
    if part != "embeddings":  # whose graph wants both of ids and embeddings
        torch.testing.assert_close(graphs[1](*PARTS[part]), graphs[0](*PARTS[part]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "cls", "part"),
    [("distilbert", None, "transformer.layer.0.ffn"), ("bert", "BertForMaskedLM", "cls.predictions.transform")],
)
def test_symbolic_trace_of_other_parts(family: str, cls: str | None, part: str) -> None:
    x = torch.randn(2, 5, 32)
    graphs = [torch.fx.symbolic_trace(model.get_submodule(part)) for model in pair(family, cls=cls)]
    torch.testing.assert_close(graphs[1](x), graphs[0](x))
