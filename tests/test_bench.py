"""The benches: formulas against a counter, timing in turns, correctness before speed, readable records."""

from __future__ import annotations

import dataclasses
import json
import math

import bench_cuda
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bench import accuracy, kernel_cases, kernels, model, peers, records, timing, workloads
from bench.__main__ import main
from bench.workloads import Workload
from bert_fast import doctor

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64)
CPU = torch.device("cpu")
SHAPE = kernel_cases.Shape("tiny", 2, 16, 32, 48, 4, words=64)


def config(**sizes):
    return transformers.BertConfig(**TINY, **sizes)


@pytest.fixture
def tiny(monkeypatch):
    """The bench on a small model and small workloads, one call a block."""
    works = [
        Workload("dense", 3, 16),
        Workload("both", 2, 9, outputs=("attentions", "hidden_states")),
        Workload("uniform, skip", 4, 16, "uniform", "skip"),
        Workload("head", 4, 16, "lognormal", "auto", head=True),
    ]
    monkeypatch.setitem(workloads.SIZES, "base", TINY)
    monkeypatch.setattr(model, "workloads", lambda *args: works)
    monkeypatch.setattr(timing, "BLOCK_MS", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(timing, "GEMM_SIZE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 2**12, "cuda": 2**12})
    monkeypatch.setattr(kernel_cases, "SHAPES", {"cpu": (SHAPE,), "cuda": (SHAPE,)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_gpu_no_bench_on_one():
    assert timing.pick_device(None) == CPU
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        main(["kernels", "--device", "cuda"])


@pytest.mark.parametrize("head", [False, True])
def test_flops_are_those_of_the_counter(head):
    cls = transformers.BertForSequenceClassification if head else transformers.BertModel
    upstream = cls(config(attn_implementation="eager", num_labels=5)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        upstream(torch.zeros(3, 16, dtype=torch.long))
    found = workloads.flops(upstream.config, torch.full((3,), 16), labels=5 if head else 0)
    assert found == counter.get_total_flops()


def test_bytes_are_those_of_the_tensors():
    upstream = transformers.BertModel(config(attn_implementation="eager")).eval()
    work = Workload("both", 3, 16, outputs=("attentions", "hidden_states"))
    inputs, lengths = workloads.inputs_of(work, 64, CPU)
    with torch.no_grad():
        out = upstream(**inputs, output_attentions=True, output_hidden_states=True)
    weights = sum(p.numel() for part in (upstream.encoder, upstream.pooler) for p in part.parameters())
    written = sum(t.numel() for t in (*out.hidden_states, *out.attentions))
    assert workloads.least_bytes(upstream.config, work, lengths, 4) == 4 * (weights + 3 * 16 * 32 + written)


def test_lognormal_lengths():
    work = Workload("text", 4096, 512, "lognormal")
    lengths = workloads.lengths_of(work)
    assert torch.equal(lengths, workloads.lengths_of(work))
    assert lengths.min() >= 1 and lengths.max() == 512 and lengths[0] == 512
    assert lengths.median().item() == pytest.approx(512 * workloads.LOGNORMAL_MEDIAN, rel=0.05)
    inside = lengths[(lengths > 8) & (lengths < 512)].double().log()
    assert inside.std().item() == pytest.approx(workloads.LOGNORMAL_SIGMA, rel=0.15)  # the clipped tail is missing
    assert (lengths == 512).double().mean().item() == pytest.approx(0.042, abs=0.02)


def test_padded_inputs():
    inputs, lengths = workloads.inputs_of(Workload("ragged", 32, 128, "uniform", "skip"), 100, CPU)
    assert lengths.min() >= 1 and lengths[0] == 128 and len(lengths.unique()) > 10
    assert torch.equal(inputs["attention_mask"].sum(1), lengths)
    assert not (inputs["input_ids"] * (1 - inputs["attention_mask"])).any()


def test_workloads_are_those_that_are_promised():
    found = {size: {w.label for w in workloads.workloads(size, "cuda", quick=False)} for size in workloads.SIZES}
    main_ones = {"dense", "attentions", "hidden_states", "uniform, skip", "uniform, exact", "lognormal, skip"}
    assert found["base"] >= {f"{name} 32x512" for name in main_ones}
    assert found["base"] >= {f"dense {s}" for s in ("32x128", "8x128", "1x128", "1x64", "1x32", "4x2048")}
    assert "dense 32x512" in found["large"]
    assert found["minilm"] >= {"dense 256x128", "lognormal, skip 256x128", "dense 1x128", "dense 1x32"}
    for size in workloads.SIZES:
        for device in ("cuda", "cpu"):
            full, quick = (workloads.workloads(size, device, quick) for quick in (False, True))
            labels = [w.label for w in full]
            assert len(set(labels)) == len(labels)
            assert {w.label for w in quick} < set(labels) and quick[0].name == "dense"
            models = [w.model for w in full]
            assert sum(a != b for a, b in zip(models, models[1:], strict=False)) == len(set(models)) - 1, "loads twice"
    heads = [w for w in workloads.workloads("base", "cuda", quick=False) if w.head]
    assert heads and all(w.padding == "auto" and w.lengths == "uniform" for w in heads)
    assert {w.model[1] for w in workloads.workloads("base", "cuda", quick=False)} == {512, 2048}


def test_every_mode_of_compile_is_tried_where_it_makes_sense():
    small, large = Workload("dense", 1, 128), Workload("dense", 32, 512)
    gpu = torch.device("cuda")
    assert set(peers.modes(small, gpu, quick=False)) == {"default", "reduce-overhead", "max-autotune"}
    assert peers.modes(large, gpu, quick=False) == ("default", "max-autotune")
    assert peers.modes(small, gpu, quick=True) == ("reduce-overhead",)
    assert peers.modes(large, gpu, quick=True) == peers.modes(small, CPU, quick=False) == ("default",)


def test_timing_takes_turns(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "_block", lambda call, count, device: order.append(call()) or 5.0)
    times = timing.in_turns({name: lambda n=name: n for name in "abc"}, CPU, rounds=3)
    assert "".join(order) == "abc" + "abcbcacab"  # one block each to size them, then the rounds
    assert times["a"] == timing.Timing(5.0, 5.0, 5.0, 3)
    spread = timing.Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (spread.q20, spread.median, spread.q80) == (2.0, 3.5, 5.0)
    assert timing.Timing.of([4.0]) == timing.Timing(4.0, 4.0, 4.0, 1)


def test_ceilings_are_the_higher_ones():
    found = timing.higher({"copy": 1.0, "gemm": 4.0, "gemm_size": 8}, {"copy": 2.0, "gemm": 3.0, "gemm_size": 8})
    assert found == {"copy": 2.0, "gemm": 4.0, "gemm_size": 8}


def test_a_peer_that_fails_is_noted():
    def fails():
        raise RuntimeError("no such\nkernel")

    problems = {}
    times = timing.in_turns({"bad": fails, "good": lambda: None}, CPU, rounds=2, problems=problems)
    assert set(times) == {"good"} and problems == {"bad": "RuntimeError: no such kernel"}
    with pytest.raises(RuntimeError, match="no such"):
        timing.in_turns({"bad": fails}, CPU, rounds=2)


def test_environment_says_where_and_how():
    words = ["model", "--out", "somewhere.json", "--quick", "--record=x"]
    env = records.environment(CPU, records.command_line(words))
    assert env["command"] == "python -m bench model --quick"
    for name in ("device", "date", "python", "torch", "triton", "transformers", "threads"):
        assert name in env
    assert "busy machine" in records.busy({"load": 7.0, "cores": 2}) and records.busy({"load": 0.5, "cores": 2}) == ""
    assert records.result_file("model-base", CPU).parent == records.RESULTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_bench(tiny, tmp_path, capsys, dtype):
    out = tmp_path / "record.json"
    assert main(["model", "--device", "cpu", "--model", "base", "--quick", "--dtype", dtype, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["environment"]["torch"] == torch.__version__ and record["dtype"] == dtype
    assert record["environment"]["load_after"] >= 0
    assert (record["schema"], record["kind"]) == (records.SCHEMA, "model") and record["ceilings"]["gemm"] > 0
    for row in record["rows"]:
        assert row["check"] and all(v["ok"] for v in row["check"])
        assert row["speed_up"] > 0 and math.isfinite(row["rate"])
        assert row["share"] == pytest.approx(
            row["flops"] / row["ms"]["bert_fast"]["median"] * 1e3 / record["ceilings"]["gemm"]
        )
        assert ("sdpa" in row["ms"]) == ("attentions" not in row["outputs"])
        assert row["best_peer"] in row["ms"] and row["best_peer"] != "bert_fast"
    assert {v["name"] for v in record["rows"][1]["check"]} >= {"attentions", "hidden_states"}
    assert [v["name"] for v in record["rows"][3]["check"]] == ["logits"]
    lines = capsys.readouterr().out.splitlines()
    assert "head 4x16" in lines[-3] and "higher of before and after" in lines[-1]


def test_model_bench_runs_what_is_asked_for(tiny, tmp_path, capsys):
    out = tmp_path / "record.json"
    assert main(["model", "--device", "cpu", "--model", "base", "--only", "skip", "--out", str(out)]) == 0
    assert [r["workload"] for r in json.loads(out.read_text())["rows"]] == ["uniform, skip 4x16"]
    assert main(["model", "--device", "cpu", "--model", "base", "--only", "nothing", "--out", str(out)]) == 2
    assert "there are: dense 3x16, both 2x9" in capsys.readouterr().out


def other_weight(ours):
    ours.encoder.layer[1].output.dense.weight.data.mul_(1.01)


def hooked(ours):
    ours.encoder.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize("change, said", [(other_weight, "last_hidden_state"), (hooked, "runs transformers' code")])
def test_model_bench_times_nothing_that_is_wrong_or_not_ours(tiny, tmp_path, capsys, monkeypatch, change, said):
    build = peers.load_all

    def changed(*args):
        models = build(*args)
        change(models["bert_fast"])
        return models

    monkeypatch.setattr(peers, "load_all", changed)
    out = tmp_path / "record.json"
    command = ["model", "--device", "cpu", "--model", "base", "--only", "dense", "--out", str(out)]
    assert main(command) == 1
    assert all(not row["ms"] and not row["ok"] for row in json.loads(out.read_text())["rows"])
    assert f"FAILED: {said}" in capsys.readouterr().out


def test_cuda_path_of_the_model_bench(tiny, tmp_path, capsys):
    """Only that it runs through, each mode of torch.compile once, one of them broken."""
    tried = []

    def compile(model, mode, dynamic):
        tried.append(mode)
        if mode == "max-autotune":
            raise RuntimeError("made up")
        return model

    out = tmp_path / "record.json"
    with bench_cuda.pretended(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile)
        assert main(["model", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["dtype"] == "bfloat16" and record["environment"]["capability"] == "9.0"
    for row in record["rows"]:
        assert set(row["ms"]) >= {"eager", "compile/default", "compile/reduce-overhead", "bert_fast"}
        assert "made up" in row["notes"]["compile/max-autotune"] and row["memory_mib"]["bert_fast"] == 1.0
        assert set(row["host_ms"]) == set(row["gpu_ms"]) == {"bert_fast"}
    assert tried[:3] == ["reduce-overhead", "default", "max-autotune"] and len(tried) == 3 * len(record["rows"])
    assert "torch.compile:" in capsys.readouterr().out


def test_compile_budget(tiny, tmp_path):
    out = tmp_path / "record.json"
    with bench_cuda.pretended():
        assert main(["model", "--compile-budget", "0", "--only", "dense", "--out", str(out)]) == 0
    row = json.loads(out.read_text())["rows"][0]
    assert set(row["ms"]) == {"eager", "sdpa", "bert_fast"} and "was spent" in row["notes"]["compile/default"]


def test_cuda_path_of_the_kernel_bench(tiny, tmp_path):
    out = tmp_path / "record.json"
    with bench_cuda.pretended():
        assert main(["kernels", "--op", "attention", "--op", "residual_layer_norm", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    for row in rows:
        tried = set(row["ms"]) | set(row["notes"])
        assert tried >= ({"torch"} if "probs" in row["workload"] or row["op"] != "attention" else {"cudnn", "flash"})


@pytest.mark.parametrize("op", kernel_cases.OPS)
def test_kernel_bench(tiny, tmp_path, op):
    out = tmp_path / "record.json"
    assert main(["kernels", "--device", "cpu", "--op", op, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    rows = record["rows"]
    assert record["kind"] == "kernels"
    assert rows and all(row["op"] == op and row["ok"] and row["bytes"] > 0 and row["rate"] > 0 for row in rows)


def test_kernel_flops_are_those_of_the_counter():
    for op, inner_products in (("linear", 1), ("qkv_linear", 3), ("pool", 1)):
        case = next(kernel_cases.cases(op, SHAPE, CPU, torch.float32))
        with FlopCounterMode(display=False) as counter:
            case.peers["torch"]()
        assert case.flops == counter.get_total_flops(), (op, inner_products)
    case = next(kernel_cases.cases("attention", SHAPE, CPU, torch.float32))
    with FlopCounterMode(display=False) as counter:
        case.peers["torch"]()
    assert case.flops == counter.get_total_flops()


def test_peers_of_a_case_compute_the_same():
    for op in kernel_cases.OPS:
        for case in kernel_cases.cases(op, SHAPE, CPU, torch.float32):
            want = kernels_outputs(case.ours())
            for name, peer in case.peers.items():
                found = kernels_outputs(peer())
                if op == "qkv_linear":
                    found = [torch.cat(found, 1)]
                if op == "embed_layer_norm":
                    found = [found[0].flatten(0, 1)]
                if "ragged" in case.shape:  # rows of ours are packed
                    continue
                for a, b in zip(want, found, strict=False):
                    torch.testing.assert_close(a, b.view_as(a), rtol=1e-4, atol=1e-5, msg=f"{case.label}: {name}")


def kernels_outputs(found):
    return [t for t in (found if isinstance(found, (tuple, list)) else (found,)) if t.numel()]


def test_kernel_check_notices(monkeypatch, tiny):
    case = next(kernel_cases.cases("linear", SHAPE, CPU, torch.float32))
    right = case.ours()
    error, limit = kernels.check(case, torch.float32)
    assert error <= limit
    unwritten = dataclasses.replace(case)
    for wrong in (right * 1.001, right.index_fill(0, torch.tensor([3]), float("nan"))):
        monkeypatch.setattr(kernel_cases.Case, "ours", lambda self, wrong=wrong: wrong)
        error, limit = kernels.check(unwritten, torch.float32)
        assert not error <= limit


def test_poison_shows_what_nobody_wrote():
    with accuracy.poisoned():
        assert torch.empty(4).isnan().all() and torch.zeros(2, 2).new_empty(3).isnan().all()


def test_every_op_is_in_the_kernel_bench():
    assert set(doctor.OPS) <= set(kernel_cases.OPS)
    registered = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "bert_fast::" in n}
    assert registered <= set(kernel_cases.OPS)
