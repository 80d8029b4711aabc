"""The whole model, forward under no_grad: eager, SDPA, torch.compile in its modes and bert_fast in one process.

What runs is in workloads.py, against whom in peers.py, how a row comes about in forward.py. Work is counted by formula;
`share` is of the matrix product measured in the same run. The record is saved after every row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers

from bert_fast.demo import DemoError

from . import peers, records, timing
from .forward import Session, measure
from .peers import COMPILE
from .progress import Progress
from .records import FOLDED, ONE_LAUNCH, OURS
from .workloads import SIZES, workloads

COMPILE_BUDGET_S = {True: 180.0, False: 1500.0}  # quick -> seconds after which torch.compile is not tried again
VERSIONS = ("torch", "triton", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--model", choices=tuple(SIZES), help="default: base on cuda, minilm on cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda")
    parser.add_argument("--quick", action="store_true", help="few workloads, fewer rounds, one mode of torch.compile")
    parser.add_argument("--only", metavar="TEXT", help='workloads whose name has this in it, such as "32x512"')
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile too (default: on cuda, not on cpu)"
    )
    parser.add_argument("--folded", action="store_true", help="also with LayerNorm folded, where no graph replays")
    parser.add_argument("--one-launch", action="store_true", help="also with all layers in one launch, for few rows")
    parser.add_argument("--compile-budget", type=float, metavar="SECONDS", help="for all of torch.compile together")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<device>-<model>-<date>.json")


def run(args: argparse.Namespace) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = timing.pick_device(args.device)
    on_cpu = device.type == "cpu"
    size = args.model or ("minilm" if on_cpu else "base")
    dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    works = [w for w in workloads(size, device.type, args.quick) if not args.only or args.only in w.label]
    if not works:
        known = ", ".join(w.label for w in workloads(size, device.type, args.quick))
        print(f"bench: no workload has {args.only!r} in its name; there are: {known}")
        return 2
    out = args.out or records.result_file(f"model-{size}-{str(dtype)[6:]}", device)
    env = records.environment(device, records.command_line())
    print(f"{size}, {str(dtype)[6:]}, {env['device']}, " + ", ".join(f"{n} {env[n]}" for n in VERSIONS))
    print(f"record: {out.name}\n{records.busy(env)}", end="", flush=True)
    with_compile = args.compile if args.compile is not None else not on_cpu
    budget = args.compile_budget if args.compile_budget is not None else COMPILE_BUDGET_S[args.quick]
    tried = {COMPILE + mode: None for w in works for mode in peers.modes(w, device, args.quick) if with_compile}
    variants = tuple(name for name, asked in ((FOLDED, args.folded), (ONE_LAUNCH, args.one_launch)) if asked)
    names = ["eager", "sdpa", *tried, *variants, OURS]
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), Progress(len(works), "bench model") as bar:
        top = timing.ceilings(device, dtype)
        bar.say(timing.say_ceilings(top) + "\n\n" + heading(names))
        left = budget if with_compile else float("-inf")
        session = Session(size, device, dtype, args.quick, left, top, bar, {}, variants)
        loaded = None
        for work in works:
            if loaded != (loaded := work.model):
                try:
                    session.load(work)
                except DemoError as problem:
                    bar.say(f"bench: {problem}")
                    return 2
            rows.append(measure(session, work))
            bar.say(shown(rows[-1], names))
            records.save(out, "model", env, rows, model=size, dtype=str(dtype)[6:], ceilings=top)
            bar.step()
        session.free()
        records.add_load_after(env)
        top = timing.higher(top, timing.ceilings(device, dtype))
        for line in rows:
            line["share"] = line["rate"] / top["gemm"] if line["rate"] else None
        records.save(out, "model", env, rows, model=size, dtype=str(dtype)[6:], ceilings=top)
        bar.say(f"\n{timing.say_ceilings(top)}, the higher of before and after; shares in the record are of these")
    return int(not all(r["ok"] for r in rows))


def width(name: str) -> int:
    return max(11, len(name.removeprefix(COMPILE)) + 2)


def heading(names: list[str]) -> str:
    columns = "".join(f"{name.removeprefix(COMPILE):>{width(name)}}" for name in names)
    line = f"{'workload (times in ms)':<34}{columns}  {'best peer':<24}speed-up  TFLOP/s  share  check"
    modes = [name for name in names if name.startswith(COMPILE)]
    if not modes:
        return line
    before = 34 + sum(width(name) for name in names[: names.index(modes[0])])
    return " " * before + "torch.compile:".rjust(width(modes[0])) + "\n" + line


def shown(line: dict[str, Any], names: list[str]) -> str:
    text = f"{line['workload']:<34}"
    for name in names:
        cell = f"{line['ms'][name]['median']:.3f}" if name in line["ms"] else "-"
        text += f"{cell:>{width(name)}}"
    if line["ok"]:
        gain = f"{line['speed_up']:.2f}x" if line["speed_up"] else "-"
        text += f"  {line['best_peer'] or '-':<24}{gain:>8}{line['rate'] / 1e12:>9.3g}{line['share']:>7.0%}  ok"
    else:
        bad = [f"{v['name']} {v['error']:.2e} > {v['limit']:.2e}" for v in line["check"] if not v["ok"]]
        text += "   FAILED: " + "; ".join([*bad, *filter(None, [line["notes"].get(OURS)])])
    if records.host_counts(line):
        parts = [f"{n} {ms:.3f} / {timing.milliseconds(line['gpu_ms'][n])}" for n, ms in line["host_ms"].items()]
        text += f"\n    host / GPU alone: {', '.join(parts)}"
    return "\n".join([text, *(f"    {name}: {why}" for name, why in line["notes"].items() if name != OURS)])
