"""All layers in one launch, on a GPU: the op and whole models by the error rule and bit for bit, beside other work, and
under compute-sanitizer. What needs no GPU is in test_encoder_small.py, test_extension.py and test_one_launch.py."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import Shape
from fake_graphs import alive, assert_equal, directly
from helpers import model_inputs, ragged_mask
from kernel_helpers import assert_error_rule, double
from test_encoder_small import CASES, arguments, mask_of
from test_gpu_model import BASE, DEVICE, FLAGS, assert_model, kinds_of, on_device, run, trio

from bert_fast import graphs, one_launch
from bert_fast.demo import kept_positions, zero_dropped
from bert_fast.explain import explanation
from bert_fast.family import family_of
from bert_fast.kernels import extension
from bert_fast.kernels.encoder_small import encoder_small, encoder_small_reason, encoder_small_ref
from bert_fast.one_launch import one_launch_reason

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = (BF16, FP16)
SECONDS = 500  # for one test
SANITIZER = shutil.which("compute-sanitizer")
BASE_LAYERS = Shape(12, 768, 3072, 12, 1, 32)
MINILM = Shape(12, 384, 1536, 12, 1, 32)
LARGE = Shape(24, 1024, 4096, 16, 1, 64)
Args = dict[str, Any]


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the process, saying where it stands, after minutes that no test takes: blocks that wait for others which
    never start hold the GPU, and whoever waits for it, for ever."""
    capture = request.config.pluginmanager.getplugin("capturemanager")  # absent under -p no:capture
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        terminal = os.dup(2)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(terminal)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One launch wherever it can be taken, no gradients, no capture that failed. Rows of every call by a model."""
    reason = extension.load()
    if reason:
        pytest.skip(reason)
    monkeypatch.delenv("BERT_FAST_GRAPHS", raising=False)
    failed: list[str] = []
    monkeypatch.setattr(graphs.logger, "warning", lambda message, *args: failed.append(message % args))
    rows: list[int] = []

    def counted(x: torch.Tensor, *args: Any) -> Any:
        rows.append(x.shape[0])
        return encoder_small(x, *args)

    monkeypatch.setattr(one_launch, "encoder_small", counted)
    with torch.no_grad(), one_launch.one_launch(True):
        yield rows
    assert not failed


def made(shape: Shape, kind: str = "holes", skip: bool = True, dtype: torch.dtype = BF16, **changes: Any) -> Args:
    """Arguments on the GPU. The test ends where the device cannot run the shape: shared memory differs by chip."""
    return moved(arguments(shape, mask_of(kind, shape.B, shape.S), skip, dtype, **changes))


def moved(args: Args) -> Args:
    def to(x: Any) -> Any:
        return x.to(DEVICE) if isinstance(x, torch.Tensor) else list(map(to, x)) if isinstance(x, list) else x

    found = {name: to(x) for name, x in args.items()}
    x, parameters, kv_len = found["x"], found["parameters"], found["kv_len"]
    sizes = len(found["eps"]) // 2, x.shape[1], parameters[4].shape[0], found["heads"]
    B = kv_len.shape[0]
    reason = encoder_small_reason(x.device, x.dtype, *sizes, B, x.shape[0] // B)
    if reason:
        pytest.skip(reason)
    return found


def call(args: Args) -> tuple[torch.Tensor, ...]:
    return encoder_small(*args.values())


def assert_right(args: Args) -> None:
    """By the rule, and exact zeros where no number belongs: truth is the definition in float64 on the same GPU."""
    exact = {k: [double(p) for p in v] if k == "parameters" else double(v) for k, v in args.items()}
    sides = call(args), encoder_small_ref(**args), encoder_small_ref(**exact)
    for what, ours, low, truth in zip(("last", "hidden", "probs"), *sides, strict=True):
        assert_error_rule(ours, low, truth, what)
        assert not ours[truth == 0].any(), what


def differing(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How many numbers differ, on the GPU: nobody waits."""
    return torch.stack([(a != b).sum() for a, b in zip(got, wanted, strict=True)]).sum()


def zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64, device=DEVICE)


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_op(case: str, dtype: torch.dtype) -> None:
    shape, kind, skip, *_ = CASES[case]
    assert_right(made(shape, kind, skip, dtype))


