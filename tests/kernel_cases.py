"""Shared by the kernel tests on the CPU and on a GPU: masks, biases and arguments for every op."""

from __future__ import annotations

from typing import Any

import torch
from kernel_helpers import assert_error_rule, body, count, randn, references

from bert_fast.kernels.attention import attention_ref
from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.pack import pack_ref

NAN, INF = float("nan"), float("inf")


def move(args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The arguments on `device`: a tensor given twice stays one, a leaf stays a leaf."""
    moved: dict[int, Any] = {id(a): a for a in args}
    for a in args:
        if isinstance(a, torch.Tensor):
            moved[id(a)] = a.detach().to(device).requires_grad_(a.requires_grad)
    return tuple(moved[id(a)] for a in args)


def mask_of_every_kind(S: int) -> torch.Tensor:
    at = torch.arange(S)
    holes = torch.rand(S, generator=torch.Generator().manual_seed(S)) < 0.6
    full, empty = torch.ones(S, dtype=torch.bool), torch.zeros(S, dtype=torch.bool)
    return torch.stack([empty, full, at < S - S // 2, at >= S // 3, holes | (at == S - 1)]).long()


def packed_args(
    mask: torch.Tensor, D: int, H: int, dtype: torch.dtype, skip: bool, probs: bool, uniform: bool, bias: Any = None
) -> tuple[Any, ...]:
    """The op's arguments for random qkv; its rows past the real ones are NaN."""
    token, cu_seqlens, kv_len, prefix = pack_ref(mask, skip)
    qkv = randn(mask.numel(), 3 * H * D, dtype=dtype)
    qkv[cu_seqlens[-1] :] = NAN
    return qkv, bias, token, cu_seqlens, kv_len, prefix, H, D**-0.5, probs, uniform


def assert_attention(name: str, args: tuple[Any, ...], tile: TileConfig | None = None) -> tuple[torch.Tensor, ...]:
    """All three outputs by the rule, probabilities of 0 and lse of -inf exactly where the reference has them."""
    run = body("attention", name)
    ours = run(*args, *([tile] if name == "triton" else []))
    low, truth = references(attention_ref, *args)
    n, want_probs = int(args[3][-1]), args[8]
    assert_error_rule(ours[0][:n], low[0][:n], truth[0][:n], "context")
    assert ours[1].shape == truth[1].shape
    if want_probs:
        assert_error_rule(ours[1], low[1], truth[1], "probs")
        assert (ours[1][truth[1] == 0] == 0).all(), "a probability is not 0 where it must be"
    finite = truth[2][:, :n].isfinite()
    lse, low_lse, true_lse = (x[2][:, :n] for x in (ours, low, truth))
    assert lse.dtype == torch.float32
    assert torch.equal(lse == -INF, true_lse == -INF), "lse is not -inf exactly where no key is"
    assert_error_rule(lse[finite], low_lse[finite], true_lse[finite], "lse")
    return ours


def biases(B: int, H: int, S: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Additive masks as users pass them; the smallest finite number is transformers' own for "not a key"."""
    lowest = torch.finfo(dtype).min
    padding = torch.where(mask_of_every_kind(S)[:B].bool(), 0.0, lowest).to(dtype)  # row 0: every key at the lowest
    dead = randn(B, H, S, S, dtype=dtype)
    dead[0, :, S // 2] = -INF  # no key at all for this query
    dead[1, :, :, S // 2 :] = -INF  # half the keys, whole blocks of them
    return {
        "one row per sequence": padding[:, None, None, :],
        "one square per head": randn(1, H, S, S, dtype=dtype),
        "everything": dead,
        "one square": randn(S, S, dtype=dtype).t()[None, None],  # strided
        "one number per query": randn(B, 1, S, 1, dtype=dtype),
        "expanded": padding[:, None, None, :].expand(B, H, S, S),  # strides of 0
        "lowest": torch.full((1, 1, 1, 1), lowest, dtype=dtype),
    }


T, K, N, H, B, S = 6, 8, 12, 2, 2, 3  # T = B * S
ROWS = 4  # of T, where rows are counted on the device
OPS = ("pack", "linear", "linear_gelu", "linear_gelu_pre", "qkv_linear", "attention", "residual_layer_norm")
OPS += ("gelu_layer_norm", "embed_layer_norm", "pool", "linear_layer_norm", "first_rows", "first_token_attention")
OPS += ("attention_heads",)
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])  # skip makes 5 rows of it
ONES = torch.ones(B, S)


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed).requires_grad_()


def cases(op: str, rows: int = ROWS) -> dict[str, tuple[Any, ...]]:
    """Arguments of the op with and without each optional input and output; float tensors in use want a gradient."""
    x, weight, bias, n = leaf(T, K), leaf(N, K), leaf(N), count(rows)
    gamma, beta = leaf(K), leaf(K, seed=1)
    three, projections = [leaf(N, K, seed=i) for i in range(3)], [leaf(N, seed=i) for i in range(3)]
    qkv, square = leaf(T, 3 * H * 4), leaf(B, H, S, S)
    full, skip, everything = pack_ref(MASK, False), pack_ref(MASK if rows < T else ONES, True), pack_ref(ONES, False)
    ids, types, positions = torch.tensor([[4, 0, 9], [1, 1, 3]]), torch.tensor([[0, 1, 1]] * 2), torch.arange(S)
    tables = leaf(10, K), leaf(2, K), leaf(S, K)
    index, seed = (types, positions.expand(B, S)), torch.tensor([2**40 + 7])
    heads = [leaf(B, S, H, 4, seed=i).transpose(1, 2).detach().requires_grad_() for i in range(3)]
    return {
        "pack": {
            "exact": (MASK, False, None),
            "skip": (MASK.bool(), True, None),
            "bucket": (MASK, True, torch.tensor([1, 3]).int()),
        },
        "linear": {"plain": (x, weight, None, None), "all": (x, weight, bias, n)},
        "linear_gelu": {
            "plain": (x, weight, None, None, "silu"),
            "all": (x, weight, bias, n, "gelu"),
            "tanh": (x, weight, bias, None, "gelu_tanh"),
        },
        "linear_gelu_pre": {
            "plain": (x, weight, None, None, "silu"),
            "all": (x, weight, bias, n, "gelu"),
            "none": (x, weight, bias, None, "none"),
        },
        "qkv_linear": {
            "plain": (x, *three, None, None, None, None),
            "all": (x, *three, *projections, n),
            "two": (x, None, *three[1:], None, *projections[1:], n),
            "tied": (x, weight, weight, weight, bias, bias, bias, None),  # one parameter three times
        },
        "attention": {
            "plain": (qkv, None, *full, H, 0.5, False, False),
            "probs": (qkv, None, *full, H, 0.5, True, True),
            "skip": (qkv, None, *skip, H, 0.5, False, False),
            "skip probs": (qkv, None, *skip, H, 0.5, True, False),
            "bias": (qkv, square, *everything, H, 0.5, True, False),
            "key bias": (qkv, leaf(B, 1, 1, S), *everything, H, 0.5, False, False),
        },
        "residual_layer_norm": {
            "rows": (x, leaf(T, K, seed=1), gamma, beta, 1e-5, None, None, True, False),
            "padded": (x, leaf(T, K, seed=1), gamma, beta, 1e-5, skip[0], n, False, True),
            "both": (x, leaf(T, K, seed=1), gamma, beta, 1e-5, skip[0], None, True, True),
            "twice": (x, x, gamma, beta, 1e-5, None, None, True, False),  # its own residual
            "dropout": (x, leaf(T, K, seed=1), gamma, beta, 1e-5, None, None, True, False, seed, 3, 0.4),
            "dropped padded": (x, leaf(T, K, seed=1), gamma, beta, 1e-5, skip[0], n, True, True, seed, 3, 0.4),
        },
        "gelu_layer_norm": {"erf": (x, gamma, beta, 1e-5, "gelu"), "relu": (x, gamma, beta, 1e-5, "relu")},
        "embed_layer_norm": {
            "ids": (
                *(ids, None, *index, *tables, gamma, beta, 1e-5, 0, full[0], None, True, False),
                *(None, 0, 0.0, -1, True),
            ),
            "embeds": (
                *(None, leaf(B, S, K), *index, tables[0].detach(), *tables[1:], gamma, beta, 1e-5, -1),
                *(skip[0], skip[1][-1:], True, True, None, 0, 0.0, -1, True),
            ),
            "no types": (
                *(ids, None, None, index[1], tables[0], None, tables[2], gamma, beta, 1e-5, 0, full[0], None),
                *(True, False, None, 0, 0.0, 1, True),
            ),
            "dropout": (
                *(ids, None, *index, *tables, gamma, beta, 1e-5, 0, skip[0], skip[1][-1:], True, True),
                *(seed, 3, 0.4, -1, True),
            ),
            "no gradient": (ids, None, *index, *map(torch.Tensor.detach, (*tables, gamma, beta)), 1e-5, 0, full[0], n)
            + (True, False),
        },
        "pool": {"plain": (leaf(B, S, K), weight, bias)},
        "linear_layer_norm": {
            "rows": (x, weight, bias, leaf(T, N), leaf(N, seed=2), bias, 1e-5, None, None, True, False),
            "both": (x, weight, bias, leaf(T, N), leaf(N, seed=2), bias, 1e-5, skip[0], n, True, True),
        },
        "first_token_attention": {
            "exact": (leaf(B, H * 4), leaf(T, 2 * H * 4), *full[1:3], H, 0.5, False),
            "skip": (leaf(B, H * 4), leaf(T, 2 * H * 4), *skip[1:3], H, 0.5, True),
        },
        "attention_heads": {
            "plain": (leaf(B, H, S, 4), leaf(B, 1, 5, 4), leaf(B, 1, 5, 4, seed=1), None, False, 0.5, False),
            "causal": (*heads, None, True, 0.5, True),
            "keep": (*heads, MASK.bool()[:, None, None], False, 0.5, True),
            "dropout": (*heads, leaf(1, H, S, 1), False, 0.5, False, seed, 3, 0.4),
        },
        "first_rows": {"skip": (x, skip[0], *skip[1:3]), "exact": (x, full[0], *full[1:3])},
    }[op]


CASES = [(op, case) for op in OPS for case in cases(op)]
DIFFERENTIABLE = [pair for pair in CASES if pair[0] != "pack" and pair[1] != "no gradient"]
READ = {"embed_layer_norm": 2}  # outputs that a loss reads; the sum is for the backward


def gradients(
    function: Any, args: tuple[Any, ...], create_graph: bool, outputs: int | None = None
) -> list[torch.Tensor]:
    """Gradients of all inputs under fixed random gradients of all outputs, or the first, undefined rows included."""
    out = function(*args)
    out = out[:outputs] if isinstance(out, tuple) else (out,)
    pairs = [(o, randn(*o.shape, seed=i).to(o)) for i, o in enumerate(out) if o.requires_grad and o.numel()]
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    results, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(results, leaves, weights, create_graph=create_graph))


