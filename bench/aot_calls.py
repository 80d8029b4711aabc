"""What `python -m bench aot` compiles: calls of the kernels' launchers, on meta tensors, at BERT's shapes.

Tiles come from kernels/*.json through the launchers; sizes of 100 stand for those that are no multiple of 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bert_fast.kernels import configs
from bert_fast.kernels.activation import KERNEL_NAME
from bert_fast.kernels.attention import attention_triton
from bert_fast.kernels.attention_heads import attention_heads_triton
from bert_fast.kernels.embed_layer_norm import embed_layer_norm_triton
from bert_fast.kernels.first_rows import first_rows_triton
from bert_fast.kernels.first_token_attention import first_token_attention_triton
from bert_fast.kernels.fold_vectors import fold_vectors_triton
from bert_fast.kernels.folded_linear import folded_linear_triton
from bert_fast.kernels.gelu_layer_norm import gelu_layer_norm_triton
from bert_fast.kernels.linear import linear_triton
from bert_fast.kernels.linear_gelu import linear_gelu_triton
from bert_fast.kernels.linear_layer_norm import linear_layer_norm_triton
from bert_fast.kernels.linear_to_stream import linear_to_stream_triton, partials, stream_reason
from bert_fast.kernels.normalise import normalise_triton
from bert_fast.kernels.pack import pack_triton
from bert_fast.kernels.pool import pool_triton
from bert_fast.kernels.qkv_linear import qkv_linear_triton
from bert_fast.kernels.residual_layer_norm import residual_layer_norm_triton
from bert_fast.kernels.runtime import dependent_launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
INTEGERS = {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


@dataclass(frozen=True)
class Call:
    """A call of a launcher; with dtype "tf32", fp32 tensors where torch allows TF32."""

    op: str
    dtype: str
    shape: str
    run: Callable[[], Any]


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gemm(op: str, dtype: str, rows: int, N: int, K: int, act: str = "none", optional: bool = True) -> Call:
    """`optional`: with a bias and a row count."""

    def run() -> None:
        x, parts = empty(rows, K, dtype=DTYPES[dtype]), 3 if op == "qkv_linear" else 1
        weights = [x.new_empty(N, K) for _ in range(parts)]
        biases = [x.new_empty(N) if optional else None for _ in range(parts)]
        launch = {"linear": linear_triton, "linear_gelu": linear_gelu_triton, "qkv_linear": qkv_linear_triton}[op]
        launch(x, *weights, *biases, empty(1) if optional else None, *([act] if op == "linear_gelu" else []))

    return Call(op, dtype, f"{configs.row_class(rows)} {N}x{K} {act}{'' if optional else ' no bias'}", run)


def keys_and_values(dtype: str, rows: int, N: int, K: int) -> Call:
    """qkv_linear without the query, as in the last layer of a first-token head."""

    def run() -> None:
        x, p = empty(rows, K, dtype=DTYPES[dtype]), empty(N, dtype=DTYPES[dtype])
        weight = x.new_empty(N, K)
        qkv_linear_triton(x, None, weight, weight, None, p, p, empty(1))

    return Call("qkv_linear", dtype, f"{configs.row_class(rows)} {N}x{K} two", run)


def product_layer_norm(dtype: str, rows: int, N: int, K: int) -> Call:
    def run() -> None:
        x, p = empty(rows, K, dtype=DTYPES[dtype]), empty(N, dtype=DTYPES[dtype])
        weight, residual = x.new_empty(N, K), x.new_empty(rows, N)
        linear_layer_norm_triton(x, weight, p, residual, p, p, 1e-12, None, empty(1), True, False)

    return Call("linear_layer_norm", dtype, f"{configs.row_class(rows)} {N}x{K}", run)


def fold(parts: int, N: int, K: int) -> Call:
    def run() -> None:
        gamma, absent = empty(K, dtype=torch.bfloat16), [None] * (3 - parts)
        weights, biases = [gamma.new_empty(N, K)] * parts, [gamma.new_empty(N)] * parts
        fold_vectors_triton(*weights, *absent, *biases, *absent, gamma, gamma)

    return Call("fold_vectors", "bf16", f"{parts}x{N}x{K}", run)


def stream(rows: int, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(g, sums) of a folded LayerNorm over N columns."""
    return empty(rows, N, dtype=torch.bfloat16), empty(2, partials(N), rows, dtype=torch.float32)