@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(seed: int) -> None:
    """Rows, padding, layers, sizes, activations, outputs."""
    r = random.Random(seed)
    head_dim = r.choice([32, 64, 128])
    heads, B = r.randint(1, 1024 // head_dim), r.choice([1, 1, 2, 3, 5, 8, 16, 64])
    shape = Shape(r.randint(1, 4), heads * head_dim, 16 * r.randint(1, 256), heads, B, r.randint(1, 64 // B))
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(B, shape.S, generator=generator) < r.choice([1.0, 0.8, 0.4, 0.1])).long()
    flags = {name: r.random() < 0.5 for name in ("uniform_empty", "want_hidden", "want_probs")}
    skip, dtype, activation = r.random() < 0.5, r.choice(DTYPES), r.randint(0, 3)
    assert_right(moved(arguments(shape, mask, skip, dtype, activation=activation, **flags)))


@pytest.mark.parametrize("shape", [BASE_LAYERS, MINILM, LARGE], ids=["base", "minilm", "large"])
def test_whole_depth(shape: Shape) -> None:
    assert_right(made(shape, "left"))


def test_undefined_rows_reach_nothing() -> None:
    """Rows past the count on the device hold NaN, as the op before leaves them."""
    args = made(Shape(2, 768, 3072, 12, 2, 27))
    clean = call(args)
    args["x"][args["cu_seqlens"][-1] :] = float("nan")
    assert not differing(call(args), clean)


@pytest.mark.unpoisoned  # a fill after every allocation would keep any two launches apart
@pytest.mark.parametrize("sizes", [(768, 3072, 12), (384, 1536, 12), (1024, 4096, 8)], ids=["base", "minilm", "wide"])
def test_10000_runs(sizes: tuple[int, int, int]) -> None:
    """Equal to the bit, each right behind one of another input, so that whatever a run left behind is wrong."""
    several = [made(Shape(2, *sizes, 2, 29), kind) for kind in ("holes", "left")]
    several[1]["x"] = several[1]["x"].flip(0)
    wanted, wrong = [call(args) for args in several], zero()
    for i in range(10_000):
        wrong += differing(call(several[i % 2]), wanted[i % 2])
    assert wrong.item() == 0 and all(t.isfinite().all() for outputs in wanted for t in outputs)


def test_in_a_graph_of_the_users() -> None:
    args = made(Shape(2, 384, 1536, 12, 2, 20))
    want = call(args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(args)
    for _ in range(3):
        graph.replay()
        assert not differing(got, want)
    args["x"].neg_()
    want = call(args)
    graph.replay()
    assert not differing(got, want)


# --- beside other work ------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.parametrize("shape", [BASE_LAYERS, Shape(2, 64, 96, 2, 1, 5)], ids=["base", "small"])
def test_beside_a_busy_stream(shape: Shape) -> None:
    args = made(shape)
    want, wrong = call(args), zero()
    x, side = torch.randn(8192, 8192, dtype=BF16, device=DEVICE), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(200):
        with torch.cuda.stream(side):
            torch.matmul(x, x)
        wrong += differing(call(args), want)
    torch.cuda.synchronize()
    assert wrong.item() == 0


@pytest.mark.unpoisoned
def test_on_several_streams_at_once() -> None:
    """Grids of the whole chip, and small ones of which two may run side by side; a model's replays among them."""
    ours = trio(0, BF16, **BASE)[0]
    inputs = on_device(model_inputs(1, 32, "holes"))
    for _ in range(2):
        model_want = ours(**inputs).last_hidden_state
    shapes = BASE_LAYERS, Shape(2, 768, 3072, 12, 2, 30), Shape(2, 64, 96, 2, 1, 5), Shape(2, 64, 96, 2, 3, 21)
    several = [made(shape) for shape in shapes]
    wanted, wrong = [call(args) for args in several], [zero() for _ in range(5)]
    streams = [torch.cuda.Stream() for _ in wrong]
    torch.cuda.synchronize()
    for _ in range(200):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < 4:
                    wrong[i] += differing(call(several[i]), wanted[i])
                else:
                    wrong[i] += (ours(**inputs).last_hidden_state != model_want).sum()
    torch.cuda.synchronize()
    assert [n.item() for n in wrong] == [0] * 5


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_models(padding: str, dtype: torch.dtype, launches: list[int]) -> None:
    """All outputs, the first time and replayed, in buckets larger than the batch and of its size."""

    def make(seed: int) -> list[dict[str, list[torch.Tensor]]]:
        models = trio(seed, dtype, **BASE)
        models[0].set_padding(padding)
        sides: list[dict[str, list[torch.Tensor]]] = [{}, {}, {}]
        for B, S, kind in ((1, 32, "ones"), (1, 19, "left"), (2, 27, "holes"), (2, 32, "right"), (1, 64, "first")):
            inputs = model_inputs(B, S, kind, seed, **FLAGS)
            kept = kept_positions(inputs["attention_mask"], padding).to(DEVICE)
            first, *others = run(models, inputs)
            again = [kinds_of(models[0](**on_device(inputs))) for _ in range(2)][1]
            told = explanation(models[0], **on_device(inputs)).graph
            assert told.startswith("replayed") and told.endswith("layers in one launch")
            others = [zero_dropped(found, kept) for found in others]
            for ours in (first, again):
                for side, outputs in zip(sides, (ours, *others), strict=True):
                    for name, tensors in outputs.items():
                        side.setdefault(name, []).extend(tensors)
        return sides

    assert_model(dtype, make)
    assert set(launches) == {32, 54, 64}  # direct, 32 and 54; captured, 32 and 64; no other batch came first


@pytest.mark.parametrize("B, S", [(3, 11), (5, 12), (64, 1), (1, 1)])
def test_models_without_graphs(B: int, S: int, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERT_FAST_GRAPHS", "0")

    def make(seed: int) -> list[dict[str, list[torch.Tensor]]]:
        return run(trio(seed, BF16, **BASE), model_inputs(B, S, "holes", seed, **FLAGS))

    assert_model(BF16, make)
    assert launches == [B * S] * 3


def test_a_head_that_reads_first_tokens(launches: list[int]) -> None:
    def make(seed: int) -> list[dict[str, list[torch.Tensor]]]:
        models = trio(seed, BF16, "BertForSequenceClassification", **BASE)
        inputs = on_device(model_inputs(2, 27, "first", seed))
        for _ in range(2):
            models[0](**inputs)
        return [{"logits": [model(**inputs).logits]} for model in models]

    assert_model(BF16, make)
    assert launches and launches[-1] == 64


@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "all"])
@pytest.mark.parametrize("B, S", [(1, 32), (2, 32), (1, 64)])
def test_replays(B: int, S: int, flags: dict[str, bool]) -> None:
    """Bit for bit what direct launches give, where the bucket has the batch's size; with weights as they now are."""
    ours = trio(0, BF16, **BASE)[0]
    several = [on_device(model_inputs(B, S, "holes", seed, **flags)) for seed in range(2)]
    wanted = [directly(ours, **inputs) for inputs in several]
    for i in range(6):
        assert_equal(ours(**several[i % 2]), wanted[i % 2])
    ours.encoder.layer[1].output.dense.weight.mul_(0.5)
    changed = directly(ours, **several[0])
    assert not torch.equal(changed.last_hidden_state, wanted[0].last_hidden_state)
    assert_equal(ours(**several[0]), changed)
    assert alive(ours) == 1
    dense = ours.encoder.layer[0].intermediate.dense
    dense.weight = torch.nn.Parameter(dense.weight * 2)
    other = directly(ours, **several[0])
    assert not torch.equal(other.last_hidden_state, changed.last_hidden_state)
    for _ in range(3):
        assert_equal(ours(**several[0]), other)
    assert "one launch" in explanation(ours, **several[0]).graph


def test_a_model_in_a_graph_of_the_users() -> None:
    ours, inputs = trio(0, BF16, **BASE)[0], on_device(model_inputs(2, 32, "holes"))
    for _ in range(3):
        want = ours(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ours(**inputs)
    graph.replay()
    assert_equal(got, want)
    assert_equal(ours(**inputs), want)


# --- where it is not taken --------------------------------------------------------------------------------------------


def test_reasons(launches: list[int]) -> None:
    ours, device = trio(0, BF16, **BASE)[0], torch.device(DEVICE)
    view = family_of(ours).view(ours)
    assert one_launch_reason(view, 1, 64, BF16, device) is None
    assert one_launch_reason(view, 1, 65, BF16, device) == "one launch is not the choice for 1 x 65 rows here"
    of_op = encoder_small_reason(device, BF16, 2, 768, 3072, 12, 1, 65)
    assert of_op == "batch * length is 65, expected 1 to 64"
    inputs = on_device(model_inputs(1, 65))
    for _ in range(2):
        ours(**inputs)
    assert explanation(ours, **inputs).graph == "replayed, bucket 1 x 128" and not launches


@pytest.mark.parametrize("why", ["head_dim is 8", "not torch.float32", "fewer blocks fit"])
def test_where_it_does_not_fit_graphs_run(why: str, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if "float32" in why else BF16
    ours = trio(0, dtype, **({"intermediate_size": 64} if "head_dim" in why else BASE))[0]
    if "blocks" in why:
        monkeypatch.setattr(one_launch, "encoder_small_reason", lambda *args: f"{why} the device than a group has")
    assert why in str(one_launch_reason(family_of(ours).view(ours), 1, 16, dtype, torch.device(DEVICE)))
    inputs = on_device({**model_inputs(1, 16, **FLAGS), "attention_mask": ragged_mask(1, 16)})
    for _ in range(3):
        got = ours(**inputs)
    assert explanation(ours, **inputs).graph.startswith("replayed") and not launches
    with one_launch.one_launch(False):
        for _ in range(3):
            want = ours(**inputs)
    assert_equal(got, want)


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


def every_kernel() -> None:
    """Two layers in each of the six compiled kernels, in a process of its own; ends where a number is wrong."""
    assert extension.load() is None
    for head_dim in (32, 64, 128):
        for dtype in DTYPES:
            for B, S, kind in ((1, 1, "ones"), (2, 21, "holes"), (1, 64, "left")):
                assert_right(made(Shape(2, 256, 320, 256 // head_dim, B, S), kind, True, dtype))


@pytest.mark.slow
@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool: str) -> None:
    here = Path(__file__).resolve().parent
    command = [
        str(SANITIZER), "--tool", tool, "--kernel-name", "kernel_substring=encoder_small_kernel",
        "--report-api-errors", "no", "--target-processes", "all", "--error-exitcode", "9",
        sys.executable, "-c", f"import {Path(__file__).stem} as tests; tests.every_kernel(); print('all of them ran')",
    ]  # fmt: skip
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS - 20,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    clean = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert done.returncode == 0 and clean in done.stdout and "all of them ran" in done.stdout, done.stdout[-5000:]
