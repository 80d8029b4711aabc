"""Ways to train that drive the model differently: checkpointing, adapters, hooks, compilers, Trainer, two processes."""

import contextlib
import copy
import os
import pathlib
import subprocess
import sys

import distributed_worker
import pytest
import torch
import transformers
from dropout_helpers import our_dropout
from helpers import (
    assert_close_fp32,
    assert_gradients_close,
    assert_tier,
    gradients,
    head_inputs,
    model_inputs,
    pair,
    relative_error,
    tensors_of,
)
from test_contract_breaks import LowRank
from test_training import DROPOUT, FLAGS, NO_DROPOUT, names_of_ops, step, weighted_sum
from torch.utils._python_dispatch import TorchDispatchMode

import bert_fast

EVERY_PART = {
    "embeddings", "pooler",
    *(f"encoder.layer.{i}.{part}" for i in (0, 1) for part in ("attention.self", "attention.output")),
    *(f"encoder.layer.{i}.{part}" for i in (0, 1) for part in ("intermediate", "output")),
}  # fmt: skip


def assert_module_tier(model, inputs, reason):
    """Transformers' forward drives a BertModel, and every part of it is fused."""
    (_, how, _), *parts = assert_tier(model, inputs, "module", reason).rows
    assert how == "transformers" and {path for path, how, _ in parts if how == "fused"} == EVERY_PART


def watch_layers(model):
    """A hook that does nothing on every layer: the encoder tier is left, nothing else changes."""
    for layer in model.base_model.encoder.layer:
        layer.register_forward_hook(lambda *_: None)
    return model


def low_rank(model):
    """Adapters in place of query and value; the base model frozen, as in LoRA."""
    model.requires_grad_(False)
    for layer in model.encoder.layer:
        own = layer.attention.self
        own.query, own.value = LowRank(own.query), LowRank(own.value)
    return model


def extended(mask, dtype=torch.float32):
    """A (B, S) mask as the additive 4-D one that differs by query: nobody sees behind itself and two more."""
    S = mask.shape[1]
    keep = mask.bool()[:, None, None] & torch.ones(S, S).tril(2).bool()
    return torch.where(keep, 0.0, torch.finfo(dtype).min).to(dtype)


def masked(kind):
    """model_inputs with a mask of this kind; "4-D" and "boolean" are masks for every query."""
    if kind not in ("4-D", "boolean"):
        return model_inputs(kind=kind)
    inputs = model_inputs(kind="right")
    bias = extended(inputs["attention_mask"])
    return {**inputs, "attention_mask": bias if kind == "4-D" else bias == 0}


@pytest.mark.parametrize("change", [watch_layers, low_rank])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [None, "right", "4-D", "boolean"])
@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "outputs"])
def test_module_tier_with_dropout(change, attn, kind, flags, monkeypatch):
    models = pair(**DROPOUT)
    upstream, ours = map(change, models)
    ours.set_attn_implementation(attn)
    inputs = {**masked(kind), **flags}
    assert_module_tier(ours.train(), inputs, "hook" if change is watch_layers else "LowRank")
    got = step(ours, inputs)
    if kind == "boolean":  # transformers' eager adds it as 0 and 1
        inputs["attention_mask"] = extended(model_inputs(kind="right")["attention_mask"])
    with our_dropout(monkeypatch, per_module=True):
        wanted = step(upstream, inputs)
    assert_close_fp32(got, wanted, factor=2e-5)
    assert_gradients_close(ours, upstream)
    trained = {name.rpartition(".")[2] for name, gradient in gradients(ours).items() if gradient is not None}
    assert trained == ({"up", "down"} if change is low_rank else {"weight", "bias"})


