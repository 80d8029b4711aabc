"""The ops that multiply: linear, linear_gelu, qkv_linear on rows, and pool, each body against the reference."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from kernel_helpers import BODIES, DTYPES, assert_error_rule, assert_like_ref, body, count, randn, references

from bert_fast.kernels.activation import TORCH, activate
from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.linear import linear_ref
from bert_fast.kernels.linear_gelu import linear_gelu_ref
from bert_fast.kernels.runtime import tl, triton

NAN = float("nan")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
SHAPES = (  # (T, K, N)
    (37, 40, 72),  # no size is a multiple of a tile
    (1, 384, 16),  # one row, six steps of K
    (130, 8, 100),  # past 128 rows: the next class of tiles; K below one step
    (5, 100, 1),  # one column
)
gemm = import_module("bert_fast.kernels.gemm")


def operands(T: int, K: int, N: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, bias: outputs of size 1, so that activations are neither linear nor saturated."""
    return randn(T, K, dtype=dtype), randn(N, K, dtype=dtype, scale=K**-0.5), randn(N, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,K,N", SHAPES)
@pytest.mark.parametrize("name", BODIES)
def test_linear(name: str, T: int, K: int, N: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(T, K, N, dtype)
    assert_like_ref("linear", name, x, weight, bias, None)
    assert_like_ref("linear", name, x, weight, None, None)


@pytest.mark.parametrize("op", ["linear", "linear_gelu", "qkv_linear"])
@pytest.mark.parametrize("name", BODIES)
def test_row_count_on_the_device(name: str, op: str) -> None:
    """Rows past n_rows are undefined memory, here NaN: no part of them may reach a real row."""
    _, weight, bias = operands(37, 40, 24, torch.float32)
    for n in (0, 1, 29, 32, 37):
        x = randn(37, 40)
        x[n:] = NAN
        args = [x, weight, bias] if op != "qkv_linear" else [x, *[weight] * 3, *[bias] * 3]
        assert_like_ref(op, name, *args, count(n), *(["gelu"] if op == "linear_gelu" else []), rows=n)


@pytest.mark.parametrize("op", ["linear", "linear_gelu", "qkv_linear"])
@pytest.mark.parametrize("name", BODIES)
def test_no_rows(name: str, op: str) -> None:
    x, weight = randn(0, 8), randn(4, 8)
    args = {"linear": [x, weight, None, None], "linear_gelu": [x, weight, None, None, "gelu"]}
    y = body(op, name)(*args.get(op, [x, *[weight] * 3, *[None] * 4]))
    assert y.shape == (0, 12 if op == "qkv_linear" else 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", [*ACTIVATIONS, "none"])
@pytest.mark.parametrize("name", BODIES)
def test_activations(name: str, act: str, dtype: torch.dtype) -> None:
    x, weight, bias = operands(19, 24, 40, dtype)
    assert_like_ref("linear_gelu", name, x, weight, bias, None, act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", BODIES)
def test_activations_at_extremes(name: str, act: str, dtype: torch.dtype) -> None:
    """A trained FFN reaches 195; cubes and exponentials of that must not turn into inf or NaN. A NaN stays one."""
    values = torch.tensor([0.0, -1e-4, 1e-4, -3.0, 5.0, -9.0, -60.0, 200.0, -200.0, 6e4, -6e4, NAN]).to(dtype)
    args = values.new_zeros(2, 16), values.new_zeros(12, 16), values, None, act
    y, (_, expected) = body("linear_gelu", name)(*args), references(linear_gelu_ref, *args)
    assert y[:, -1].isnan().all()
    eps = torch.finfo(dtype).eps  # relative to each number; 2e-6: what is left of 1 + erf far below zero
    torch.testing.assert_close(y[:, :-1].double(), expected[:, :-1], rtol=4 * eps, atol=2e-6)


@triton.jit
def _activate_kernel(x_ptr, y_ptr, ACT: tl.constexpr, EXACT: tl.constexpr, N: tl.constexpr):
    cols = tl.arange(0, N)
    tl.store(y_ptr + cols, activate(tl.load(x_ptr + cols), ACT, EXACT))


@pytest.mark.interpreter
@pytest.mark.parametrize("act,exact", [("gelu", True), ("gelu_tanh", False), ("silu", False)])
def test_activations_in_fp32(act: str, exact: bool) -> None:
    """What a half output would round away; the polynomial of half outputs has tests/test_kernels_activation.py."""
    x, y = torch.linspace(-8, 8, 512), torch.empty(512)
    _activate_kernel[(1,)](x, y, act, exact, 512)
    torch.testing.assert_close(y.double(), TORCH[act](x.double()), rtol=4 * torch.finfo(torch.float32).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,K,N", SHAPES[:2])
@pytest.mark.parametrize("name", BODIES)
def test_qkv_linear(name: str, T: int, K: int, N: int, dtype: torch.dtype) -> None:
    x = randn(T, K, dtype=dtype)
    weights = [randn(N, K, dtype=dtype, scale=K**-0.5, seed=i) for i in range(3)]
    biases = [randn(N, dtype=dtype, seed=i) for i in range(3)]
    assert_like_ref("qkv_linear", name, x, *weights, *biases, None)
    assert_like_ref("qkv_linear", name, x, *weights, None, None, None, count(max(T - 3, 0)), rows=max(T - 3, 0))


@pytest.mark.parametrize("name", BODIES)
def test_strides(name: str) -> None:
    """Rows apart, weights that are slices or transposed, biases with gaps, three projections of three layouts."""
    K, N = 24, 20
    x, sliced, turned = randn(11, 60)[::2, 8 : 8 + K], randn(N, 64)[:, 16 : 16 + K], randn(K, N).t()
    plain, bias, gaps = randn(N, K), randn(N), randn(2 * N)[::2]
    for weight in (sliced, turned):
        assert_like_ref("linear", name, x, weight, bias, None)
        assert_like_ref("linear_gelu", name, x, weight, bias, count(4), "silu", rows=4)
    assert_like_ref("linear", name, x, plain, gaps, None)
    for weights in ((sliced, turned, plain), (plain, sliced, turned), (turned, plain, sliced)):
        assert_like_ref("qkv_linear", name, x, *weights, bias, gaps, bias, None)
    assert_like_ref("pool", name, randn(3, 14, 60)[:, ::2, 8 : 8 + K], sliced, gaps)


@pytest.mark.interpreter
@pytest.mark.parametrize("n", [None, 75])
def test_groups_of_row_tiles(n: int | None) -> None:
    """Ten row tiles, more than the eight walked before the next column."""
    x, weight, bias = operands(150, 40, 50, torch.float32)
    y = gemm.gemm_triton(x, [weight], [bias], count(n), "none", TileConfig(16, 16, 4, 2, 16))
    low, truth = references(linear_ref, x[:n], weight, bias, None)
    assert_error_rule(y[:n], low, truth)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "split,T,K,N,n",
    [
        (2, 37, 200, 48, 30),  # uneven shares of K, masked ends, rows past the count
        (4, 5, 64, 33, None),  # a share each
        (8, 5, 40, 16, 5),  # more programs than steps: the last have nothing to add
        (3, 4, 96, 16, 0),  # no row at all
    ],
)
def test_split_products(split: int, T: int, K: int, N: int, n: int | None, dtype: torch.dtype) -> None:
    """The parts stay apart until the LayerNorm adds them; the same tile elsewhere is not split."""
    tile = TileConfig(16, 16, 4, 2, 16, SPLIT_K=split)
    x, weight, bias = operands(T, K, N, dtype)
    residual, norm = randn(T, N, dtype=dtype, seed=1), (1 + randn(N, scale=0.2)).to(dtype)
    token = torch.randperm(T, generator=torch.Generator().manual_seed(0)).int()
    if n is not None:
        x[n:] = residual[n:] = NAN
    parts = gemm.gemm_triton(x, [weight], [bias], count(n), "none", tile, may_split=True)
    assert parts.shape == (split, T, N) and parts.dtype == torch.float32
    whole = gemm.gemm_triton(x, [weight], [bias], count(n), "none", tile)
    assert whole.shape == (T, N) and whole.dtype == dtype
    args = (x, weight, bias, residual, norm, bias, 1e-12, token, count(n), True, True)
    ours = body("linear_layer_norm", "triton")(*args, tile)
    low, truth = references(body("linear_layer_norm", "ref"), *args)
    assert_error_rule(ours[0][:n], low[0][:n], truth[0][:n], "rows")
    assert_error_rule(ours[1], low[1], truth[1], "padded")
    again = body("linear_layer_norm", "triton")(*args, tile)
    assert torch.equal(ours[0][:n], again[0][:n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,K,N", SHAPES[:3])
@pytest.mark.parametrize("name", BODIES)
def test_linear_layer_norm(name: str, T: int, K: int, N: int, dtype: torch.dtype) -> None:
    """With the shipped tiles; of 130 rows some are not rows."""
    x, weight, bias = operands(T, K, N, dtype)
    residual, norm = randn(T, N, dtype=dtype, seed=1), (1 + randn(N, scale=0.2)).to(dtype)
    n = T - T // 3
    x[n:] = residual[n:] = NAN
    args = (x, weight, bias, residual, norm, bias, 1e-12, None, count(n), True, False)
    assert_like_ref("linear_layer_norm", name, *args, rows=n)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    "parts,N,n,act", [(1, 64, None, "gelu"), (1, 64, 100, "gelu_tanh"), (3, 64, None, "none"), (3, 40, 65, "relu")]
)
def test_descriptors(
    parts: int, N: int, n: int | None, act: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The TMA path; T, K and 40 columns are no multiples of the tile; three parts lie side by side in the output."""
    monkeypatch.setattr(gemm, "_gemm_pointer_kernel", None)  # so that it cannot have run
    x, weights = randn(150, 72, dtype=dtype), [randn(N, 72, dtype=dtype, scale=0.1, seed=i) for i in range(parts)]
    biases = [randn(N, dtype=dtype, seed=i) for i in range(parts)]
    y = gemm.gemm_triton(x, weights, biases, count(n), act, TileConfig(64, 32, 4, 3, 32, tma=True))
    low, truth = references(linear_ref, x[:n], torch.cat(weights), torch.cat(biases), None)
    assert_error_rule(y[:n], TORCH[act](low), TORCH[act](truth))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "why,parts,T,K,N",
    [
        ("rows of 72 bytes", 1, 70, 36, 64),
        ("output rows of 72 bytes", 1, 70, 40, 36),
        ("output columns of a part at 72 bytes", 3, 70, 40, 36),
    ],
)
def test_what_no_descriptor_fits(why: str, parts: int, T: int, K: int, N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table says TMA and a descriptor may not, the generic tile takes pointers, and is right."""
    descriptors, pointers = TileConfig(64, 32, 4, 3, 32, tma=True), TileConfig(32, 32, 4, 2, 32)
    monkeypatch.setattr(gemm, "_gemm_tma_kernel", None)
    monkeypatch.setattr(gemm, "capability", lambda device: (9, 0))
    monkeypatch.setattr(gemm, "choose", lambda *key: descriptors if key[-1] == (9, 0) else pointers)
    x, weight, bias = operands(T, K, N, torch.bfloat16)
    with pytest.raises(ValueError, match="do not fit descriptors"):
        gemm.gemm_triton(x, [weight] * parts, [bias] * parts, None, "none", descriptors)
    y = gemm.gemm_triton(x, [weight] * parts, [bias] * parts, None, "none")
    low, truth = references(linear_ref, x, weight.repeat(parts, 1), bias.repeat(parts), None)
    assert_error_rule(y, low, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B,S,K,N",
    [
        (5, 4, 100, 70),  # no size is a multiple of a tile
        (1, 1, 16, 8),  # the smallest call
        (17, 2, 136, 33),  # past one tile of sequences
    ],
)
@pytest.mark.parametrize("name", BODIES)
def test_pool(name: str, B: int, S: int, K: int, N: int, dtype: torch.dtype) -> None:
    hidden, weight, bias = randn(B, S, K, dtype=dtype), randn(N, K, dtype=dtype, scale=K**-0.5), randn(N, dtype=dtype)
    hidden[:, 1:] = NAN  # only the first token is read
    assert_like_ref("pool", name, hidden, weight, bias)


@pytest.mark.parametrize("name", BODIES)
def test_tanh_is_accurate_everywhere(name: str) -> None:
    """Each number by itself: a difference of exponentials would lose the small ones."""
    bias = torch.tensor([0.0, 1e-20, -1e-6, 1e-3, 0.3, -0.624, 0.626, 2.0, -9.0, 50.0, -1e4, 1e4])
    y = body("pool", name)(torch.zeros(1, 1, 16), torch.zeros(12, 16), bias)
    torch.testing.assert_close(y[0].double(), bias.double().tanh(), rtol=4 * torch.finfo(torch.float32).eps, atol=0)
