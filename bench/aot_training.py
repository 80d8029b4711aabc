"""What `python -m bench aot` compiles for training: dropout in the forward kernels, and every backward kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bert_fast.kernels.activation import KERNEL_NAME
from bert_fast.kernels.attention import attention_triton
from bert_fast.kernels.attention_backward import attention_backward_triton
from bert_fast.kernels.embed_layer_norm import embed_layer_norm_triton
from bert_fast.kernels.embed_layer_norm_backward import embed_layer_norm_backward_triton
from bert_fast.kernels.gelu_layer_norm_backward import gelu_layer_norm_backward_triton
from bert_fast.kernels.grad_activation import grad_activation_triton
from bert_fast.kernels.grad_input import grad_input_act_triton, grad_input_triton
from bert_fast.kernels.grad_weight import grad_weight_triton
from bert_fast.kernels.linear_gelu import linear_gelu_pre_triton
from bert_fast.kernels.residual_layer_norm import residual_layer_norm_triton
from bert_fast.kernels.residual_layer_norm_backward import residual_layer_norm_backward_triton

from .aot_calls import DTYPES, Call, empty

ACTS = sorted(set(KERNEL_NAME.values()))
HALF, MANY, FEW = ("bf16", "fp16"), 16384, 128  # dtypes; rows


def seed() -> torch.Tensor:
    return empty(1, dtype=torch.int64)


def rows_of(dtype: str, rows: int, N: int) -> torch.Tensor:
    return empty(rows, N, dtype=DTYPES[dtype])


def up(dtype: str, rows: int, N: int, K: int, act: str) -> Call:
    def run() -> None:
        x, weight = rows_of(dtype, rows, K), rows_of(dtype, N, K)
        linear_gelu_pre_triton(x, weight, x.new_empty(N), empty(1), act)

    return Call("linear_gelu_pre", dtype, f"{rows} {N}x{K} {act}", run)


def data_gradient(dtype: str, rows: int, N: int, K: int, parts: int, add: torch.dtype | None, counted: bool) -> Call:
    def run() -> None:
        dy, weight = rows_of(dtype, rows, parts * N), rows_of(dtype, N, K)
        weights = [weight] * parts + [None] * (3 - parts)
        added = None if add is None else empty(rows, K, dtype=add)
        grad_input_triton(dy, *weights, added, empty(1) if counted else None)

    added = "" if add is None else f" + {add}".replace("torch.", "")
    return Call("grad_input", dtype, f"{rows} {parts}x{N}x{K}{added}{'' if counted else ' all'}", run)


def through_activation(dtype: str, rows: int, N: int, K: int, act: str) -> Call:
    def run() -> None:
        dy, weight, pre = rows_of(dtype, rows, N), rows_of(dtype, N, K), rows_of(dtype, rows, K)
        grad_input_act_triton(dy, weight, pre, act, empty(1))

    return Call("grad_input_act", dtype, f"{rows} {N}x{K} {act}", run)


def weight_gradient(dtype: str, rows: int, M: int, K: int) -> Call:
    def run() -> None:
        grad_weight_triton(rows_of(dtype, rows, M), rows_of(dtype, rows, K), empty(1), True)

    return Call("grad_weight", dtype, f"{rows} {M}x{K}", run)


def elementwise(dtype: str, act: str) -> Call:
    def run() -> None:
        grad_activation_triton(rows_of(dtype, 512, 3072), rows_of(dtype, 512, 3072), act, empty(1))

    return Call("grad_activation", dtype, act, run)


def dropped_attention(dtype: str, D: int, probs: bool, bias: bool) -> Call:
    def run() -> None:
        B, S, H = 4, 128, 12
        qkv = rows_of(dtype, B * S, 3 * H * D)
        added = qkv.new_empty(B, 1, 1, S) if bias else None
        maps = (empty(B * S), empty(B + 1), empty(B), empty(B))
        attention_triton(qkv, added, *maps, H, D**-0.5, probs, False, seed(), 4, 0.1)

    return Call("attention dropout", dtype, f"D={D}{' probs' * probs}{' bias' * bias}", run)


def attention_gradient(
    dtype: str, D: int, p: float = 0.1, context: bool = True, probs: bool = False, bias: str = "", uniform: bool = False
) -> Call:
    def run() -> None:
        B, S, H = 4, 128, 12
        qkv = rows_of(dtype, B * S, 3 * H * D)
        d_context, lse = qkv.new_empty(B * S, H * D), empty(H, B * S, dtype=torch.float32)
        added = {"keys": qkv.new_empty(B, 1, 1, S), "full": qkv.new_empty(B, H, S, S)}.get(bias)
        maps = (empty(B * S), empty(B + 1), empty(B), empty(B))
        d_probs = qkv.new_empty(B, H, S, S) if probs else None
        attention_backward_triton(
            d_context if context else None, d_probs, qkv, added, d_context, lse, *maps, H, D**-0.5, uniform, seed(), 4,
            p, bias == "full",
        )  # fmt: skip

    shape = f"D={D} p={p}{' context' * context}{' probs' * probs}{' bias ' * bool(bias)}{bias}{' uniform' * uniform}"
    return Call("attention_backward", dtype, shape, run)


def norm(dtype: str, N: int, autocast: bool = False, padded: bool = False, p: float = 0.1, params: bool = True) -> Call:
    def run() -> None:
        x = rows_of(dtype, 512, N)
        residual = empty(512, N, dtype=torch.float32) if autocast else x
        weight, token = residual.new_empty(N), empty(512) if padded else None
        drop = (seed(), 5, p)
        residual_layer_norm_triton(
            x, residual, weight, weight, 1e-12, token, empty(1), not padded, padded, *drop
        )  # fmt: skip
        residual_layer_norm_backward_triton(
            residual, padded, x, residual, weight, 1e-12, token, empty(1), *drop, params
        )  # fmt: skip

    shape = f"{N} p={p}{' autocast' * autocast}{' padded' * padded}{'' if params else ' frozen'}"
    return Call("residual_layer_norm_backward", dtype, shape, run)


def embeddings(dtype: str, N: int, ids: bool = True, padded: bool = False, typed: bool = True) -> Call:
    def run() -> None:
        B, S = 4, 128
        words, types, positions = (rows_of(dtype, n, N) for n in (30522, 2, 512))
        index = empty(B, S, dtype=torch.int64)
        given = (index, None) if ids else (None, words.new_empty(B, S, N))
        arange, weight = empty(1, S, dtype=torch.int64).expand(B, S), words.new_empty(N)
        tail = (empty(B * S), empty(1))
        tables, drop = (words, types if typed else None, positions), (seed(), 0, 0.1)
        given += (arange if typed else None, arange)
        embed_layer_norm_triton(*given, *tables, weight, weight, 1e-12, 0, *tail, not padded, padded, *drop, -1, True)
        h = words.new_empty(B * S, N)
        embed_layer_norm_backward_triton(h, padded, h, weight, 1e-12, *tail, *drop)

    shape = f"{N}{' ids' * ids}{' padded' * padded}{'' if typed else ' no types'}"
    return Call("embed_layer_norm_backward", dtype, shape, run)


def head_norm(dtype: str, N: int, act: str) -> Call:
    def run() -> None:
        x = rows_of(dtype, 512, N)
        gelu_layer_norm_backward_triton(x, x, x.new_empty(N), 1e-12, act)

    return Call("gelu_layer_norm_backward", dtype, f"{N} {act}", run)


def training_calls() -> Iterator[Call]:
    """Every kernel, tile entry, dtype and constexpr variant of training; the first call of an op stands for it."""
    for rows, dtype in itertools.product((MANY, FEW), HALF):
        yield up(dtype, rows, 3072, 768, ACTS[0])
        yield data_gradient(dtype, rows, 768, 768, 3, DTYPES[dtype], True)
        yield data_gradient(dtype, rows, 3072, 768, 1, DTYPES[dtype], True)
        yield data_gradient(dtype, rows, 768, 768, 1, None, True)
        yield data_gradient(dtype, rows, 768, 768, 3, torch.float32, False)
        yield through_activation(dtype, rows, 768, 3072, ACTS[0])
        yield from (weight_gradient(dtype, rows, M, K) for M, K in ((2304, 768), (768, 768), (3072, 768), (768, 3072)))
    for act in ACTS[1:]:
        yield up("bf16", MANY, 3072, 768, act)
        yield through_activation("bf16", MANY, 768, 3072, act)
    for rows, dtype in ((8192, "bf16"), (8192, "fp32")):
        yield data_gradient(dtype, rows, 768, 768, 3, DTYPES[dtype], True)
        yield weight_gradient(dtype, rows, 768, 768)
    for rows in (MANY, FEW):  # rows of 200 bytes: never by TMA
        yield up("bf16", rows, 100, 100, ACTS[0])
        yield data_gradient("bf16", rows, 100, 100, 3, torch.bfloat16, True)
        yield through_activation("bf16", rows, 100, 100, ACTS[0])
        yield weight_gradient("bf16", rows, 100, 100)
    yield from (elementwise(dtype, act) for dtype, act in itertools.product(("bf16", "fp16", "fp32"), ACTS))
    for D in (64, 32, 128, 80, 20):
        yield attention_gradient("bf16", D)
        yield dropped_attention("bf16", D, False, False)
    for dtype, D in itertools.product(DTYPES, (64, 128)):
        yield attention_gradient(dtype, D)
        yield attention_gradient(dtype, D, 0.0)
        yield attention_gradient(dtype, D, probs=True)
        yield dropped_attention(dtype, D, True, False)
    yield attention_gradient("bf16", 64, context=False, probs=True)
    yield from (attention_gradient("bf16", D, bias=bias) for D, bias in itertools.product((64, 32), ("keys", "full")))
    yield attention_gradient("bf16", 64, uniform=True)
    yield dropped_attention("bf16", 64, False, True)
    for dtype, N in itertools.product(("bf16", "fp16", "fp32"), (768, 384, 1024)):
        yield norm(dtype, N)
        yield embeddings(dtype, N)
        yield head_norm(dtype, N, ACTS[0])
    yield from (norm(dtype, 768, autocast=True) for dtype in HALF)
    yield norm("bf16", 768, padded=True)
    yield norm("bf16", 768, p=0.0)
    yield norm("bf16", 768, params=False)
    yield norm("bf16", 100)
    yield embeddings("bf16", 768, ids=False)
    yield embeddings("bf16", 768, padded=True)
    yield embeddings("bf16", 768, typed=False)
    yield from (head_norm("bf16", 768, act) for act in ACTS[1:])
