"""Each op at BERT's shapes: against torch's composite (as transformers' eager writes it), and SDPA for attention.

An op is held against `<op>_ref` in float64 before it is timed, by the error rule of docs/design.md. Times on a GPU are
of CUDA-graph replays, so kernels and not launches; inputs that fit in L2 may be read from there. The ceilings are
measured in the same run; a kernel's share is of the one that bounds it, by its formula below.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bert_fast.kernels.pack import pack

from . import timing

OPS = ("pack", "embed_layer_norm", "qkv_linear", "attention", "linear", "residual_layer_norm", "linear_gelu")
OPS += ("gelu_layer_norm", "pool")
EPS = 1e-12
INTENSITY = 32.0  # FLOP a byte above which an op counts as compute-bound where no ceiling is measured


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    seq: int
    hidden: int
    inner: int
    heads: int
    words: int = 30522


SHAPES = {
    "cuda": (
        Shape("base 32x512", 32, 512, 768, 3072, 12),
        Shape("base 1x128", 1, 128, 768, 3072, 12),
        Shape("minilm 256x128", 256, 128, 384, 1536, 12),
    ),
    "cpu": (Shape("minilm 4x128", 4, 128, 384, 1536, 12),),
}


@dataclass(frozen=True)
class Case:
    """One call of an op, its peers, and what it must move and compute at least."""

    op: str
    shape: str
    args: tuple[Any, ...]
    bytes: float
    flops: float = 0.0
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    rows: int | None = None  # rows of the outputs that are defined (None: all)

    def ours(self) -> Any:
        return self.function("")(*self.args)

    def function(self, suffix: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"bert_fast.kernels.{self.op}"), self.op + suffix)


def cases(op: str, s: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All cases of `op` at one model's shape; T = batch * seq rows."""
    g = torch.Generator(device).manual_seed(0)

    def rand(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=g, device=device) * scale).to(dtype)

    T, H, inner, e = s.batch * s.seq, s.hidden, s.inner, dtype.itemsize
    if op in ("linear", "linear_gelu", "qkv_linear"):
        # e (T K + N K + T N) bytes, 2 T N K FLOP; qkv_linear is three of them over one x
        for K, N in {"linear": ((H, H), (inner, H)), "linear_gelu": ((H, inner),), "qkv_linear": ((H, H),)}[op]:
            x, ws, bs = rand(T, K), [rand(N, K, scale=K**-0.5) for _ in range(3)], [rand(N) for _ in range(3)]
            w, b, n = ws[0], bs[0], 3 if op == "qkv_linear" else 1
            peer, args = {
                "linear": (lambda x=x, w=w, b=b: F.linear(x, w, b), (x, w, b, None)),
                "linear_gelu": (lambda x=x, w=w, b=b: F.gelu(F.linear(x, w, b)), (x, w, b, None, "gelu")),
                "qkv_linear": (
                    lambda x=x, ws=ws, bs=bs: [F.linear(x, w, b) for w, b in zip(ws, bs, strict=True)],
                    (x, *ws, *bs, None),
                ),
            }[op]
            moved = e * (T * K + n * N * K + n * T * N)
            yield Case(op, f"{s.name} {K}->{n * N}", args, moved, 2 * n * T * N * K, {"torch": peer})
    elif op == "attention":
        yield from attention_cases(s, device, dtype, rand)
    elif op == "pack":  # the mask read, token, cu_seqlens, kv_len and prefix written
        mask = ragged_mask(s, device)
        yield Case(op, f"{s.name} ragged", (mask, True), T * 8 + 4 * (T + 3 * s.batch + 1))
    elif op == "embed_layer_norm":  # three indices and one word row read a token, one row written; small tables cached
        ids = torch.randint(0, s.words, (s.batch, s.seq), generator=g, device=device)
        types = torch.zeros_like(ids)
        at = torch.arange(s.seq, device=device).expand(s.batch, -1)
        tables, affine = (rand(s.words, H), rand(2, H), rand(s.seq, H)), (rand(H), rand(H))
        token = torch.arange(T, device=device, dtype=torch.int32)

        def embed() -> torch.Tensor:
            h = F.embedding(ids, tables[0]) + F.embedding(types, tables[1]) + F.embedding(at, tables[2])
            return F.layer_norm(h, (H,), *affine, EPS)

        args = (ids, None, types, at, *tables, *affine, EPS, -1, token, None, True, False)
        yield Case(op, s.name, args, T * (3 * 8 + 2 * H * e), peers={"torch": embed})
    elif op == "residual_layer_norm":  # two rows read, one written
        x, r, w, b = rand(T, H), rand(T, H), rand(H), rand(H)
        args = (x, r, w, b, EPS, None, None, True, False)
        peer = {"torch": lambda: F.layer_norm(x + r, (H,), w, b, EPS)}
        yield Case(op, f"{s.name} {H}", args, 3 * T * H * e, peers=peer)
    elif op == "gelu_layer_norm":  # one row read, one written
        x, w, b = rand(T, H), rand(H), rand(H)
        peer = {"torch": lambda: F.layer_norm(F.gelu(x), (H,), w, b, EPS)}
        yield Case(op, f"{s.name} {H}", (x, w, b, EPS, "gelu"), 2 * T * H * e, peers=peer)
    elif op == "pool":  # the first tokens and the weight read, 2 B H H FLOP
        x, w, b = rand(s.batch, s.seq, H), rand(H, H, scale=H**-0.5), rand(H)
        peer = {"torch": lambda: torch.tanh(F.linear(x[:, 0], w, b))}
        yield Case(op, s.name, (x, w, b), e * (2 * s.batch * H + H * H), 2 * s.batch * H * H, peer)


