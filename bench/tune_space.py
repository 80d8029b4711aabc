"""What `bench tune` searches: one problem for each shape class, and the tiles worth a try. No GPU is asked anything.

Classes come from kernels/configs.py: a product's by asking it for the class of BERT's products at every row bound.
Fields that GRID does not name keep the present entry's value; fields that TileConfig does not have are passed over.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from bert_fast.kernels import configs
from bert_fast.kernels.attention import attention, attention_ref, attention_triton
from bert_fast.kernels.attention_backward import attention_backward_cpu, attention_backward_triton
from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.gemm import gemm_triton
from bert_fast.kernels.grad_input import grad_input_act_ref, grad_input_act_triton
from bert_fast.kernels.grad_weight import grad_weight_ref, grad_weight_triton
from bert_fast.kernels.linear import linear_ref
from bert_fast.kernels.linear_gelu import linear_gelu_ref
from bert_fast.kernels.linear_layer_norm import linear_layer_norm_ref, linear_layer_norm_triton
from bert_fast.kernels.pack import pack
from bert_fast.kernels.pool import pool_ref, pool_triton

OPS = ("gemm", "attention", "attention_probs", "pool")
OPS += ("attention_backward", "attention_backward_probs", "grad_input", "grad_weight")
LAYERS = 12  # sets of weights that take turns: a layer's do not wait in L2 for the next forward
EPS = 1e-12
GRID: dict[str, dict[str, tuple]] = {
    "gemm": {
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128, 256),
        "BLOCK_K": (32, 64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "SPLIT_K": (1, 2, 4),
        "tma": (False, True),
    },
    "attention": {"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128), "num_warps": (4, 8)},
    "pool": {"BLOCK_M": (16, 32), "BLOCK_N": (16, 32, 64), "BLOCK_K": (64, 128, 256), "num_warps": (4, 8)},
}
GRID["attention"]["num_stages"] = GRID["pool"]["num_stages"] = (2, 3, 4)
GRID["attention_probs"] = GRID["attention_backward"] = GRID["attention_backward_probs"] = GRID["attention"]
GRID["grad_input"] = GRID["grad_weight"] = {k: v for k, v in GRID["gemm"].items() if k != "SPLIT_K"}


@dataclass(frozen=True)
class Problem:
    """Sizes by the letters of the kernels: gemm M, N, K (of a weight gradient M is summed over); attention B, H, S, D;
    pool B, N, K."""

    op: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return "x".join(map(str, self.sizes))


def _problems() -> dict[str, Problem]:
    found = {"gemm/any": Problem("gemm", (1024, 768, 768)), "pool/any": Problem("pool", (32, 768, 768))}
    for rows in (*configs.ROW_CLASSES, 2 * configs.ROW_CLASSES[-1]):
        for N, K in ((3072, 768), (768, 768), (768, 3072)):  # BERT-base's intermediate, output and second FFN product
            found.setdefault(f"gemm/{configs.gemm_class(rows, N, K)}", Problem("gemm", (rows, N, K)))
    for op in ("grad_input", "grad_weight"):  # through the activation, and of the intermediate dense
        for rows in (1024, 8192, 16384):
            found[f"{op}/{configs.gradient_class(rows)}"] = Problem(op, (rows, 3072, 768))
        found[f"{op}/any"], found[f"{op}/unaligned"] = Problem(op, (1024, 768, 768)), Problem(op, (1024, 780, 780))
    for op in ("attention", "attention_probs", "attention_backward", "attention_backward_probs"):
        found[f"{op}/dim<=64"] = Problem(op, (16, 12, 512, 64))
        found[f"{op}/dim<=128"] = Problem(op, (16, 6, 512, 128))
    return found


PROBLEMS = _problems()


def problem_of(key: str) -> Problem:
    """Of a table key `op/shape class/dtype class`."""
    name = key.rpartition("/")[0]
    if name not in PROBLEMS:
        raise KeyError(f"{key}: bench/tune_space.py has no problem for this class")
    return PROBLEMS[name]


def candidates(
    key: str, present: TileConfig, capability: tuple[int, int], shared: int, quick: bool = False
) -> list[TileConfig]:
    """Tiles to try beside the present one; quick: those that differ from it in one field."""
    op, size = key.partition("/")[0], 4 if key.endswith("fp32") else 2
    known = {f.name for f in dataclasses.fields(TileConfig)}
    grid = {name: values for name, values in GRID[op].items() if name in known}
    found = []
    for values in itertools.product(*grid.values()):
        fields = dict(zip(grid, values, strict=True))
        try:
            config = dataclasses.replace(present, **fields)
        except ValueError:  # configs.py says no
            continue
        changed = sum(getattr(present, name) != value for name, value in fields.items())
        if changed and (not quick or changed == 1) and _sensible(config, problem_of(key), capability, shared, size):
            found.append(config)
    return found


def _sensible(c: TileConfig, problem: Problem, capability: tuple[int, int], shared: int, size: int) -> bool:
    """A rough sieve: what cannot fit, or leaves most of a tile or of the threads idle. The GPU judges the rest."""
    D = problem.sizes[3] if problem.op.startswith("attention") else 0
    accumulator = c.BLOCK_M * (D or c.BLOCK_N) // (32 * c.num_warps)  # fp32 registers a thread
    if D:
        scores = c.BLOCK_M * c.BLOCK_N // (32 * c.num_warps)
        staged = c.BLOCK_M * D + c.num_stages * 2 * c.BLOCK_N * D
        return 4 <= accumulator and accumulator + scores <= 128 and staged * size <= shared and c.BLOCK_M * size >= 64
    if c.num_stages * (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * size > shared or not 2 <= accumulator <= 128:
        return False
    if problem.op == "pool":
        return True
    M, N, _ = problem.sizes
    if problem.op.startswith("grad"):
        whole = all(n % 16 == 0 for n in problem.sizes)
        square = max(c.BLOCK_M, c.BLOCK_N) <= 4 * min(c.BLOCK_M, c.BLOCK_N)
        fits = square and c.BLOCK_K <= (32 if size == 4 else 64) and c.BLOCK_M * c.BLOCK_N >= 1024 * c.num_warps // 4
        fits = fits and c.num_stages >= (2 if size == 4 else 3)
        return fits and (not c.tma or (size == 2 and whole and capability >= (9, 0)))
    if size == 4:
        return c.BLOCK_K <= 64 and accumulator <= 32 and not c.tma and c.SPLIT_K == 1
    tile, few = c.BLOCK_M * c.BLOCK_N, M <= 128
    if c.num_stages < 3 or c.BLOCK_K < 64 or (c.BLOCK_K > 128 and not (few and c.BLOCK_N <= 32)):
        return False
    if c.BLOCK_M > M or 4 * c.BLOCK_M < min(M, 256) or not (tile >= 8192 if c.num_warps == 8 else tile <= 16384):
        return False
    if few:  # more columns would leave SMs without a tile
        return c.BLOCK_N <= 64 and not c.tma and _split(c, problem)
    if c.tma and capability < (9, 0):
        return False
    return c.BLOCK_N >= 32 and tile >= (4096 if M <= 512 else 8192) and _split(c, problem)


def _split(c: TileConfig, problem: Problem) -> bool:
    """Only the product under a LayerNorm is split, and only where tiles are few."""
    M, N, K = problem.sizes
    most = 1 if N > configs.NARROW or M > 512 else 4 if K > configs.LONG else 2
    return c.SPLIT_K <= most


@dataclass(frozen=True)
class Built:
    """A problem with its tensors. launch(config, i): on the i-th set of weights; reference(dtype): the definition."""

    launch: Callable[[TileConfig, int], Any]
    reference: Callable[[torch.dtype], Any]


def build(problem: Problem, device: torch.device, dtype: torch.dtype) -> Built:
    g = torch.Generator().manual_seed(0)

    def rand(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=g) * scale).to(device=device, dtype=dtype)

    if problem.op.startswith("attention_backward"):
        B, H, S, D = problem.sizes
        probs = rand(B, H, S, S) if problem.op.endswith("probs") else None
        qkv, dy = rand(B * S, 3 * H * D), rand(B * S, H * D)
        maps = pack(torch.ones(B, S, device=device, dtype=torch.long), False)
        context, _, lse = attention(qkv, None, *maps, H, D**-0.5, False, False)
        rest = (*maps, H, D**-0.5, False, None, 0, 0.0, False)

        def gradients(t: torch.dtype) -> Any:
            d_probs = None if probs is None else probs.to(t)
            return attention_backward_cpu(dy.to(t), d_probs, qkv.to(t), None, context.to(t), lse, *rest)

        return Built(
            lambda c, i: attention_backward_triton(dy, probs, qkv, None, context, lse, *rest, config=c), gradients
        )
    if problem.op.startswith("attention"):
        B, H, S, D = problem.sizes
        probs, mask = problem.op == "attention_probs", torch.ones(B, S, device=device, dtype=torch.long)
        qkv, rest = rand(B * S, 3 * H * D), (*pack(mask, True), H, D**-0.5, probs, False)
        return Built(
            lambda c, i: attention_triton(qkv, None, *rest, config=c),
            lambda t: attention_ref(qkv.to(t), None, *rest),
        )
    M, N, K = problem.sizes
    first = rand(N, K, scale=K**-0.5)
    weights = [first, *(first.flip(0).roll(i, 0).contiguous() for i in range(1, LAYERS))]
    b = rand(N)
    if problem.op == "pool":
        hidden = rand(M, 8, K)
        return Built(
            lambda c, i: pool_triton(hidden, weights[i % LAYERS], b, config=c),
            lambda t: pool_ref(hidden.to(t), first.to(t), b.to(t)),
        )
    x = rand(M, K)
    if problem.op == "grad_weight":
        dy = rand(M, N)
        return Built(
            lambda c, i: grad_weight_triton(dy, x, None, True, config=c),
            lambda t: grad_weight_ref(dy.to(t), x.to(t), None, True),
        )
    if problem.op == "grad_input":
        down, pre = [w.t().contiguous() for w in weights], rand(M, N)  # (K, N): x is the gradient of K columns
        return Built(
            lambda c, i: grad_input_act_triton(x, down[i % LAYERS], pre, "gelu", None, config=c),
            lambda t: grad_input_act_ref(x.to(t), down[0].to(t), pre.to(t), "gelu", None),
        )
    if dtype == torch.float32:
        return Built(
            lambda c, i: gemm_triton(x, [weights[i % LAYERS]], [b], None, "none", config=c),
            lambda t: linear_ref(x.to(t), first.to(t), b.to(t), None),
        )
    if N > configs.NARROW:
        return Built(
            lambda c, i: gemm_triton(x, [weights[i % LAYERS]], [b], None, "gelu", config=c),
            lambda t: linear_gelu_ref(x.to(t), first.to(t), b.to(t), None, "gelu"),
        )
    residual, gamma, beta = rand(M, N), rand(N), rand(N)
    rest = (EPS, None, None, True, False)
    return Built(
        lambda c, i: linear_layer_norm_triton(x, weights[i % LAYERS], b, residual, gamma, beta, *rest, config=c),
        lambda t: linear_layer_norm_ref(*(a.to(t) for a in (x, first, b, residual, gamma, beta)), *rest),
    )


def outputs(found: Any) -> list[torch.Tensor]:
    return [t for t in (found if isinstance(found, tuple) else (found,)) if t.numel()]


def keys_of(table: dict[str, TileConfig], ops: Collection[str], dtype: torch.dtype) -> list[str]:
    """The table's keys of these ops and this dtype, in the table's order."""
    kind = configs.dtype_class(dtype)
    return [key for key in table if key.partition("/")[0] in ops and key.rpartition("/")[2] == kind]
