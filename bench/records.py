"""The JSON record of a run: what a number needs beside it to be read later.

{"schema", "kind", "environment", ...what the kind adds..., "rows"}; kind is "model", "kernels" or "tune". A row has a
`workload`, its name within the file, and `ms`: provider -> median, 20 % and 80 % quantiles, rounds. A row of "model"
has `host_ms` and `gpu_ms` too, of ours on a GPU: what enqueueing a call takes, and the GPU when it waits for no host.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
OURS = "bert_fast"  # the provider that is this package's
FOLDED = "folded"  # the same with LayerNorm folded into the products (bert_fast/folded.py)
ONE_LAUNCH = "one launch"  # the same with all layers in one launch (bert_fast/one_launch.py)
Record = dict[str, Any]


class RecordError(Exception):
    """A file that cannot be used; the message says why."""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def environment(device: torch.device, command: str) -> Record:
    record: Record = {
        "device": device_name(device),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("triton", "transformers", "bert-fast", "liger-kernel")},
    }
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        record |= {
            "capability": f"{chip.major}.{chip.minor}",
            "multiprocessors": chip.multi_processor_count,
            "memory_gib": round(chip.total_memory / 2**30, 1),
            "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
        }
    else:
        record |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
        if hasattr(os, "getloadavg"):
            record["load"] = round(os.getloadavg()[0], 2)
    return record


def add_load_after(env: Record) -> None:
    """The load at the run's end, its own included: others may have come after the start."""
    if "load" in env:
        env["load_after"] = round(os.getloadavg()[0], 2)


def busy(env: Record) -> str:
    """A line for the reader when others are using the cores, else nothing."""
    load, cores = env.get("load"), env.get("cores")
    if not isinstance(load, float) or not isinstance(cores, int) or load < cores / 2:
        return ""
    return f"note: load {load} on {cores} cores before the first call; these times are of a busy machine\n"


def command_line(argv: list[str] | None = None) -> str:
    """The command, less `--out FILE` and `--record FILE`: where things went is no part of it."""
    words = list(sys.argv[1:] if argv is None else argv)
    for option in ("--out", "--record"):
        while option in words:
            at = words.index(option)
            del words[at : at + 2]
        words = [w for w in words if not w.startswith(f"{option}=")]
    return " ".join(["python", "-m", "bench", *words])


def result_file(kind: str, device: torch.device) -> Path:
    """bench/results/<device>-<kind>-<date>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{name}-{kind}-{datetime.date.today().isoformat()}.json"


def save(path: Path, kind: str, env: Record, rows: list[Record], **more: object) -> None:
    """Written whole after every row, so that a run cut short leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = {"schema": SCHEMA, "kind": kind, "environment": env, **more, "rows": rows}
    path.write_text(json.dumps(payload, indent=1, default=asdict) + "\n")


def host_counts(row: Record) -> bool:
    """Whether enqueueing our call takes a good part of its time: there `host_ms` and `gpu_ms` are worth a look."""
    return OURS in row.get("host_ms", {}) and row["host_ms"][OURS] > row["ms"][OURS]["median"] / 4


def load(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise RecordError(f"{path}: {problem}") from problem
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA:
        raise RecordError(f"{path}: schema {found}, this version reads {SCHEMA}; run the bench again")
    return record
