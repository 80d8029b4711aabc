"""One model called from many threads: the results of one thread. CUDA streams: test_gpu_graphs.py."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_graphs import FakeBackend, assert_equal, backend  # noqa: F401
from helpers import assert_close_fp32, assert_tier, model_inputs, tensors_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from thread_helpers import CASES, FLAGS, accelerated, in_threads, modes_of_padding, often, with_gradients  # noqa: F401

import bert_fast
from bert_fast import direct, doctor, graphs, packing

pytestmark = pytest.mark.usefixtures("often")


@pytest.mark.parametrize("tier", ["encoder", "module"])
@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "BertModel", "distilbert"])
def test_eight_threads(cls: str, tier: str) -> None:
    """Shapes, masks, outputs asked for, padding modes and gradients mixed; hidden states of one are not another's."""
    models = modes_of_padding(cls)
    for model in models if tier == "module" else ():
        next(m for m in model.modules() if type(m) is torch.nn.Linear).register_forward_hook(lambda *_: None)
        assert_tier(model, model_inputs(), "module", "hook")
    wanted = {(m, i): with_gradients(models[m], *case) for m in range(3) for i, case in enumerate(CASES)}

    def work(seed: int) -> Callable[[], None]:
        order = random.Random(seed).choices(list(wanted), k=40)
        return lambda: [assert_equal(with_gradients(models[m], *CASES[i]), wanted[m, i]) for m, i in order]

    in_threads(*map(work, range(8)))


@st.composite
def calls(draw: Any) -> tuple[dict[str, Any], bool]:
    B, S = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    kind = draw(st.sampled_from([None, "ones", "right", "left", "holes"]))
    inputs = model_inputs(B, S, kind, draw(st.integers(0, 9)))
    if draw(st.booleans()):
        inputs["token_type_ids"] = inputs["input_ids"] % 3
    if draw(st.integers(0, 4)) == 0:
        inputs["attention_mask"] = torch.randn(B, 4, S, S, generator=torch.Generator().manual_seed(S))
    inputs |= {name: True for name in FLAGS if draw(st.booleans())}
    return inputs, draw(st.integers(0, 3)) == 0


@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "BertModel"])
@settings(
    max_examples=4, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # what threads did does not come again to be shrunk
)  # fmt: skip
@given(pool=st.lists(calls(), min_size=8, max_size=12), seed=st.integers(0, 2**16))
def test_three_threads_a_hundred_random_calls(cls: str, pool: list[Any], seed: int) -> None:
    models = modes_of_padding(cls)
    wanted = {(m, i): with_gradients(models[m], *case) for m in range(3) for i, case in enumerate(pool)}

    def work(thread: int) -> Callable[[], None]:
        order = random.Random(seed + thread).choices(list(wanted), k=100)
        return lambda: [assert_equal(with_gradients(models[m], *pool[i]), wanted[m, i]) for m, i in order]

    in_threads(*map(work, range(3)))


def test_through_graphs(backend: FakeBackend) -> None:  # noqa: F811
    """Replays, captures, evictions and direct launches mixed; the fake asserts that no two replays overlap. Meanwhile
    two threads look at what is held and call models that nobody has called yet."""
    models = modes_of_padding("BertModel")
    pool = [*CASES, *((model_inputs(B, 2 + B, "right", B), False) for B in range(1, 20, 3))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERT_FAST_GRAPHS", "0")
        wanted = {(m, i): with_gradients(models[m], *case) for m in range(3) for i, case in enumerate(pool)}
    left = [6]

    def work(seed: int) -> Callable[[], None]:
        def run() -> None:
            try:
                for m, i in random.Random(seed).choices(list(wanted), k=60):
                    assert_close_fp32(with_gradients(models[m], *pool[i]), wanted[m, i], factor=1e-4)
            finally:
                left[0] -= 1

        return run

    def look() -> None:
        while left[0] > 0:
            assert all(n > 0 and nbytes > 0 for _, n, nbytes in graphs.held())
            doctor.graph_lines()

    def call_new_models() -> None:
        while left[0] > 0:
            assert_close_fp32(with_gradients(copy.deepcopy(models[0]), *pool[0]), wanted[0, 0])

    in_threads(*map(work, range(6)), look, call_new_models)
    assert backend.replays > 30 and backend.captures > 5 and backend.running == 0


MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    # one dtype: torch keeps one cache of casts for all threads, two at once fail in transformers' class as well
    "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "off": lambda: torch.autocast("cpu", enabled=False),
}


def test_modes_of_a_thread_are_its_own() -> None:
    _, model = accelerated(attn="sdpa")
    inputs = model_inputs(kind="right", **FLAGS)
    wanted = {}
    for mode, context in MODES.items():
        with context():
            wanted[mode] = model(**inputs)

    def work(mode: str) -> None:
        for _ in range(40):
            with MODES[mode]():
                got = model(**inputs)
            assert_equal(got, wanted[mode])
            for name, tensor in tensors_of(got).items():
                like = tensors_of(wanted[mode])[name]
                assert (tensor.dtype, tensor.requires_grad) == (like.dtype, like.requires_grad), (mode, name)
                assert tensor.is_inference() == like.is_inference(), (mode, name)

    in_threads(*(lambda mode=mode: work(mode) for mode in MODES))


def test_copies_and_pickles_in_threads() -> None:
    _, model = accelerated(attn="sdpa")
    inputs, wanted = CASES[2][0], with_gradients(model, *CASES[2])

    def work(make: Callable[[Any], Any]) -> None:
        for _ in range(15):
            twin = make(model)
            same = bert_fast.accelerate(twin)  # what was pickled is transformers' own
            assert [type(module) for module in same.modules()] == [type(module) for module in model.modules()]
            assert_equal(with_gradients(twin, inputs, False), wanted)
            assert_equal(with_gradients(model, inputs, False), wanted)

    in_threads(*(lambda make=make: work(make) for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))) * 3))


def test_encode_in_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reads token embeddings: that the other skips padding does not reach it, though both are inside `encode`."""
    sentences = pytest.importorskip("sentence_transformers")
    from test_accelerate import MINILM, TEXTS, folder_of

    model = bert_fast.accelerate(sentences.SentenceTransformer(str(folder_of(*MINILM)), device="cpu"))
    values = ("sentence_embedding", None)  # None: everything, padding positions too
    wanted = {value: model.encode(TEXTS, output_value=value) for value in values}
    together, taken = threading.Barrier(2), {value: [] for value in values}
    value_of: dict[int, str | None] = {}

    def make_packing(mask: Any, B: int, S: int, device: Any, skip: bool, *rest: Any) -> Any:
        together.wait(20)
        taken[value_of[threading.get_ident()]].append(skip)
        return packing.make_packing(mask, B, S, device, skip, *rest)

    monkeypatch.setattr(direct, "make_packing", make_packing)

    def work(value: str | None) -> None:
        value_of[threading.get_ident()] = value
        for _ in range(3):
            got = model.encode(TEXTS, output_value=value)
            if value is None:
                got = [each["token_embeddings"] for each in got]
                assert_close_fp32(got, [each["token_embeddings"] for each in wanted[None]])
            else:
                assert_close_fp32(torch.from_numpy(got), torch.from_numpy(wanted[value]))

    in_threads(*(lambda value=value: work(value) for value in values))
    assert taken == {"sentence_embedding": [True] * 3, None: [False] * 3}
