"""Backward of the ops that end in a LayerNorm, and of pool: the error rule, undefined rows, dropout, what is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import cases, gradients
from kernel_helpers import BODIES, DTYPES, assert_error_rule, body, count, double, randn

from bert_fast.kernels import pool as pool_module
from bert_fast.kernels import residual_layer_norm as residual_module
from bert_fast.kernels.column_sums import add_partials
from bert_fast.kernels.embed_layer_norm_backward import table_gradient
from bert_fast.kernels.pack import pack_ref
from bert_fast.kernels.registry import gradients_of

NAN = float("nan")
SEED = torch.tensor([0x123456789ABCDEF])
# rows, columns: tiles with rows to spare; no power of two, no multiple of 16; one row; programs with a second tile, the
# last one half empty (slow to interpret)
SHAPES = ((5, 384), (9, 100), (1, 768), (21, 768))
MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])  # skip: 11 of 12 rows, the last sequence whole
HALF = (torch.bfloat16, torch.float16)


def affine(N: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return (1 + randn(N, scale=0.2)).to(dtype), randn(N, dtype=dtype, seed=1)


def by_reference(
    op: str, args: tuple[Any, ...], wanted: tuple[int, ...], *grads: torch.Tensor | None
) -> list[tuple[Any, Any]]:
    """For each wanted argument of op: (gradient in its dtype, in float64), by autograd of the reference."""
    needs, ref = [i in wanted for i in range(len(args))], body(op, "ref")
    low = gradients_of(ref, args, needs, grads)
    truth = gradients_of(ref, tuple(map(double, args)), needs, tuple(map(double, grads)))
    return [(low[i], truth[i]) for i in wanted]


def assert_residual(name: str, dy: torch.Tensor, dy_padded: bool, *args: Any) -> None:
    """args: of the forward up to n_rows, then seed, site, p; rows past n_rows may be NaN."""
    x, residual, weight, bias, eps, token, n_rows, *dropout = args
    n, p = x.shape[0] if n_rows is None else int(n_rows), dropout[-1]
    ours = body("residual_layer_norm_backward", name)(
        dy, dy_padded, x, residual, weight, eps, token, n_rows, *dropout, True
    )
    shared = not p and x.dtype == residual.dtype
    assert (ours[0].numel() == 0) == shared
    call = (x, residual, weight, bias, eps, token, n_rows, not dy_padded, dy_padded, *dropout)
    grads = (None, dy) if dy_padded else (dy, None)
    wanted = by_reference("residual_layer_norm", call, (0, 1, 2, 3), *grads)
    found = dict(dx=ours[1] if shared else ours[0], d_residual=ours[1], d_weight=ours[2], d_bias=ours[3])
    for (what, got), (low, truth) in zip(found.items(), wanted, strict=True):
        rows = slice(n if truth.dim() == 2 else None)
        assert_error_rule(got[rows], low[rows], truth[rows], what)
    low, truth = wanted[0]
    assert_error_rule(ours[4], low[:n].sum(0), truth[:n].sum(0), "dx_sum")


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,p", [*itertools.product(SHAPES[:3], (0.0, 0.3)), (SHAPES[3], 0.3)], ids=str)
def test_residual(name: str, dtype: torch.dtype, shape: tuple[int, int], p: float) -> None:
    x, residual, dy = (randn(*shape, dtype=dtype, seed=i) for i in range(3))
    assert_residual(name, dy, False, x, residual, *affine(shape[1], dtype), 1e-12, None, None, SEED, 4, p)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_residual_of_autocast(name: str, dtype: torch.dtype, p: float) -> None:
    """A product in half precision onto rows in fp32: its gradient is no longer the residual's."""
    x, residual, dy = randn(7, 96, dtype=dtype), randn(7, 96, seed=1), randn(7, 96, seed=2)
    assert_residual(name, dy, False, x, residual, *affine(96), 1e-5, None, None, SEED, 4, p)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("n", [0, 1, 11])
