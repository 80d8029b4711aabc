"""The cache of CUDA graphs, without CUDA: eviction, bounds, validity, threads, death; through fake_graphs.py."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from fake_graphs import FakeBackend, alive, assert_equal, backend, directly, inference, with_empty  # noqa: F401
from helpers import (
    assert_close_fp32,
    model_inputs,
    pair,
    ragged_mask,
)

import bert_fast
from bert_fast import doctor, graphs, snapshot

pytestmark = pytest.mark.usefixtures("backend", "inference")
FLAGS = {"output_hidden_states": True, "output_attentions": True}
WIDE = {"max_position_embeddings": 64}  # so that a bucket is a whole one of 32 positions


def test_random_shapes_stay_bounded(backend: FakeBackend) -> None:  # noqa: F811
    """200 shapes over more buckets than may be held: every result right, few captures, bounded memory."""
    upstream, ours = pair(max_position_embeddings=512, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    for call in range(200):
        B, S = (int(torch.randint(1, n, (), generator=generator)) for n in (9, 300))
        flags = {"output_hidden_states": call % 3 == 0}
        inputs = model_inputs(B, S, "right" if call % 2 else None, call, **flags)
        assert_close_fp32(ours(**inputs), upstream(**inputs), factor=2e-5)
        assert alive(ours) <= graphs.MAX_GRAPHS
    assert alive(ours) == graphs.MAX_GRAPHS and backend.replays > 50
    assert backend.captures <= 80, "captured again and again"
    ((name, n, nbytes),) = graphs.held()
    assert name == "BertModel on cpu" and n == graphs.MAX_GRAPHS and 0 < nbytes <= graphs.MAX_DEVICE_BYTES


def test_least_recently_used_goes_first(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> None:  # noqa: F811
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    _, ours = pair(**WIDE)

    def call(B: int, times: int = 1) -> int:
        before = backend.captures
        for _ in range(times):
            ours(**model_inputs(B, 32))
        return backend.captures - before

    assert call(1, 2) == call(2, 2) == 1 and call(1) == 0
    assert call(4, 2) == 1 and alive(ours) == 2  # 2 goes, 1 was used since
    assert call(1) == 0 and call(4) == 0
    assert call(2, 3) == 0 and call(2) == 1  # evicted once: now on the fourth sighting


def test_bytes_of_a_device_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all its models, oldest first."""
    first, second = (pair(seed=seed, **WIDE)[1] for seed in (0, 1))
    for _ in range(2):
        first(**model_inputs(4, 32))
    ((_, _, nbytes),) = graphs.held()
    monkeypatch.setattr(graphs, "MAX_DEVICE_BYTES", 2 * nbytes)
    for B in (2, 4, 3):
        for _ in range(2):
            second(**model_inputs(B, 32))
    assert alive(first) == 0 and alive(second) == 2
    assert sum(size for _, _, size in graphs.held()) <= graphs.MAX_DEVICE_BYTES


