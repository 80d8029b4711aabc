"""The emulator that runs CUDA kernels on the CPU (tests/cuda_emulator.h): it computes right, and it can fail."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import COMPILER, NO_COMPILER

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

SEEDS = range(8)
BLOCKS, THREADS = 4, 64
SOURCE = r"""
#include "cuda_emulator.h"
using namespace bert_fast;

unsigned counter[2];  // of groups in strips mode; counter[0] of the grid as well

// out (16, 16) = 1 + x y, y in memory as (columns, inner) or, for ldmatrix_x4_trans, as (inner, columns)
template <class E, bool TRANS>
__global__ void product(const void* x, float* out) {
  constexpr int STRIDE = 48;
  char* shared = shared_memory();
  const int lane = threadIdx.x % WARP;
  *reinterpret_cast<uint4*>(shared + threadIdx.x / 2 * STRIDE + threadIdx.x % 2 * 16) =
      load_16(static_cast<const uint4*>(x) + threadIdx.x);
  __syncthreads();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, shared + lane % 16 * STRIDE + lane / 16 * 16);
  if (TRANS) ldmatrix_x4_trans(b, shared + (16 + lane % 16) * STRIDE + lane / 16 * 16);
  else ldmatrix_x4(b, shared + (16 + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 16);
  for (int half = 0; half < 2; ++half) {
    float c[4] = {1, 1, 1, 1};
    E::mma(c, a, b[2 * half], b[2 * half + 1]);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = c[i];
  }
}

template <class E>
__global__ void rounded(const void* x, float* out) {
  out[0] = E::unpack(E::pack(0, static_cast<const float*>(x)[0])).y;
}

__global__ void reversed(float* out, bool sync) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  if (sync) __syncthreads();
  out[0] = shared[blockDim.x - 1 - threadIdx.x];
}

// Two turns of one stage: what thread i copies is read by thread i ^ 1, and copied again once all have read it.
__global__ void copied(const void* x, float* out, bool wait, bool sync) {
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared_memory());
  float* stage = reinterpret_cast<float*>(shared_memory() + 128);
  if (threadIdx.x == 0) mbarrier_init(barrier, blockDim.x);
  __syncthreads();
  out[0] = 0;
  for (int turn = 0; turn < 2; ++turn) {
    cp_async_16(stage + threadIdx.x * 4, static_cast<const float*>(x) + (turn * blockDim.x + threadIdx.x) * 4);
    cp_async_arrive(barrier);
    if (wait) mbarrier_wait(barrier, turn);
    out[0] += stage[(threadIdx.x ^ 1) * 4];
    if (sync) __syncthreads();
  }
}

// The number of the block after this one, through global memory or through the group's memory.
__global__ void from_next(float* out, float* all, bool grid, int late, bool sync = true) {
  const int next = (blockIdx.x + 1) % (grid ? gridDim.x : 2);
  Group<2> peers{int(blockIdx.x % 2), reinterpret_cast<char*>(all) + blockIdx.x / 2 * 32, 16,
                 counter + blockIdx.x / 2, 0};
  char* own = grid ? reinterpret_cast<char*>(all + blockIdx.x) : peers.own(shared_memory());
  if (threadIdx.x == 0) *reinterpret_cast<float*>(own) = blockIdx.x;
  if (grid && sync) {
    arrive_at(counter);
    wait_at(counter, gridDim.x + late);
  }
  if (!grid) peers.sync();
  out[0] = grid ? all[next] : peers.read(peers.of(next, shared_memory())).x;
  if (!grid && sync) peers.sync();
}