@pytest.mark.parametrize("dy_padded", [False, True])
def test_residual_on_packed_rows(name: str, p: float, n: int, dy_padded: bool) -> None:
    """NaN wherever a row is none; the tokens' numbers of the dropout, not the rows'."""
    token, cu_seqlens, _, _ = pack_ref(MASK, True)
    assert int(cu_seqlens[-1]) == 11
    x, residual, dy = (randn(12, 48, seed=i) for i in range(3))
    x[n:] = residual[n:] = NAN
    dy[token[n:].long() if dy_padded else slice(n, None)] = NAN
    assert_residual(name, dy, dy_padded, x, residual, *affine(48), 1e-5, token, count(n), SEED, 4, p)


@pytest.mark.parametrize("name", BODIES)
def test_eps_of_zero_spares_the_rows_that_are_none(name: str) -> None:
    x, dy = randn(3, 20), randn(3, 20, seed=1)
    x[2] = dy[2] = NAN
    assert_residual(name, dy, False, x, x, *affine(20), 0.0, None, count(2), None, 0, 0.0)


@pytest.mark.parametrize("name", BODIES)
def test_its_own_residual(name: str) -> None:
    x, dy = randn(6, 40), randn(6, 40, seed=1)
    assert_residual(name, dy, False, x, x, *affine(40), 1e-5, None, None, SEED, 4, 0.3)


@pytest.mark.parametrize("name", BODIES)
def test_no_rows(name: str) -> None:
    x, weight = torch.zeros(0, 24), torch.ones(24)
    _, rows, *sums = body("residual_layer_norm_backward", name)(
        x, False, x, x, weight, 1e-5, None, None, None, 0, 0.0, True
    )
    dx, *others = body("gelu_layer_norm_backward", name)(x, x, weight, 1e-5, "gelu")
    assert rows.shape == dx.shape == (0, 24) and len(sums) == 3 and len(others) == 2
    assert all(torch.equal(t, torch.zeros(24)) for t in (*sums, *others))


@pytest.mark.parametrize("name", BODIES)
def test_strides(name: str) -> None:
    """A gradient of one row for all, as a sum's is, and slices of wider rows."""
    wide, weight = randn(6, 96), affine(40)[0]
    dy, x, residual = randn(40, seed=5).expand(6, 40), wide[:, 8:48], wide[:, 50:90]
    run = body("residual_layer_norm_backward", name)
    args = weight, 1e-5, None, None, SEED, 4, 0.2, True
    ours = run(dy, False, x, residual, *args)
    every = run(dy.contiguous(), False, x.contiguous(), residual.contiguous(), *args)
    assert all(map(torch.equal, ours, every))
    turned = randn(40, 6).t()
    ours = run(turned, False, x, residual, *args)
    assert all(map(torch.equal, ours, run(turned.contiguous(), False, x, residual, *args)))


@pytest.mark.parametrize("name", BODIES)
def test_frozen_parameters(name: str) -> None:
    x, residual, weight = randn(6, 40), randn(6, 40, seed=1), affine(40)[0]
    run, args = body("residual_layer_norm_backward", name), (x, residual, weight, 1e-5, None, None, SEED, 4, 0.2)
    some, every = run(x, False, *args, False), run(x, False, *args, True)
    assert torch.equal(some[0], every[0]) and torch.equal(some[1], every[1])
    assert [t.numel() for t in some[2:]] == [0, 0, 0] and [t.numel() for t in every[2:]] == [40] * 3


@pytest.mark.interpreter
@pytest.mark.parametrize("sums", [1, 2, 3])
def test_partial_sums_of_many_programs(sums: int) -> None:
    """More programs than a tile of the second kernel has rows, more columns than it has, each sum in its own dtype."""
    partial = randn(130, sums, 40)
    found = [torch.empty(40, dtype=dtype) for dtype in DTYPES[:sums]]
    add_partials(partial, found)
    for i, total in enumerate(found):
        assert_error_rule(total, partial[:, i].sum(0).to(total.dtype), partial[:, i].double().sum(0))


