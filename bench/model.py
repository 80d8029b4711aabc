"""The whole model, forward under no_grad: eager, SDPA, torch.compile and bert_fast in one process.

Correctness comes first, by the rule of `bert_fast.demo.judge`; a workload that fails it is not timed. FLOPs are those
of real tokens: per layer n (8 H^2 + 4 H I) + 4 H sum_b n_b^2, and 2 B H^2 for the pooler, with n = sum_b n_b. A padded
peer spends more than that; its rate here is what it delivers.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

import bert_fast
from bert_fast.demo import DemoError, Verdict, collect, judge, kept_positions, minilm_dir, zero_dropped
from bert_fast.explain import explanation

from . import timing

SIZES = {  # base and large: bert-base-uncased and bert-large-uncased, random weights; minilm: the packaged weights
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "minilm": {},
}
VERSIONS = ("torch", "triton", "transformers")
GRAPH_ROWS = 8192  # torch.compile: reduce-overhead up to here (launch-bound), its default mode above
COMPILE_BUDGET_S = 120.0  # --quick: no further torch.compile once this much time went into it


Models = dict[str, torch.nn.Module]


@dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    seq: int
    padding: str = "exact"
    outputs: tuple[str, ...] = ()  # of "attentions", "hidden_states"
    low: int | None = None  # lengths uniform in low..seq, None: every sequence is full


def workloads(size: str, device: str, quick: bool) -> list[Workload]:
    if device == "cpu":
        batch, seq, low = 32, 128, 8
    else:
        batch, seq, low = {"minilm": (256, 128, 1)}.get(size, (32, 512, 1))
    dense = Workload("dense", batch, seq)
    skip = Workload("ragged, skip", batch, seq, "skip", low=low)
    attentions = Workload("dense + attentions", batch, seq, outputs=("attentions",))
    hidden = Workload("dense + hidden_states", batch, seq, outputs=("hidden_states",))
    exact = Workload("ragged, exact", batch, seq, low=low)
    if device == "cpu":
        return [dense, skip] if quick else [dense, attentions, skip, exact, hidden]
    small = [Workload("dense", b, s) for b, s in ((1, 32), (1, 128), (8, 128), (32, 128))]
    return [dense, attentions, skip, exact, *(small[1:2] if quick else small), hidden]


def inputs_of(work: Workload, vocab: int, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """-> the forward's arguments and the (B,) lengths; one sequence has the full length, as after padding=True.

    A dense workload passes no mask: torch.compile cannot see that a mask is all ones and would pay for it.
    """
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (work.batch, work.seq), generator=g)
    lengths = torch.full((work.batch,), work.seq)
    if work.low is None:
        return {"input_ids": ids.to(device)}, lengths
    lengths = torch.randint(work.low, work.seq + 1, (work.batch,), generator=g)
    lengths[0] = work.seq
    mask = (torch.arange(work.seq) < lengths[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}, lengths


def flops(config: transformers.BertConfig, lengths: torch.Tensor) -> float:
    h, inner, n = config.hidden_size, config.intermediate_size, lengths.sum().item()
    layer = n * (8 * h * h + 4 * h * inner) + 4 * h * lengths.square().sum().item()
    return config.num_hidden_layers * layer + 2 * len(lengths) * h * h


def load(size: str, cls: type, device: torch.device, dtype: torch.dtype, **options) -> torch.nn.Module:
    """A model of `cls` with the size's weights: the same ones for every class."""
    if size == "minilm":
        model = cls.from_pretrained(str(minilm_dir()), dtype=dtype, **options)
    else:
        torch.manual_seed(0)
        model = cls._from_config(transformers.BertConfig(**SIZES[size]), dtype=dtype, **options)
    return model.eval().to(device)


def providers(size: str, device: torch.device, dtype: torch.dtype) -> Models:
    return {
        "eager": load(size, transformers.BertModel, device, dtype, attn_implementation="eager"),
        "sdpa": load(size, transformers.BertModel, device, dtype, attn_implementation="sdpa"),
        "bert_fast": load(size, bert_fast.BertModel, device, dtype),
    }


def compiled(models: Models, work: Workload) -> Callable[..., object]:
    """torch.compile over SDPA, over eager where attentions are asked for (SDPA has none)."""
    model = models["eager" if "attentions" in work.outputs else "sdpa"]
    mode = "reduce-overhead" if work.batch * work.seq <= GRAPH_ROWS else "default"
    torch.compiler.reset()
    run = torch.compile(model, mode=mode, dynamic=False)

    def call(**kwargs: object) -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return run(**kwargs)

    return call


def upstream_reason(model: torch.nn.Module, inputs: dict, work: Workload) -> str | None:
    """Why bert_fast would run transformers' own code here: then there is nothing of ours to check or to time."""
    told = explanation(model, **inputs, **{f"output_{name}": True for name in work.outputs})
    return told.reason if told.tier != "encoder" else None


