"""Each op at BERT's shapes: against torch's composite (as transformers' eager writes it), SDPA's backends, Liger.

An op is held against `<op>_ref` in float64 before it is timed. Times on a GPU are of CUDA-graph replays, so kernels and
not launches; inputs that fit in L2 may be read from there. The ceilings are measured in the same run; a kernel's share
is of the one that bounds it, by the formulas in kernel_cases.py. A peer that fails is noted.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import kernel_cases, records, timing
from .accuracy import error_and_limit, poisoned
from .kernel_cases import OPS, Case, cases
from .progress import Progress
from .records import OURS


def check(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """-> (error, limit) of the case's outputs; integer outputs must be equal."""

    def cast(x: Any) -> Any:
        if isinstance(x, list):
            return [cast(each) for each in x]
        return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

    def outputs(found: Any) -> list[torch.Tensor]:
        found = found if isinstance(found, tuple) else (found,)
        T = case.args[0].shape[0]
        used = [t if case.rows is None else t[: case.rows] if t.shape[0] == T else t[..., : case.rows] for t in found]
        return [t for t in used if t.numel()]

    reference = case.function("_ref")
    with poisoned():
        ours, low = outputs(case.ours()), outputs(reference(*case.args))
    return error_and_limit(ours, low, outputs(reference(*map(cast, case.args))), dtype)


def measure(case: Case, device: torch.device, dtype: torch.dtype, top: dict[str, float]) -> dict[str, Any]:
    notes: dict[str, str] = {}
    line: dict[str, Any] = dict(workload=case.label, op=case.op, shape=case.shape, bytes=case.bytes, flops=case.flops)
    line |= dict(ok=False, error=None, limit=None, ms={}, best_peer=None, speed_up=None, rate=None, share=None)
    line |= dict(bound=None, notes=notes)
    try:
        line["error"], line["limit"] = check(case, dtype)
    except torch.OutOfMemoryError as problem:
        notes[OURS] = f"not checked: {timing.one_line(problem)}"
        return line
    line["ok"] = line["error"] <= line["limit"]
    if not line["ok"]:
        return line
    times = timing.in_turns({**case.peers, OURS: case.ours}, device, rounds=9, graph=True, problems=notes)
    line["ms"] = {name: asdict(t) for name, t in times.items()}
    line["ok"] = OURS in times
    if not line["ok"]:
        return line
    peers = {name: t.median for name, t in times.items() if name != OURS}
    line["best_peer"] = min(peers, key=peers.__getitem__, default=None)
    if peers:
        line["speed_up"] = peers[line["best_peer"]] / times[OURS].median
    compute_bound = case.flops / case.bytes > top["gemm"] / top["copy"]
    line["bound"] = "gemm" if compute_bound else "copy"
    line["rate"] = (case.flops if compute_bound else case.bytes) / times[OURS].median * 1e3
    line["share"] = line["rate"] / top[line["bound"]]
    return line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, action="append", help="only this op; repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<device>-kernels-<date>.json")


def run(args: argparse.Namespace) -> int:
    device = timing.pick_device(args.device)
    on_cpu = device.type == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    out = args.out or records.result_file(f"kernels-{str(dtype)[6:]}", device)
    env = records.environment(device, records.command_line())
    print(f"{str(dtype)[6:]}, {env['device']}, torch {env['torch']}, triton {env['triton']}")
    print(f"record: {out.name}\n{records.busy(env)}", end="")
    top = timing.ceilings(device, dtype)
    print(timing.say_ceilings(top))
    names = ["torch", "sdpa", *([] if on_cpu else ["cudnn", "flash"])]
    if not on_cpu and env["liger-kernel"]:
        names.append("liger")
    names.append(OURS)
    columns = "".join(f"{name:>11}" for name in names)
    print(f"\n{'op (times in us)':<22}{'shape':<26}{columns}           rate  share  speed-up  check")
    shapes = kernel_cases.SHAPES[device.type][: 1 if args.quick else None]
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), Progress(len(args.op or OPS) * len(shapes), "bench kernels") as bar:
        for op in args.op or OPS:
            for shape in shapes:
                bar.at(f"{op} {shape.name}")
                for case in cases(op, shape, device, dtype):
                    rows.append(measure(case, device, dtype, top))
                    bar.say(shown(rows[-1], names))
                    records.save(out, "kernels", env, rows, dtype=str(dtype)[6:], ceilings=top)
                bar.step()
        records.add_load_after(env)
        top = timing.higher(top, timing.ceilings(device, dtype))
        for line in rows:
            line["share"] = line["rate"] / top[line["bound"]] if line["rate"] else None
        records.save(out, "kernels", env, rows, dtype=str(dtype)[6:], ceilings=top)
        bar.say(f"\n{timing.say_ceilings(top)}, the higher of before and after; shares in the record are of these")
    return int(not all(row["ok"] for row in rows))


def shown(line: dict[str, Any], names: list[str]) -> str:
    text = f"{line['op']:<22}{line['shape']:<26}"
    for name in names:
        text += f"{line['ms'][name]['median'] * 1e3:>11.1f}" if name in line["ms"] else f"{'-':>11}"
    if line["ok"]:
        rate = timing.quantity(line["rate"], "FLOP/s" if line["bound"] == "gemm" else "B/s")
        text += f"{rate:>15}{line['share']:>7.0%}"
        text += f"{line['speed_up']:>9.2f}x  ok" if line["speed_up"] else f"{'-':>10}  ok"
    elif line["notes"].get(OURS):
        text += "   FAILED"
    else:
        text += f"   FAILED: error {line['error']:.2e} > {line['limit']:.2e}"
    return "\n".join([text, *(f"    {name}: {why}" for name, why in line["notes"].items())])