def folded(parts: int, N: int, K: int, act: str = "none") -> Call:
    def run() -> None:
        g, sums = stream(16384, K)
        if stream_reason(g.dtype, g.device):  # a target without this tile: the launcher refuses
            return
        u, absent = empty(parts * N, dtype=torch.float32), [None] * (3 - parts)
        folded_linear_triton(g, sums, *[g.new_empty(N, K)] * parts, *absent, u, u, 1e-12, act, empty(1))

    return Call("folded_linear", "bf16", f"{parts}x{N}x{K} {act}", run)


def to_stream(N: int, K: int, from_stream: bool) -> Call:
    def run() -> None:
        (residual, sums), x = stream(16384, N), empty(16384, K, dtype=torch.bfloat16)
        if stream_reason(x.dtype, x.device):
            return
        weight, p = x.new_empty(N, K), x.new_empty(N)
        of_residual = (sums, p, p) if from_stream else (None, None, None)
        linear_to_stream_triton(x, weight, p, residual, *of_residual, p, 1e-12, empty(1))

    return Call("linear_to_stream", "bf16", f"{N}x{K}{' from stream' * from_stream}", run)


def end_of_stream(N: int, padded: bool) -> Call:
    def run() -> None:
        (g, sums), p = stream(512, N), empty(N, dtype=torch.bfloat16)
        normalise_triton(g, sums, p, p, 1e-12, empty(512) if padded else None, empty(1), not padded, padded)

    return Call("normalise", "bf16", f"{N}{' padded' if padded else ' rows'}", run)


def dependent(call: Call) -> Call:
    """The same call with dependent launch on, where the target has it."""

    def run() -> None:
        with dependent_launches(torch.device("meta")):
            call.run()

    return Call(call.op, call.dtype, f"{call.shape} dependent", run)


def attention(dtype: str, D: int, probs: bool, bias: str = "", S: int = 128, uniform: bool = False) -> Call:
    def run() -> None:
        B, H = 4, 12
        qkv = empty(B * S, 3 * H * D, dtype=DTYPES[dtype])
        added = {"full": qkv.new_empty(B, H, S, S), "keys": qkv.new_empty(B, 1, 1, S)}.get(bias)
        maps = (empty(B * S), empty(B + 1), empty(B), empty(B))
        attention_triton(qkv, added, *maps, H, D**-0.5, probs, uniform)

    shape = f"D={D} S={S}{' bias ' * bool(bias)}{bias}{' uniform' * uniform}"
    return Call("attention_probs" if probs else "attention", dtype, shape, run)


def attention_heads(
    dtype: str, D: int, probs: bool, mask: str = "", S: int = 128, heads: int = 12, p: float = 0.0
) -> Call:
    """On views as transformers hands them; S: of the queries, of 128 keys."""

    def run() -> None:
        B, H, keys = 4, 12, 128
        q, k = (empty(B, n, h, D, dtype=DTYPES[dtype]).transpose(1, 2) for n, h in ((S, H), (keys, heads)))
        given = {"keep": empty(B, 1, S, keys, dtype=torch.bool), "add": q.new_empty(B, 1, S, keys)}.get(mask)
        seed = empty(1, dtype=torch.int64) if p else None
        attention_heads_triton(q, k, k, given, mask == "causal", D**-0.5, probs, seed, 0, p)

    shape = f"D={D} S={S}{' probs' * probs}{' ' * bool(mask)}{mask}{' grouped' * (heads < 12)}{' dropout' * (p > 0)}"
    return Call("attention_heads", dtype, shape, run)


def first_token_attention(dtype: str, D: int, uniform: bool = False) -> Call:
    def run() -> None:
        B, S, H = 4, 128, 12
        q = empty(B, H * D, dtype=DTYPES[dtype])
        kv = q.new_empty(B * S, 2 * H * D)
        first_token_attention_triton(q, kv, empty(B + 1), empty(B), H, D**-0.5, uniform)

    return Call("first_token_attention", dtype, f"D={D}{' uniform' * uniform}", run)


