"""torch.compile, torch.export, AOTInductor and jit.trace: transformers' own code is what they see, with its results.

Every case is held against the same model as transformers made it; where upstream works, ours does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_families
import torch
from fake_graphs import FakeBackend, backend  # noqa: F401
from helpers import assert_close_fp32, assert_gradients_close, assert_tier, model_inputs, pair, tensors_of
from torch._dynamo.testing import CompileCounter

import bert_fast

MODELS = ("BertModel", "accelerate", "BertForSequenceClassification", "roberta", "distilbert")
EVERY = pytest.mark.parametrize("name", MODELS)
FLAGS = {"output_hidden_states": True, "output_attentions": True}
SHAPES = [(1 + i % 5, 2 + (7 * i) % 19) for i in range(20)]  # 20 different (B, S), some dimensions of 1 among them


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code of another test; torch's own deprecations are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def models_of(name: str, attn: str = "sdpa", **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) in eval mode."""
    if name in test_families.FAMILIES:
        return test_families.pair(name, attn, **changes)
    if name == "accelerate":
        upstream, _ = pair(attn=attn, **changes)
        return upstream, bert_fast.accelerate(copy.deepcopy(upstream))
    return pair(name, attn=attn, **changes)


def eager_of(upstream: Any) -> Any:
    """Its twin that returns attentions, as ours does under every implementation."""
    twin = copy.deepcopy(upstream)
    twin.set_attn_implementation("eager")
    return twin


def values(output: Any) -> list[torch.Tensor]:
    """The tensors alone: programs return them under names of their own."""
    return list(tensors_of(output).values())


@EVERY
def test_before_and_after_eager_calls(name: str) -> None:
    """Neither knows of the other: outputs are asked for or not, the eager call keeps its tier, compiled code holds."""
    upstream, ours = models_of(name)
    inputs = model_inputs(kind="right")
    with torch.no_grad():
        plain, full = upstream(**inputs), eager_of(upstream)(**inputs, **FLAGS)
        compiled = torch.compile(ours, backend="eager")
        for _ in range(2):
            assert_close_fp32(compiled(**inputs), plain)
            assert_close_fp32(compiled(**inputs, **FLAGS), full)
            assert_tier(ours, inputs, "encoder")
            assert_close_fp32(ours(**inputs), plain)
            assert_close_fp32(ours(**inputs, **FLAGS), full)
            torch._dynamo.reset()  # the second time nothing is left of what was compiled before the eager calls


@pytest.mark.parametrize("name, attn", [("BertModel", "eager"), *((name, "sdpa") for name in MODELS)])
def test_fullgraph(name: str, attn: str) -> None:
    """Outputs that are asked for too: transformers' classes trace them only after an eager call that asked for them."""
    upstream, ours = models_of(name, attn)
    counter = CompileCounter()
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    with torch.no_grad():
        for kind in ("right", "ones"):
            inputs = model_inputs(kind=kind)
            assert_close_fp32(compiled(**inputs, **FLAGS), eager_of(upstream)(**inputs, **FLAGS))
            assert_close_fp32(compiled(**inputs), upstream(**inputs))
    assert counter.frame_count == 2, "with and without outputs"
    layers = ours.base_model.get_submodule("transformer" if name == "distilbert" else "encoder").layer
    assert all(len(layer._forward_hooks) == 1 for layer in layers)


@pytest.mark.parametrize("name, dynamic", [("BertModel", True), *((name, None) for name in MODELS)])
def test_dynamic_lengths(name: str, dynamic: bool | None) -> None:
    """At most two recompiles over 20 shapes, with both kinds of masks."""
    upstream, ours = models_of(name, num_hidden_layers=1)
    counter = CompileCounter()
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for i, (B, S) in enumerate(SHAPES):
            inputs = model_inputs(B, S, "ones" if i % 2 else "right", seed=i)
            assert_close_fp32(compiled(**inputs), upstream(**inputs))
    assert counter.frame_count <= 1 + 2


@EVERY
def test_training_step(name: str) -> None:
    """Two steps: losses and gradients of transformers' eager."""
    upstream, ours = models_of(name, num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    losses: list[list[torch.Tensor]] = [[], []]
    for side, (model, run) in enumerate(
        ((upstream, upstream), (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)))
    ):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for step in range(2):
            optimizer.zero_grad()
            loss = sum(x.sin().sum() for x in values(run(**model_inputs(kind="right", seed=step))))
            loss.backward()
            losses[side].append(loss.detach())
            if step == 0:
                optimizer.step()
    assert_close_fp32(losses[1], losses[0], factor=1e-4)
    assert_gradients_close(ours, upstream, factor=1e-4)


