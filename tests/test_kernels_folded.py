"""The folded LayerNorm: fold_vectors, linear_to_stream, folded_linear, normalise, each body, and all together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import NAN, gradients, leaf, move
from kernel_helpers import BODIES, assert_error_rule, body, count, randn, references

from bert_fast.kernels.linear_to_stream import SUM_COLUMNS, linear_to_stream_ref, partials

Tensor = torch.Tensor
BF16, EPS = torch.bfloat16, 1e-12
ALL = (*BODIES, pytest.param("cuda", marks=pytest.mark.gpu))  # the registered op, compiled
PRODUCTS = (  # (T, K, N, n): x (T, K), weight (N, K), rows in use
    (150, 72, 200, None),  # no size is a multiple of a tile
    (150, 72, 264, 100),  # two column tiles, two partial sums: the right half of the last tile has no column
    (1, 8, 8, None),  # the smallest row of a descriptor
    (300, 136, 128, 129),  # three row tiles, of which the count leaves two
    (9, 8, 16, 0),  # no row in use
    (0, 8, 16, None),  # no row
)


def run(op: str, name: str, args: tuple[Any, ...]) -> Any:
    if name != "cuda":
        return body(op, name)(*args)
    out = body(op, "")(*move(args, "cuda"))
    return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()


def assert_like_ref(op: str, name: str, args: tuple[Any, ...], n: int | None = None) -> None:
    """All outputs by the one rule; of outputs of rows, the first n."""
    results = run(op, name, args), *references(body(op, "ref"), *args)
    for ours, low, truth in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert_error_rule(ours[:n], low[:n], truth[:n], op)


def gamma_of(N: int, seed: int = 0) -> Tensor:
    """As trained ones are, and with a zero and a negative entry: neither can be divided by or skipped."""
    gamma = 1 + randn(N, scale=0.3, seed=seed)
    gamma[:2] = torch.tensor([0.0, -0.7])
    return gamma.to(BF16)


def stream_of(h: Tensor, gamma: Tensor, n: int | None) -> tuple[Tensor, Tensor]:
    """(g, sums) of float64 rows h; rows past n are NaN, as the memory nobody wrote."""
    T, N = h.shape
    columns = torch.nn.functional.pad(h, (0, -N % SUM_COLUMNS)).view(T, partials(N), SUM_COLUMNS)
    sums = torch.stack([columns.sum(2).t(), columns.square().sum(2).t()]).float().contiguous()
    g = (h * gamma.double()).to(BF16)
    if n is not None:
        g[n:] = sums[..., n:] = NAN
    return g, sums


def rows_of(T: int, N: int, seed: int = 0) -> Tensor:
    """float64 rows, each with its own mean and size."""
    return (randn(T, N, seed=seed) * (1 + randn(T, 1, seed=1).abs()) + 2 * randn(T, 1, seed=2)).double()


def weights_of(parts: int, N: int, K: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    absent = [None] * (3 - parts)
    weights = [randn(N, K, dtype=BF16, scale=K**-0.5, seed=i) for i in range(parts)]
    return weights + absent, [randn(N, dtype=BF16, seed=i) for i in range(parts)] + absent


@pytest.mark.parametrize("parts,N,K", [(1, 40, 300), (3, 21, 24), (3, 8, 256), (1, 1, 8)])  # K: two steps, parts of one
@pytest.mark.parametrize("name", ALL)
def test_fold_vectors(name: str, parts: int, N: int, K: int) -> None:
    weights, biases = weights_of(parts, N, K)
    args = *weights, *biases, gamma_of(K), randn(K, dtype=BF16)
    assert all(v.dtype == torch.float32 for v in run("fold_vectors", name, args))
    assert_like_ref("fold_vectors", name, args)


@pytest.mark.parametrize("T,K,N,n", PRODUCTS)
@pytest.mark.parametrize("from_stream", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_linear_to_stream(name: str, from_stream: bool, T: int, K: int, N: int, n: int | None) -> None:
    (weight, *_), (bias, *_) = weights_of(1, N, K)
    x, of_residual = randn(T, K, dtype=BF16), (None, None, None)
    residual = randn(T, N, dtype=BF16)
    if from_stream:
        gamma = gamma_of(N, seed=1)
        residual, sums = stream_of(rows_of(T, N), gamma, n)
        of_residual = sums, gamma, randn(N, dtype=BF16, seed=2)
    if n is not None:
        x[n:] = residual[n:] = NAN
    args = x, weight, bias, residual, *of_residual, gamma_of(N), EPS, count(n)
    (g, sums), (low, low_sums), (true, true_sums) = (
        run("linear_to_stream", name, args),
        *references(linear_to_stream_ref, *args),
    )
    assert_error_rule(g[:n], low[:n], true[:n], "g")
    assert sums.is_contiguous() and sums.dtype == torch.float32
    assert_error_rule(sums[..., :n], low_sums[..., :n], true_sums[..., :n], "sums")
    again = run("linear_to_stream", name, args)
    assert torch.equal(g[:n], again[0][:n]) and torch.equal(sums[..., :n], again[1][..., :n])


@pytest.mark.parametrize("T,K,N,n", [(T, N, K, n) for T, K, N, n in PRODUCTS])  # K has the partial sums
@pytest.mark.parametrize("parts,act", [(1, "gelu"), (1, "relu"), (3, "none")])
@pytest.mark.parametrize("name", ALL)
def test_folded_linear(name: str, parts: int, act: str, T: int, K: int, N: int, n: int | None) -> None:
    weights, biases = weights_of(parts, N, K)
    gamma, beta = gamma_of(K), randn(K, dtype=BF16)
    u, c = body("fold_vectors", "ref")(*weights, *biases, gamma, beta)
    args = *stream_of(rows_of(T, K), gamma, n), *weights, u, c, EPS, act, count(n)
    assert_like_ref("folded_linear", name, args, n)


@pytest.mark.parametrize("T,N,n", [(5, 300, None), (7, 24, 4), (3, 8, 0), (0, 8, None)])
@pytest.mark.parametrize("want_rows,want_padded", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", ALL)
def test_normalise(name: str, want_rows: bool, want_padded: bool, T: int, N: int, n: int | None) -> None:
    token = torch.randperm(T, generator=torch.Generator().manual_seed(0)).int() if want_padded else None
    gamma = gamma_of(N)
    wanted = token, count(n), want_rows, want_padded
    args = *stream_of(rows_of(T, N), gamma, n), gamma, randn(N, dtype=BF16), EPS, *wanted
    ours, (low, truth) = run("normalise", name, args), references(body("normalise", "ref"), *args)
    assert_error_rule(ours[0][:n], low[0][:n], truth[0][:n], "rows")
    assert_error_rule(ours[1], low[1], truth[1], "padded")  # zeros where a token is no row


@pytest.mark.parametrize("name", ALL)
def test_strides(name: str) -> None:
    """Rows apart, transposed weights, vectors with gaps."""
    T, K, N = 9, 24, 40
    x, residual = randn(T, 64, dtype=BF16)[:, 8 : 8 + K], randn(2 * T, N, dtype=BF16)[::2]
    turned, gaps = randn(K, N, dtype=BF16, scale=0.2).t(), [randn(2 * N, dtype=BF16, seed=i)[::2] for i in range(4)]
    g, sums = stream_of(rows_of(T, N), gaps[2], None)
    args: tuple[Any, ...] = x, turned, gaps[0], residual, None, None, None, gaps[1], EPS, None
    assert_like_ref("linear_to_stream", name, args)
    assert_like_ref("linear_to_stream", name, (*args[:3], g, sums, gaps[2], gaps[3], *args[7:]))
    down, spread = randn(N, 16, dtype=BF16, scale=0.2).t(), torch.cat([g, g], 1)[:, :N]
    u, c = (randn(32, seed=i)[::2] for i in range(2))
    assert_like_ref("fold_vectors", name, (down, None, None, gaps[0][:16], None, None, gaps[2], gaps[3]))
    assert_like_ref("folded_linear", name, (spread, sums, down, None, None, u, c, EPS, "silu", None))
    assert_like_ref("normalise", name, (spread, sums, gaps[2], gaps[3], EPS, None, None, True, False))


def unfolded(*args: Any) -> Tensor:
    """linear(LayerNorm(linear(x) + residual)) by the references of the ops that a fold replaces."""
    *to_norm, down, down_bias = args
    rows, _ = body("linear_layer_norm", "ref")(*to_norm, EPS, None, None, True, False)
    return body("linear", "ref")(rows, down, down_bias, None)


@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0])  # of a row, where its numbers have size 1
@pytest.mark.parametrize("name", ALL)
def test_a_fold_is_as_accurate_as_what_it_replaces(name: str, mean: float) -> None:
    """Held to the error of the unfolded ops in bf16: LayerNorm's own formula, no folding in the truth."""
    T, K, N, M = 40, 64, 200, 48
    (weight, *_), (bias, *_) = weights_of(1, N, K)
    (down, *_), (down_bias, *_) = weights_of(1, M, N)
    x, residual = randn(T, K, dtype=BF16), (randn(T, N, scale=0.5) + mean * (1 + randn(T, 1).abs())).to(BF16)
    gamma, beta = gamma_of(N), randn(N, dtype=BF16)
    u, c = run("fold_vectors", name, (down, None, None, down_bias, None, None, gamma, beta))
    g, sums = run("linear_to_stream", name, (x, weight, bias, residual, None, None, None, gamma, EPS, None))
    y = run("folded_linear", name, (g, sums, down, None, None, u, c, EPS, "none", None))
    assert_error_rule(y, *references(unfolded, x, weight, bias, residual, gamma, beta, down, down_bias))


