"""The registered ops: opcheck, gradients equal to autograd of the reference, and what wrong inputs are told."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import CASES, DIFFERENTIABLE, READ, ROWS, B, K, N, S, T, cases, chain_args, gradients, layer_chain
from kernel_helpers import BODIES, DTYPES, assert_error_rule, body, double, randn, references


def traceable(op: str, case: str) -> bool:
    """Whether the backward has shapes known without data: it is the reference's, which may slice by a row count."""
    return op != "attention" and not any(isinstance(a, torch.Tensor) and a.shape == (1,) for a in cases(op)[case])


@pytest.mark.parametrize("op,case", CASES)
def test_opcheck(op: str, case: str) -> None:
    run, args = body(op, ""), cases(op, T)[case]  # of undefined rows it would compare the undefined
    if traceable(op, case):
        torch.library.opcheck(run, args)
    else:
        torch.library.opcheck(run, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(run, args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op,case", DIFFERENTIABLE)
def test_gradients(op: str, case: str, create_graph: bool) -> None:
    args = cases(op)[case]
    ours = gradients(body(op, ""), args, create_graph, READ.get(op))
    torch.testing.assert_close(ours, gradients(body(op, "ref"), args, create_graph, READ.get(op)))
    twice = create_graph and op != "first_rows"  # which is linear in its only input
    assert all(g.count_nonzero() for g in ours) and any(g.requires_grad for g in ours) == twice


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BODIES)
def test_undefined_rows_stay_out_of_a_whole_layer(name: str, dtype: torch.dtype) -> None:
    """Skip mode from embedding to pooler: every op gets the undefined rows, here NaN, that the one before left."""
    args = chain_args(9, 24, 40, 2, dtype)
    ours, (low, truth) = layer_chain(name, *args), references(partial(layer_chain, "ref"), *args)
    for what in truth:
        assert_error_rule(ours[what], low[what], truth[what], what)


@pytest.mark.parametrize("op,case", [("linear", "all"), ("qkv_linear", "all"), ("attention", "skip probs")])
def test_undefined_rows_have_no_gradient(op: str, case: str) -> None:
    """Rows past the count hold NaN, as an op before this one leaves them."""
    args = cases(op)[case]
    n = 5 if op == "attention" else ROWS
    with torch.no_grad():
        args[0][n:] = float("nan")
    first, *others = gradients(body(op, ""), args, False)
    assert torch.isfinite(first).all() and all(torch.isfinite(g).all() for g in others)
    assert (first[n:] == 0).all() and first[:n].count_nonzero()


def test_padding_idx_has_no_gradient() -> None:
    args = cases("embed_layer_norm")["ids"]
    word = gradients(body("embed_layer_norm", ""), args, False)[0]
    assert args[0].eq(0).any() and word[0].count_nonzero() == 0 and word[4].count_nonzero()


@pytest.mark.parametrize("op,case", [("attention", "probs"), ("linear_gelu", "tanh")])
def test_second_derivatives(op: str, case: str) -> None:
    args = tuple(double(a.detach()).requires_grad_() if double(a) is not a else a for a in cases(op)[case])
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def function(*inputs: torch.Tensor) -> Any:
        given = iter(inputs)
        out = body(op, "")(*(next(given) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args))
        return out[:2] if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def wrong(op: str, case: str, at: int, value: Any, *more: Any) -> tuple[str, tuple[Any, ...]]:
    args = list(cases(op)[case])
    args[at] = value
    return op, (*args, *more)


F16 = torch.float16
WRONG = [
    (*wrong("linear", "plain", 0, randn(2, T, K)), r"linear: x has shape \(2, 6, 8\).*expected \(T, K\)"),
    (*wrong("linear", "plain", 0, randn(K, T).t()), r"strides \(1, 6\), expected \(T, K\) with unit rows"),
    (*wrong("linear", "plain", 1, randn(N, K + 1)), r"linear: weight has shape \(12, 9\), expected \(12, 8\)"),
    (*wrong("linear", "plain", 1, randn(N, K, dtype=F16)), r"weight is torch.float16 on cpu, x is torch.float32"),
    (*wrong("linear", "plain", 1, randn(N, K).to("meta")), r"weight is torch.float32 on meta, x is .* on cpu"),
    (*wrong("linear", "all", 2, randn(K)), r"linear: bias is \(8,\) torch.float32, expected \(12,\) torch.float32"),
    (*wrong("linear_gelu", "all", 4, "swish"), r"act='swish': expected one of .*'gelu'.*'silu'"),
    (*wrong("linear_gelu", "all", 2, randn(N, dtype=F16)), r"bias is \(12,\) torch.float16"),
    (*wrong("qkv_linear", "all", 5, None), r"qkv_linear: some projections have a bias and some have none"),
    (*wrong("qkv_linear", "all", 3, randn(K, K)), r"qkv_linear: weight has shape \(8, 8\), expected \(12, 8\)"),
    (*wrong("attention", "plain", 0, randn(T - 1, 24)), r"attention: qkv has shape \(5, 24\), expected \(6,"),
    (*wrong("attention", "plain", 6, 5), r"qkv has 24 columns, expected a multiple of 3 \* heads = 15"),
    (*wrong("attention", "plain", 0, randn(T, 3 * 2 * 129)), r"head_dim is 129, expected at most 128"),
    (*wrong("attention", "plain", 4, torch.zeros(4, dtype=torch.int32)), r"6 tokens in 4 sequences, expected B \* S"),
    (*wrong("attention", "plain", 7, -0.5), r"attention: scale is -0.5, expected a number above 0"),
    (*wrong("attention", "bias", 7, 0.0), r"attention: scale is 0.0, expected"),
    (*wrong("attention", "probs", 7, float("nan")), r"attention: scale is nan, expected"),
    (*wrong("attention", "bias", 1, randn(B, S, S)), r"bias has shape \(2, 3, 3\), expected one that broadcasts"),
    (*wrong("attention", "bias", 1, randn(B, 3, S, S)), r"bias has shape \(2, 3, 3, 3\),.*\(2, 2, 3, 3\)"),
    (*wrong("residual_layer_norm", "rows", 0, randn(K)), r"residual_layer_norm: x has shape \(8,\)"),
    (*wrong("residual_layer_norm", "rows", 1, randn(T, 1)), r"residual is \(6, 1\) .* expected \(6, 8\)"),
    (*wrong("residual_layer_norm", "rows", 2, randn(N)), r"weight is \(12,\) on cpu, expected \(8,\) on cpu"),
    (*wrong("residual_layer_norm", "padded", 5, None), r"padded output asked for without a token map"),
    (*wrong("gelu_layer_norm", "erf", 4, "tanh"), r"act='tanh': expected one of"),
    (*wrong("gelu_layer_norm", "erf", 2, randn(N)), r"gelu_layer_norm: bias is \(12,\)"),
    (*wrong("embed_layer_norm", "ids", 1, randn(B, S, K)), r"exactly one of input_ids and inputs_embeds"),
    (*wrong("embed_layer_norm", "ids", 0, None), r"exactly one of input_ids and inputs_embeds"),
    (*wrong("embed_layer_norm", "ids", 2, None), r"both of token_type_ids and token_type, or neither"),
    (*wrong("embed_layer_norm", "ids", 2, torch.zeros(B, 4).int()), r"token_type_ids has shape \(2, 4\), .* \(2, 3\)"),
    (*wrong("embed_layer_norm", "ids", 5, randn(2, N)), r"token_type is \(2, 12\), expected dense \(rows, 8\)"),
    (*wrong("embed_layer_norm", "ids", 6, randn(K, S).t()), r"position is \(3, 8\), expected dense"),
    (*wrong("embed_layer_norm", "ids", 11, torch.arange(5).int()), r"token has 5 entries, expected 6"),
    (*wrong("pool", "plain", 0, randn(T, K)), r"pool: hidden has shape \(6, 8\), expected \(B, S, K\)"),
    (*wrong("pool", "plain", 0, randn(B, 0, K)), r"pool: hidden has shape \(2, 0, 8\)"),
    (*wrong("pool", "plain", 1, randn(N, N)), r"pool: weight has shape \(12, 12\), expected \(N, 8\)"),
    (*wrong("pool", "plain", 2, randn(N, dtype=F16)), r"pool: bias is \(12,\) torch.float16 on cpu"),
]


@pytest.mark.parametrize("name", ["", "triton"])
@pytest.mark.parametrize("op,args,message", WRONG, ids=range(len(WRONG)))
def test_wrong_inputs(op: str, args: tuple[Any, ...], message: str, name: str) -> None:
    """Told by the op and by the launcher, before anything runs."""
    if not name and any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
        name = "cpu"  # torch would take the fake implementation
    with pytest.raises(ValueError, match=message):
        body(op, name)(*args)
