"""The benches: formulas against a counter, timing in turns, correctness before speed, readable records."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bench import kernels, model, timing
from bench.__main__ import main
from bert_fast import doctor

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64)
CPU = torch.device("cpu")


def config(**sizes):
    return transformers.BertConfig(**TINY, **sizes)


@pytest.fixture
def tiny(monkeypatch):
    """The bench on a small model and small workloads, one round each."""
    works = [
        model.Workload("dense", 3, 16),
        model.Workload("dense + both", 2, 9, outputs=("attentions", "hidden_states")),
        model.Workload("ragged", 4, 16, "skip", low=2),
    ]
    monkeypatch.setitem(model.SIZES, "base", TINY)
    monkeypatch.setattr(model, "workloads", lambda *args: works)
    monkeypatch.setattr(timing, "BLOCK_MS", {"cpu": 0.0})
    shape = kernels.Shape("tiny", 2, 16, 32, 48, 4, words=64)
    monkeypatch.setattr(kernels, "SHAPES", {"cpu": (shape,)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_gpu_no_bench_on_one():
    assert timing.pick_device(None) == CPU
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        main(["kernels", "--device", "cuda"])


def test_flops_are_those_of_the_counter():
    upstream = transformers.BertModel(config(attn_implementation="eager")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        upstream(torch.zeros(3, 16, dtype=torch.long))
    assert model.flops(upstream.config, torch.full((3,), 16)) == counter.get_total_flops()


def test_timing_takes_turns(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "_block", lambda call, count, device: order.append(call()) or 5.0)
    times = timing.in_turns({name: lambda n=name: n for name in "abc"}, CPU, rounds=3)
    assert "".join(order) == "abc" + "abcbcacab"  # one block each to size them, then the rounds
    assert times["a"] == timing.Timing(5.0, 5.0, 5.0, 3)
    spread = timing.Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (spread.q20, spread.median, spread.q80) == (2.0, 3.5, 5.0)
    assert timing.Timing.of([4.0]) == timing.Timing(4.0, 4.0, 4.0, 1)


def test_environment_says_where_and_how():
    env = timing.environment(CPU, timing.command_line(["model", "--out", "somewhere.json", "--quick"]))
    assert env["command"] == "python -m bench model --quick"
    for name in ("device", "date", "python", "torch", "triton", "transformers", "threads"):
        assert name in env
    assert "busy machine" in timing.busy({"load": 7.0, "cores": 2}) and timing.busy({"load": 0.5, "cores": 2}) == ""
    assert timing.result_file("model-base", CPU).parent == timing.RESULTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_bench(tiny, tmp_path, capsys, dtype):
    out = tmp_path / "record.json"
    assert main(["model", "--device", "cpu", "--model", "base", "--quick", "--dtype", dtype, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["environment"]["torch"] == torch.__version__ and record["dtype"] == dtype
    for row in record["rows"]:
        assert row["check"] and all(v["ok"] for v in row["check"])
        assert row["speed_up"] > 0 and math.isfinite(row["tflops"])
        assert ("sdpa" in row["ms"]) == ("attentions" not in row["outputs"])
    assert {v["name"] for v in record["rows"][1]["check"]} >= {"attentions", "hidden_states"}
    assert "ragged" in capsys.readouterr().out.splitlines()[-1]


def other_weight(ours):
    ours.encoder.layer[1].output.dense.weight.data.mul_(1.01)


def hooked(ours):
    ours.encoder.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize("change, said", [(other_weight, "last_hidden_state"), (hooked, "runs transformers' code")])
def test_model_bench_times_nothing_that_is_wrong_or_not_ours(tiny, tmp_path, capsys, monkeypatch, change, said):
    build = model.providers

    def changed(*args):
        models = build(*args)
        change(models["bert_fast"])
        return models

    monkeypatch.setattr(model, "providers", changed)
    out = tmp_path / "record.json"
    assert main(["model", "--device", "cpu", "--model", "base", "--out", str(out)]) == 1
    assert all(not row["ms"] for row in json.loads(out.read_text())["rows"])
    assert f"FAILED: {said}" in capsys.readouterr().out


def test_workloads_cover_what_is_claimed():
    for size in model.SIZES:
        names = [w.name for w in model.workloads(size, "cuda", quick=True)]
        for name in ("dense", "dense + attentions", "dense + hidden_states", "ragged, skip", "ragged, exact"):
            assert name in names
    inputs, lengths = model.inputs_of(model.Workload("ragged", 32, 128, "skip", low=8), 100, CPU)
    assert lengths.min() >= 8 and lengths.max() == 128
    assert torch.equal(inputs["attention_mask"].sum(1), lengths)


@pytest.mark.parametrize("op", kernels.OPS)
def test_kernel_bench(tiny, tmp_path, op):
    out = tmp_path / "record.json"
    assert main(["kernels", "--device", "cpu", "--op", op, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows and all(row["op"] == op and row["ok"] and row["bytes"] > 0 and row["rate"] > 0 for row in rows)


def test_kernel_check_notices(monkeypatch, tiny):
    case = next(kernels.cases("linear", kernels.SHAPES["cpu"][0], CPU, torch.float32))
    right = case.ours()
    assert kernels.check(case, torch.float32)[0] <= kernels.check(case, torch.float32)[1]
    for wrong in (right * 1.001, right.index_fill(0, torch.tensor([3]), float("nan"))):
        monkeypatch.setattr(kernels.Case, "ours", lambda self, wrong=wrong: wrong)
        error, limit = kernels.check(case, torch.float32)
        assert not error <= limit


def test_every_op_is_in_the_kernel_bench():
    assert set(doctor.OPS) == set(kernels.OPS)
    registered = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "bert_fast::" in n}
    assert registered <= set(kernels.OPS)