@pytest.mark.parametrize("reentrant, flags", [(False, {}), (True, {}), (False, {"output_attentions": True})], ids=str)
def test_gradient_checkpointing_with_dropout(reentrant, flags, monkeypatch):
    """Recomputed layers drop what they dropped the first time; reentrant ones return weights without a gradient."""
    upstream, ours = pair(**DROPOUT)
    _, watched = pair(**DROPOUT)
    inputs = model_inputs(kind="right", **flags)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.disable_input_require_grads()  # a hook on the word table, where torch's own dropout would follow
    assert_module_tier(ours.train(), inputs, "checkpoint")
    assert_module_tier(watch_layers(watched).train(), inputs, "hook")
    got, plain = step(ours, inputs), step(watched, inputs)
    with our_dropout(monkeypatch, per_module=True):
        wanted = step(upstream, inputs)
    assert_close_fp32(got, plain, factor=0)
    assert_close_fp32(got, wanted, factor=2e-5)
    for name, gradient in gradients(ours).items():
        assert torch.equal(gradient, gradients(watched)[name]), name
    assert_gradients_close(ours, upstream)


def test_checkpointed_layers_run_twice():
    _, ours = pair(**DROPOUT)
    inputs = model_inputs(kind="right")
    plain = names_of_ops(lambda: step(watch_layers(ours), inputs))
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    again = names_of_ops(lambda: step(ours, inputs))
    assert (plain.count("attention"), again.count("attention")) == (2, 4)
    assert again.count("attention_backward") == plain.count("attention_backward") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attn, flags", [("eager", FLAGS), ("sdpa", {"output_hidden_states": True})])
@pytest.mark.parametrize("kind", [None, "right", "4-D"])
def test_autocast_in_the_module_tier(dtype, attn, flags, kind):
    upstream, ours = map(watch_layers, pair(attn=attn, **NO_DROPOUT))
    exact = copy.deepcopy(upstream).double()
    inputs = {**masked(kind), **flags}
    if kind == "4-D":
        inputs["attention_mask"] = inputs["attention_mask"].clamp(min=-1e4)  # representable in fp16
    dtypes, losses, errors, eps = [], [], [], torch.finfo(dtype).eps
    for model in (exact, upstream, ours):
        with torch.autocast("cpu", dtype, enabled=model is not exact):
            if model is ours:
                assert_module_tier(ours.train(), inputs, "hook")
            bias = {"attention_mask": inputs["attention_mask"].to(model.dtype)} if kind == "4-D" else {}
            output = model.train()(**{**inputs, **bias})
        loss = weighted_sum(output)
        loss.backward()
        dtypes.append({n: t.dtype for n, t in tensors_of(output).items() if t is not None})
        losses.append(loss.item())
        errors.append(relative_error(gradients(model).values(), [p.grad for p in exact.parameters()]))
    assert dtypes[1] == dtypes[2] and dtype in dtypes[2].values()
    size = sum(p.abs().sum() for p in tensors_of(output).values() if p is not None).item()
    assert abs(losses[2] - losses[0]) <= eps * size
    assert errors[2] <= 1.25 * errors[1] + 4 * eps


@pytest.mark.parametrize("change", [lambda model: model, watch_layers], ids=["encoder", "module"])
def test_accumulated_gradients_of_a_partly_frozen_model(change, monkeypatch):
    cls = "BertForTokenClassification"
    upstream, ours = map(change, pair(cls, classifier_dropout=0.0, **DROPOUT))
    batches = [head_inputs(cls, labels=True, seed=seed) for seed in (0, 1)]
    for model in (upstream, ours):
        model.train()
        model.bert.embeddings.requires_grad_(False)
        model.bert.encoder.layer[0].requires_grad_(False)
    in_encoder = change is not watch_layers
    assert_tier(ours, batches[0], "encoder" if in_encoder else "module", "hook")

    def losses(model, seeds=(4, 5)):
        for seed, batch in zip(seeds, batches, strict=True):
            torch.manual_seed(seed)
            masks = our_dropout(monkeypatch, batch["attention_mask"], per_module=not in_encoder)
            with masks if model is upstream else contextlib.nullcontext():
                yield model(**batch).loss

    found = []
    for model, summed in ((ours, True), (ours, False), (upstream, False)):
        model.zero_grad()
        if summed:
            sum(losses(model)).backward()
        else:
            for loss in losses(model):
                loss.backward()
        found.append({n: g.clone() for n, g in gradients(model).items() if g is not None})
    assert found[0] and not [name for name in found[0] if "embeddings" in name or "layer.0" in name]
    assert_close_fp32(found[1], found[0], factor=1e-6)
    assert_gradients_close(ours, upstream)


