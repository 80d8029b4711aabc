"""CUDA graphs on a GPU: replays beside direct launches and transformers, streams, threads, weights, memory.

What does not need CUDA (buckets, keys, eviction, copies) is in test_graphs.py.
"""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from fake_graphs import alive, directly
from helpers import (
    FIRST_TOKEN_HEADS,
    MASK_KINDS,
    assert_close_fp32,
    head_inputs,
    model_inputs,
    pair,
    ragged_mask,
    tensors_of,
)

import bert_fast
from bert_fast import doctor, graphs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FLAGS = {"output_hidden_states": True, "output_attentions": True}
WIDE = {"max_position_embeddings": 64}
FACTOR = 2e-5  # of the largest magnitude, in fp32: another order of summation, on another device
LOW = 0.05  # the same for bf16: replay and direct launch may take other tiles


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def models(cls: str = "BertModel", **changes: Any) -> list[torch.nn.Module]:
    return [model.to(DEVICE) for model in pair(cls, **changes)]


@pytest.fixture(autouse=True)
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without gradients, and sure that no capture failed."""
    monkeypatch.delenv("BERT_FAST_GRAPHS", raising=False)
    failed: list[str] = []
    monkeypatch.setattr(graphs.logger, "warning", lambda message, *args: failed.append(message % args))
    with torch.no_grad():
        yield
    assert not [message for message in failed if "CUDA graph" in message], failed


@pytest.mark.parametrize("flags", [{}, {"output_hidden_states": True}, FLAGS], ids=["plain", "hidden", "all"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_outputs(padding: str, attn: str, flags: dict[str, bool]) -> None:
    """Every kind of mask, an empty sequence too; the buckets hold more than the batch."""
    upstream, ours = models(attn=attn, **WIDE)
    ours.set_padding(padding)
    masks: list[Any] = [None, *(ragged_mask(3, 11, kind) for kind in MASK_KINDS), ragged_mask(3, 11, "holes", 1)]
    masks[-1][1] = 0
    for seed, mask in enumerate(masks):
        inputs = on_device({**model_inputs(3, 11, seed=seed), "attention_mask": mask, **flags})
        for _ in range(3):
            got = ours(**inputs)
        assert "replayed" in bert_fast.explain(ours, **inputs).graph
        assert_close_fp32(got, directly(ours, **inputs), factor=FACTOR)
        if padding == "exact" and not (attn == "sdpa" and "output_attentions" in flags):
            assert_close_fp32(got, upstream(**inputs), factor=FACTOR)
    assert alive(ours) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_half_precision(padding: str, dtype: torch.dtype) -> None:
    _, ours = models(dtype=dtype, **WIDE)
    ours.set_padding(padding)
    for kind in MASK_KINDS:
        inputs = on_device(model_inputs(3, 19, kind, **FLAGS))
        for _ in range(3):
            got = ours(**inputs)
        assert_close_fp32(got, directly(ours, **inputs), factor=LOW)


@pytest.mark.parametrize("cls", ["BertForMaskedLM", *FIRST_TOKEN_HEADS])
def test_heads(cls: str) -> None:
    upstream, ours = models(cls)
    for seed in range(3):
        inputs = on_device(head_inputs(cls, kind="holes", seed=seed))
        assert_close_fp32(ours(**inputs), upstream(**inputs), factor=FACTOR)
    assert alive(ours) == 1


def test_random_shapes() -> None:
    """200 shapes; outputs of all of them held to the end, and unchanged there."""
    upstream, ours = models(max_position_embeddings=512, num_hidden_layers=1)
    generator, held = torch.Generator().manual_seed(0), []
    for call in range(200):
        B, S = (int(torch.randint(1, n, (), generator=generator)) for n in (9, 300))
        inputs = on_device(model_inputs(B, S, "right" if call % 2 else None, call))
        held.append((inputs, ours(**inputs)))
        assert alive(ours) <= graphs.MAX_GRAPHS
    for inputs, got in held:
        assert_close_fp32(got, upstream(**inputs), factor=FACTOR)


def test_streams() -> None:
    """Calls of one bucket from several streams, inputs and outputs on each, nothing waiting on the host."""
    _, ours = models(**WIDE)
    streams = [torch.cuda.Stream() for _ in range(3)]
    batches = [on_device(model_inputs(2 + i % 3, 9 + i, "holes", i)) for i in range(9)]
    wanted = [directly(ours, **x).last_hidden_state for x in batches]
    for _ in range(2):
        ours(**batches[0])
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for i, inputs in enumerate(batches):
            with torch.cuda.stream(streams[i % 3]):
                got.append(ours(**inputs).last_hidden_state * 1)
        torch.cuda.synchronize()
        for x, want in zip(got, wanted, strict=True):
            assert_close_fp32(x, want, factor=FACTOR)


def test_threads() -> None:
    """Two models, four threads with streams of their own, captures and replays mixed."""
    both = [models(seed=seed, **WIDE)[1] for seed in (0, 1)]
    batches = [on_device(model_inputs(1 + i % 4, 9 + 5 * i, "holes", i)) for i in range(6)]
    wanted = [[directly(model, **x).last_hidden_state for x in batches] for model in both]
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                order = [*range(start, 6), *range(start)] * 5
                got = [(m, i, both[m](**batches[i]).last_hidden_state) for i in order for m in (0, 1)]
                torch.cuda.current_stream().synchronize()
                for m, i, x in got:
                    assert_close_fp32(x, wanted[m][i], factor=FACTOR)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert all(alive(model) for model in both)


def test_weights_changed_in_place_and_moved() -> None:
    other, ours = models()
    inputs = on_device(model_inputs(3, 11, "holes", **FLAGS))
    for _ in range(2):
        ours(**inputs)
    for model in (ours, other):
        model.encoder.layer[0].output.dense.weight.mul_(0.5)
    assert_close_fp32(ours(**inputs), other(**inputs), factor=FACTOR)
    assert alive(ours) == 1
    for model in (ours, other):
        dense = model.encoder.layer[1].intermediate.dense
        dense.weight = torch.nn.Parameter(dense.weight * 2)
    for _ in range(3):
        assert_close_fp32(ours(**inputs), other(**inputs), factor=FACTOR)
    ours.cpu().to(DEVICE)
    for _ in range(3):
        assert_close_fp32(ours(**inputs), other(**inputs), factor=FACTOR)
    assert alive(ours) == 1


@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "all"])
def test_a_replay_never_synchronises(flags: dict[str, bool]) -> None:
    """Nor does another shape of the bucket, nor the capture itself."""
    _, ours = models(dtype=torch.bfloat16, **WIDE)
    small, large = (on_device(model_inputs(B, S, "holes", **flags)) for B, S in ((3, 11), (4, 20)))
    ours(**small)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [ours(**inputs) for inputs in (small, large, small)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got[0].last_hidden_state, got[2].last_hidden_state)
    assert_close_fp32(got[1], directly(ours, **large), factor=LOW)


def test_memory_is_stable_and_given_back() -> None:
    kept = models(dtype=torch.bfloat16, max_position_embeddings=512)[1:]

    def calls(n: int) -> None:
        for i in range(n):
            kept[0](**on_device(model_inputs(1 + i % 4, 20 + 37 * (i % 7), "right", i)))  # 12 buckets: all are kept

    calls(300)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    calls(500)
    torch.cuda.synchronize()
    gc.collect()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    slack = 8 * 2**20  # captures that came late
    assert all(y <= x + slack for x, y in zip(before, after, strict=True)), (before, after)
    lines = "\n".join(doctor.graph_lines())
    assert "on, for inference" in lines and "memory pool of" in lines
    kept.clear()
    gc.collect()
    torch.cuda.synchronize()
    models(dtype=torch.bfloat16, **WIDE)[1](**on_device(model_inputs(3, 11)))  # sweeps what the dead model left
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < before[0]


def test_under_the_capture_of_someone_else() -> None:
    """Launched into their graph, which replays what it captured."""
    _, ours = models(**WIDE)
    inputs = on_device(model_inputs(3, 11, "holes"))
    for _ in range(3):
        want = ours(**inputs).last_hidden_state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ours(**inputs).last_hidden_state
    graph.replay()
    torch.cuda.synchronize()
    assert_close_fp32(got, want, factor=FACTOR)
    assert_close_fp32(ours(**inputs).last_hidden_state, want, factor=FACTOR)


def test_a_capture_that_fails_leaves_torch_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait inside a capture ends it; the call's result is right all the same, and other captures go on working."""
    upstream, ours = models(**WIDE)
    other = models(**WIDE)[1]  # its graph keeps the pool that the capture fails in
    for _ in range(2):
        kept = other(**on_device(model_inputs(2, 11)))
    encode = graphs.encode

    def waits(*args: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "encode", waits)
        patch.setattr(graphs.logger, "warning", lambda *args: None)
        for _ in range(3):
            inputs = on_device(model_inputs(3, 11, "holes"))
            assert_close_fp32(ours(**inputs), upstream(**inputs), factor=FACTOR)
    assert alive(ours) == 0
    torch.rand(3, device=DEVICE)
    for _ in range(3):
        inputs = on_device(model_inputs(1, 11, "holes"))
        assert_close_fp32(ours(**inputs), upstream(**inputs), factor=FACTOR)
    assert alive(ours) == alive(other) == 1
    assert_close_fp32(other(**on_device(model_inputs(2, 11))), kept, factor=FACTOR)


@pytest.mark.unpoisoned  # a fill after every allocation would keep any two of our kernels apart
@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "all"])
def test_dependent_launches(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that start while the one before ends: the same bits as without, many times, beside other work."""
    sizes = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=4, **WIDE)
    dependent, plain = (models(dtype=torch.bfloat16, **sizes)[1] for _ in range(2))
    shapes = [on_device(model_inputs(B, S, "holes", seed=B, **flags)) for B, S in ((3, 20), (4, 32), (3, 31))]
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "DEPENDENT_ROWS", 0)
        wanted = [[tensors_of(plain(**inputs)) for inputs in shapes] for _ in range(2)][-1]
    assert alive(plain) == 1
    x, side = torch.randn(4096, 4096, device=DEVICE), torch.cuda.Stream()
    for i in range(300):
        with torch.cuda.stream(side):
            x = (x @ x).tanh_()
        got = tensors_of(dependent(**shapes[i % 3]))
        if i > 0:  # the first call is launched directly, with tiles of its own
            assert all(torch.equal(t, wanted[i % 3][name]) for name, t in got.items() if t.numel()), i