@pytest.mark.parametrize("trained", [False, True])
def test_column_sums_only_where_parameters_are_trained(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    seen = []

    def backward(*args: Any) -> Any:
        seen.append(args[-1])
        return body("residual_layer_norm_backward", "")(*args)

    monkeypatch.setattr(residual_module, "residual_layer_norm_backward", backward)
    x, (weight, bias) = randn(3, 8).requires_grad_(), affine(8)
    y, _ = residual_module.residual_layer_norm(
        x, randn(3, 8), weight, bias.requires_grad_(trained), 1e-5, None, None, True, False
    )
    y.sum().backward()
    assert seen == [trained] and weight.grad is None and (bias.grad is not None) == trained


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu", "silu", "none"])
def test_gelu_layer_norm(name: str, dtype: torch.dtype, act: str) -> None:
    args = randn(7, 100, dtype=dtype, scale=2.0), *affine(100, dtype), 1e-5, act
    dy = randn(7, 100, dtype=dtype, seed=1)
    ours = body("gelu_layer_norm_backward", name)(dy, args[0], args[1], *args[3:])
    wanted = by_reference("gelu_layer_norm", args, (0, 1, 2), dy)
    for what, got, (low, truth) in zip(("dx", "d_weight", "d_bias"), ours, wanted, strict=True):
        assert_error_rule(got, low, truth, what)


def embedding_args(dtype: torch.dtype, skip: bool, embeds: bool, p: float, N: int = 40) -> list[Any]:
    """The forward's arguments: int32 and turned indices, one row of positions for all; the last sequence is empty."""
    token, cu_seqlens, _, _ = pack_ref(MASK, skip)
    ids = (torch.arange(12).view(4, 3).t() * 5 % 9).int()
    first = (None, randn(3, N, 4, dtype=dtype).transpose(1, 2)) if embeds else (ids, None)
    tables = [randn(rows, N, dtype=dtype, seed=rows) for rows in (9, 2, 6)]
    index = torch.arange(12).view(3, 4) % 2, torch.tensor([5, 0, 0, 3]).expand(3, 4)
    norm = (*affine(N, dtype), 1e-5, 0)
    return [*first, *index, *tables, *norm, token, cu_seqlens[-1:], not skip, skip, SEED, 2, p, -1, True]


def summed(args: list[Any]) -> torch.Tensor:
    """The sum as the forward leaves it, undefined where a row is none."""
    h = body("embed_layer_norm", "ref")(*args)[2]
    h[int(args[12]) :] = NAN
    return h


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_embeddings(name: str, dtype: torch.dtype, p: float, embeds: bool, skip: bool) -> None:
    """The gradient of the sum is that of inputs_embeds; where ids are given, their word rows stand for it."""
    args = embedding_args(dtype, skip, embeds, p)
    dy, token, n = randn(12, 40, dtype=dtype, seed=7), args[11], args[12]
    dy[token[int(n) :].long()] = NAN  # skip: dy in padded order, and a token is no row
    h = summed(args)
    dh, *params = body("embed_layer_norm_backward", name)(dy, skip, h, args[7], args[9], token, n, *args[15:18])
    given = args if embeds else [None, args[4][args[0].long()], *args[2:]]
    wanted = by_reference("embed_layer_norm", tuple(given), (1, 7, 8), *((None, dy) if skip else (dy, None)), None)
    ours = dh.view(3, 4, 40), *params
    for what, got, (low, truth) in zip(("dh", "d_weight", "d_bias"), ours, wanted, strict=True):
        assert_error_rule(got, low, truth, what)
    assert (dh[token[int(n) :].long()] == 0).all()


def test_a_position_row_without_gradient() -> None:
    """RoBERTa's table of positions has a padding row too."""
    args = embedding_args(torch.float32, False, False, 0.0)
    position = args[6].requires_grad_()
    rows = body("embed_layer_norm", "")(*args[:18], 3, True)[0]
    (d,) = torch.autograd.grad(rows, position, randn(12, 40, seed=7))
    (full,) = torch.autograd.grad(body("embed_layer_norm", "")(*args)[0], position, randn(12, 40, seed=7))
    assert (d[3] == 0).all() and (full[3] != 0).any() and torch.equal(d[[0, 5]], full[[0, 5]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_gradients_of_the_tables(dtype: torch.dtype, embeds: bool, skip: bool) -> None:
    """Of the registered op: padding_idx has none, nor has a table that was not read."""
    args = embedding_args(dtype, skip, embeds, 0.3)
    leaves = {1: args[1]} if embeds else {4: args[4]}
    leaves |= {i: args[i] for i in (5, 6, 7, 8)}
    for t in (args[4], *leaves.values()):
        t.requires_grad_()
    y, dy = body("embed_layer_norm", "")(*args)[int(skip)], randn(12, 40, dtype=dtype, seed=7)
    ours = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    wanted = by_reference("embed_layer_norm", tuple(args), tuple(leaves), *((None, dy) if skip else (dy, None)), None)
    for i, got, (low, truth) in zip(leaves, ours, wanted, strict=True):
        assert_error_rule(got, low, truth, f"argument {i}")
    if embeds:
        assert torch.autograd.grad(y, args[4], dy, allow_unused=True) == (None,)
    else:
        assert (ours[0][0] == 0).all() and args[0].eq(0).any()


def test_without_token_types() -> None:
    args = embedding_args(torch.float32, True, False, 0.3)
    args[2] = args[5] = None
    leaves = [args[i].requires_grad_() for i in (4, 6, 7, 8)]
    padded, dy = body("embed_layer_norm", "")(*args)[1], randn(12, 40, seed=7)
    wanted = by_reference("embed_layer_norm", tuple(args), (4, 6, 7, 8), None, dy, None)
    for got, (low, truth) in zip(torch.autograd.grad(padded, leaves, dy), wanted, strict=True):
        assert_error_rule(got, low, truth)


def test_there_is_no_gradient_without_the_sum() -> None:
    args = embedding_args(torch.float32, True, False, 0.0)
    args[7].requires_grad_()
    rows, padded, h = body("embed_layer_norm", "")(*args[:-1])
    assert h.numel() == 0
    with pytest.raises(RuntimeError, match="called without want_sum"):
        padded.sum().backward()


def test_a_second_derivative_of_the_embeddings_goes_through_rows_and_sum() -> None:
    args, found = cases("embed_layer_norm")["dropout"], []
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    for name in ("", "ref"):
        loss = body("embed_layer_norm", name)(*args)[1].pow(3).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*found)


@pytest.mark.interpreter
def test_a_sum_of_nan_reaches_no_other_row() -> None:
    """An index outside its table made it in the forward; the table's rows are added up within the table."""
    args = embedding_args(torch.float32, False, False, 0.0)
    h = summed(args)
    h[6] = NAN
    dh, d_weight, d_bias = body("embed_layer_norm_backward", "triton")(
        randn(12, 40), False, h, args[7], args[9], args[11], args[12], None, 0, 0.0
    )
    wrong = torch.arange(12) == int(args[11][6])
    assert torch.equal(dh.isnan().all(1), wrong) and torch.equal(dh.isnan().any(1), wrong)
    assert d_weight.isnan().all() and not d_bias.isnan().any()
    for outside in (2**40, -(2**40)):
        d = table_gradient(torch.ones(3, 2), torch.tensor([[1], [outside], [1]]), torch.zeros(3, 2), -1)
        assert d[1].tolist() == [2, 2] and d.sum() == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,)])
