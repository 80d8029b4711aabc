"""The doctor: what is installed, whether families are what they were on the tested releases, how each op would run on
each device here, and how to get what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from dataclasses import asdict
from importlib import metadata

import torch
import transformers

import bert_fast
from bert_fast import comparison, graphs
from bert_fast.comparison import verdicts
from bert_fast.families import LEFT_OUT
from bert_fast.family import FAMILIES
from bert_fast.installed import TESTED_RELEASES, is_tested
from bert_fast.kernels import configs, extension, runtime
from bert_fast.one_launch import MEASURED_ROWS

from . import demo

OPS = ("pack", "embed_layer_norm", "qkv_linear", "attention", "linear_layer_norm", "linear_gelu", "linear")
OPS += ("residual_layer_norm", "first_rows", "first_token_attention", "gelu_layer_norm", "pool", "attention_heads")
GEMM_OPS = ("qkv_linear", "linear_layer_norm", "linear_gelu", "linear")  # fp32 on a GPU: torch's own GEMM
UPSTREAM_CASES = "decoder mode, torch.compile, export, torch.func transforms, other activations, head_dim over 128"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def gpus() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def how(op: str, device: torch.device) -> str:
    """Which code runs `op` in the encoder tier on `device`."""
    if runtime.unsupported_reason(device):
        return "transformers"
    if device.type == "cpu":
        return "torch"
    return "triton (fp32: torch)" if op in GEMM_OPS else "triton"


def describe(device: torch.device) -> list[str]:
    """A GPU, and the tiles in force on it."""
    chip = torch.cuda.get_device_properties(device)
    major, minor = capability = torch.cuda.get_device_capability(device)
    text = f"{device}  {chip.name}, capability {major}.{minor}, {chip.multi_processor_count} multiprocessors"
    lines = [f"{text}, {chip.total_memory / 2**30:.0f} GiB"]
    reason = runtime.unsupported_reason(device)
    if reason:
        return [*lines, f"        no kernels here: {reason}; transformers' code runs"]
    arch = configs.arch_name(capability)
    own = (configs.FOLDER / f"{arch}.json").exists()
    tiles = f"{arch}.json over generic.json" if own else f"generic.json (there is no {arch}.json)"
    rows = MEASURED_ROWS.get(capability, 0)
    launch = extension.load() or f"up to {rows} rows" if rows else "not taken: it has not been measured on such a GPU"
    return [*lines, f"        all layers in one launch: {launch}", f"        tiles: {tiles}", *tile_lines(arch)]


def tile_lines(arch: str) -> list[str]:
    """The table of `arch`, one entry a line."""
    lines = []
    for key, tile in configs.table(arch).items():
        fields = [f"{name}={value}" for name, value in asdict(tile).items() if value not in (0, False)]
        lines.append(f"        {key:<32} {' '.join(fields)}")
    return lines


def graph_lines() -> list[str]:
    """Whether forwards are replayed from CUDA graphs here, the limits, and what this process holds."""
    if os.environ.get("BERT_FAST_GRAPHS") == "0":
        state = "off: BERT_FAST_GRAPHS=0"
    elif not gpus():
        state = "off: no CUDA device"
    else:
        state = "on, for inference without gradients; BERT_FAST_GRAPHS=0 switches them off"
    size, total = graphs.MAX_OUTPUT_BYTES >> 20, graphs.MAX_DEVICE_BYTES >> 20
    limits = f"limits: {graphs.MAX_GRAPHS} a model, {graphs.MAX_ROWS} rows and {size} MiB of outputs a graph,"
    lines = [state, f"{limits} {total} MiB of inputs and outputs a device"]
    held = [f"{name}: {n} graphs, {size / 2**20:.1f} MiB of inputs and outputs" for name, n, size in graphs.held()]
    held += [f"{name}: memory pool of {size / 2**20:.1f} MiB" for name, size in graphs.pools()]
    return lines + (held or ["held by this process: none"])


def extension_line() -> str:
    """Whether the compiled library of csrc/ is here, and whether this torch takes it."""
    if extension.path() is None:
        how_to_get = "in a checkout, with nvcc: BERT_FAST_CUDA=1 pip install -e ."
        return f"csrc extension: absent, and optional; to build it {how_to_get}"
    reason = extension.load()
    return f"csrc extension: present but does not load: {reason}" if reason else "csrc extension: present, loaded"


def family_lines() -> list[str]:
    """Every family compared with the installed transformers, now; on a release not tested, the verdict is kept."""
    release = f"transformers {transformers.__version__}"
    if is_tested():
        lines = [f"{release} is a tested release"]
    else:
        lines = [f"{release} was not tested, {', '.join(TESTED_RELEASES)} were; where a family differs, its code runs"]
    for family in FAMILIES:
        start = time.perf_counter()
        try:
            verdict = comparison.compare(family)
        except comparison.NotNow as why:
            told = f"not compared: {why}"
        else:
            told = "same" if verdict.difference is None else f"differs: {verdict.difference}"
            if verdict.lasting and not is_tested():
                verdicts.write(family, verdict.difference)
        lines.append(f"{family.model.__name__:<24}{told} ({time.perf_counter() - start:.2f} s)")
    return lines + [f"{what:<24}left out: {why}" for what, why in LEFT_OUT.items()]


def missing() -> list[str]:
    """What could be here and is not, each with the way to get it."""
    found = []
    if not runtime.HAS_TRITON:
        if sys.platform == "linux":
            found.append("triton: GPU kernels need it; pip install triton (torch's CUDA wheels bring their own)")
        else:
            found.append(f"triton: has no release for {platform.system()}; ops run through torch here")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            found.append("CUDA torch: a driver is here but torch is a CPU build; see https://pytorch.org/get-started")
        elif shutil.which("nvidia-smi"):
            found.append("GPU: an NVIDIA driver is here but torch sees no device; check nvidia-smi")
        else:
            found.append("GPU: none seen; everything runs on the CPU through torch")
    try:
        demo.minilm_dir()
    except demo.DemoError:
        found.append(f"demo weights: {demo.WEIGHTS_INSTALL}")
    return found


def report() -> list[str]:
    devices = [torch.device("cpu"), *gpus()]
    lines = ["versions"]
    lines.append(f"  bert_fast     {bert_fast.__version__}")
    lines.append(f"  python        {platform.python_version()} ({platform.system()} {platform.machine()})")
    lines.append(f"  torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    lines.append(f"  triton        {_version('triton')}")
    lines.append(f"  transformers  {transformers.__version__}")
    lines.append(f"  numpy         {_version('numpy')}")
    lines += ["", "families", *(f"  {line}" for line in family_lines())]
    lines += ["", "devices", f"  cpu     {torch.get_num_threads()} threads"]
    for device in devices[1:]:
        lines += [f"  {line}" for line in describe(device)]
    width = max(len(how(op, d)) for op in OPS for d in devices) + 2
    lines += ["", f"{'ops in inference':<24}" + "".join(f"{d!s:<{width}}" for d in devices).rstrip()]
    for op in OPS:
        lines.append(f"  {op:<22}" + "".join(f"{how(op, d):<{width}}" for d in devices).rstrip())
    lines.append(f"  {UPSTREAM_CASES}: transformers' code;")
    lines.append("  bert_fast.explain(model, **inputs) says which code a call takes, and why")
    lines += ["", "graphs", *(f"  {line}" for line in graph_lines())]
    if not devices[1:]:
        tables = ", ".join(sorted(path.name for path in configs.FOLDER.glob("*.json")))
        lines += ["", f"tiles: no GPU, so none in force; tables at hand: {tables}"]
    lines += ["", extension_line(), "", "missing"]
    return lines + ([f"  {line}" for line in missing()] or ["  nothing"])


def run() -> int:
    print("\n".join(report()))
    return 0
