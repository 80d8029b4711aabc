"""The products under autograd: activations and their derivatives, linear_gelu_pre, gradients of the registered ops."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from gradient_cases import arguments, weights
from kernel_helpers import BODIES, DTYPES, assert_error_rule, assert_like_ref, body, count, randn, references

from bert_fast.kernels.activation import BACKWARD, TORCH, activate_backward
from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.linear import column_sums, linear_ref
from bert_fast.kernels.linear_gelu import linear_gelu_pre_ref
from bert_fast.kernels.qkv_linear import qkv_linear_ref
from bert_fast.kernels.runtime import tl, triton

NAN = float("nan")
F32, BF16 = torch.float32, torch.bfloat16
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "none")
TMA = TileConfig(64, 32, 4, 3, 32, tma=True)
linear_file, grad_input_file, grad_weight_file = (
    import_module(f"bert_fast.kernels.{name}") for name in ("linear", "grad_input", "grad_weight")
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", BODIES)
def test_activations_at_extremes(name: str, act: str, dtype: torch.dtype) -> None:
    """A trained FFN reaches 195; cubes and exponentials of that must not turn into inf or NaN. A NaN stays one."""
    pre = torch.tensor([0.0, -1e-4, 1e-4, -0.75, -3.0, 5.0, -9.0, -60.0, 200.0, -200.0, 6e4, -6e4, NAN]).to(dtype)[None]
    dx = body("grad_activation", name)(torch.ones_like(pre), pre, act, None)
    expected = BACKWARD[act](torch.ones_like(pre).double(), pre.double())
    assert torch.equal(dx.isnan(), expected.isnan())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dx[:, :-1].double(), expected[:, :-1], rtol=4 * eps, atol=2e-6 if dtype == F32 else 4e-5)


@triton.jit
def _backward_kernel(x_ptr, d_ptr, y_ptr, ACT: tl.constexpr, EXACT: tl.constexpr, N: tl.constexpr):
    cols = tl.program_id(0) * N + tl.arange(0, N)
    d, y = activate_backward(tl.full((N,), 1.0, tl.float32), tl.load(x_ptr + cols), ACT, EXACT)
    tl.store(d_ptr + cols, d)
    tl.store(y_ptr + cols, y)


def derivative(x: torch.Tensor, act: str, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    d, y = torch.empty_like(x), torch.empty_like(x)
    _backward_kernel[(x.numel() // 4096,)](x, d, y, act, exact, 4096)
    return d, y


@pytest.mark.interpreter
def test_bound_of_the_gelu_derivative() -> None:
    """For half outputs: 4e-5 for every fp16 number, most fp32 ones near the limit of the polynomial, and large ones."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    near = torch.linspace(4.5, 4.75, 4096)
    large = torch.logspace(0.7, 38.5, 4096, dtype=torch.float64).float()
    x = torch.cat([every[every.isfinite()], near, -near, large, -large])
    x = torch.cat([x, x.new_zeros(-x.numel() % 4096)])
    d, y = derivative(x, "gelu", False)
    wide = x.double()
    cdf = 0.5 * torch.erfc(wide * -(0.5**0.5))
    truth = cdf + wide * torch.exp(-(wide**2) / 2) * (2 * torch.pi) ** -0.5
    error = (d.double() - truth).abs()
    assert error.max() <= 4e-5 and (error <= 1e-4 * wide.abs() + 1e-6).all()
    assert error.max() >= 1e-5, "the bound is not a loose one"
    assert ((y.double() - wide * cdf).abs() <= 1.3e-5).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivatives_in_fp32(act: str) -> None:
    x = torch.linspace(-8, 8, 4096)
    d, y = derivative(x, act, True)
    eps = torch.finfo(F32).eps
    expected = BACKWARD[act](torch.ones_like(x).double(), x.double())
    torch.testing.assert_close(d.double(), expected, rtol=4 * eps, atol=5e-7)
    torch.testing.assert_close(y.double(), TORCH[act](x.double()), rtol=4 * eps, atol=1e-6)


def assert_act_of_stored(y: torch.Tensor, pre: torch.Tensor) -> None:
    """y is the activation of the stored number, not of the sum before that was rounded: half an ulp from it."""
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(
        y.double(), TORCH["gelu"](pre.double()), rtol=4 * eps if y.dtype == F32 else 0.5 * eps, atol=2e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [None, 29])
@pytest.mark.parametrize("name", BODIES)
def test_linear_gelu_pre(name: str, n: int | None, dtype: torch.dtype) -> None:
    x, weight, bias = randn(37, 40, dtype=dtype), randn(72, 40, dtype=dtype, scale=40**-0.5), randn(72, dtype=dtype)
    x[37 if n is None else n :] = NAN
    assert_like_ref("linear_gelu_pre", name, x, weight, bias, count(n), "gelu", rows=n)
    assert_act_of_stored(*(t[:n] for t in body("linear_gelu_pre", name)(x, weight, None, count(n), "gelu")))


