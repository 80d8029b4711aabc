"""`python -m bench aot`: what ships compiles for GPUs that are not here, and the check can fail.

In processes of their own: this one has Triton's interpreter, which replaces the compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
OPS = (
    "attention",
    "attention_heads",
    "attention_probs",
    "embed_layer_norm",
    "first_rows",
    "first_token_attention",
    "fold_vectors",
    "gelu_layer_norm",
    "linear",
    "linear_gelu",
    "linear_layer_norm",
    "normalise",
    "pack",
    "pool",
    "qkv_linear",
    "residual_layer_norm",
)
TARGETS = ("80", "90", "100", "120", "gfx942")
TRAINING_OPS = (
    "attention_backward",
    "embed_layer_norm_backward",
    "gelu_layer_norm_backward",
    "grad_activation",
    "grad_input",
    "grad_input_act",
    "grad_weight",
    "linear_gelu_pre",
    "residual_layer_norm_backward",
)
TRAINING_TARGETS = ("80", "90")  # the others with --all
FOLDED_OPS = ("folded_linear", "linear_to_stream")  # tensor descriptors, and a tile for 200 KB of shared memory
FOLDED_TARGETS = ("90", "100")

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def row_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols).to(tl.float32)
    tl.store(y_ptr + cols, x - tl.sum(x, 0))

@triton.jit
def matrix_kernel(x_ptr, y_ptr, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr):
    tl.static_assert(BLOCK_K > 16, "BLOCK_K is too small")
    rows = tl.arange(0, BLOCK_M)[:, None]
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + rows * K + k + inner[None, :])
        if DOT:
            acc = tl.dot(x, x.T, acc)
        else:
            acc += tl.sum(x.to(tl.float32), 1)[:, None]
    tl.store(y_ptr + rows * BLOCK_M + tl.arange(0, BLOCK_M)[None, :], acc)
"""

SCRIPT = """
import sys
from pathlib import Path
import torch
import faulty
from bench import aot

aot.CACHE = Path(sys.argv[1])
x = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")

def build(name, target, kernel, *args, limit=101376, **kwargs):
    launch = aot.specialise(getattr(faulty, kernel), args, kwargs)
    return aot.Build(kernel, name, target, "faulty", kernel, **launch, limit=limit)

def matrix(name, target, BLOCK_M=64, BLOCK_K=64, DOT=True, num_warps=4, num_stages=3):
    sizes = dict(BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, DOT=DOT, num_warps=num_warps, num_stages=num_stages)
    return build(name, target, "matrix_kernel", x, x, 1024, **sizes)

failed = aot.report([
    build("fine", "80", "row_kernel", x, x, BLOCK=1024, num_warps=4),
    matrix("fine", "90"),
    build("greedy", "90", "row_kernel", x, x, BLOCK=16384, num_warps=1),
    matrix("wide", "80", BLOCK_M=128, BLOCK_K=256),
    matrix("scalar", "80", DOT=False),
    matrix("small", "90", num_warps=2),
    matrix("broken", "gfx942", BLOCK_K=16),
], 1)
aot.calls = aot.training_calls = lambda: []
print(*aot.all_builds()[1], sep="\\n")
sys.exit(failed)
"""


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)


def rows(output: str) -> list[list[str]]:
    """Cells of the table's rows; the verdict is the last one."""
    lines = output.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("op "))
    return [line.split() for line in lines[header + 1 :] if not line.startswith(" ")]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), pytest.param(("--all",), marks=pytest.mark.aot_all)], ids=["first", "all"])
def test_what_ships_compiles(flags):
    done = run("-m", "bench", "aot", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [row for row in rows(done.stdout) if row[-1] == "ok"]
    for op in OPS:
        for target in TARGETS:
            assert any(row[0] == op and target in row for row in table), f"{op} for {target}"
    for op in TRAINING_OPS:
        for target in TARGETS if flags else TRAINING_TARGETS:
            assert any(row[0] == op and target in row for row in table), f"{op} for {target}"
    for op in FOLDED_OPS:
        for target in TARGETS:
            found = any(row[0] == op and target in row for row in table)
            assert found == (target in FOLDED_TARGETS), f"{op} for {target}"
    assert f"{len(table)} builds, 0 failed" in done.stdout


@pytest.mark.slow
def test_faults_are_reported(tmp_path):
    (tmp_path / "faulty.py").write_text(KERNELS)
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run(str(tmp_path / "script.py"), str(tmp_path / "cache"), PYTHONPATH=path)
    assert done.returncode == 5, done.stdout + done.stderr
    verdicts = {row[1]: " ".join(row) for row in rows(done.stdout)[:7]}
    assert "7 builds, 5 failed, 0 from cache" in done.stdout
    for name, end in {
        "fine": "ok",
        "greedy": "spills",
        "wide": "shared memory past 101376",
        "scalar": "no tensor-core instruction",
        "small": "no wgmma",
    }.items():
        assert verdicts[name].endswith(end), done.stdout
    assert "BLOCK_K is too small" in done.stdout
    # no calls: every kernel and every tile entry is missed
    assert "bert_fast.kernels.attention._attention_kernel is never launched" in done.stdout
    assert "sm90.json: nothing reaches gemm/rows>8192 wide/half" in done.stdout


def test_the_interpreter_is_refused(monkeypatch, capsys):
    from bench import aot

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stop:
        aot.main([])
    assert stop.value.code == 2 and "TRITON_INTERPRET is set" in capsys.readouterr().err
