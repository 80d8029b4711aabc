"""Dropout by counter: the kernels' numbers are the reference's, they are as random as they must be, the forward ops."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from kernel_cases import cases
from kernel_helpers import BODIES, DTYPES, assert_error_rule, body, count, outputs, randn

from bert_fast.kernels.dropout import (
    check_dropout,
    dropout_kept,
    dropout_keys,
    dropout_rows_ref,
    kept_ref,
    make_seed,
    philox,
    rescale,
    threshold,
)
from bert_fast.kernels.pack import pack_ref
from bert_fast.kernels.runtime import tl, triton

SEED = torch.tensor([0x123456789ABCDEF])
ZERO = torch.zeros(1, dtype=torch.long)
LAST = 2**31 - 1
DRAWS = 10_000_000
NAN = float("nan")


@triton.jit(do_not_specialize=["site", "block", "threshold"])
def _kept_kernel(counter_ptr, kept_ptr, seed_ptr, site, block, threshold, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    k0, k1 = dropout_keys(seed_ptr, site, block)
    kept = dropout_kept(tl.load(counter_ptr + at).to(tl.int32), k0, k1, threshold)
    tl.store(kept_ptr + at, kept.to(tl.int32))


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_the_kernels_draw_the_references_numbers(seed: int) -> None:
    """Bit for bit: counters past 2^31 and 2^32 wrap, as those of long batches do; every word of the key counts."""
    generator = torch.Generator().manual_seed(seed % 97)
    counter = torch.randint(-(2**63), 2**63 - 1, (2048,), generator=generator)
    edges = [m * 2**31 + d for m in range(-2, 5) for d in (-2, -1, 0, 1)]
    counter[: len(edges)] = torch.tensor(edges)
    given, kept = torch.tensor([seed]), torch.empty(2048, dtype=torch.int32)
    for site, block, p in itertools.product((0, 1, LAST), (0, 3, LAST), (0.1, 0.5, 1.0)):
        _kept_kernel[(1,)](counter, kept, given, site, block, threshold(p), BLOCK=2048)
        assert torch.equal(kept.bool(), kept_ref(given, site, ZERO + block, counter, p)), (site, block, p)


def test_philox() -> None:
    """The first two words of Random123's known answer for zeros."""
    words = philox(0, ZERO, ZERO)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D]


def test_the_numbers_stay() -> None:
    """A run continued under a later version draws what it would have drawn."""
    kept = kept_ref(torch.tensor([2**40 + 1]), 3, torch.tensor([2]), torch.arange(64), 0.5)
    assert sum(k << i for i, k in enumerate(kept.tolist())) == 0xD2A4DF64D43F936B


@functools.lru_cache(maxsize=4)
def draw(p: float, seed: int = 0, site: int = 0, block: int = 0, first: int = 0, n: int = DRAWS) -> torch.Tensor:
    return kept_ref(torch.tensor([seed]), site, ZERO + block, torch.arange(first, first + n), p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.01])