def layer_norm(dtype: str, N: int, rows: bool = True, padded: bool = False, counted: bool = True) -> Call:
    def run() -> None:
        x, p = empty(512, N, dtype=DTYPES[dtype]), empty(N, dtype=DTYPES[dtype])
        token, n_rows = empty(512) if padded else None, empty(1) if counted else None
        residual_layer_norm_triton(x, x, p, p, 1e-12, token, n_rows, rows, padded)

    shape = f"{N}{' rows' * rows}{' padded' * padded}{'' if counted else ' all'}"
    return Call("residual_layer_norm", dtype, shape, run)


def act_layer_norm(dtype: str, N: int, act: str) -> Call:
    def run() -> None:
        p = empty(N, dtype=DTYPES[dtype])
        gelu_layer_norm_triton(p.new_empty(512, N), p, p, 1e-12, act)

    return Call("gelu_layer_norm", dtype, f"{N} {act}", run)


def embed(
    dtype: str, N: int, ids: torch.dtype | None, padded: bool = False, counted: bool = True, typed: bool = True
) -> Call:
    def run() -> None:
        B, S = 4, 128
        words, types, positions = (empty(n, N, dtype=DTYPES[dtype]) for n in (30522, 2, 512))
        index = empty(B, S, dtype=ids) if ids else None
        given = None if ids else words.new_empty(B, S, N)
        arange, p = empty(1, S, dtype=torch.int64).expand(B, S), words.new_empty(N)
        n_rows = empty(1) if counted else None
        tables = (words, types if typed else None, positions, p, p, 1e-12, 0)
        type_ids = arange if typed else None
        embed_layer_norm_triton(index, given, type_ids, arange, *tables, empty(B * S), n_rows, True, padded)

    shape = f"{N} {INTEGERS[ids] if ids else 'embeds'}{' padded' * padded}{'' if counted else ' all'}"
    shape += "" if typed else " no types"
    return Call("embed_layer_norm", dtype, shape, run)


def first_rows(dtype: str, N: int) -> Call:
    def run() -> None:
        first_rows_triton(empty(512, N, dtype=DTYPES[dtype]), empty(512), empty(5), empty(4))

    return Call("first_rows", dtype, str(N), run)


def pool(dtype: str, N: int) -> Call:
    def run() -> None:
        weight = empty(N, N, dtype=DTYPES[dtype])
        pool_triton(weight.new_empty(4, 128, N), weight, weight.new_empty(N))

    return Call("pool", dtype, str(N), run)


def pack(dtype: torch.dtype, skip: bool, B: int = 4, S: int = 128, bucket: bool = False) -> Call:
    name = str(dtype).removeprefix("torch.")
    shape = f"{B}x{S} {'skip' if skip else 'exact'}{' bucket' * bucket}"
    true = empty(2) if bucket else None
    return Call("pack", name, shape, lambda: pack_triton(empty(B, S, dtype=dtype), skip, true) and None)