def ragged_mask(s: Shape, device: torch.device) -> torch.Tensor:
    """(B, S), lengths uniform in 1..S, the first one full."""
    lengths = torch.randint(1, s.seq + 1, (s.batch, 1), generator=torch.Generator().manual_seed(0))
    lengths[0] = s.seq
    return (torch.arange(s.seq) < lengths).long().to(device)


def attention_cases(s: Shape, device: torch.device, dtype: torch.dtype, rand: Callable) -> Iterator[Case]:
    """e (3 + 1) n H bytes, with probabilities e B heads S S more; 4 H sum(q_len kv_len) FLOP."""
    B, S, H, D, e = s.batch, s.seq, s.hidden, s.hidden // s.heads, dtype.itemsize
    qkv = rand(B * S, 3 * H)
    q, k, v = qkv.view(B, S, 3, s.heads, D).permute(2, 0, 3, 1, 4)
    scale = D**-0.5

    def eager(probs: bool) -> Any:
        p = torch.softmax(q @ k.transpose(2, 3) * scale, -1)
        context = (p @ v).transpose(1, 2).reshape(B * S, H)
        return (context, p) if probs else context

    def sdpa(backend: SDPBackend | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(B * S, H)

    fused = {"sdpa": sdpa}
    if device.type == "cuda" and dtype != torch.float32:
        fused["cudnn"] = lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
    ones, ragged = torch.ones(B, S, device=device, dtype=torch.long), ragged_mask(s, device)
    for name, mask, probs in (("", ones, False), (" probs", ones, True), (" ragged", ragged, False)):
        if B == 1 and mask is ragged:
            continue
        lengths = mask.sum(1)
        n, pairs = int(lengths.sum()), int(lengths.square().sum())
        keep = mask.bool()[:, None, None]
        peers = {"torch": lambda p=probs: eager(p)} | ({} if probs else fused)
        if mask is ragged:
            peers = {"sdpa": lambda m=keep: sdpa(mask=m)}
        args = (qkv, None, *pack(mask, True), s.heads, scale, probs, False)
        moved = e * (4 * n * H + (B * s.heads * S * S if probs else 0))
        yield Case("attention", s.name + name, args, moved, 4 * H * pairs, peers, n if mask is ragged else None)


def check(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """-> (error, limit): relative L2 distance to the reference in float64; integer outputs must be equal."""

    def cast(to: torch.dtype) -> tuple[Any, ...]:
        return tuple(a.to(to) if torch.is_tensor(a) and a.is_floating_point() else a for a in case.args)

    def outputs(found: Any) -> list[torch.Tensor]:
        found = found if isinstance(found, tuple) else (found,)
        T = case.args[0].shape[0]
        used = [t if case.rows is None else t[: case.rows] if t.shape[0] == T else t[..., : case.rows] for t in found]
        return [t for t in used if t.numel()]

    ours, low = outputs(case.ours()), outputs(case.function("_ref")(*case.args))
    if not ours[0].is_floating_point():
        return float(any(not torch.equal(a, b) for a, b in zip(ours, low, strict=True))), 0.0
    truth = outputs(case.function("_ref")(*cast(torch.float64)))
    worst = (0.0, 4 * torch.finfo(dtype).eps)
    for o, r, t in zip(ours, low, truth, strict=True):
        norm = t.norm().item()
        error, limit = (((x.double() - t).norm().item()) / norm for x in (o, r))
        limit = 1.25 * limit + 4 * torch.finfo(dtype).eps
        if not error / limit <= worst[0] / worst[1]:  # NaN is the worst
            worst = (error, limit)
    return worst


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a copy (read + written), FLOP a second of an 8192^3 product; on a GPU only."""
    if device.type != "cuda":
        return {}
    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
    times = timing.in_turns(calls, device, rounds=5)
    moved, work = 2 * source.numel() * source.element_size(), 2 * 8192**3
    return {"copy": moved / times["copy"].median * 1e3, "gemm": work / times["gemm"].median * 1e3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, action="append", help="only this op; repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<device>-kernels-<date>.json")


def run(args: argparse.Namespace) -> int:
    device = timing.pick_device(args.device)
    on_cpu = device.type == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    out = args.out or timing.result_file(f"kernels-{str(dtype)[6:]}", device)
    env = timing.environment(device, timing.command_line())
    print(f"{str(dtype)[6:]}, {env['device']}, torch {env['torch']}, triton {env['triton']}")
    print(f"record: {out.name}\n{timing.busy(env)}", end="")
    top = ceilings(device, dtype)
    if top:
        print(f"ceilings: copy {top['copy'] / 1e12:.2f} TB/s, 8192^3 GEMM {top['gemm'] / 1e12:.0f} TFLOP/s")
    names = ["torch", "sdpa", *([] if on_cpu else ["cudnn"]), "ours"]
    columns = "".join(f"{name + ' us':>12}" for name in names)
    print(f"\n{'op':<20}{'shape':<28}{columns}          rate  share  speed-up  check")
    rows, failed = [], False
    with torch.no_grad():
        for op in args.op or OPS:
            for shape in SHAPES[device.type]:
                for case in cases(op, shape, device, dtype):
                    rows.append(measure(case, device, dtype, top))
                    failed |= not rows[-1]["ok"]
                    show(rows[-1], names)
    timing.save(out, env, rows, dtype=str(dtype)[6:], ceilings=top)
    return int(failed)


def measure(case: Case, device: torch.device, dtype: torch.dtype, top: dict[str, float]) -> dict[str, Any]:
    error, limit = check(case, dtype)
    line: dict[str, Any] = dict(op=case.op, shape=case.shape, error=error, limit=limit, ok=error <= limit)
    line |= dict(bytes=case.bytes, flops=case.flops, ms={}, speed_up=None, rate=None, share=None)
    if not line["ok"]:
        return line
    times = timing.in_turns({**case.peers, "ours": case.ours}, device, rounds=9, graph=True)
    seconds = times["ours"].median / 1e3
    line["ms"] = {name: asdict(t) for name, t in times.items()}
    if case.peers:
        line["speed_up"] = min(t.median for n, t in times.items() if n != "ours") / times["ours"].median
    compute_bound = case.flops / case.bytes > (top["gemm"] / top["copy"] if top else INTENSITY)
    line["bound"] = "gemm" if compute_bound else "copy"
    line["rate"] = (case.flops if compute_bound else case.bytes) / seconds
    line["share"] = line["rate"] / top[line["bound"]] if top else None
    return line


def show(line: dict[str, Any], names: list[str]) -> None:
    text = f"{line['op']:<20}{line['shape']:<28}"
    for name in names:
        text += f"{line['ms'][name]['median'] * 1e3:>12.1f}" if name in line["ms"] else f"{'-':>12}"
    if not line["ok"]:
        print(text + f"   FAILED: error {line['error']:.2e} > {line['limit']:.2e}", flush=True)
        return
    rate = line["rate"] / 1e9
    big, unit = rate >= 1e3, "FLOP/s" if line["bound"] == "gemm" else "B/s"
    text += f"{rate / 1e3 if big else rate:>7.3g} {('T' if big else 'G') + unit:<7}"
    text += f"{line['share']:>6.0%}" if line["share"] else f"{'-':>6}"
    print(text + (f"{line['speed_up']:>9.2f}x" if line["speed_up"] else f"{'-':>10}") + "  ok", flush=True)