def scaled(model, inputs, scaler, context):
    """Gradients after a scaled backward and unscale_; parameters after the scaler's step; its next scale."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    torch.manual_seed(6)
    with context:
        loss = model(**inputs).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = {n: g.clone() for n, g in gradients(model).items()}
    scaler.step(optimizer)
    scaler.update()
    return found, {n: p.detach().clone() for n, p in model.named_parameters()}, scaler.get_scale()


@pytest.mark.parametrize("change", [lambda model: model, watch_layers], ids=["encoder", "module"])
def test_gradient_scaler(change):
    cls = "BertForSequenceClassification"
    ours = change(pair(cls, **DROPOUT)[1]).train()
    inputs = head_inputs(cls, labels=True)
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}

    def run(init_scale, enabled=True, half=False):
        ours.load_state_dict(before)
        context = torch.autocast("cpu", torch.float16, enabled=half)
        with context:
            assert_tier(ours, inputs, "encoder" if change is not watch_layers else "module", "hook")
        return scaled(ours, inputs, torch.amp.GradScaler("cpu", init_scale, enabled=enabled), context)

    plain, stepped, _ = run(1.0, enabled=False)
    again, stepped_too, _ = run(2.0**10)
    assert all(torch.equal(again[n], plain[n]) and torch.equal(stepped_too[n], stepped[n]) for n in plain)
    half, moved, scale = run(2.0**7, half=True)
    assert scale == 2.0**7 and all(g.isfinite().all() for g in half.values())
    assert not torch.equal(moved["classifier.weight"], before["classifier.weight"])
    overflowed, kept, scale = run(2.0**40, half=True)
    assert not [n for n, g in overflowed.items() if g.isfinite().all()], "an overflow was hidden"
    assert scale == 2.0**39 and all(torch.equal(kept[n], before[n]) for n in before)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("cls", ["BertForPreTraining", "BertForSequenceClassification"])
@pytest.mark.parametrize("change", [lambda model: model, watch_layers], ids=["encoder", "module"])
def test_deterministic_algorithms_raise_nothing(cls, change):
    ours = change(pair(cls, **DROPOUT)[1]).train()
    inputs = {**head_inputs(cls, labels=True), **FLAGS}
    assert_tier(ours, inputs, "encoder" if change is not watch_layers else "module", "hook")
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    torch.use_deterministic_algorithms(True)
    try:
        for padding in ("exact", "skip"):
            optimizer.zero_grad()
            output = ours.set_padding(padding)(**inputs)
            (output.loss + output.attentions[0].square().sum() + output.hidden_states[1].sum()).backward()
            optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isfinite().all() for p in ours.parameters())


class Explained(torch.nn.Module):
    """A model that is explained where it is called, if a tier is expected."""

    def __init__(self, model, *expected):
        super().__init__()
        self.model, self.expected = model, expected

    def forward(self, **inputs):
        if self.expected:
            assert_tier(self.model, inputs, *self.expected)
        return self.model(**inputs)


@pytest.mark.parametrize("change, expected", [(lambda model: model, "encoder"), (watch_layers, "module")])
def test_a_gradient_through_an_inner_step(change, expected):
    """Learning to learn: the loss with the parameters that a step led to, differentiated through the step."""
    cls, found = "BertForSequenceClassification", []
    upstream, ours = map(change, pair(cls, num_hidden_layers=1, **NO_DROPOUT))
    inner, outer = (head_inputs(cls, labels=True, seed=seed) for seed in (0, 1))
    for called in (Explained(upstream.train()), Explained(ours.train(), expected, "hook")):
        parameters = dict(called.named_parameters())
        before = torch.func.functional_call(called, parameters, kwargs=inner).loss
        grads = torch.autograd.grad(before, list(parameters.values()), create_graph=True)
        moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
        after = torch.func.functional_call(called, moved, kwargs=outer).loss
        after.backward()
        found.append((before, after))
    assert_close_fp32(found[1], found[0])
    assert_gradients_close(ours, upstream, 1e-4)


def test_gradients_under_a_dispatch_mode():
    """Debuggers watch a step by such a mode, and see transformers' operators; where only the backward runs under it,
    torch takes autograd from within an op's body."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    plain, watched, late = (pair(**NO_DROPOUT)[1] for _ in range(3))
    inputs = model_inputs(kind="right")
    step(plain, inputs)
    with Watch():
        assert_tier(watched.train(), inputs, "upstream", "TorchDispatchMode")
        step(watched, inputs)
    assert_gradients_close(watched, plain)
    loss = weighted_sum(late.train()(**inputs))
    with Watch():
        loss.backward()
    assert_gradients_close(late, plain)


