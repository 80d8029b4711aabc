"""When a family is compared with a release of transformers that nobody tested, and where.

What is compared shows in test_drift.py. Here the installed release stands for one that nobody tested.
"""

# ruff: noqa: F811  the fixtures of drift_helpers.py are arguments here

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import contextmanager

import accelerate as hf_accelerate
import numpy
import pytest
import torch
import transformers
from drift_helpers import VERSION, altered_copy, found, run_python, untested  # noqa: F401
from helpers import model_inputs, pair
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast import comparison
from bert_fast.comparison import trial, trial_parts
from bert_fast.explain import explanation
from bert_fast.families.bert import BERT
from bert_fast.families.mpnet import MPNET
from bert_fast.family import FAMILIES

NAMES = [family.model.__name__ for family in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_a_tested_release_is_the_same(family):
    assert comparison.compare(family) == comparison.Verdict(None)


def test_takes_less_than_200_ms():
    """Of the processor; on a machine that is busy or slow, the time of 150 calls of transformers' own tiny model."""
    tiny = trial.Trial(BERT)

    def seconds(work) -> float:
        start = time.thread_time()
        work()
        return time.thread_time() - start

    def calls() -> None:
        for _ in range(20):
            tiny.upstream(input_ids=tiny.inputs.ids, attention_mask=tiny.inputs.holes)

    def ratio() -> float:
        needed = seconds(lambda: comparison._compared(BERT))
        return needed / max(0.2, 7.5 * seconds(calls))

    assert min(comparison._in_thread(ratio) for _ in range(4)) < 1


def test_nothing_is_drawn_and_nothing_is_set():
    def state() -> tuple:
        return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads()

    before = state()
    for family in (BERT, MPNET):
        comparison.compare(family)
    assert state() == before


class _Seen(TorchDispatchMode):
    """Every operator that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.device("meta"),
        lambda: _default_device("meta"),
        lambda: _default_dtype(torch.float64),
        lambda: _default_dtype(torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        _Seen,
    ],
    ids=["device", "default device", "float64", "bfloat16", "inference", "no grad", "autocast", "dispatch mode"],
)
def test_what_is_around_the_call_does_not_matter(around, untested):
    with around() as mode:
        assert BERT.difference() is None
    assert untested == [BERT] and not getattr(mode, "ops", [])


def test_under_a_transform(untested):
    def f(x):
        assert BERT.difference() is None
        return x.sum()

    torch.func.vmap(torch.func.grad(f))(torch.ones(2, 3))
    assert untested == [BERT]


@contextmanager
def _global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced(owner, name):
    own = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: own(*args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, own)


@pytest.mark.parametrize(
    ("around", "why"),
    [
        (hf_accelerate.init_empty_weights, "init_empty_weights"),
        (lambda: _replaced(nn.Module, "register_buffer"), "init_empty_weights"),
        (_global_hook, "global module hook"),
        (lambda: _replaced(nn.functional, "softmax"), "softmax was replaced"),
        (torch.autograd.forward_ad.dual_level, "forward-mode"),
    ],
    ids=["init_empty_weights", "buffers", "hook", "softmax", "dual level"],
)
def test_put_off_where_something_is_changed_for_the_process(around, why, untested, tmp_path):
    """By the caller or another thread: it is not a call of ours alone that would see it."""
    with around():
        told = BERT.difference()
    assert f"transformers {transformers.__version__} is not compared yet" in told and why in told
    assert not comparison._verdicts and not list(tmp_path.iterdir())
    assert BERT.difference() is None and untested == [BERT, BERT]


def test_put_off_where_models_are_built_elsewhere(untested, monkeypatch):
    class Elsewhere(transformers.BertModel):
        def __init__(self, config):
            super().__init__(config)
            self.to("meta")

    with monkeypatch.context() as patched:
        patched.setattr(trial, "build", lambda cls, config: trial_parts.build(Elsewhere, config))
        assert "not built on the CPU" in BERT.difference()
    assert BERT.difference() is None


def test_put_off_runs_transformers_code(untested):
    upstream, ours = pair("BertModel")
    inputs = model_inputs(kind="right")
    with torch.no_grad(), hf_accelerate.init_empty_weights():
        assert explanation(ours, **inputs).tier == "upstream"
        assert torch.equal(ours(**inputs)[0], upstream(**inputs)[0])
    assert explanation(ours, **inputs).tier == "encoder"


def test_not_while_compiling(untested):
    def f(x):
        return x + 1 if BERT.difference() is None else x - 1

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == -1 and not untested


def test_first_uses_side_by_side_compare_once(untested, monkeypatch):
    monkeypatch.setattr(comparison, "differences", lambda family: time.sleep(0.1) or iter(()))
    start, told = threading.Barrier(8), []

    def use() -> None:
        start.wait()
        told.append(BERT.difference())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [None] * 8 and untested == [BERT]


def test_its_own_models_are_not_asked_about(untested):
    """They would wait for themselves."""
    told = []
    comparison._in_thread(lambda: told.append(MPNET.difference()))
    assert told == [None] and not untested


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_gets_a_free_lock():
    with comparison._lock:
        child = os.fork()
        if not child:
            os._exit(comparison._lock.locked())
    assert os.waitpid(child, 0)[1] == 0


def test_no_thread_to_be_had(untested, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert "not compared yet: can't start new thread" in BERT.difference()
    assert BERT.difference() is None


def test_a_difference_is_found_twice(untested, monkeypatch):
    """Else another thread has changed something in between."""
    once = iter([["it"], []])
    monkeypatch.setattr(comparison, "differences", lambda family: iter(next(once)))
    assert BERT.difference() is None


def test_a_model_that_is_not_fused_is_a_difference(monkeypatch):
    """Two calls of transformers' code would always agree."""
    monkeypatch.setattr(trial, "encoder_check", lambda model, given: ("of something", None))
    verdict = comparison.compare(BERT)
    assert "not fused: of something" in verdict.difference and not verdict.lasting


def test_an_activation_that_differs(monkeypatch):
    gelu = transformers.activations.GELUActivation
    monkeypatch.setattr(trial_parts, "ACTIVATIONS", {gelu: "gelu_tanh"})
    assert "activation GELUActivation" in comparison.compare(BERT).difference


def test_a_comparison_that_fails_is_a_difference_of_this_process(untested, monkeypatch, tmp_path):
    def broken(family):
        raise TypeError("no such argument")

    monkeypatch.setattr(comparison, "differences", broken)
    assert "TypeError: no such argument" in BERT.difference()
    assert BERT.difference() and untested == [BERT] and not list(tmp_path.iterdir())


# all of it, in processes of their own

FIRST_USE = """
import json, random, sys
import numpy, torch, transformers
import bert_fast
from bert_fast import comparison
from bert_fast.comparison import trial, trial_parts

compared, compare = [], comparison.compare
comparison.compare = lambda family: compared.append(family.model.__name__) or compare(family)
model = bert_fast.BertModel(transformers.BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)).eval()
ids = torch.tensor([[5, 6, 7]])
with torch.no_grad():
    model(ids)
first = list(compared)
comparison._verdicts.clear()
with torch.no_grad():
    model(ids, attention_mask=torch.ones_like(ids))
tier = bert_fast.explain(model, input_ids=ids).tier
print(json.dumps({"first": first, "then": compared[len(first):], "tier": tier, "version": transformers.__version__}))
"""


def test_first_use_of_a_release_that_is_the_same(tmp_path):
    """Fused, silent, compared once for all processes; and the doctor compares again."""
    copied = altered_copy(tmp_path / "copy", {})
    answer, stderr = run_python(copied, tmp_path / "cache", "-c", FIRST_USE)
    assert answer == {"first": ["BertModel"], "then": [], "tier": "encoder", "version": VERSION}
    assert not stderr, stderr
    assert [file.name.split("-")[0] for file in (tmp_path / "cache").iterdir()] == ["BertModel"]