def check(models: Models, work: Workload, inputs: dict, truth_model: torch.nn.Module | None) -> list[Verdict]:
    """The rule of bert_fast.demo over the outputs the workload asks for."""
    kept = kept_positions(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])), work.padding)
    wanted = {f"output_{name}": True for name in work.outputs}
    ours = collect(models["bert_fast"](**inputs, **wanted))
    eager = zero_dropped(collect(models["eager"](**inputs, **wanted)), kept)
    if truth_model is not None:
        return judge(ours, eager, truth=zero_dropped(collect(truth_model(**inputs, **wanted)), kept))
    hidden = {k: v for k, v in wanted.items() if k != "output_attentions"}
    return judge(ours, eager, zero_dropped(collect(models["sdpa"](**inputs, **hidden)), kept))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--model", choices=tuple(SIZES), help="default: base on cuda, minilm on cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda")
    parser.add_argument("--quick", action="store_true", help="fewer workloads and rounds")
    parser.add_argument("--compile", action="store_true", help="torch.compile on cpu too (it always runs on cuda)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<device>-<model>-<date>.json")


def run(args: argparse.Namespace) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = timing.pick_device(args.device)
    on_cpu = device.type == "cpu"
    size = args.model or ("minilm" if on_cpu else "base")
    dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    out = args.out or timing.result_file(f"model-{size}-{str(dtype)[6:]}", device)
    env = timing.environment(device, timing.command_line())
    print(f"{size}, {str(dtype)[6:]}, {env['device']}, " + ", ".join(f"{n} {env[n]}" for n in VERSIONS))
    print(f"record: {out.name}\n{timing.busy(env)}", end="")
    try:
        models = providers(size, device, dtype)
    except DemoError as problem:
        print(f"bench: {problem}")
        return 2
    config = models["eager"].config
    # fp32 is held against eager fp32 itself; half types against float64
    truth_model = None if dtype == torch.float32 else copy.deepcopy(models["eager"]).double()
    works = workloads(size, device.type, args.quick)
    with_compile = args.compile or not on_cpu
    names = ["eager", "sdpa", *(["compile"] if with_compile else []), "bert_fast"]
    columns = "".join(f"{name:>11}" for name in names)
    print(f"\n{'workload':<22}{'shape':>8}{columns}   best peer  speed-up  TFLOP/s  check")
    rows, failed, compile_s, last, peer = [], False, 0.0, None, None
    rounds = (7 if args.quick else 15) if on_cpu else (10 if args.quick else 20)
    with torch.no_grad(), timing.progress(len(works), "bench model") as step:
        for work in works:
            inputs, lengths = inputs_of(work, config.vocab_size, device)
            models["bert_fast"].set_padding(work.padding)
            reason = upstream_reason(models["bert_fast"], inputs, work)
            verdicts = [] if reason else check(models, work, inputs, truth_model)
            good = not reason and all(v.ok for v in verdicts)
            failed |= not good
            wanted = {f"output_{name}": True for name in work.outputs}
            chosen = {n: m for n, m in models.items() if not (n == "sdpa" and "attentions" in work.outputs)}
            calls = {n: lambda m=m, i=inputs, w=wanted: m(**i, **w) for n, m in chosen.items()}
            notes = {"bert_fast": f"runs transformers' code: {reason}"} if reason else {}
            if args.quick and compile_s > COMPILE_BUDGET_S:
                notes["compile"] = "not run: the time that --quick gives torch.compile was spent"
            elif with_compile and good:
                start = time.perf_counter()
                if last != (last := (work.batch, work.seq, work.low, work.outputs)):
                    peer = compiled(models, work)
                try:
                    peer(**inputs, **wanted)
                    calls["compile"] = lambda i=inputs, w=wanted, f=peer: f(**i, **w)
                except Exception as problem:  # a peer that cannot compile is a fact to print, not the bench's end
                    notes["compile"] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
                compile_s += time.perf_counter() - start
            times = timing.in_turns(calls, device, rounds) if good else {}
            rows.append(row(work, times, verdicts, flops(config, lengths), notes))
            show(rows[-1], names)
            step()
    timing.save(out, env, rows, model=size, dtype=str(dtype)[6:])
    return int(failed)


def row(work: Workload, times: dict, verdicts: list, work_flops: float, notes: dict) -> dict[str, object]:
    peers = {n: t.median for n, t in times.items() if n != "bert_fast"}
    best = min(peers, key=peers.get, default=None)
    ours = times["bert_fast"].median if times else None
    return {
        **asdict(work),
        "check": [{**asdict(v), "ok": v.ok} for v in verdicts],
        "ms": {n: asdict(t) for n, t in times.items()},
        "best_peer": best,
        "speed_up": peers[best] / ours if best and ours else None,
        "flops": work_flops,
        "tflops": work_flops / ours / 1e9 if ours else None,
        "notes": notes,
    }


def show(line: dict, names: list[str]) -> None:
    text = f"{line['name']:<22}{line['batch']:>4}x{line['seq']:<3}"
    for name in names:
        text += f"{line['ms'][name]['median']:>11.3f}" if name in line["ms"] else f"{'-':>11}"
    if line["speed_up"]:
        text += f"   {line['best_peer']:<9}  {line['speed_up']:>7.2f}x  {line['tflops']:>7.3g}  ok"
        text += "  (without compile)" if "compile" in line["notes"] else ""
    else:
        bad = [f"{v['name']} {v['error']:.2e} > {v['limit']:.2e}" for v in line["check"] if not v["ok"]]
        text += "   FAILED: " + "; ".join([*line["notes"].values(), *bad])
    print(text, flush=True)