@pytest.mark.interpreter
@pytest.mark.parametrize("n", [None, 100])
def test_linear_gelu_pre_by_descriptors(n: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gemm = import_module("bert_fast.kernels.gemm")
    monkeypatch.setattr(gemm, "_gemm_pointer_kernel", None)
    x, weight, bias = randn(150, 72, dtype=BF16), randn(40, 72, dtype=BF16, scale=0.1), randn(40, dtype=BF16)
    pre = x.new_empty(150, 40)
    y = gemm.gemm_triton(x, [weight], [bias], count(n), "gelu", TMA, pre=pre)
    low, truth = references(linear_ref, x, weight, bias, None)
    assert_error_rule(pre[:n], low[:n], truth[:n])
    assert_act_of_stored(y[:n], pre[:n])


def forward(op: str, dtype: torch.dtype, n: int | None) -> tuple[Any, list[torch.Tensor]]:
    """A call of a registered op of leaves, and those."""
    x, ws = randn(11, 8, dtype=dtype), weights(3, 12, 8, dtype)
    bs = [randn(12, dtype=dtype, seed=i) for i in range(3)]
    x[11 if n is None else n :] = NAN
    leaves = {"qkv_linear": [x, *ws, *bs]}.get(op, [x, ws[0], bs[0]])
    more = (count(n), "gelu") if op == "linear_gelu_pre" else (count(n),)
    return more, [t.requires_grad_() for t in leaves]


REFERENCES = {"linear": linear_ref, "qkv_linear": qkv_linear_ref, "linear_gelu_pre": linear_gelu_pre_ref}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [None, 7])
@pytest.mark.parametrize("op", REFERENCES)
def test_gradients_of_the_registered_ops(op: str, n: int | None, dtype: torch.dtype) -> None:
    """All of them, and each alone, by the rule; gradients of undefined rows are NaN and go nowhere."""
    more, leaves = forward(op, dtype, n)

    def gradients(function: Any, leaves: list[torch.Tensor], wanted: Any) -> Any:
        out = function(*leaves, *more)
        out = out if isinstance(out, tuple) else (out,)
        dy = [randn(*o.shape, seed=i).to(o) for i, o in enumerate(out)]
        for d in dy:
            d[len(d) if n is None else n :] = NAN if function is body(op, "") else 0
        return torch.autograd.grad(out, [leaves[i] for i in wanted], dy)

    every = range(len(leaves))
    low = gradients(REFERENCES[op], leaves, every)
    truth = gradients(REFERENCES[op], [t.detach().double().requires_grad_() for t in leaves], every)
    for wanted in (every, *([i] for i in every)):
        for t, want in zip(leaves, (i in wanted for i in every), strict=True):
            t.requires_grad_(want)
        for i, g in zip(wanted, gradients(body(op, ""), leaves, wanted), strict=True):
            rows = n if i == 0 else None
            assert_error_rule(g[:rows], low[i][:rows], truth[i][:rows], f"gradient {i} of {op}")


def test_nothing_is_computed_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = randn(5, 8), randn(6, 8), randn(6)
    monkeypatch.setattr(linear_file, "grad_weight", None)
    linear_file.linear(x.requires_grad_(), weight, bias.requires_grad_(), None).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 5.0)) and x.grad is not None
    monkeypatch.undo()
    monkeypatch.setattr(linear_file, "grad_input", None)
    linear_file.linear(x.detach(), weight.requires_grad_(), bias, None).sum().backward()
    q = import_module("bert_fast.kernels.qkv_linear")
    ws = [randn(6, 8, seed=i) for i in range(3)]
    seen = []

    def counted(dy: torch.Tensor, *rest: Any) -> Any:
        seen.append(tuple(dy.shape))
        return body("grad_weight", "cpu")(dy, *rest)

    monkeypatch.setattr(linear_file, "grad_weight", counted)
    projections = x.detach(), ws[0], ws[1].requires_grad_(), ws[2].requires_grad_()
    q.qkv_linear(*projections, bias, bias, bias, None).sum().backward()
    q.qkv_linear(*projections, None, None, None, None).sum().backward()
    assert seen == [(5, 18), (5, 12)]  # the bias of the query wants a gradient; without it nothing of the query does


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_torch_runs_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bodies for CUDA, here on CPU tensors: fp32 always, half where nothing is fused and no rows are counted."""
    monkeypatch.setattr(grad_input_file, "grad_gemm_triton", None)
    monkeypatch.setattr(grad_weight_file, "grad_weight_triton", None)
    for n in (None, 5) if dtype == F32 else (None,):
        dy, x, _, _ = arguments("grad_weight", 9, 24, 8, dtype, n)
        (w, *_), add = weights(1, 24, 8, dtype), randn(9, 8, dtype=dtype)
        for i, g in enumerate(grad_weight_file._grad_weight_cuda(dy, x, count(n), True)):
            assert_error_rule(g, *(r[i] for r in references(body("grad_weight", "ref"), dy, x, count(n), True)))
        for args in ((dy, w, None, None, add, count(n)), (dy, w, None, None, None, count(n))):
            low, truth = references(body("grad_input", "ref"), *args)
            assert_error_rule(grad_input_file._grad_input_cuda(*args)[:n], low[:n], truth[:n])
        if dtype == F32:
            args = dy, w, x, "gelu", count(n)
            low, truth = references(body("grad_input_act", "ref"), *args)
            for i, ours in enumerate(grad_input_file._grad_input_act_cuda(*args)):
                assert_error_rule(ours[:n], low[i][:n], truth[i][:n])


@pytest.mark.interpreter
def test_products_that_are_ours_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half dtypes where something is fused or rows are counted."""
    monkeypatch.setattr(grad_input_file, "_product", None)
    dy, w, other, _, n = arguments("grad_input_act", 9, 24, 8, BF16, 7)
    for args in ((dy, w, None, None, other, n), (dy, w, None, None, other.float(), None)):
        assert grad_input_file._grad_input_cuda(*args).shape == (9, 8)
    assert grad_input_file._grad_input_cuda(torch.cat([dy, dy], 1), w, w, None, None, None).dtype == BF16
    assert grad_input_file._grad_input_act_cuda(dy, w, other, "gelu", None)[0].shape == (9, 8)
    monkeypatch.setattr(torch, "mm", None)
    assert grad_weight_file._grad_weight_cuda(dy, other, n, False)[0].isfinite().all()
    torch.testing.assert_close(grad_weight_file.column_sums_triton(dy, n), column_sums(dy, n))