extern "C" const char* launch(const char* name, int seed, int clusters, const void* x, float* out) {
  counter[0] = counter[1] = 0;
  std::vector<float> memory(16, NAN);
  float *all = memory.data(), c[4];
  while (reinterpret_cast<uintptr_t>(all) % 16) ++all;
  const auto at = [&] { return out + blockIdx.x * blockDim.x + threadIdx.x; };
  const std::map<std::string, std::function<void()>> kernels{
      {"bfloat16", [&] { product<Bf16, false>(x, out); }},
      {"bfloat16 trans", [&] { product<Bf16, true>(x, out); }},
      {"float16", [&] { product<Fp16, false>(x, out); }},
      {"float16 trans", [&] { product<Fp16, true>(x, out); }},
      {"round bfloat16", [&] { rounded<Bf16>(at() - out + static_cast<const float*>(x), at()); }},
      {"round float16", [&] { rounded<Fp16>(at() - out + static_cast<const float*>(x), at()); }},
      {"shfl_xor", [&] { *at() = shfl_xor(threadIdx.x, 5); }},
      {"reversed", [&] { reversed(at(), true); }},
      {"reversed, no __syncthreads", [&] { reversed(at(), false); }},
      {"copied", [&] { copied(x, at(), true, true); }},
      {"copied, no wait", [&] { copied(x, at(), false, true); }},
      {"copied, no __syncthreads", [&] { copied(x, at(), true, false); }},
      {"grid", [&] { from_next(at(), all, true, 0); }},
      {"grid, no barrier", [&] { from_next(at(), all, true, 0, false); }},
      {"grid, target too high", [&] { from_next(at(), all, true, 1); }},
      {"group", [&] { from_next(at(), all, false, 0); }},
      {"group, ends early", [&] { from_next(at(), all, false, 0, false); }},
      {"one skips", [&] { if (threadIdx.x != 7) __syncthreads(); }},
      {"diverged", [&] {
         uint32_t r[4] = {};
         if (threadIdx.x % WARP < 9) ldmatrix_x4(r, shared_memory());
         else Bf16::mma(c, r, 0, 0);
       }},
      {"misaligned ldmatrix", [&] { uint32_t r[4]; ldmatrix_x4(r, shared_memory() + 8); }},
      {"misaligned load_8", [&] { load_8(static_cast<const char*>(x) + 4); }},
      {"beyond", [&] { cp_async_16(shared_memory() + 4096, x); }},
      {"stored beyond", [&] { shared_memory()[4096] = 0; }},
      {"no mbarrier", [&] { mbarrier_wait(reinterpret_cast<uint64_t*>(shared_memory()), 0); }},
  };
  static std::string error;
  return (error = emulate(4, 64, 2, 4096, seed, clusters, kernels.at(name))).c_str();
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "kernels.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", f"-I{Path(__file__).parent}"]
    subprocess.run([COMPILER, *flags, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.launch.restype = ctypes.c_char_p
    return library


def launch(
    library: ctypes.CDLL, name: str, x: torch.Tensor | None = None, seed: int = 0, clusters: bool = True
) -> tuple[str, torch.Tensor]:
    """What went wrong, and the output."""
    x = torch.zeros(1024) if x is None else x
    out = torch.full((BLOCKS, THREADS), float("nan"))
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
    return library.launch(name.encode(), seed, clusters, *pointers).decode(), out


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_of_ldmatrix(library: ctypes.CDLL, dtype: torch.dtype, trans: bool) -> None:
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    error, out = launch(library, str(dtype).removeprefix("torch.") + " trans" * trans, x)
    expected = 1 + x[0].double() @ (x[1] if trans else x[1].T).double()
    assert not error
    torch.testing.assert_close(out.view(16, 16).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, generator=generator) * 2.0 ** torch.randint(-27, 19, (256,), generator=generator)
    special = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, 2**-25, 3 * 2**-25, 2**-14 - 2**-26]
    special += [3.4e38, float("inf"), -float("inf"), float("nan"), -0.0]
    x[: len(special)] = torch.tensor(special)
    error, out = launch(library, "round " + str(dtype).removeprefix("torch."), x)
    out, expected = (y.flatten().nan_to_num(nan=1e9) for y in (out, x.to(dtype).float()))
    assert not error and torch.equal(out, expected) and torch.equal(out.signbit(), expected.signbit())


THREAD = torch.arange(THREADS).float().expand(BLOCKS, THREADS)
TURNS = torch.arange(2 * THREADS * 4).float()
NEXT = torch.tensor([1.0, 2, 3, 0])[:, None].expand(BLOCKS, THREADS)
PEER = torch.tensor([1.0, 0, 3, 2])[:, None].expand(BLOCKS, THREADS)
COPIED = (TURNS.view(2, THREADS, 4)[:, :, 0].sum(0)[torch.arange(THREADS) ^ 1]).expand(BLOCKS, THREADS)


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shfl_xor", (THREAD.int() ^ 5).float()),
        ("reversed", THREAD.flip(1)),
        ("copied", COPIED),
        ("grid", NEXT),
        ("group", PEER),
    ],
)
def test_right_for_all_seeds(library: ctypes.CDLL, name: str, expected: torch.Tensor, clusters: bool) -> None:
    for seed in SEEDS:
        error, out = launch(library, name, TURNS, seed, clusters)
        assert not error and torch.equal(out, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reversed, no __syncthreads", THREAD.flip(1)),
        ("copied, no wait", COPIED),
        ("copied, no __syncthreads", COPIED),
        ("grid, no barrier", NEXT),
    ],
)
def test_missing_barrier_is_wrong_for_some_seeds(library: ctypes.CDLL, name: str, expected: torch.Tensor) -> None:
    outcomes = [launch(library, name, TURNS, seed) for seed in SEEDS]
    assert not any(error for error, _ in outcomes)
    assert any(not torch.equal(out, expected) for _, out in outcomes)


def test_unwaited_copy_reads_poison(library: ctypes.CDLL) -> None:
    assert all(launch(library, "copied, no wait", TURNS, seed)[1].isnan().any() for seed in SEEDS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one skips", "deadlock, "),
        ("grid, target too high", "deadlock, 4 threads at the counter of wait_at"),
        ("group, ends early", "the block has ended"),
        ("diverged", "other lanes of its warp are at "),
        ("misaligned ldmatrix", "address not aligned to 16 bytes"),
        ("misaligned load_8", "address not aligned to 8 bytes"),
        ("beyond", "outside of the block's shared memory"),
        ("stored beyond", "written beyond the shared memory of block 3"),
        ("no mbarrier", "no mbarrier: not initialised"),
    ],
)
def test_error_is_reported(library: ctypes.CDLL, name: str, message: str) -> None:
    errors = [launch(library, name, seed=seed)[0] for seed in SEEDS]
    assert any(message in error for error in errors), errors