@pytest.mark.parametrize("name", ALL)
def test_constant_rows(name: str) -> None:
    """E[h^2] - mean^2 of equal numbers is rounding noise of either sign, never the root of a negative number."""
    N = 200
    h = torch.linspace(0.1, 3, 64)[:, None].expand(64, N).to(BF16)
    x, weight, gamma = h.new_zeros(64, 8), h.new_zeros(N, 8), h.new_ones(N)
    bias = h.new_full((N,), 1 / 300)  # so that h has more bits than bf16, and its square more than fp32
    g, sums = run("linear_to_stream", name, (x, weight, bias, h, None, None, None, gamma, EPS, None))
    mean, square = sums.sum(1) / N
    assert (square < mean.square()).any(), "no row shows the clamp"
    rows, _ = run("normalise", name, (g, sums, gamma, gamma, EPS, None, None, True, False))
    w = h.new_ones(16, N)
    u = c = torch.zeros(16)
    y = run("folded_linear", name, (g, sums, w, None, None, u, c, EPS, "none", None))
    assert torch.isfinite(rows).all() and torch.isfinite(y).all()


@pytest.mark.parametrize("name", ALL)
def test_a_nan_or_inf_spoils_its_row_only(name: str) -> None:
    """As in LayerNorm: the clamp must not turn a broken row into numbers."""
    N = 24
    gamma, residual = gamma_of(N), randn(5, N, dtype=BF16)
    residual[1, 3], residual[2, 4] = NAN, float("inf")
    x, (weight, *_), (bias, *_) = randn(5, 8, dtype=BF16), *weights_of(1, N, 8)
    g, sums = run("linear_to_stream", name, (x, weight, bias, residual, None, None, None, gamma, EPS, None))
    (down, *_), _ = weights_of(1, 16, N)
    u = c = torch.ones(16)
    y = run("folded_linear", name, (g, sums, down, None, None, u, c, EPS, "none", None))
    rows, _ = run("normalise", name, (g, sums, gamma, gamma, EPS, None, None, True, False))
    for out in (y, rows):
        assert out[1:3].isnan().all() and torch.isfinite(out[[0, 3, 4]]).all()


