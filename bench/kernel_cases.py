"""What `bench kernels` runs: each op at BERT's shapes, its peers, and the bytes and FLOP it needs by formula.

Matrix products count 2 FLOP an element of the inner dimension. Elementwise work counts as many operations a row
element as the formula has: it places an op in the roofline and bounds nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bert_fast.kernels.pack import pack

OPS = ("pack", "embed_layer_norm", "qkv_linear", "attention", "linear", "residual_layer_norm", "linear_layer_norm")
OPS += ("linear_gelu", "gelu_layer_norm", "first_rows", "first_token_attention", "attention_heads", "pool")
FOLDED_OPS = ("fold_vectors", "linear_to_stream", "folded_linear", "normalise")  # cases in folded_cases.py
TRAINING_OPS = ("linear_gelu_pre", "attention_backward", "grad_input", "grad_input_act", "grad_weight")
TRAINING_OPS += ("grad_activation", "residual_layer_norm_backward", "gelu_layer_norm_backward")
TRAINING_OPS += ("embed_layer_norm_backward",)  # cases in training_cases.py
OPS += ("encoder_small", *FOLDED_OPS, *TRAINING_OPS)  # cases of encoder_small in encoder_small_cases.py
MODULES = {"linear_gelu_pre": "linear_gelu", "grad_input_act": "grad_input"}  # of ops that share a file
NORM_EPS = 1e-12
NORM_FLOPS = 8  # sum, centre, square and sum, scale, weight, bias: operations an element
GELU_FLOPS = 8  # erf counted as 4


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    seq: int
    hidden: int
    inner: int
    heads: int
    words: int = 30522

    @property
    def rows(self) -> int:
        return self.batch * self.seq


SHAPES = {
    "cuda": (
        Shape("base 32x512", 32, 512, 768, 3072, 12),
        Shape("base 8x128", 8, 128, 768, 3072, 12),
        Shape("base 1x128", 1, 128, 768, 3072, 12),
        Shape("large 32x512", 32, 512, 1024, 4096, 16),
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

    @property
    def label(self) -> str:
        return f"{self.op} {self.shape}"

    def ours(self) -> Any:
        return self.function("")(*self.args)

    def function(self, suffix: str) -> Callable[..., Any]:
        """The op, or a body of it; the reference of most backward ops is their CPU body, autograd of the forward's."""
        module = importlib.import_module(f"bert_fast.kernels.{MODULES.get(self.op, self.op)}")
        if suffix == "_ref" and not hasattr(module, self.op + suffix):
            suffix = "_cpu"
        return getattr(module, self.op + suffix)