def test_pool(dtype: torch.dtype, wanted: tuple[int, ...]) -> None:
    args = [randn(5, 3, 24, dtype=dtype), randn(20, 24, dtype=dtype, scale=0.2), randn(20, dtype=dtype)]
    args[0][:, 1:] = NAN  # what is not read
    for i in wanted:
        args[i].requires_grad_()
    y, dy = body("pool", "")(*args), randn(5, 20, dtype=dtype, seed=1)
    ours = torch.autograd.grad(y, [args[i] for i in wanted], dy)
    for i, got, (low, truth) in zip(wanted, ours, by_reference("pool", tuple(args), wanted, dy), strict=True):
        assert_error_rule(got, low, truth, f"argument {i}")
    found = pool_module._gradient([i in wanted for i in range(3)], args, (y.detach(),), (dy,))
    assert [g is not None for g in found] == [i in wanted for i in range(3)]


CASES = [
    ("residual_layer_norm", "dropped padded"),
    ("embed_layer_norm", "dropout"),
    ("gelu_layer_norm", "erf"),
    ("pool", "plain"),
]


@pytest.mark.parametrize("op,case", CASES)
def test_numerical_gradients(op: str, case: str) -> None:
    """Finite differences in float64, the seed held; the second derivative goes through the reference."""
    args = tuple(double(a.detach()).requires_grad_() if double(a) is not a else a for a in cases(op)[case])
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    token = next((a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int32), None)
    n = int(args[6 if op == "residual_layer_norm" else 12]) if token is not None else None

    def function(*inputs: torch.Tensor) -> Any:
        given = iter(inputs)
        out = body(op, "")(*(next(given) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args))
        return (out[0][:n], out[1]) if isinstance(out, tuple) else out  # the defined rows

    if op == "embed_layer_norm":
        args[0][args[0] == 0] = 1  # differences know no padding_idx
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def backward_calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    x, weight, token = randn(4, 8), torch.ones(8), torch.tensor([2, 0, 1, 3]).int()
    half, embedded = x.bfloat16(), randn(12, 40)
    maps = pack_ref(MASK, True)[0], count(11)
    calls: dict[str, tuple[str, tuple[Any, ...]]] = {
        "plain": ("residual_layer_norm", (x, False, x, x, weight, 1e-5, None, None, None, 0, 0.0, True)),
        "frozen": ("residual_layer_norm", (x, True, x, x + 1, weight, 1e-5, token, None, SEED, 3, 0.5, False)),
        "mixed": ("residual_layer_norm", (x, True, half, x, weight, 1e-5, token, count(4), SEED, 3, 0.5, True)),
        "gelu": ("gelu_layer_norm", (x, x, weight, 1e-5, "gelu")),
        "embeddings": ("embed_layer_norm", (embedded, True, embedded, affine(40)[0], 1e-5, *maps, SEED, 2, 0.3)),
    }
    return {what: (body(f"{op}_backward", ""), given) for what, (op, given) in calls.items()}