T, K, N, ROWS = 6, 8, 12, 4


def cases() -> dict[str, tuple[Any, ...]]:
    """fp32 arguments of every op that want gradients; "count": with rows past the count."""
    h, n, token = randn(T, K, seed=5), count(ROWS), torch.tensor([2, 0, 1, 5, 4, 3]).int()
    sums = torch.stack([h.sum(1), h.square().sum(1)])[:, None].contiguous().requires_grad_()
    g, x, gamma, beta = h.clone().requires_grad_(), leaf(T, N), leaf(K), leaf(K, seed=1)
    three, biases = [leaf(N, K, seed=i) for i in range(3)], [leaf(N, seed=i) for i in range(3)]
    down, bias = leaf(K, N), leaf(K, seed=2)
    u, c = leaf(3 * N), leaf(3 * N, seed=1)
    one = leaf(N), leaf(N, seed=1)
    return {
        "fold_vectors": (*three, *biases, gamma, beta),
        "fold_vectors one": (three[0], None, None, biases[0], None, None, gamma, beta),
        "folded_linear": (g, sums, *three, u, c, 1e-5, "none", None),
        "folded_linear count": (g, sums, three[0], None, None, *one, 1e-5, "gelu", n),
        "linear_to_stream": (x, down, bias, leaf(T, K), None, None, None, gamma, 1e-5, None),
        "linear_to_stream count": (x, down, bias, g, sums, gamma, beta, leaf(K, seed=3), 1e-5, n),
        "normalise": (g, sums, gamma, beta, 1e-5, None, None, True, False),
        "normalise count": (g, sums, gamma, beta, 1e-5, token, n, True, True),
    }