def cases(op: str, s: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All cases of `op` at one model's shape; T = batch * seq rows."""
    g = torch.Generator().manual_seed(0)  # on the host: the same numbers for every device

    def rand(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=g) * scale).to(device=device, dtype=dtype)

    if op == "encoder_small":
        from . import encoder_small_cases

        yield from encoder_small_cases.cases(op, s, device, dtype, rand)
        return
    if op in FOLDED_OPS:
        from . import folded_cases  # which takes Case and Shape from here

        yield from folded_cases.cases(op, s, device, dtype, rand)
        return
    if op in TRAINING_OPS:
        from . import training_cases

        yield from training_cases.cases(op, s, device, dtype, rand)
        return
    T, H, inner, e = s.rows, s.hidden, s.inner, dtype.itemsize
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
    elif op == "attention_heads":
        yield from attention_heads_cases(s, device, dtype, rand)
    elif op == "pack":  # the mask read, token, cu_seqlens, kv_len and prefix written
        mask = ragged_mask(s, device)
        yield Case(op, f"{s.name} ragged", (mask, True), T * 8 + 4 * (T + 3 * s.batch + 1))
    elif op == "embed_layer_norm":  # three indices and one word row read a token, one row written; small tables cached
        ids = torch.randint(0, s.words, (s.batch, s.seq), generator=g).to(device)
        types = torch.zeros_like(ids)
        at = torch.arange(s.seq, device=device).expand(s.batch, -1)
        tables, affine = (rand(s.words, H), rand(2, H), rand(s.seq, H)), (rand(H), rand(H))
        token = torch.arange(T, device=device, dtype=torch.int32)

        def embed() -> torch.Tensor:
            h = F.embedding(ids, tables[0]) + F.embedding(types, tables[1]) + F.embedding(at, tables[2])
            return F.layer_norm(h, (H,), *affine, NORM_EPS)

        args = (ids, None, types, at, *tables, *affine, NORM_EPS, -1, token, None, True, False)
        yield Case(op, s.name, args, T * (3 * 8 + 2 * H * e), (2 + NORM_FLOPS) * T * H, {"torch": embed})
    elif op == "residual_layer_norm":  # two rows read, one written
        x, r, w, b = rand(T, H), rand(T, H), rand(H), rand(H)
        args = (x, r, w, b, NORM_EPS, None, None, True, False)
        peers = {"torch": lambda: F.layer_norm(x + r, (H,), w, b, NORM_EPS)} | liger(x, r, w, b)
        yield Case(op, f"{s.name} {H}", args, 3 * T * H * e, (1 + NORM_FLOPS) * T * H, peers)
    elif op == "linear_layer_norm":  # the product between its two launches counts for nothing
        for K in (H, inner):
            x, r, m, p, w, b = rand(T, K), rand(T, H), rand(H, K, scale=K**-0.5), rand(H), rand(H), rand(H)
            args = (x, m, p, r, w, b, NORM_EPS, None, None, True, False)

            def composite(x=x, m=m, p=p, r=r, w=w, b=b) -> torch.Tensor:
                return F.layer_norm(F.linear(x, m, p) + r, (H,), w, b, NORM_EPS)

            work = 2 * T * H * K + (1 + NORM_FLOPS) * T * H
            yield Case(op, f"{s.name} {K}->{H}", args, e * (T * K + H * K + 2 * T * H), work, {"torch": composite})
    elif op == "first_rows":  # one row a sequence read and written
        rows, mask = rand(T, H), ragged_mask(s, device)
        token, cu_seqlens, kv_len, _ = pack(mask, True)
        starts = cu_seqlens[:-1].long()
        peers = {"torch": lambda: rows[starts]}
        yield Case(op, f"{s.name} {H}", (rows, token, cu_seqlens, kv_len), 2 * s.batch * H * e, peers=peers)
    elif op == "first_token_attention":  # all keys and values read once, one query a sequence: 4 H FLOP a key
        q, kv = rand(s.batch, H), rand(T, 2 * H)
        _, cu_seqlens, kv_len, _ = pack(torch.ones(s.batch, s.seq, device=device, dtype=torch.long), True)
        args = (q, kv, cu_seqlens, kv_len, s.heads, (H // s.heads) ** -0.5, False)
        k, v = kv.view(s.batch, s.seq, 2, s.heads, -1).permute(2, 0, 3, 1, 4)
        one = q.view(s.batch, s.heads, 1, -1)
        peers = {"sdpa": lambda: F.scaled_dot_product_attention(one, k, v).reshape(s.batch, H)}
        yield Case(op, f"{s.name} {H}", args, 2 * (T + s.batch) * H * e, 4 * T * H, peers)
    elif op == "gelu_layer_norm":  # one row read, one written
        x, w, b = rand(T, H), rand(H), rand(H)
        peers = {"torch": lambda: F.layer_norm(F.gelu(x), (H,), w, b, NORM_EPS)}
        work = (GELU_FLOPS + NORM_FLOPS) * T * H
        yield Case(op, f"{s.name} {H}", (x, w, b, NORM_EPS, "gelu"), 2 * T * H * e, work, peers)
    elif op == "pool":  # the first tokens and the weight read, 2 B H H FLOP
        x, w, b = rand(s.batch, s.seq, H), rand(H, H, scale=H**-0.5), rand(H)
        peers = {"torch": lambda: torch.tanh(F.linear(x[:, 0], w, b))}
        yield Case(op, s.name, (x, w, b), e * (2 * s.batch * H + H * H), 2 * s.batch * H * H, peers)


def liger(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Liger's LayerNorm after torch's addition, where liger_kernel is installed; it needs a GPU."""
    if x.device.type != "cuda":
        return {}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        return {}
    return {"liger": lambda: LigerLayerNormFunction.apply(x + residual, w, b, NORM_EPS)}


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

    def eager(probs: bool, keep: torch.Tensor | None) -> Any:
        scores = q @ k.transpose(2, 3) * scale
        p = torch.softmax(scores if keep is None else scores.masked_fill(~keep, float("-inf")), -1)
        context = (p @ v).transpose(1, 2).reshape(B * S, H)
        return (context, p) if probs else context

    def sdpa(keep: torch.Tensor | None, backend: SDPBackend | None = None) -> torch.Tensor:
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).reshape(B * S, H)

    backends: dict[str, SDPBackend | None] = {"sdpa": None}
    if device.type == "cuda" and dtype != torch.float32:
        backends |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    ones, ragged = torch.ones(B, S, device=device, dtype=torch.long), ragged_mask(s, device)
    for name, mask, probs in (("", ones, False), (" probs", ones, True), (" ragged", ragged, False)):
        if B == 1 and mask is ragged:
            continue
        lengths = mask.sum(1)
        n, pairs = int(lengths.sum()), int(lengths.square().sum())
        keep = mask.bool()[:, None, None] if mask is ragged else None
        peers: dict[str, Callable[[], Any]] = {"torch": lambda p=probs, m=keep: eager(p, m)}
        if not probs:
            peers |= {key: lambda m=keep, b=b: sdpa(m, b) for key, b in backends.items()}
        args = (qkv, None, *pack(mask, True), s.heads, scale, probs, False)
        moved = e * (4 * n * H + (B * s.heads * S * S if probs else 0))
        yield Case("attention", s.name + name, args, moved, 4 * H * pairs, peers, n if mask is ragged else None)


def attention_heads_cases(s: Shape, device: torch.device, dtype: torch.dtype, rand: Callable) -> Iterator[Case]:
    """On views (B, S, heads, D) turned, as transformers' models hand them. e (3 + 1) B S H bytes, with probabilities
    e B heads S S more, a bool mask B S S; 4 B S S H FLOP, (S + 1) / 2 S of them where causal."""
    B, S, H, e = s.batch, s.seq, s.hidden, dtype.itemsize
    q, k, v = (rand(B, S, s.heads, H // s.heads).transpose(1, 2) for _ in range(3))
    keep = ragged_mask(s, device).bool()[:, None, None].expand(B, 1, S, S).contiguous()
    for name, mask, probs in (
        ("", None, False),
        (" causal", None, False),
        (" masked", keep, False),
        (" probs", None, True),
    ):
        causal = name == " causal"

        def sdpa(mask=mask, causal=causal) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).contiguous()

        def eager() -> tuple[torch.Tensor, torch.Tensor]:
            p = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, -1)
            return (p @ v).transpose(1, 2).contiguous(), p

        args = (q, k, v, mask, causal, q.shape[3] ** -0.5, probs)
        moved = e * (4 * B * S * H + (B * s.heads * S * S if probs else 0)) + (B * S * S if mask is not None else 0)
        pairs = B * S * (S + 1) / 2 if causal else B * S * S
        yield Case(
            "attention_heads", s.name + name, args, moved, 4 * H * pairs, {"torch": eager} if probs else {"sdpa": sdpa}
        )
