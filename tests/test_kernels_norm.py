"""The ops that end in a LayerNorm: residual_layer_norm, gelu_layer_norm, embed_layer_norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import BODIES, DTYPES, assert_error_rule, assert_like_ref, body, count, outputs, randn

from bert_fast.kernels.pack import pack_ref

NAN = float("nan")
WIDTHS = (100, 768, 1)  # no power of two; BERT's; a variance of zero
EPS = 1e-12
N, V, TYPES, P = 40, 50, 3, 16


def affine(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (1 + randn(width, scale=0.2)).to(dtype), randn(width, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", BODIES)
def test_residual_layer_norm(name: str, width: int, dtype: torch.dtype) -> None:
    x, residual = randn(5, width, dtype=dtype), randn(5, width, dtype=dtype, seed=1)
    assert_like_ref("residual_layer_norm", name, x, residual, *affine(width, dtype), EPS, None, None, True, False)


@pytest.mark.parametrize("want_rows,want_padded", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("n", [0, 6, 9, None])
@pytest.mark.parametrize("name", BODIES)
def test_rows_and_padded(name: str, n: int | None, want_rows: bool, want_padded: bool) -> None:
    """The rows in use go to their tokens' places, the other tokens are exactly 0; rows past n_rows are NaN memory."""
    x, residual = randn(9, 20), randn(9, 20, seed=1)
    x[9 if n is None else n :] = NAN
    token = torch.randperm(9, generator=torch.Generator().manual_seed(0)).int()
    args = (x, residual, *affine(20, x.dtype), EPS, token, count(n), want_rows, want_padded)
    rows, padded = outputs("residual_layer_norm", name, *args)
    if want_rows:
        assert_error_rule(*(t[:n] for t in rows), "rows")
    if want_padded:
        assert_error_rule(*padded, "padded")
        assert n is None or (padded[0][token[n:].long()] == 0).all()
    assert [t[0].shape[0] for t in (rows, padded)] == [9 * want_rows, 9 * want_padded]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BODIES)
def test_large_mean(name: str, dtype: torch.dtype) -> None:
    """A mean far from 0: the variance as a difference of squares would be noise in fp32."""
    x = (randn(3, 100) + 500).to(dtype)
    assert_like_ref(
        "residual_layer_norm", name, x, x.new_zeros(3, 100), *affine(100, dtype), EPS, None, None, True, False
    )


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
@pytest.mark.parametrize("name", BODIES)
def test_eps(name: str, eps: float) -> None:
    """A constant row has variance 0: the bias alone, even with 1e-12 in fp16. A small row shows every eps."""
    weight, bias = affine(24, torch.float16)
    x = torch.ones(2, 24, dtype=torch.float16)
    y, _ = body("residual_layer_norm", name)(x, x, weight, bias, eps, None, None, True, False)
    assert torch.equal(y, bias.expand(2, 24))
    small = randn(2, 24, scale=1e-3)
    assert_like_ref("gelu_layer_norm", name, small, weight.float(), bias.float(), eps, "none")


@pytest.mark.parametrize("name", BODIES)
def test_strides(name: str) -> None:
    x, residual, (weight, bias) = randn(14, 60)[::2, 8:28], randn(7, 32)[:, :20], affine(20, torch.float32)
    gaps = randn(40)[::2]
    assert_like_ref("residual_layer_norm", name, x, residual, weight, bias, EPS, None, None, True, False)
    assert_like_ref("residual_layer_norm", name, x, residual, gaps, gaps, EPS, None, None, True, False)
    assert_like_ref("gelu_layer_norm", name, x, weight, gaps, EPS, "gelu")