def test_as_many_are_dropped_as_asked(p: float) -> None:
    error = (p * (1 - p) / DRAWS) ** 0.5
    kept = draw(p, seed=7)
    assert abs(1 - kept.sum().item() / DRAWS - p) < 4 * error
    runs = kept.view(-1, 1000).sum(1).double()  # a spread that is the binomial's
    assert runs.var().item() / (1000 * p * (1 - p)) == pytest.approx(1, abs=4 * (2 / len(runs)) ** 0.5)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard errors of two independent masks."""
    a, b = (m.float() - m.float().mean() for m in (a, b))
    return ((a * b).mean() / (a.std() * b.std())).item() * len(a) ** 0.5


N = 1_000_000
OTHERS: dict[str, dict[str, int]] = {
    "next element": {"first": 1},
    "next but one": {"first": 2},
    "next row of 384": {"first": 384},
    "next row of 768": {"first": 768},
    "next row of 1024": {"first": 1024},
    "half the numbers away": {"first": 2**31},
    "next head": {"block": 1},
    "next site": {"site": 1},
    "site and block swapped": {"site": 1, "block": 2},
    "next seed": {"seed": 12},
    "seed's other word": {"seed": 11 + 2**32},
}


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("what", OTHERS)
def test_no_correlation(what: str, p: float) -> None:
    same = {"seed": 11, "n": N} | ({"site": 2, "block": 1} if "swapped" in what else {})
    assert abs(correlation(draw(p, **same), draw(p, **same | OTHERS[what]))) < 4.5


def test_no_correlation_of_rows_and_columns() -> None:
    """Many short rows: a column's or a row's share of kept elements varies as that of independent ones does."""
    kept = draw(0.1, seed=3, n=4096 * 768).view(4096, 768).double()
    for axis, n in ((0, 4096), (1, 768)):
        shares = kept.mean(axis)
        ratio = shares.var().item() / (0.09 / n)
        assert ratio == pytest.approx(1, abs=4 * (2 / len(shares)) ** 0.5)


def test_thresholds() -> None:
    assert [threshold(p) for p in (0.0, 0.25, 0.5, 1.0)] == [-(2**31), -(2**30), 0, LAST]
    assert threshold(2.0**-32) == -(2**31) + 1 and threshold(1e-12) == -(2**31)
    assert all(-(2**31) <= threshold(p) <= LAST for p in (1 - 1e-12, 1 - 2.0**-33, 1e-300))
    assert rescale(0.0) == 1 and rescale(0.75) == 4 and rescale(1.0) == 0
    few, many = draw(0.1, n=10_000), draw(0.5, n=10_000)
    assert (few | ~many).all() and few.sum() > many.sum()  # one number decides, whatever p is


def test_none_and_all() -> None:
    x = randn(50, 40)
    assert dropout_rows_ref(x, None, None, 0, 0.0) is x
    assert draw(0.0, n=1000).all() and not draw(1.0, n=1_000_000).any()
    assert (dropout_rows_ref(x, None, SEED, 0, 1.0) == 0).all()
    dropped = dropout_rows_ref(x, None, SEED, 0, 0.2)
    assert torch.equal(dropped[dropped != 0], (x * 1.25)[dropped != 0]) and 300 < (dropped == 0).sum() < 500


def test_tokens_draw_not_rows() -> None:
    x, token = randn(6, 40), torch.tensor([3, 0, 5, 1, 2, 4]).int()
    mapped = dropout_rows_ref(x[:4], token, SEED, 1, 0.5)
    assert torch.equal(mapped, dropout_rows_ref(x[token.argsort()], None, SEED, 1, 0.5)[token[:4].long()])


def test_seeds_follow_the_generator() -> None:
    torch.manual_seed(5)
    first, second = make_seed(torch.device("cpu")), make_seed(torch.device("cpu"))
    torch.manual_seed(5)
    again = make_seed(torch.device("cpu"))
    assert first.dtype == torch.int64 and first.shape == (1,) and torch.equal(first, again)
    assert not torch.equal(first, second) and first > 2**40  # all words of a key


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.6, 1.0])
def test_residual_layer_norm(name: str, dtype: torch.dtype, p: float) -> None:
    """With and without a map of tokens; rows past the count are NaN."""
    token, cu_seqlens, _, _ = pack_ref(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]), True)
    n = int(cu_seqlens[-1])
    weight, bias = (1 + randn(100, scale=0.2)).to(dtype), randn(100, dtype=dtype, seed=1)
    for mapped, padded in ((token, True), (token, False), (None, False)):
        x, residual = randn(12, 100, dtype=dtype), randn(12, 100, dtype=dtype, seed=1)
        x[n:] = NAN
        args = x, residual, weight, bias, 1e-12, mapped, count(n), True, padded, SEED, 5, p
        rows, full = outputs("residual_layer_norm", name, *args)
        assert_error_rule(*(t[:n] for t in rows), "rows")
        if padded:
            assert_error_rule(*full, "padded")
            assert torch.equal(full[0][token[:n].long()], rows[0][:n])


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_residual_layer_norm_of_autocast(name: str, dtype: torch.dtype, p: float) -> None:
    """Half precision onto fp32: the sum and both outputs are fp32."""
    x, residual, weight = randn(5, 96, dtype=dtype), randn(5, 96, seed=1), 1 + randn(96, scale=0.2)
    token = torch.tensor([3, 0, 4, 1, 2]).int()
    args = x, residual, weight, weight, 1e-12, token, None, True, True, SEED, 5, p
    for ours, low, truth in outputs("residual_layer_norm", name, *args):
        assert ours.dtype == torch.float32
        assert_error_rule(ours, low, truth)


def test_autocast_traces() -> None:
    """The fake outputs are fp32 too, and so are the gradients of all but x."""
    x, residual, weight = randn(5, 8).bfloat16().requires_grad_(), randn(5, 8, seed=1).requires_grad_(), torch.ones(8)
    token = torch.tensor([3, 0, 4, 1, 2]).int()
    args = x, residual, weight.requires_grad_(), torch.zeros(8), 1e-5, token, None, True, True, SEED, 5, 0.3
    torch.library.opcheck(body("residual_layer_norm", ""), args)
    rows, padded = body("residual_layer_norm", "")(*args)
    (rows.sum() + padded.square().sum()).backward()
    assert [t.grad.dtype for t in (x, residual, weight)] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_layer_norm(name: str, dtype: torch.dtype) -> None:
    """After the LayerNorm: what is dropped is 0, not the bias."""
    (ids, *_), mask = cases("embed_layer_norm")["ids"], torch.tensor([[1, 1, 0], [0, 1, 1]])
    token, cu_seqlens, _, _ = pack_ref(mask, True)
    tables = [randn(rows, 40, dtype=dtype) for rows in (10, 2, 3)]
    at, n = torch.arange(3).expand(2, 3), int(cu_seqlens[-1])
    weight, bias = (1 + randn(40, scale=0.2)).to(dtype), randn(40, dtype=dtype, seed=1)
    args = ids, None, torch.zeros_like(ids), at, *tables, weight, bias, 1e-12, 0, token, count(n), True, True
    rows, padded, _ = outputs("embed_layer_norm", name, *args, SEED, 5, 0.4)
    assert_error_rule(*(t[:n] for t in rows), "rows")
    assert_error_rule(*padded, "padded")
    assert torch.equal(rows[0][:n] == 0, rows[2][:n] == 0) and 40 < (rows[0][:n] == 0).sum() < 120


@pytest.mark.parametrize("name", BODIES)
def test_no_dropout_needs_no_seed(name: str) -> None:
    """p = 0: the same bits with a seed, without one, and without the arguments."""
    x, residual, weight = randn(5, 48), randn(5, 48, seed=1), randn(48)
    args = x, residual, weight, weight, 1e-12, None, None, True, False
    run = body("residual_layer_norm", name)
    plain = run(*args)[0]
    assert torch.equal(plain, run(*args, None, 3, 0.0)[0]) and torch.equal(plain, run(*args, SEED, 3, 0.0)[0])


WRONG: list[tuple[Any, float, str]] = [
    (None, 0.1, "op: seed is None, expected one int64 number on cpu for p = 0.1"),
    (SEED.int(), 0.1, r"op: seed is \(1,\) torch.int32 on cpu"),
    (torch.zeros(2, dtype=torch.long), 0.1, r"op: seed is \(2,\) torch.int64"),
    (SEED.to("meta"), 0.1, "torch.int64 on meta, expected one int64 number on cpu"),
    (SEED, -0.1, "op: p is -0.1, expected a probability from 0 to 1"),
    (SEED, 1.01, "p is 1.01"),
    (SEED, NAN, "p is nan"),
]


@pytest.mark.parametrize("seed,p,message", WRONG, ids=range(len(WRONG)))
def test_wrong_inputs(seed: Any, p: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dropout("op", seed, p, torch.device("cpu"))


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("op,case", [("residual_layer_norm", "dropout"), ("embed_layer_norm", "dropout")])
def test_every_op_checks(op: str, case: str, name: str) -> None:
    args = cases(op)[case]
    end = next(i for i, a in enumerate(args) if type(a) is float and a == 0.4) + 1
    for change, message in (((None, 3, 0.4), f"{op}: seed is None"), ((SEED, 3, 2.0), f"{op}: p is 2.0")):
        with pytest.raises(ValueError, match=message):
            body(op, name)(*args[: end - 3], *change, *args[end:])


@pytest.mark.parametrize("name", BODIES)
def test_a_residual_of_less_precision_is_refused(name: str) -> None:
    x, weight = randn(4, 8), torch.ones(8)
    for residual in (x.bfloat16(), x.half()):
        with pytest.raises(ValueError, match=r"residual is \(4, 8\) .*expected \(4, 8\) torch.float32"):
            body("residual_layer_norm", name)(x, residual, weight, weight, 1e-5, None, None, True, False)
    with pytest.raises(ValueError, match="torch.bfloat16"):
        body("residual_layer_norm", name)(x.half(), x.bfloat16(), weight, weight, 1e-5, None, None, True, False)