def test_a_compiled_step_is_that_of_transformers():
    upstream, ours = pair("BertForSequenceClassification", num_hidden_layers=1, **NO_DROPOUT)
    inputs, graphs = head_inputs("BertForSequenceClassification", labels=True), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def train(model):
        loss = model(**inputs).loss
        loss.backward()
        return loss

    assert_tier(ours.train(), inputs, "encoder")
    torch.compiler.reset()
    compiled = torch.compile(lambda: train(ours), backend=backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        got = compiled()
    wanted = train(upstream.train())
    assert graphs and not [event.key for event in profiler.key_averages() if event.key.startswith("bert_fast::")]
    assert_close_fp32(got, wanted)
    assert_gradients_close(ours, upstream)


@pytest.fixture(scope="module")
def gradients_of_two_processes(tmp_path_factory):
    """{"ddp": and "fsdp": {parameter: gradient}} of one batch of which each process had half."""
    folder, tests = tmp_path_factory.mktemp("distributed"), pathlib.Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(tests / "distributed_worker.py"), str(folder), str(rank)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(distributed_worker.WORLD)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), "\n".join(said)
    return {name: torch.load(folder / f"{name}.pt") for name in ("ddp", "fsdp")}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_make_the_gradients_of_the_whole_batch(way, gradients_of_two_processes):
    """Which tier ran, and that its ops did, is asserted in the processes."""
    ours, found = distributed_worker.model(), gradients_of_two_processes[way]
    alone = distributed_worker.model()
    alone(**distributed_worker.whole_batch()).loss.backward()
    for name, parameter in ours.named_parameters():
        parameter.grad = found[name]
    assert_gradients_close(ours, alone)


HEADS = ("BertForSequenceClassification", "BertForTokenClassification")
TRAINERS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
}


def fine_tune(model, cls, folder, **arguments):
    """(losses, norms of gradients) of four steps of transformers' Trainer."""
    batches = [head_inputs(cls, labels=True, seed=seed) for seed in range(11)]
    examples = [{name: x[row] for name, x in batch.items()} for batch in batches for row in range(3)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, optim="sgd", logging_steps=1,
        seed=3, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    trainer.save_model(str(folder))
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in logged])


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("cls", HEADS)
def test_trainer(cls, name, tmp_path):
    upstream, ours = pair(cls, **NO_DROPOUT)
    inputs, arguments, half = head_inputs(cls, labels=True), TRAINERS[name], name == "bf16"
    wanted = fine_tune(upstream, cls, tmp_path / "upstream", **arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        got = fine_tune(ours, cls, tmp_path / "ours", **arguments)
    ran = [e.name for e in profiler.events() if e.name == "bert_fast::attention_backward"]
    assert len(ran) == 2 * 4 * arguments.get("gradient_accumulation_steps", 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert_tier(ours.train(), inputs, "module" if name == "checkpointed" else "encoder", "hook|checkpoint")
    assert got.shape == (4, 2) and (wanted[0] - wanted[3]).abs().min() > 1e-2
    tolerance = 0.03 if half else 1e-3  # losses are logged with four digits
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    trained, state = ours.state_dict(), upstream.state_dict()
    for key, tensor in trained.items():
        assert (tensor - state[key]).abs().max() <= (0.03 if half else 1e-4), key
    loaded = [getattr(package, cls).from_pretrained(tmp_path / "ours").eval() for package in (transformers, bert_fast)]
    assert all(torch.equal(tensor, trained[key]) for key, tensor in loaded[1].state_dict().items())
    assert_tier(loaded[1], inputs, "encoder")
    assert_close_fp32(loaded[1](**inputs), loaded[0](**inputs))