@pytest.mark.parametrize("name", BODIES)
def test_no_rows(name: str) -> None:
    x, (weight, bias) = randn(0, 20), affine(20, torch.float32)
    rows, padded = body("residual_layer_norm", name)(x, x, weight, bias, EPS, None, None, True, False)
    assert rows.shape == (0, 20) and padded.numel() == 0
    assert body("gelu_layer_norm", name)(x, weight, bias, EPS, "gelu").shape == (0, 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("name", BODIES)
def test_gelu_layer_norm(name: str, act: str, dtype: torch.dtype) -> None:
    for width in WIDTHS[:2]:
        x = randn(3, width, dtype=dtype)
        x[0, 0] = 195.0  # as large as a trained dense gives
        assert_like_ref("gelu_layer_norm", name, x, *affine(width, dtype), EPS, act)


def embedding_args(dtype: torch.dtype, skip: bool, embeds: bool = False, **changes: Any) -> list[Any]:
    """The op's arguments for (B, S) = (4, 7): an empty sequence, a full one, a left padded one, one with a hole."""
    at = torch.arange(7)
    mask = torch.stack([at < 0, at >= 0, at >= 3, at != 2])
    token, cu_seqlens, _, _ = pack_ref(mask, skip)
    ids, types = torch.arange(28).view(4, 7) * 13 % V, torch.arange(28).view(4, 7) % TYPES
    given = {"ids": ids, "types": types, "positions": at.expand(4, 7)} | changes  # positions: strides (0, 1)
    first = (None, randn(4, 7, N, dtype=dtype)) if embeds else (given["ids"], None)
    tables = [randn(rows, N, dtype=dtype) for rows in (V, TYPES, P)]
    return [*first, given["types"], given["positions"], *tables, *affine(N, dtype), EPS, 0, token, cu_seqlens[-1:]]


def assert_embedding(name: str, args: list[Any]) -> None:
    """Against the float64 reference; sums in the op are fp32 where transformers' are in the model's dtype."""
    n = int(args[-1])
    rows, padded, summed = outputs("embed_layer_norm", name, *args, True, True, None, 0, 0.0, -1, True)
    assert_error_rule(*(t[:n] for t in rows), "rows")
    assert_error_rule(*padded, "padded")
    assert_error_rule(*(t[:n] for t in summed), "sum")
    assert (padded[0][args[-2][n:].long()] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_embed_layer_norm(name: str, skip: bool, embeds: bool, dtype: torch.dtype) -> None:
    assert_embedding(name, embedding_args(dtype, skip, embeds))


@pytest.mark.parametrize("name", BODIES)
def test_embedding_without_token_types(name: str) -> None:
    args = embedding_args(torch.float32, True)
    args[2] = args[5] = None
    assert_embedding(name, args)


@pytest.mark.parametrize("name", BODIES)
def test_embedding_of_strided_and_small_integers(name: str) -> None:
    """int32, transposed, every other column, one row for all; embeds turned in their last two dimensions."""
    ids = torch.arange(28).view(7, 4).int().t() % V
    types = (torch.arange(56).view(4, 14) % TYPES)[:, ::2]
    positions = torch.tensor([[15, 3, 3, 0, 7, 1, 2]])
    assert_embedding(name, embedding_args(torch.float32, True, ids=ids, types=types, positions=positions.expand(4, 7)))
    args = embedding_args(torch.float32, False, embeds=True, types=types.new_zeros(1, 1).expand(4, 7))
    args[1] = randn(4, N, 7).transpose(1, 2)
    assert_embedding(name, args)


@pytest.mark.parametrize("want_rows,want_padded", [(True, False), (False, True)])
@pytest.mark.parametrize("name", BODIES)
def test_embedding_of_all_rows(name: str, want_rows: bool, want_padded: bool) -> None:
    args = embedding_args(torch.float32, False)
    args[-1] = None
    assert_like_ref("embed_layer_norm", name, *args, want_rows, want_padded)
    assert_like_ref("embed_layer_norm", name, *args, want_rows, want_padded, None, 0, 0.0, -1, True)


@pytest.mark.interpreter
@pytest.mark.parametrize("which,size", [("ids", V), ("types", TYPES), ("positions", P)])
def test_index_outside_its_table_is_nan_and_is_not_read(which: str, size: int) -> None:
    """The tables are the middle of larger buffers of finite numbers, so a read outside would look right.

    2**40 rows away there is no memory at all: a read would end the process.
    """
    for outside in (-1, size, 2**40, -(2**40)):
        args = embedding_args(torch.float32, False)
        for i in (4, 5, 6):
            args[i] = F.pad(args[i], (0, 0, 2, 2), value=1.0)[2:-2]
        at = {"ids": 0, "types": 2, "positions": 3}[which]
        args[at] = args[at].clone().long()
        args[at][1, 4] = outside
        rows, padded, summed = body("embed_layer_norm", "triton")(*args, True, True, None, 0, 0.0, -1, True)
        wrong = torch.zeros(28, dtype=torch.bool)
        wrong[7 + 4] = True
        assert torch.equal(padded.isnan().all(1), wrong) and torch.equal(padded.isnan().any(1), wrong)
        assert torch.equal(padded[args[-2].long()].isnan(), rows.isnan()) and torch.equal(summed.isnan(), rows.isnan())


@pytest.mark.parametrize("at", [0, 2, 3])
def test_index_outside_its_table_raises_on_the_cpu(at: int) -> None:
    args = embedding_args(torch.float32, False)
    args[at] = args[at].clone()
    args[at][1, 4] = 1000
    with pytest.raises(IndexError):
        body("embed_layer_norm", "cpu")(*args, True, True)
