"""Made-up records for the tests of the bench: the shape of real ones, numbers of no machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import kernel_cases
from bench.records import OURS, SCHEMA
from bench.workloads import SIZES, flops, least_bytes, lengths_of, workloads

CEILINGS = {"copy": 3.0e12, "gemm": 7.0e14, "gemm_size": 8192}
ENVIRONMENT = {"device": "Made-up GPU", "command": "python -m bench model", "date": "2000-01-01T00:00:00+00:00"}
ENVIRONMENT |= {"python": "3.12", "system": "Linux", "torch": "2.11", "triton": "3.6", "transformers": "5"}


def timing(median: float, spread: float = 0.02) -> dict[str, float]:
    return {"median": median, "q20": median * (1 - spread), "q80": median * (1 + spread), "rounds": 20}


def finish(row: dict[str, Any], times: dict[str, float]) -> dict[str, Any]:
    best = min((n for n in times if n != OURS), key=times.__getitem__, default=None)
    row |= {"ms": {n: timing(t) for n, t in times.items()}, "best_peer": best, "ok": True, "notes": {}}
    row["speed_up"] = times[best] / times[OURS] if best else None
    return row


def model_record(size: str = "base", slower: float = 1.0) -> dict[str, Any]:
    """slower: factor on bert_fast's times."""
    config, rows = transformers.BertConfig(**SIZES[size]), []
    for i, work in enumerate(workloads(size, "cuda", quick=False)):
        lengths = lengths_of(work)
        work_flops, moved = flops(config, lengths), least_bytes(config, work, lengths, 2)
        ours = (0.3 + work_flops / 5e11) * slower
        times = {"eager": ours * 2.5 + 3, "sdpa": ours * 1.7 + 1, OURS: ours}
        for mode, factor in (("default", 1.25), ("reduce-overhead", 1.2), ("max-autotune", 1.3)):
            if mode == "reduce-overhead" and work.batch * work.seq > 8192:
                continue
            times[f"compile/{mode}"] = ours * (factor + 0.07 * (i % 4))
        if "attentions" in work.outputs:
            del times["sdpa"]
        row = {"workload": work.label, "name": work.name, "batch": work.batch, "seq": work.seq, "check": []}
        row |= {"rows": work.batch * work.seq, "flops": work_flops, "bytes": moved, "outputs": list(work.outputs)}
        row |= {"rate": work_flops / ours * 1e3, "share": work_flops / ours * 1e3 / CEILINGS["gemm"]}
        row["memory_mib"] = {n: 100.0 * (i + 1) for n in times}
        rows.append(finish(row, times))
    rows[1]["notes"] = {"compile/max-autotune": "RuntimeError: <made up> & long"}
    record = {"schema": SCHEMA, "kind": "model", "environment": ENVIRONMENT, "model": size, "dtype": "bfloat16"}
    return record | {"ceilings": CEILINGS, "rows": rows}


def kernels_record() -> dict[str, Any]:
    """The ops at shapes that bear a GPU run's names, smaller; tensors stay on the meta device."""
    rows = []
    meta = torch.device("meta")
    for op in kernel_cases.OPS:
        if op in ("pack", "attention", "first_rows", "first_token_attention"):  # these look into their tensors
            continue
        for i, shape in enumerate(kernel_cases.SHAPES["cuda"]):
            small = dataclasses.replace(shape, batch=max(1, shape.batch // 32), words=64)
            for case in kernel_cases.cases(op, small, meta, torch.bfloat16):
                bound = "gemm" if case.flops / case.bytes > CEILINGS["gemm"] / CEILINGS["copy"] else "copy"
                best = max(case.flops / CEILINGS["gemm"], case.bytes / CEILINGS["copy"]) * 1e3
                ours = best * (1.2 + 0.3 * i) + 0.002
                row = {"workload": case.label, "op": op, "shape": case.shape, "bytes": case.bytes, "flops": case.flops}
                row |= {"bound": bound, "rate": (case.flops if bound == "gemm" else case.bytes) / ours * 1e3}
                row["share"] = row["rate"] / CEILINGS[bound]
                rows.append(finish(row, {"torch": ours * (0.9 + 0.3 * i), OURS: ours}))
    record = {"schema": SCHEMA, "kind": "kernels", "environment": ENVIRONMENT, "dtype": "bfloat16"}
    return record | {"ceilings": CEILINGS, "rows": rows}


def write(path: Path, record: dict[str, Any]) -> Path:
    path.write_text(json.dumps(record))
    return path