def test_parts_compiled_in_place() -> None:
    """`module.compile()` of the base model of a head that tells it what it reads, and of one layer."""
    upstream, ours = models_of("BertForSequenceClassification")
    counter = CompileCounter()
    ours.bert.compile(backend=counter, fullgraph=True)
    ours.bert.encoder.layer[0].compile(backend=counter, fullgraph=True)
    inputs = model_inputs(kind="right")
    with torch.no_grad():
        assert_close_fp32(ours(**inputs), upstream(**inputs))
    assert counter.frame_count == 1


def test_accelerate_and_restore_under_compiled_code() -> None:
    upstream, _ = pair()
    model, inputs = copy.deepcopy(upstream), model_inputs(kind="right")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for change in (lambda m: m, bert_fast.accelerate, bert_fast.restore, bert_fast.accelerate):
            change(model)
            assert_close_fp32(compiled(**inputs), upstream(**inputs))
            assert_close_fp32(model(**inputs), upstream(**inputs))


def test_no_graph_is_captured(backend: FakeBackend) -> None:  # noqa: F811
    upstream, ours = pair()
    inputs = model_inputs(kind="right")
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        for _ in range(4):
            assert_close_fp32(compiled(**inputs), upstream(**inputs))
        assert backend.captures == backend.replays == 0
        for _ in range(3):
            ours(**inputs)
        assert backend.captures == 1, "the eager calls have their graph all the same"
        before = backend.replays
        compiled(**inputs)
    assert (backend.captures, backend.replays) == (1, before)


@pytest.mark.slow
def test_inductor() -> None:
    """The one case with generated code."""
    upstream, ours = pair(num_hidden_layers=1, attn="sdpa")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for B, S, kind in ((3, 11, "right"), (4, 17, "left")):
            inputs = model_inputs(B, S, kind)
            assert_close_fp32(compiled(**inputs), upstream(**inputs))


def exported(model: Any, strict: bool) -> torch.export.ExportedProgram:
    batch, length = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("length", min=2, max=24)
    dynamic = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return torch.export.export(model, (), model_inputs(kind="right"), dynamic_shapes=dynamic, strict=strict)


@EVERY
@pytest.mark.parametrize("strict", [False, True])
def test_export(name: str, strict: bool) -> None:
    """Dynamic batch and length; the program is made of torch's own operators, and the model stays as it was."""
    upstream, ours = models_of(name, num_hidden_layers=1)
    program = exported(ours, strict)
    assert not [node for node in program.graph.nodes if "bert_fast" in str(node.target)]
    module = program.module()
    with torch.no_grad():
        for B, S, kind in ((2, 5, "left"), (5, 20, "ones"), (4, 17, "holes")):
            inputs = model_inputs(B, S, kind, seed=B)
            assert_close_fp32(values(module(**inputs)), values(upstream(**inputs)))
            assert_tier(ours, inputs, "encoder")


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    upstream, ours = pair(num_hidden_layers=1, attn="sdpa")
    path = torch._inductor.aoti_compile_and_package(exported(ours, False), package_path=str(tmp_path / "bert.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for B, S, kind in ((2, 5, "left"), (5, 20, "ones")):
        inputs = model_inputs(B, S, kind, seed=B)
        with torch.no_grad():
            assert_close_fp32(values(package(**inputs)), values(upstream(**inputs)))


@pytest.mark.parametrize("name, attn", [("BertModel", "eager"), *((name, "sdpa") for name in MODELS)])
def test_jit_trace(name: str, attn: str) -> None:
    """Right at another shape, or the error that transformers' class gives."""
    upstream, ours = models_of(name, attn, num_hidden_layers=1)
    traced = [model_inputs(kind="right")[n] for n in ("input_ids", "attention_mask")]
    inputs = model_inputs(2, 17, "left", seed=5)
    outcomes = []
    with torch.no_grad():
        for model in (upstream, ours):
            try:
                got = torch.jit.trace(model, tuple(traced), strict=False)(*inputs.values())
                assert_close_fp32(values(got), values(upstream(**inputs)))
                outcomes.append("right")
            except (RuntimeError, AssertionError) as error:
                outcomes.append(type(error).__name__)
    assert outcomes[1] in ("right", outcomes[0]), outcomes