@pytest.mark.parametrize("what", backward_calls())
def test_opcheck(what: str) -> None:
    run, args = backward_calls()[what]
    torch.library.opcheck(run, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_rows_that_are_none_have_no_gradient_on_the_cpu() -> None:
    """Undefined rows may be anything between kernels; the CPU bodies leave zeros, which nobody need know."""
    args = cases("residual_layer_norm")["dropped padded"]
    with torch.no_grad():
        args[0][4:] = args[1][4:] = NAN
    d = gradients(body("residual_layer_norm", ""), args, False)
    assert all(torch.isfinite(g).all() for g in d) and (d[0][4:] == 0).all() and (d[1][4:] == 0).all()


R, E, G = "residual_layer_norm_backward", "embed_layer_norm_backward", "gelu_layer_norm_backward"
WRONG = [
    (R, 0, randn(3, 8), R + r": dy is \(3, 8\) on cpu, expected \(4, 8\)"),
    (R, 3, randn(4, 9), r"x is \(4, 8\) and residual \(4, 9\), expected the same \(T, N\)"),
    (R, 2, randn(8, 4).t(), r"expected the same \(T, N\), unit rows"),
    (R, 4, randn(9), r"weight is \(9,\) on cpu, expected \(8,\)"),
    (R, 1, True, "dy is in padded order, but there is no token map"),
    (R, 10, 1.5, r"p is 1\.5, expected a probability from 0 to 1"),
    (R, 10, 0.5, "seed is None, expected one int64 number on cpu for p = 0.5"),
    (G, 0, randn(4, 7), G + r": dy is \(4, 7\)"),
    (G, 1, randn(4), r"x has shape \(4,\), expected \(T, N\)"),
    (G, 4, "swish", r"act='swish': expected one of"),
    (E, 0, randn(11, 40), E + r": dy is \(11, 40\) on cpu, expected \(12, 40\)"),
    (E, 2, randn(11, 40), E + r": h is \(11, 40\), expected dense rows of 12 tokens"),
    (E, 2, randn(40, 12).t(), r"h is \(12, 40\), expected dense rows"),
    (E, 3, randn(41), r"weight is \(41,\) on cpu, expected \(40,\)"),
    (E, 7, SEED.int(), r"seed is \(1,\) torch.int32 on cpu, expected one int64 number"),
]


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("op,at,value,message", WRONG, ids=range(len(WRONG)))
def test_wrong_inputs(name: str, op: str, at: int, value: Any, message: str) -> None:
    what = {R: "plain", E: "embeddings", G: "gelu"}[op]
    args = list(backward_calls()[what][1])
    args[at] = value
    with pytest.raises(ValueError, match=message):
        body(op, name)(*args)
