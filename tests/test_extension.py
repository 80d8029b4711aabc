"""The CUDA library of csrc/: compiles for every target without a spill, loads under any torch, checks its arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import COMPILER, NO_COMPILER, Shape
from packaging_helpers import ROOT, build_module
from test_encoder_small import arguments, mask_of

from bert_fast.kernels import extension
from bert_fast.kernels.encoder_small import MAX_ROWS, encoder_small, encoder_small_reason

build_library = build_module()
needs_nvcc = pytest.mark.skipif(build_library.find_nvcc() is None, reason="no nvcc")
needs_library = pytest.mark.skipif(extension.path() is None, reason=extension.NOT_BUILT)
KERNELS = {"encoder_small.cu": 6}  # two dtypes, three head_dims
BF16 = torch.bfloat16


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", build_library.TARGETS.split())
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc").glob("*.cu")))
def test_compiles_without_warnings_and_spills(source: str, target: str, tmp_path: Path) -> None:
    nvcc = build_library.find_nvcc()
    if f"sm_{target.rstrip('a')}" not in build_library.run(nvcc, "--list-gpu-code").split():
        pytest.skip(f"{nvcc} does not know sm_{target}")
    command = [
        nvcc, *build_library.FLAGS, f"-gencode=arch=compute_{target},code=sm_{target}", "-Werror", "all-warnings",
        "-Xcompiler", "-Wall,-Werror", "-Xptxas", "-v", "-isystem", str(build_library.find_torch() / "include"),
        "-c", f"csrc/{source}", "-o", str(tmp_path / "object.o"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout[-3000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout)
    assert frames == [("0", "0", "0")] * KERNELS.get(source, 0), done.stdout


@pytest.fixture(scope="module")
def library() -> None:
    assert extension.load() is None


def through_the_host_part(**changes: Any) -> Any:
    """The body of CUDA tensors, given those of the CPU: checks come first, and that they are on a GPU comes last."""
    args = arguments(Shape(2, 64, 96, 2, 2, 5), mask_of("ones", 2, 5), False, BF16) | changes
    return encoder_small.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args.values())


def changed(index: int, to: torch.Tensor) -> list[torch.Tensor]:
    """The parameters with one exchanged."""
    found = arguments(Shape(2, 64, 96, 2, 2, 5), mask_of("ones", 2, 5), False, BF16)["parameters"]
    found[index] = to
    return found


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


WRONG = {
    "nothing": ({}, r"x is not on a CUDA device, where its only body runs"),
    "dtype": ({"x": zeros(10, 64, dtype=torch.float32)}, r"x is \(10, 64\) float32, expected \(rows, hidden\)"),
    "dimensions": ({"x": zeros(2, 5, 64)}, r"x is \(2, 5, 64\) bfloat16, expected \(rows, hidden\)"),
    "rows": ({"x": zeros(11, 64)}, r"x has 11 rows for 2 sequences, expected batch \* length"),
    "hidden": ({"x": zeros(10, 72)}, r"hidden is 72, expected a multiple of 16"),
    "too many rows": ({"x": zeros(66, 64)}, r"batch \* length is 66, expected 1 to 64"),
    "heads": ({"heads": 0}, r"head_dim is 0, expected 32, 64 or 128"),
    "head_dim": ({"heads": 4}, r"head_dim is 16, expected 32, 64 or 128"),
    "heads that leave a rest": ({"heads": 3}, r"head_dim is 21, expected 32, 64 or 128"),
    "scale": ({"scale": float("nan")}, r"scale is nan, expected a finite number"),
    "activation": ({"activation": 4}, r"activation is 4, expected 0 \(gelu\), 1 \(gelu_tanh\)"),
    "eps": ({"eps": [1e-12] * 3}, r"3 eps, expected 2 for each of 2 layers"),
    "parameters": ({"parameters": changed(0, zeros(64, 64))[:31]}, r"31 parameters, expected 16 for each layer"),
    "no parameters": ({"parameters": []}, r"0 parameters, expected 16 for each layer"),
    "token": ({"token": zeros(9, dtype=torch.int32)}, r"token is \(9,\) int32, expected \(10,\) int32"),
    "token's dtype": ({"token": zeros(10, dtype=torch.int64)}, r"token is \(10,\) int64, expected \(10,\) int32"),
    "cu_seqlens": ({"cu_seqlens": zeros(2, dtype=torch.int32)}, r"cu_seqlens is \(2,\) int32, expected \(3,\) int32"),
    "weight": ({"parameters": changed(1, zeros(64, 32))}, r"layer 0 key.weight is \(64, 32\) .* expected \(64, 64\)"),
    "up": ({"parameters": changed(20, zeros(96, 32))}, r"layer 1 up.weight is \(96, 32\) .* expected \(96, 64\)"),
    "intermediate": ({"parameters": changed(4, zeros(24, 64))}, r"intermediate is 24, expected a multiple of 16"),
    "bias": ({"parameters": changed(12, zeros(64))}, r"layer 0 up.bias is \(64,\) bfloat16, expected \(96,\)"),
    "bias's dtype": (
        {"parameters": changed(22, zeros(64, dtype=torch.float32))},
        r"layer 1 query.bias is \(64,\) float32, expected \(64,\) bfloat16",
    ),
    "strides": ({"parameters": changed(0, zeros(64, 64).t())}, r"layer 0 query.weight is .*, not contiguous"),
    "alignment": ({"parameters": changed(31, zeros(65)[1:])}, r"layer 1 beta 2 is .*, unaligned, .* of 16 bytes"),
}  # fmt: skip


@needs_library
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("case", WRONG)
def test_arguments_are_checked_on_the_host(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(RuntimeError, match=rf"encoder_small: {message}"):
        through_the_host_part(**changes)


@needs_library
@pytest.mark.usefixtures("library")
@pytest.mark.skipif(torch.version.cuda is not None, reason="what a CPU build of torch is told, and this one has CUDA")
def test_reasons_without_a_gpu() -> None:
    reason = torch.ops.bert_fast_csrc.encoder_small_reason
    assert reason(0, 12, 768, 3072, 12, 1, 32) == "this torch has no CUDA"
    assert reason(0, 25, 768, 3072, 12, 1, 32) == "number of layers is 25, expected 1 to 24"
    assert reason(0, 12, 1040, 3072, 12, 1, 32) == "hidden is 1040, expected a multiple of 16 up to 1024"
    assert reason(0, 12, 1024, 4112, 16, 1, 32) == "intermediate is 4112, expected a multiple of 16 up to 4096"
    assert reason(0, 12, 768, 3072, 12, 2**40, 2**40).startswith("batch * length is ")
    assert reason(0, 12, 768, 3072, 12, MAX_ROWS, 1) == "this torch has no CUDA"  # the same limit on both sides
    assert reason(0, 12, 768, 3072, 12, MAX_ROWS + 1, 1).endswith(f"expected 1 to {MAX_ROWS}")
    assert reason(0, 12, 768, 3072, -(2**40), 1, 1).startswith("head_dim is 0")


NO_GPU = """
import ctypes, torch
ctypes.CDLL({fake!r}, mode=ctypes.RTLD_LOCAL)  # as torch loads its own
torch.ops.load_library({library!r})
print(torch.ops.bert_fast_csrc.encoder_small_reason(0, 12, 768, 3072, 12, 1, 32))
"""


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="what CUDA says without a GPU, and one is here")
@pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
def test_torch_with_cuda_but_without_a_gpu(tmp_path: Path) -> None:
    """The current stream's function is found in torch's CUDA library; what CUDA then says is a reason, no error."""
    fake = tmp_path / "libtorch_cuda.so"
    source = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return device || !stream; }"
    compile_it = [COMPILER, "-x", "c", "-", "-fPIC", "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", str(fake)]
    subprocess.run(compile_it, input=source, text=True, check=True)
    code = NO_GPU.format(fake=str(fake), library=str(extension.path()))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() and "this torch has no CUDA" not in done.stdout and done.stdout.count("\n") == 1


def test_reason_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "load", lambda: "it is not built")
    args = 12, 768, 3072, 12, 1, 32
    assert encoder_small_reason(torch.device("cuda"), BF16, *args) == "it is not built"
    assert encoder_small_reason(torch.device("cpu"), BF16, *args) is None  # the definition runs there
    assert "not torch.float32" in str(encoder_small_reason(torch.device("cpu"), torch.float32, *args))


@needs_library
def test_loads_in_a_process_of_its_own() -> None:
    """Before or after the ops of Python; and with nothing of CUDA asked, so that it serves a machine without one."""
    for order in ("import bert_fast; {}", "{}; import bert_fast"):
        code = order.format(f"import torch; torch.ops.load_library({str(extension.path())!r})")
        code += "; assert torch._C._dispatch_has_kernel_for_dispatch_key('bert_fast::encoder_small', 'CUDA')"
        code += "; assert not torch.cuda.is_initialized()"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
        )
        assert done.returncode == 0, done.stderr[-2000:]
