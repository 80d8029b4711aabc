"""The ops that make up the backward of the products: each body against its reference, and that against autograd."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from gradient_cases import OPS, arguments, weights
from kernel_helpers import BODIES, DTYPES, assert_error_rule, assert_like_ref, body, count, double, randn, references

from bert_fast.kernels.activation import TORCH
from bert_fast.kernels.configs import TileConfig, gradient_class
from bert_fast.kernels.linear import linear_ref

F32, BF16 = torch.float32, torch.bfloat16
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "none")
SHAPES = (  # (T, N, K)
    (37, 40, 72),  # no size is a multiple of a tile
    (1, 96, 16),  # one row, three steps of the inner dimension
    (70, 8, 100),  # past a tile of 64 rows, N below one step
    (5, 100, 1),  # one column
)
PARTS = (1, 2, 3)
grad_gemm, grad_weight_file = (import_module(f"bert_fast.kernels.{name}") for name in ("grad_gemm", "grad_weight"))
TMA = TileConfig(64, 32, 4, 3, 32, tma=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,N,K", SHAPES)
@pytest.mark.parametrize("name", BODIES)
def test_shapes(name: str, T: int, N: int, K: int, dtype: torch.dtype) -> None:
    for op in OPS:
        assert_like_ref(op, name, *arguments(op, T, N, K, dtype))


@pytest.mark.parametrize("parts", PARTS)
def test_references_are_autograd(parts: int) -> None:
    """float64: each backward op's reference against autograd of what it is the backward of."""
    T, N, K, n = 7, 6, 4, 5
    x, ws = randn(T, K).double().requires_grad_(), [w.double() for w in weights(parts, N, K, F32)[:parts]]
    ws = [w.requires_grad_() for w in ws]
    bias, dy = torch.zeros(N, dtype=torch.float64, requires_grad=True), randn(T, parts * N).double()
    y = torch.cat([linear_ref(x, w, bias, count(n)) for w in ws], 1)
    dx, db, *dws = torch.autograd.grad(y, [x, bias, *ws], dy, retain_graph=True)
    add = randn(T, K, seed=3).double()
    torch.testing.assert_close(body("grad_input", "ref")(dy, *ws, *[None] * (3 - parts), None, count(n)), dx)
    with_add = body("grad_input", "ref")(dy, *ws, *[None] * (3 - parts), add, count(n))
    torch.testing.assert_close(with_add[:n], (dx + add)[:n])
    dw, sums = body("grad_weight", "ref")(dy, x, count(n), True)
    torch.testing.assert_close(dw, torch.cat(dws))
    torch.testing.assert_close(sums.view(parts, N).sum(0), db)
    for act in ACTIVATIONS:
        pre = randn(T, K, seed=1).double().requires_grad_()
        through = TORCH[act](pre)
        d_y, w = dy[:, :N], ws[0]
        (expected,) = torch.autograd.grad(through, pre, torch.nn.functional.pad(d_y[:n] @ w, (0, 0, 0, T - n)))
        d_pre, again = body("grad_input_act", "ref")(d_y, w, pre, act, count(n))
        torch.testing.assert_close((d_pre, again[:n]), (expected, through[:n]))
        torch.testing.assert_close(body("grad_activation", "ref")(d_y @ w, pre, act, count(n)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", BODIES)
def test_parts_and_what_is_added(name: str, parts: int, dtype: torch.dtype) -> None:
    """One sum over the parts, rounded once; an fp32 gradient beside half operands makes an fp32 result."""
    T, N, K = 19, 40, 24
    dy, ws = randn(T, parts * N, dtype=dtype), weights(parts, N, K, dtype)
    for add in (None, randn(T, K, dtype=dtype), randn(T, K)):
        assert_like_ref("grad_input", name, dy, *ws, add, None)
        dx = body("grad_input", name)(dy, *ws, add, None)
        assert dx.dtype == (dtype if add is None else add.dtype) and dx.is_contiguous()
    if name == "triton" and dtype != F32:  # no intermediate rounding: fp32's accuracy
        truth = body("grad_input", "ref")(*map(double, (dy, *ws, add, None)))
        assert_error_rule(dx, truth.float(), truth)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", BODIES)
def test_row_count_on_the_device(name: str, op: str) -> None:
    """Rows past n_rows are undefined memory, here NaN: they reach no row, no weight and no bias gradient."""
    for n in (0, 1, 29, 32, 37):
        for dtype in (F32, BF16):
            assert_like_ref(op, name, *arguments(op, 37, 24, 40, dtype, n), rows=None if op == "grad_weight" else n)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", BODIES)
def test_no_rows(name: str, op: str) -> None:
    """The capacity is 0: a weight's gradient is 0, all else empty."""
    for dtype in (F32, BF16):
        assert_like_ref(op, name, *arguments(op, 0, 24, 8, dtype))
        assert_like_ref(op, name, *arguments(op, 0, 24, 8, dtype, 0))


@pytest.mark.parametrize("name", BODIES)
def test_bias_gradient_only_where_wanted(name: str) -> None:
    dy, x, n, _ = arguments("grad_weight", 9, 24, 8, F32, 5)
    assert body("grad_weight", name)(dy, x, n, False)[1].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", BODIES)
def test_activations(name: str, act: str, dtype: torch.dtype) -> None:
    dy, w, pre, _, _ = arguments("grad_input_act", 19, 24, 40, dtype)
    assert_like_ref("grad_input_act", name, dy, w, pre * 2, act, None)
    assert_like_ref("grad_activation", name, pre, pre.flip(0) * 2, act, None)
    assert_like_ref("linear_gelu_pre", name, pre, randn(8, 40, dtype=dtype), None, None, act)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("parts,n,added", [(1, None, F32), (2, 100, None), (3, 65, "same"), (3, None, F32)])
def test_descriptors(
    parts: int, n: int | None, added: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The TMA kernel; T, N and K are no multiples of the tile, so a step may read the next part's columns of dy."""
    monkeypatch.setattr(grad_gemm, "_grad_pointer_kernel", None)  # so that it cannot have run
    T, N, K = 150, 72, 40
    dy, ws = randn(T, parts * N, dtype=dtype), weights(parts, N, K, dtype)
    add = added and randn(T, K, dtype=dtype if added == "same" else F32)
    for t in (dy, *([] if add is None else [add])):
        t[T if n is None else n :] = float("nan")
    dx = body("grad_input", "triton")(dy, *ws, add, count(n), TMA)
    low, truth = references(body("grad_input", "ref"), dy, *ws, add, count(n))
    assert_error_rule(dx[:n], low[:n], truth[:n])


@pytest.mark.interpreter
@pytest.mark.parametrize("n", [None, 100])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_descriptors_through_an_activation(act: str, n: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_gemm, "_grad_pointer_kernel", None)
    dy, w, pre, _, _ = arguments("grad_input_act", 150, 72, 40, BF16, n)
    ours = body("grad_input_act", "triton")(dy, w, pre, act, count(n), TMA)
    for x, low, truth in zip(ours, *references(body("grad_input_act", "ref"), dy, w, pre, act, count(n)), strict=True):
        assert_error_rule(x[:n], low[:n], truth[:n])


@pytest.mark.interpreter
def test_descriptors_of_wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epilogues of a quarter; the last of 200 columns are in the fourth."""
    monkeypatch.setattr(grad_gemm, "_grad_pointer_kernel", None)
    tile = TileConfig(64, 256, 4, 3, 32, tma=True)
    dy, w, other, act, _ = arguments("grad_input_act", 70, 24, 200, BF16)
    for op, args in (("grad_input_act", (dy, w, other, act, None)), ("grad_input", (dy, w, None, None, other, None))):
        results = body(op, "triton")(*args, tile), *references(body(op, "ref"), *args)
        for ours, low, truth in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert_error_rule(ours, low, truth)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    "parts,T,n",
    [
        (1, 150, None),
        (2, 150, 100),  # uneven shares, a masked end
        (3, 150, 96),  # whole blocks only
        (8, 150, 33),  # more programs than blocks: the last have nothing to add
        (3, 150, 0),  # no row at all
    ],
)
def test_weight_gradient_by_descriptors(
    parts: int, T: int, n: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grad_weight_file, "_grad_weight_pointer_kernel", None)
    args = arguments("grad_weight", T, 72, 40, dtype, n)
    ours = body("grad_weight", "triton")(*args, TMA, parts)
    for x, low, truth in zip(ours, *references(body("grad_weight", "ref"), *args), strict=True):
        assert_error_rule(x, low, truth)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_split_rows(parts: int, dtype: torch.dtype) -> None:
    """The same bits every time; the last of eight programs have no rows."""
    args = arguments("grad_weight", 90, 40, 24, dtype, 81)
    ours = body("grad_weight", "triton")(*args, TileConfig(16, 16, 4, 2, 16), parts)
    for x, low, truth in zip(ours, *references(body("grad_weight", "ref"), *args), strict=True):
        assert_error_rule(x, low, truth)
    again = body("grad_weight", "triton")(*args, TileConfig(16, 16, 4, 2, 16), parts)
    assert all(map(torch.equal, ours, again))


def test_how_often_rows_are_split() -> None:
    tile = TileConfig(128, 128, 8, 4, 64)

    def split(T: int, M: int, K: int) -> int:
        return grad_weight_file.split(-(-M // 128) * -(-K // 128), T, M, K, tile, 132)

    assert split(16384, 768, 768) == 3  # 36 tiles of 132 multiprocessors
    assert split(16384, 4096, 4096) == 1  # 1024 tiles: enough
    assert split(256, 768, 768) == 1  # too few rows to pay for the parts
    assert 1 < split(16384, 3072, 768) <= grad_weight_file.MAX_SPLIT  # 144 tiles would be two rounds, the last for 12
    assert [gradient_class(n) for n in (0, 1024, 1025, 8193)] == ["rows<=1024", "rows<=1024", "rows<=8192", "rows>8192"]


@pytest.mark.parametrize("name", BODIES)
def test_strides(name: str) -> None:
    """Expanded gradients as autograd hands them out, slices, weights that are transposed, rows apart."""
    T, N, K = 11, 24, 20
    one, wide, turned = randn(1, 1).expand(T, N), randn(2 * T, 60)[::2, 8 : 8 + N], randn(N, T).t()
    w, sliced, other = randn(K, N).t(), randn(N, 64)[:, 16 : 16 + K], randn(T, 50)[:, 3 : 3 + K]
    pre, rows = randn(T, 60)[:, 7 : 7 + N], randn(K, T).t()
    for dy in (one, wide, turned, randn(1, N).expand(T, N)):
        for weight in (w, sliced):
            assert_like_ref("grad_input", name, dy, weight, None, None, other, None)
            assert_like_ref("grad_input_act", name, dy, weight, other, "silu", count(T))
        assert_like_ref("grad_weight", name, dy, other, count(5), True)
        assert_like_ref("grad_weight", name, dy, rows, None, True)
        assert_like_ref("grad_activation", name, dy, pre, "gelu", None)
    assert_like_ref("grad_input", name, torch.cat([wide, turned], 1), w, sliced, None, None, None)


@pytest.mark.interpreter
def test_what_no_descriptor_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table says TMA and a descriptor may not, the generic tile takes pointers, and is right."""
    monkeypatch.setattr(grad_gemm, "_grad_tma_kernel", None)
    monkeypatch.setattr(grad_weight_file, "_grad_weight_tma_kernel", None)
    monkeypatch.setattr(grad_gemm, "capability", lambda device: (9, 0))
    for op in ("grad_input", "grad_input_act", "grad_weight"):
        for N, K in ((36, 40), (40, 36)):  # rows of 72 bytes
            args = arguments(op, 70, N, K, BF16)
            if op != "grad_input" or N == 40:  # three parts of 36 columns are aligned
                with pytest.raises(ValueError, match="do not fit descriptors"):
                    body(op, "triton")(*args, TMA)
            assert_like_ref(op, "triton", *args)


@pytest.mark.parametrize("n", [None, 9])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, n: int | None) -> None:
    torch.library.opcheck(body(op, ""), arguments(op, 9, 24, 8, F32, n))


def wrong(op: str, at: int, value: Any) -> tuple[str, tuple[Any, ...]]:
    args = list(arguments(op, 6, 12, 8, F32))
    args[at] = value
    return op, tuple(args)


F16 = torch.float16
WRONG = [
    (*wrong("grad_input", 0, randn(6, 12)), r"grad_input: dy has shape \(6, 12\), expected \(T, 36\)"),
    (*wrong("grad_input", 0, randn(36)), r"grad_input: dy has shape \(36,\)"),
    (*wrong("grad_input", 3, None), r"grad_input: dy has shape \(6, 36\), expected \(T, 24\)"),
    (*wrong("grad_input", 1, randn(12)), r"grad_input: weight has shape \(12,\), expected \(N, K\)"),
    (*wrong("grad_input", 2, randn(12, 9)), r"grad_input: weight is \(12, 9\) torch.float32 on cpu, .* \(12, 8\)"),
    (*wrong("grad_input", 3, randn(12, 8, dtype=F16)), r"weight is \(12, 8\) torch.float16 .* torch.float32"),
    (*wrong("grad_input", 4, randn(6, 9)), r"grad_input: add is \(6, 9\) .* expected \(6, 8\)"),
    (*wrong("grad_input", 4, randn(6, 8, dtype=F16)), r"add is \(6, 8\) torch.float16 on cpu, expected"),
    (*wrong("grad_input_act", 2, randn(7, 8)), r"grad_input_act: pre is \(7, 8\) .* expected \(6, 8\)"),
    (*wrong("grad_input_act", 2, randn(6, 8, dtype=F16)), r"pre is \(6, 8\) torch.float16"),
    ("grad_input_act", (*arguments("grad_input_act", 6, 12, 8, BF16)[:2], randn(6, 8), "gelu", None), r"pre is .*32"),
    (*wrong("grad_input_act", 3, "swish"), r"act='swish': expected one of"),
    (*wrong("grad_weight", 0, randn(6)), r"grad_weight: dy has shape \(6,\), expected \(T, M\)"),
    (*wrong("grad_weight", 1, randn(7, 8)), r"grad_weight: x is \(7, 8\) torch.float32 on cpu, expected \(6, K\)"),
    (*wrong("grad_weight", 1, randn(6, 8, dtype=F16)), r"x is \(6, 8\) torch.float16 .* \(6, K\) torch.float32"),
    (*wrong("grad_activation", 1, randn(6, 8)), r"grad_activation: pre is \(6, 8\) .* dy is \(6, 12\) torch.float32"),
    (*wrong("grad_activation", 0, randn(12)), r"grad_activation: dy has shape \(12,\), expected \(T, N\)"),
    (*wrong("grad_activation", 2, "tanh"), r"act='tanh': expected one of"),
]


@pytest.mark.parametrize("name", ["", "triton"])
@pytest.mark.parametrize("op,args,message", WRONG, ids=range(len(WRONG)))
def test_wrong_inputs(op: str, args: tuple[Any, ...], message: str, name: str) -> None:
    """Told by the op and by the launcher, before anything runs."""
    with pytest.raises(ValueError, match=message):
        body(op, name)(*args)
