"""A model that one thread changes (accelerate, set_padding, hooks) while others call it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close_fp32, model_inputs
from thread_helpers import CASES, FLAGS, accelerated, in_threads, often  # noqa: F401

import bert_fast
from bert_fast import tiers
from bert_fast import upstream as attention_modules

pytestmark = pytest.mark.usefixtures("often")


@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "distilbert"])
def test_accelerated_while_others_call(cls: str) -> None:
    """Again and again, and with the other padding mode."""
    upstream, model = accelerated(cls)
    bert_fast.restore(model)
    with torch.no_grad():
        wanted = [upstream(**inputs) for inputs, _ in CASES]
    left = [3]

    def call(seed: int) -> Callable[[], None]:
        def run() -> None:
            try:
                for i in random.Random(seed).choices(range(len(CASES)), k=200):
                    with torch.set_grad_enabled(seed == 0):
                        assert_close_fp32(model(**CASES[i][0]), wanted[i], factor=2e-5)
            finally:
                left[0] -= 1

        return run

    def swap() -> None:
        while left[0] > 0:
            bert_fast.accelerate(model, padding="auto").set_padding("exact")

    in_threads(*map(call, range(3)), swap)


@pytest.mark.parametrize("tier", ["encoder", "module"])
def test_hooks_come_and_go_while_others_call(tier: str) -> None:
    """Whoever has registered a hook sees it fire once in his next call, and no more once it is removed."""
    upstream, model = accelerated("BertModel")
    if tier == "module":
        model.encoder.layer[1].register_forward_hook(lambda *_: None)
    inputs = model_inputs(kind="right")
    with torch.no_grad():
        wanted = upstream(**inputs)

    def work(where: str) -> Callable[[], None]:
        def run() -> None:
            me, seen = threading.get_ident(), [0]

            def hook(*_: Any) -> None:
                seen[0] += threading.get_ident() == me

            for _ in range(40):
                handle = model.get_submodule(where).register_forward_hook(hook)
                for expected in (1, 0):
                    seen[0] = 0
                    with torch.no_grad():
                        assert_close_fp32(model(**inputs), wanted)
                    assert seen[0] == expected, where
                    handle.remove()

        return run

    parts = ("embeddings", "encoder.layer.0", "encoder.layer.0", "encoder.layer.0.attention.self", "pooler.dense")
    in_threads(*map(work, parts))


@pytest.mark.parametrize("reader", [tiers, attention_modules])
def test_a_hook_registered_while_hooks_are_read(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, model = accelerated("BertModel")
    own = model.encoder.layer[0].attention.self
    for _ in range(2):
        own.register_forward_hook(lambda *_: None)
    read: list[Any] = []

    def registers(hook: Any) -> bool:
        read.append(own.register_forward_hook(lambda *_: None))
        return True

    monkeypatch.setattr(reader, "is_capture_hook", registers)
    with torch.no_grad():
        assert_close_fp32(model(**model_inputs()), upstream(**model_inputs()))
    assert read