def test_limits(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> None:  # noqa: F811
    _, ours = pair(**WIDE)
    nbytes = 4 * 32 * 32 * 4 + 4 * 32 * 4
    for name, limit in (("MAX_ROWS", 127), ("MAX_OUTPUT_BYTES", nbytes - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(graphs, name, limit)
            for _ in range(3):
                ours(**model_inputs(3, 20))
            assert backend.captures == 0
            told = bert_fast.explain(ours, **model_inputs(3, 20)).graph
            assert told.startswith("launched directly, ") and "4 x 32" in told
    monkeypatch.setattr(graphs, "MAX_OUTPUT_BYTES", nbytes)
    for _ in range(3):
        ours(**model_inputs(3, 20))
    assert backend.captures == 1


def test_weights_changed_in_place_and_moved(backend: FakeBackend) -> None:  # noqa: F811
    upstream, ours = pair()
    other, _ = pair(seed=7)
    inputs = model_inputs(3, 11, "holes", **FLAGS)
    for _ in range(2):
        ours(**inputs)
    ours.load_state_dict(other.state_dict())  # copied in place: the graph reads the new numbers
    assert_close_fp32(ours(**inputs), other(**inputs))
    assert backend.captures == 1 and alive(ours) == 1
    ours.encoder.layer[0].output.dense.weight.data.mul_(0.5)
    other.encoder.layer[0].output.dense.weight.data.mul_(0.5)
    assert_close_fp32(ours(**inputs), other(**inputs))
    assert backend.captures == 1
    for layer in (ours, other):
        dense = layer.encoder.layer[1].intermediate.dense
        dense.weight = torch.nn.Parameter(dense.weight * 2)  # moved
    for replays in (0, 1, 1):
        before = backend.replays
        assert_close_fp32(ours(**inputs), other(**inputs))
        assert backend.replays == before + replays
    ours.double().float()  # perhaps to the addresses from before, perhaps not
    for _ in range(2):
        assert_close_fp32(ours(**inputs), other(**inputs))
    before = backend.captures, backend.replays
    ours.train()(**inputs)
    assert (backend.captures, backend.replays) == before
    assert_close_fp32(ours.eval()(**inputs), other(**inputs))
    assert (backend.captures, backend.replays) == (before[0], before[1] + 1)


def test_a_module_no_longer_plain(backend: FakeBackend) -> None:  # noqa: F811
    _, ours = pair()
    inputs = model_inputs(3, 11)
    for _ in range(2):
        want = ours(**inputs)
    seen = []
    handle = ours.encoder.layer[0].register_forward_hook(lambda *args: seen.append(1))
    before = backend.replays
    for _ in range(3):
        assert_close_fp32(ours(**inputs), want)
    assert len(seen) == 3 and backend.replays == before
    handle.remove()
    assert_equal(ours(**inputs), want)
    assert len(seen) == 3


def test_implementation_and_precision_are_part_of_the_graph(backend: FakeBackend) -> None:  # noqa: F811
    upstream, ours = pair()
    inputs = {**model_inputs(3, 11), "attention_mask": with_empty(ragged_mask(3, 11, "ones"))}
    for attn in ("eager", "sdpa", "eager"):
        for model in (upstream, ours):
            model.set_attn_implementation(attn)
        for _ in range(2):
            assert_close_fp32(ours(**inputs), upstream(**inputs))
    assert backend.captures == 3
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee" if before == "tf32" else "tf32"
    try:
        for _ in range(2):
            ours(**inputs)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert backend.captures == 4 and alive(ours) == 2


def test_captures_that_fail(backend: FakeBackend, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    """Tried thrice, ever more rarely, after the first time without dependent launches; every call is right."""
    upstream, ours = pair()
    backend.broken = True
    for _ in range(20):
        assert_close_fp32(ours(**model_inputs(3, 11)), upstream(**model_inputs(3, 11)))
    assert backend.asked == [True, False, False] and backend.replays == 0 and backend.running == 0
    assert all("no CUDA graph for 4 x 24" in r and "not permitted" in r for r in caplog.messages)
    assert ["for now" in r for r in caplog.messages] == [True, True, False]
    assert "failed" in bert_fast.explain(ours, **model_inputs(3, 11)).graph
    assert all(isinstance(a, (int, str)) for r in caplog.records for a in r.args)  # no exception, with frames and model
    backend.broken = False
    for _ in range(2):
        ours(**model_inputs(1, 11))
    assert backend.captures == 1 and backend.asked[-1]


def test_a_capture_that_fails_once(backend: FakeBackend) -> None:  # noqa: F811
    """Memory may be short for a while: the bucket has its graph later."""
    _, ours = pair()
    backend.broken = True
    ours(**model_inputs(3, 11))
    ours(**model_inputs(3, 11))
    backend.broken = False
    for _ in range(4):
        ours(**model_inputs(3, 11))
    assert backend.asked == [True, False] and alive(ours) == 1 and backend.replays == 1


def test_an_interrupted_copy(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Ctrl-C between the two numbers of the true shape: the next call does not take the old ones for granted."""
    upstream, ours = pair()
    for _ in range(3):
        ours(**model_inputs(4, 11))

    def interrupt(self: torch.Tensor, value: int) -> torch.Tensor:
        if self.dtype == torch.int32 and value == 9:
            raise KeyboardInterrupt
        return fill(self, value)

    fill = torch.Tensor.fill_
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "fill_", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ours(**model_inputs(3, 9))  # the fourth sequence would be gone
    assert_close_fp32(ours(**model_inputs(4, 11)), upstream(**model_inputs(4, 11)))


def test_threads(backend: FakeBackend) -> None:  # noqa: F811
    """Two models, six threads, shapes of several buckets: the fake asserts that no two replays overlap."""
    models = [pair(seed=seed)[1] for seed in (0, 1)]
    inputs = [model_inputs(1 + i % 4, 7 + i, "holes", i) for i in range(6)]
    wanted = [[directly(model, **x).last_hidden_state for x in inputs] for model in models]
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            with torch.no_grad():
                got = [(m, i, models[m](**inputs[i])) for i in [*range(start, 6), *range(start)] * 3 for m in (0, 1)]
                for m, i, output in got:
                    assert_close_fp32(output.last_hidden_state, wanted[m][i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert backend.replays > 50 and backend.running == 0


def python_calls(function: Any) -> int:
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_what_a_replay_costs_in_python(backend: FakeBackend) -> None:  # noqa: F811
    """Counted in Python calls, which no busy machine disturbs: few, and not one more for more layers."""
    backend.idle, counts = True, []
    for layers in (2, 12):
        _, ours = pair(num_hidden_layers=layers)
        inputs = model_inputs(3, 11, "right")
        for _ in range(4):
            ours(**inputs)
        counts.append(python_calls(lambda: ours(**inputs)))  # noqa: B023
    assert counts[0] == counts[1] < 300, counts  # transformers' output class alone makes a hundred


def test_the_model_knows_nothing_of_its_graphs(backend: FakeBackend) -> None:  # noqa: F811
    """Copies and pickles have none; a model that dies takes its graphs along, once the device is done with them."""
    _, ours = pair()
    keys, attributes = list(ours.state_dict()), set(ours.__dict__)
    for _ in range(3):
        want = ours(**model_inputs(3, 11))
    assert list(ours.state_dict()) == keys and set(ours.__dict__) == attributes
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert alive(twin) == 0
        assert_close_fp32(twin(**model_inputs(3, 11)), want)
    backend.busy = True
    entry = weakref.ref(*snapshot.held(ours).graphs.entries.values())
    gone = weakref.ref(ours)
    del ours, twin
    gc.collect()
    assert gone() is None and not list(graphs.held())
    assert entry() is not None, "freed under a replay"
    backend.busy = False
    _, other = pair()
    other(**model_inputs(3, 11))
    gc.collect()
    assert entry() is None


def test_doctor_shows_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("none" in line for line in doctor.graph_lines()[2:])
    _, ours = pair("BertForMaskedLM")
    for _ in range(2):
        ours(**model_inputs(3, 11))
    report = "\n".join(doctor.report())
    assert "graphs\n" in report and "BertModel on cpu: 1 graphs" in report and "limits: 12 a model" in report
    monkeypatch.setenv("BERT_FAST_GRAPHS", "0")
    assert "off: BERT_FAST_GRAPHS=0" in doctor.graph_lines()
