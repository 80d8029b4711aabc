"""attention with dropout, and its backward: every kind of mask and bias, both gradients, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import NAN, assert_attention, biases, mask_of_every_kind, packed_args
from kernel_helpers import BODIES, DTYPES, assert_error_rule, body, double, randn, references

from bert_fast.kernels.attention import attention
from bert_fast.kernels.attention_backward import attention_backward
from bert_fast.kernels.attention_base import attention_ref
from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.registry import gradients_of

TILE = TileConfig(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1)  # several blocks each way of so few rows
SEED = torch.tensor([0x0123456789ABCDEF])
CONTEXT, PROBS, BOTH = ("context",), ("probs",), ("context", "probs")  # whose gradients are given


def with_dropout(args: tuple[Any, ...], p: float) -> tuple[Any, ...]:
    return (*args, SEED, 5, p)


def check_backward(name: str, args: tuple[Any, ...], given: tuple[str, ...], want_d_bias: bool = False) -> None:
    """d_qkv (and d_bias) of one body by the rule; args: the forward's, dropout included."""
    qkv, bias, token, cu_seqlens, kv_len, prefix, heads, scale, _, uniform, seed, site, p = args
    n, B, T = int(cu_seqlens[-1]), len(kv_len), len(token)
    S = T // B
    d_context = randn(T, qkv.shape[1] // 3, dtype=qkv.dtype, seed=3) if "context" in given else None
    d_probs = randn(B, heads, S, S, dtype=qkv.dtype, seed=4) if "probs" in given else None
    clean = (qkv.nan_to_num(), *args[1:8], d_probs is not None, *args[9:])
    context, _, lse = (x.clone() for x in attention_ref(*clean))
    for rows in (context, lse.t()):
        rows[n:] = NAN  # undefined
    undefined = d_context
    if d_context is not None:
        undefined = d_context.clone()
        undefined[n:] = NAN
    tile = [TILE] if name == "triton" else []
    d_qkv, d_bias = body("attention_backward", name)(
        undefined, d_probs, qkv, bias, context, lse, token, cu_seqlens, kv_len, prefix, heads, scale, uniform, seed,
        site, p, want_d_bias, *tile,
    )  # fmt: skip
    grads = (None if d_context is None else d_context, d_probs, None)
    needs = [True, want_d_bias, *[False] * 11]
    low = gradients_of(attention_ref, clean, needs, grads)
    truth = gradients_of(attention_ref, tuple(map(double, clean)), needs, tuple(map(double, grads)))
    columns = qkv.shape[1] // 3
    for i, part in enumerate("qkv"):
        of = slice(i * columns, (i + 1) * columns)
        if truth[0][:n, of].abs().max() > 0:
            assert_error_rule(d_qkv[:n, of], low[0][:n, of], truth[0][:n, of], f"d{part}")
        else:
            assert (d_qkv[:n, of] == 0).all(), f"d{part}"
    if want_d_bias:
        assert_error_rule(d_bias, low[1], truth[1], "d_bias")
    else:
        assert d_bias.numel() == 0


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("probs", [False, True])
def test_dropout_in_the_forward(name, dtype, skip, probs):
    args = packed_args(mask_of_every_kind(19), 16, 2, dtype, skip, probs, True)
    tile = TILE if name == "triton" else None
    ours = assert_attention(name, with_dropout(args, 0.3), tile)
    if probs:
        kept = (ours[1] != 0).sum() / (attention_ref(*args)[1] != 0).sum()
        assert 0.6 < kept < 0.8


@pytest.mark.parametrize("name", BODIES)
def test_everything_dropped(name):
    args = packed_args(mask_of_every_kind(5), 16, 2, torch.float32, False, True, False)
    context, probs, _ = body("attention", name)(*with_dropout(args, 1.0))
    assert (context == 0).all() and (probs == 0).all()


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype, given", [(torch.float32, PROBS), *itertools.product(DTYPES, (CONTEXT, BOTH))], ids=str)
def test_masks(name, dtype, skip, given):
    uniform, p = skip, 0.0 if given == CONTEXT and skip else 0.3
    args = packed_args(mask_of_every_kind(37), 16, 2, dtype, skip, True, uniform)
    check_backward(name, with_dropout(args, p), given)


# BERT's, one that is no power of two, MiniLM's
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("D", [64, 20, 32])
def test_head_dims(name, D):
    mask = torch.tensor([[1] * 33, [1] * 20 + [0] * 13])
    args = packed_args(mask, D, 2, torch.bfloat16, False, False, False)
    check_backward(name, with_dropout(args, 0.1), CONTEXT)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("kind", ["one row per sequence", "one square per head", "everything", "one square",
                                  "one number per query", "expanded", "lowest"])  # fmt: skip
def test_biases(name, kind):
    B, heads, S = 3, 2, 19
    # a shift of a whole row changes nothing: its gradient is rounding noise
    want_d_bias = kind in ("one row per sequence", "one square per head", "everything", "one square")
    bias = biases(B, heads, S, torch.float32)[kind]
    args = packed_args(torch.ones(B, S), 16, heads, torch.float32, False, True, False, bias)
    check_backward(name, with_dropout(args, 0.2), BOTH, want_d_bias)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_op_differentiates(p):
    # not a sequence without keys: its weights are constant, but their gradient is that of scores, as in eager
    args = list(with_dropout(packed_args(mask_of_every_kind(3)[1:4], 2, 2, torch.float64, False, True, True), p))

    def run(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attention(qkv, *args[1:])[:2]

    qkv = args[0].requires_grad_()
    assert torch.autograd.gradcheck(run, qkv, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(run, qkv, eps=1e-6, atol=1e-5)


def test_opcheck():
    args = packed_args(mask_of_every_kind(6), 4, 2, torch.float32, False, True, True)
    args = (args[0].clone().requires_grad_(), *args[1:])
    # the aot test asks for the gradient of lse, which goes through the reference, and that is not for tracing
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attention, with_dropout(args, 0.3), test_utils=tests)
    qkv, bias, *maps, heads, scale, _, uniform = (a.detach() if torch.is_tensor(a) else a for a in args)
    context, _, lse = references(attention_ref, *args)[0]
    backward = randn(*context.shape), None, qkv, bias, context.detach(), lse.detach(), *maps, heads, scale, uniform
    torch.library.opcheck(attention_backward, (*backward, SEED, 0, 0.3, False))


MESSAGES = {
    "neither": ({"d_context": None}, "expected d_context or d_probs, got neither"),
    "d_context": ({"d_context": torch.zeros(2, 8)}, r"d_context has shape \(2, 8\), expected \(12, 8\)"),
    "d_probs": ({"d_probs": torch.zeros(2, 2, 6, 5)}, r"d_probs has shape \(2, 2, 6, 5\), expected \(2, 2, 6, 6\)"),
    "p": ({"p": -0.1}, r"p is -0\.1, expected a probability from 0 to 1"),
    "seed": ({"p": 0.1, "seed": torch.zeros(2)}, r"seed is \(2,\) torch.float32 on cpu, expected one int64 number"),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("what", MESSAGES)
def test_a_wrong_input_is_named(name, what):
    qkv, _, *maps, heads, scale, _, _ = packed_args(torch.ones(2, 6), 4, 2, torch.float32, False, False, False)
    names = ("token", "cu_seqlens", "kv_len", "prefix")
    args = {
        "d_context": torch.zeros(12, 8), "d_probs": None, "qkv": qkv, "bias": None, "context": torch.zeros(12, 8),
        "lse": torch.zeros(2, 12), **dict(zip(names, maps, strict=True)), "heads": heads, "scale": scale,
        "uniform_empty": False, "seed": SEED, "site": 0, "p": 0.0, "want_d_bias": False,
    }  # fmt: skip
    changes, message = MESSAGES[what]
    with pytest.raises(ValueError, match=message):
        body("attention_backward", name)(**{**args, **changes})
