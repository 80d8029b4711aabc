"""Backward of the ops that end in a LayerNorm: the error rule, undefined rows, dropout, and what is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_helpers import BODIES, DTYPES, assert_error_rule, body, count, double, randn

from bert_fast.kernels.embed_layer_norm import embed_layer_norm_ref
from bert_fast.kernels.gelu_layer_norm import gelu_layer_norm_ref
from bert_fast.kernels.pack import pack_ref
from bert_fast.kernels.registry import gradients_of
from bert_fast.kernels.residual_layer_norm import residual_layer_norm_ref

NAN = float("nan")
SEED = torch.tensor([0x123456789ABCDEF])
# (rows, columns): BERT's width, one that is no power of two and no multiple of 16, a single row of two tiles' width
SHAPES = ((5, 384), (9, 100), (1, 768))
MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


def affine(N: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (1 + randn(N, scale=0.2)).to(dtype), randn(N, dtype=dtype, seed=1)


def undefined(rows: torch.Tensor, n: int) -> torch.Tensor:
    """The rows past n as they may come: NaN."""
    rows = rows.clone()
    rows[n:] = NAN
    return rows


def residual_truth(dy: torch.Tensor, dy_padded: bool, args: tuple[Any, ...], to: Any) -> list[torch.Tensor]:
    """Gradients of x, residual, weight, bias by autograd of the reference, arguments through `to`."""
    x, residual, weight, bias, eps, token, n_rows, seed, site, p = args
    full = [to(t) for t in (x, residual, weight, bias)]
    call = (*full, eps, token, n_rows, not dy_padded, dy_padded, seed, site, p)
    grads = (None, to(dy)) if dy_padded else (to(dy), None)
    return gradients_of(residual_layer_norm_ref, call, [True] * 4 + [False] * 8, grads)[:4]


def check_residual(name: str, dy: torch.Tensor, dy_padded: bool, args: tuple[Any, ...], n: int) -> None:
    x, residual, weight, bias, eps, token, n_rows, seed, site, p = args
    ours = body("residual_layer_norm_backward", name)(
        dy, dy_padded, x, residual, weight, eps, token, n_rows, seed, site, p, True
    )
    shared = not p and x.dtype == residual.dtype
    assert (ours[0].numel() == 0) == shared
    clean = (x.nan_to_num(), residual.nan_to_num(), *args[2:])
    low = residual_truth(dy.nan_to_num(), dy_padded, clean, lambda t: t)
    truth = residual_truth(dy.nan_to_num(), dy_padded, clean, double)
    for what, got, lower, true in zip(
        ("dx", "d_residual", "d_weight", "d_bias"), (ours[1] if shared else ours[0], *ours[1:4]), low, truth, strict=True
    ):
        rows = slice(None) if true.dim() == 1 else slice(n)
        assert_error_rule(got[rows], lower[rows], true[rows], f"{what} {name}")
    assert_error_rule(ours[4], low[0][:n].sum(0).to(x.dtype), truth[0][:n].sum(0), f"dx_sum {name}")


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual(name, dtype, p, shape):
    x, residual, dy = (randn(*shape, dtype=dtype, seed=i) for i in range(3))
    weight, bias = affine(shape[1], dtype)
    check_residual(name, dy, False, (x, residual, weight, bias, 1e-12, None, None, SEED, 4, p), shape[0])


@pytest.mark.parametrize("name", BODIES)
def test_no_rows(name):
    x, weight = torch.zeros(0, 24), torch.ones(24)
    run = body("residual_layer_norm_backward", name)
    _, d_residual, *sums = run(x, False, x, x, weight, 1e-5, None, None, None, 0, 0.0, True)
    assert d_residual.shape == (0, 24) and all(torch.equal(t, torch.zeros(24)) for t in sums)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_residual_of_autocast(name, dtype, p):
    """A product in half precision onto rows in fp32."""
    x, (residual, dy) = randn(7, 96, dtype=dtype), (randn(7, 96, seed=i) for i in (1, 2))
    weight, bias = affine(96, torch.float32)
    check_residual(name, dy, False, (x, residual, weight, bias, 1e-5, None, None, SEED, 4, p), 7)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dy_padded", [False, True])
def test_residual_on_packed_rows(name, p, dy_padded):
    token, cu_seqlens, _, _ = pack_ref(MASK, True)
    n, T = int(cu_seqlens[-1]), MASK.numel()
    assert n < T
    x, residual, dy = (randn(T, 48, seed=i) for i in range(3))
    weight, bias = affine(48, torch.float32)
    x, residual, dy = undefined(x, n), undefined(residual, n), dy if dy_padded else undefined(dy, n)
    check_residual(name, dy, dy_padded, (x, residual, weight, bias, 1e-5, token, count(n), SEED, 4, p), n)


@pytest.mark.parametrize("name", BODIES)
def test_frozen_parameters_and_a_gradient_with_strides(name):
    x, residual = randn(6, 40), randn(6, 40, seed=1)
    weight, _ = affine(40, torch.float32)
    run = body("residual_layer_norm_backward", name)
    dy = randn(40, seed=5).expand(6, 40)
    args = x, residual, weight, 1e-5, None, None, SEED, 4, 0.2
    some, every = run(dy, False, *args, False), run(dy.contiguous(), False, *args, True)
    assert torch.equal(some[0], every[0]) and torch.equal(some[1], every[1])
    assert [t.numel() for t in some[2:]] == [0, 0, 0] and every[2].shape == (40,)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu", "silu"])
def test_gelu_layer_norm(name, dtype, act):
    x, dy = randn(7, 100, dtype=dtype, scale=2.0), randn(7, 100, dtype=dtype, seed=1)
    weight, bias = affine(100, dtype)
    ours = body("gelu_layer_norm_backward", name)(dy, x, weight, 1e-5, act)
    sides = [
        gradients_of(gelu_layer_norm_ref, (*map(to, (x, weight, bias)), 1e-5, act), [True] * 3 + [False] * 2, [to(dy)])
        for to in (lambda t: t, double)
    ]
    for what, got, low, truth in zip(("dx", "d_weight", "d_bias"), ours, *(side[:3] for side in sides), strict=True):
        assert_error_rule(got, low, truth, what)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("given", ["ids", "embeds"])
@pytest.mark.parametrize("skip", [False, True])
def test_embeddings(name, dtype, p, given, skip):
    (B, S), N = MASK.shape, 40
    token, cu_seqlens, _, _ = pack_ref(MASK, skip)
    n, dy_padded = int(cu_seqlens[-1]), skip
    tables = [randn(rows, N, dtype=dtype, seed=rows) for rows in (9, 2, S)]
    weight, bias = affine(N, dtype)
    ids = (torch.arange(B * S).view(B, S) % 9).int() if given == "ids" else None
    embeds = randn(B, S, N, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1) if given == "embeds" else None
    index = torch.zeros(B, S, dtype=torch.long), torch.arange(S).expand(B, S)
    dy = randn(B * S, N, dtype=dtype, seed=7)
    dh, d_weight, d_bias = body("embed_layer_norm_backward", name)(
        dy, dy_padded, ids, embeds, *index, *tables, weight, 1e-5, token, count(n), SEED, 0, p
    )

    def truth(to):
        # the sum of the three embeddings stands for the word's
        summed = (tables[0][ids.long()] if embeds is None else embeds).to(to) + tables[1][index[0]].to(to)
        summed = summed + tables[2][index[1]].to(to)
        nothing = [torch.zeros_like(t, dtype=to) for t in tables]
        call = (None, summed, *index, *nothing, weight.to(to), bias.to(to), 1e-5, -1, token, count(n), not skip, skip)
        grads = (None, dy.to(to)) if skip else (dy.to(to), None)
        needs = [i in (1, 7, 8) for i in range(len(call) + 3)]
        found = gradients_of(embed_layer_norm_ref, (*call, SEED, 0, p), needs, grads)
        return found[1].view(B * S, N), found[7], found[8]

    for what, got, low, true in zip(
        ("dh", "d_weight", "d_bias"), (dh, d_weight, d_bias), truth(dtype), truth(torch.float64), strict=True
    ):
        assert_error_rule(got, low, true, what)


MESSAGES = {
    "dy": ({"dy": torch.zeros(3, 8)}, r"dy is \(3, 8\) on cpu, expected \(4, 8\)"),
    "residual": ({"residual": torch.zeros(4, 9)}, r"x is \(4, 8\) and residual \(4, 9\)"),
    "weight": ({"weight": torch.zeros(9)}, r"weight is \(9,\) on cpu, expected \(8,\)"),
    "map": ({"dy_padded": True}, "dy is in padded order, but there is no token map"),
    "p": ({"p": 1.5}, r"p is 1\.5, expected a probability from 0 to 1"),
    "seed": ({"seed": None, "p": 0.5}, "seed is None, expected one int64 number on cpu for p = 0.5"),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("what", MESSAGES)
def test_a_wrong_input_is_named(name, what):
    args = {
        "dy": torch.zeros(4, 8), "dy_padded": False, "x": torch.zeros(4, 8), "residual": torch.zeros(4, 8),
        "weight": torch.ones(8), "eps": 1e-5, "token": None, "n_rows": None, "seed": SEED, "site": 0, "p": 0.0,
        "want_params": True,
    }  # fmt: skip
    changes, message = MESSAGES[what]
    with pytest.raises(ValueError, match=message):
        body("residual_layer_norm_backward", name)(**{**args, **changes})