@pytest.mark.parametrize("case", list(cases()))
def test_opcheck_and_gradients(case: str) -> None:
    op, args = case.split()[0], cases()[case]
    ours = gradients(body(op, ""), args, False)
    torch.testing.assert_close(ours, gradients(body(op, "ref"), args, False))
    assert all(torch.isfinite(g).all() and g.count_nonzero() for g in ours)
    if "count" in case:  # a reference slices by a number on the device: its backward has no static shapes
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        # all rows in use: of undefined ones it would compare the undefined
        args = tuple(count(T) if isinstance(a, Tensor) and a.shape == (1,) else a for a in args)
        torch.library.opcheck(body(op, ""), args, test_utils=utils)
    else:
        torch.library.opcheck(body(op, ""), args)


def wrong(case: str, at: int, value: Any) -> tuple[str, tuple[Any, ...]]:
    args = [a.detach() if isinstance(a, Tensor) else a for a in cases()[case]]
    args[at] = value
    return case.split()[0], tuple(args)


WRONG = [
    (*wrong("fold_vectors", 2, None), r"2 weights, 3 biases, expected one or three of both"),
    (*wrong("fold_vectors", 1, randn(N, K + 1)), r"fold_vectors: weight has shape \(12, 9\), expected \(12, 8\)"),
    (*wrong("fold_vectors", 7, randn(K + 1)), r"fold_vectors: beta is \(9,\) on cpu, expected \(8,\) on cpu"),
    (*wrong("folded_linear", 0, randn(K, T).t()), r"folded_linear: g has shape \(6, 8\) and strides \(1, 6\)"),
    (*wrong("folded_linear", 1, randn(2, 2, T)), r"sums are \(2, 2, 6\) torch.float32 .* expected dense \(2, 1, 6\)"),
    (*wrong("folded_linear", 3, None), r"folded_linear: 2 weights, expected one or three"),
    (*wrong("folded_linear", 5, randn(N)), r"folded_linear: u is \(12,\) on cpu, expected \(36,\) on cpu"),
    (*wrong("folded_linear", 6, randn(3 * N).double()), r"c is torch.float64, expected torch.float32"),
    (*wrong("folded_linear", 8, "swish"), r"act='swish': expected one of"),
    (*wrong("linear_to_stream", 3, randn(T, N)), r"residual is \(6, 12\) torch.float32, expected \(6, 8\)"),
    (*wrong("linear_to_stream", 7, randn(N)), r"linear_to_stream: gamma is \(12,\) on cpu, expected \(8,\)"),
    (*wrong("linear_to_stream count", 4, randn(2, 1, N)), r"sums are \(2, 1, 12\)"),
    (*wrong("linear_to_stream count", 6, None), r"a residual with sums needs residual_gamma and residual_beta"),
    (*wrong("normalise", 1, randn(2, 1, T).half()), r"normalise: sums are \(2, 1, 6\) torch.float16"),
    (*wrong("normalise", 2, randn(N)), r"normalise: weight is \(12,\) on cpu"),
    (*wrong("normalise count", 5, None), r"padded output asked for without a token map"),
]


@pytest.mark.parametrize("name", ["", "triton"])
@pytest.mark.parametrize("op,args,message", WRONG, ids=range(len(WRONG)))
def test_wrong_inputs(op: str, args: tuple[Any, ...], message: str, name: str) -> None:
    with pytest.raises(ValueError, match=message):
        body(op, name)(*args)


def test_what_the_products_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, rows that no descriptor takes, chips without descriptors or without room for the tile."""
    product = body("linear_to_stream", "triton")

    def call(dtype: torch.dtype, K: int, N: int, device: str = "cpu") -> Any:
        x, weight, p = (torch.empty(shape, dtype=dtype, device=device) for shape in ((4, K), (N, K), (N,)))
        return product(x, weight, p, x.new_empty(4, N), None, None, None, p, EPS, None)

    for dtype in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match=f"linear_to_stream: folded LayerNorm is for bfloat16, not {dtype}"):
            call(dtype, 8, 8)
    for K, N in ((12, 8), (8, 12)):
        with pytest.raises(ValueError, match="do not fit descriptors"):
            call(BF16, K, N)
    for capability in ((8, 0), (8, 9), (12, 0), (12, 1)):
        monkeypatch.setattr("bert_fast.kernels.linear_to_stream.capability", lambda device, c=capability: c)
        with pytest.raises(ValueError, match="needs tensor descriptors and a large tile: compute capability 9.0 to"):
            call(BF16, 8, 8, "meta")