def calls() -> Iterator[Call]:
    """Every kernel, tile entry, dtype and constexpr variant that ships; the first call of an op stands for it."""
    acts = sorted(set(KERNEL_NAME.values()))
    last = configs.ROW_CLASSES[-1]
    for rows, dtype in itertools.product((2 * last, *configs.ROW_CLASSES), ("bf16", "fp16")):
        yield gemm("qkv_linear", dtype, rows, 768, 768)
        yield gemm("linear_gelu", dtype, rows, 3072, 768, acts[0])
        yield gemm("linear", dtype, rows, 768, 768)
        yield product_layer_norm(dtype, rows, 768, 768)
        yield product_layer_norm(dtype, rows, 768, 3072)
        yield keys_and_values(dtype, rows, 768, 768)
    for rows in (2 * last, 128):
        yield from (gemm("linear_gelu", "bf16", rows, 3072, 768, act) for act in acts[1:])
        for op in ("linear", "qkv_linear", "linear_gelu"):
            act = acts[0] if op == "linear_gelu" else "none"
            yield gemm(op, "bf16", rows, 768, 768, act, optional=False)
            yield gemm(op, "bf16", rows, 100, 100, act)  # rows of 200 bytes: never by TMA
    for op, dtype, size in itertools.product(("linear", "qkv_linear", "linear_gelu"), ("fp32", "tf32"), (768, 100)):
        yield gemm(op, dtype, last, size, size, acts[0] if op == "linear_gelu" else "none")
    for probs in (False, True):
        for D, bias in itertools.product((64, 32, 128, 80, 20), ("", "full")):
            yield attention("bf16", D, probs, bias)
        for D, dtype, bias in itertools.product((64, 128), DTYPES, ("", "full")):
            yield attention(dtype, D, probs, bias)
        yield attention("bf16", 64, probs, "keys")
        yield from (attention("bf16", D, probs, "full", S=33) for D in (64, 32))
        yield attention("bf16", 64, probs, S=1)
        yield attention("bf16", 64, probs, uniform=True)
    for mask, probs, D in itertools.product(("", "keep", "add", "causal"), (False, True), (64, 128)):
        yield attention_heads("bf16", D, probs, mask)
    for mask, probs, D in itertools.product(("", "keep"), (False, True), (64, 128)):
        yield attention_heads("bf16", D, probs, mask, p=0.1)
        yield attention_heads("fp32", D, probs, mask)
    for mask, D in itertools.product(("keep", "causal"), (64, 128)):
        yield attention_heads("fp16", D, True, mask, heads=4)
        yield attention_heads("tf32", D, False, mask, heads=4)
    yield from (attention_heads("bf16", D, probs, "keep") for D, probs in itertools.product((32, 80), (False, True)))
    yield attention_heads("bf16", 128, False, "", S=1, heads=4)  # one token of a generation
    for dtype, D in itertools.product(("bf16", "fp16", "fp32"), (64, 32, 128, 20)):
        yield first_token_attention(dtype, D)
    yield first_token_attention("bf16", 64, uniform=True)
    for dtype, N in itertools.product(("bf16", "fp16", "fp32"), (768, 384, 1024)):
        yield from (layer_norm(dtype, N, padded=padded) for padded in (False, True))
        yield from (embed(dtype, N, torch.int64, padded) for padded in (False, True))
        yield act_layer_norm(dtype, N, acts[0])
    yield layer_norm("bf16", 768, rows=False, padded=True, counted=False)
    yield layer_norm("bf16", 100, padded=True)
    yield embed("bf16", 768, torch.int32, counted=False)
    yield embed("bf16", 768, None, padded=True)
    yield embed("bf16", 768, torch.int64, typed=False)
    yield from (act_layer_norm("bf16", 768, act) for act in ("none", *acts))
    yield from (pool(dtype, N) for dtype, N in itertools.product(DTYPES, (768, 100)))
    yield from (first_rows(dtype, 768) for dtype in ("bf16", "fp16", "fp32"))
    masks = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16, torch.bfloat16)
    yield from (pack(dtype, skip) for dtype, skip in itertools.product(masks, (True, False)))
    yield pack(torch.int64, True, 2048, 2048)
    yield pack(torch.int64, False, 1, 33)
    yield from (pack(torch.bool, skip, bucket=True) for skip in (True, False))
    for hidden, inner in ((768, 3072), (1024, 4096), (384, 1536)):
        yield from (fold(3, hidden, hidden), fold(1, inner, hidden))
        yield from (folded(3, hidden, hidden), folded(1, inner, hidden, acts[0]))
        yield from (to_stream(hidden, K, other) for K in (hidden, inner) for other in (True, False))
        yield from (end_of_stream(hidden, padded) for padded in (False, True))
    yield from (folded(1, 3072, 768, act) for act in acts[1:])
    folds = (fold(3, 768, 768), folded(3, 768, 768), to_stream(768, 768, True), end_of_stream(768, True))
    yield from (dependent(call) for call in folds)
    for rows in configs.ROW_CLASSES[:2]:  # the sizes that BertModel's graphs launch so
        for op, N in (("qkv_linear", 768), ("linear_gelu", 3072)):
            yield dependent(gemm(op, "bf16", rows, N, 768, acts[0] if op == "linear_gelu" else "none"))
        yield from (dependent(product_layer_norm("bf16", rows, 768, K)) for K in (768, 3072))
    yield from (dependent(call) for call in (attention("bf16", 64, False), attention("bf16", 64, True)))
    yield from (dependent(call) for call in (embed("bf16", 768, torch.int64), pool("bf16", 768)))
    yield from (dependent(call) for call in (first_rows("bf16", 768), first_token_attention("bf16", 64)))
    yield from (dependent(pack(torch.bool, skip, bucket=True)) for skip in (True, False))