def chain_args(S: int, hidden: int, inner: int, heads: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of `layer_chain` for a batch with a sequence of every kind."""
    mask = mask_of_every_kind(S)
    ids = torch.arange(mask.numel()).view(mask.shape) % 50

    def linear(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        return randn(rows, columns, dtype=dtype, scale=columns**-0.5), randn(rows, dtype=dtype)

    norm = (1 + randn(hidden, scale=0.2)).to(dtype), randn(hidden, dtype=dtype, seed=1)
    tables = (randn(rows, hidden, dtype=dtype) for rows in (50, 2, S))
    return mask, ids, heads, *tables, *norm, *linear(hidden, hidden), *linear(inner, hidden), *linear(hidden, inner)


def layer_chain(
    name: str, mask: torch.Tensor, ids: torch.Tensor, heads: int, word: Any, types: Any, positions: Any,
    gamma: Any, beta: Any, w: Any, b: Any, up: Any, up_bias: Any, down: Any, down_bias: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Embedding, one layer, masked-LM transform and pooler in skip mode, by the bodies `name` of the ops.

    Rows that are none stay undefined all the way; nothing reads the row count on the host.
    """
    B, S = mask.shape
    token, cu_seqlens, kv_len, prefix = body("pack", name)(mask, True)
    n, norm = cu_seqlens[B:], (gamma, beta, 1e-12)
    at, zeros = torch.arange(S, device=mask.device).expand(B, S), torch.zeros_like(ids)
    tables = word, types, positions
    x, *_ = body("embed_layer_norm", name)(ids, None, zeros, at, *tables, *norm, -1, token, n, True, False)
    qkv = body("qkv_linear", name)(x, w, w, w, b, b, b, n)
    scale = (w.shape[0] // heads) ** -0.5
    context, probs, _ = body("attention", name)(qkv, None, token, cu_seqlens, kv_len, prefix, heads, scale, True, False)
    attended, _ = body("linear_layer_norm", name)(context, w, b, x, *norm, None, n, True, False)
    wide = body("linear_gelu", name)(attended, up, up_bias, n, "gelu")
    wide = body("linear", name)(wide, down, down_bias, n)
    _, last = body("residual_layer_norm", name)(wide, attended, *norm, token, n, False, True)
    head = body("gelu_layer_norm", name)(body("linear", name)(last, w, b, None), *norm, "gelu")
    pooled = body("pool", name)(last.view(B, S, -1), w, b)
    return {"probs": probs, "last": last, "head": head, "pooled": pooled}
