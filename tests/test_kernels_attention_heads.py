"""attention_heads: grouped heads, other lengths, masks of every shape, causal order; each body against the reference.

Small tiles bring many blocks into short sequences. Tensors are views as transformers hands them, (B, S, H, D) turned.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads_cases import SEED, SMALL, Args, assert_heads, heads_args, masks
from kernel_cases import INF, NAN, gradients
from kernel_helpers import BODIES, DTYPES, assert_error_rule, body, double, randn

import bert_fast.kernels.attention_heads as heads
from bert_fast.kernels.attention_backward import attention_backward_triton
from bert_fast.kernels.attention_heads import attention_heads, attention_heads_ref, attention_heads_triton
from bert_fast.kernels.dropout import kept_ref

SHAPES = (  # (B, H, group, Sq, Skv, D)
    (2, 4, 2, 33, 33, 20),  # three blocks of queries and keys, the last of one; head_dim padded to 32
    (2, 2, 1, 1, 40, 64),  # a token of a generation; full and cut blocks of keys
    (1, 4, 4, 17, 40, 13),  # one head of keys for all; odd head_dim; more keys than queries
    (2, 2, 1, 40, 18, 8),  # more queries than keys; head_dim below the 16 of a tensor core
    (2, 2, 2, 1, 1, 16),
)


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BODIES)
def test_shapes(name: str, shape: tuple[int, ...], causal: bool, probs: bool) -> None:
    assert_heads(name, heads_args(*shape, causal=causal, probs=probs))


@pytest.mark.parametrize("kind", masks(1, 1, 1, 1))
@pytest.mark.parametrize("name", BODIES)
def test_masks(name: str, kind: str) -> None:
    for B, H, group, Sq, Skv, probs in ((2, 4, 2, 19, 35, False), (2, 2, 1, 18, 18, True)):
        mask = masks(B, H, Sq, Skv)[kind]
        assert_heads(name, heads_args(B, H, group, Sq, Skv, 12, mask=mask, probs=probs))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", ["none", "causal", "keep", "keep nothing", "add", "add the lowest"])
@pytest.mark.parametrize("name", BODIES)
def test_half_precision(name: str, kind: str, dtype: torch.dtype) -> None:
    mask = masks(2, 2, 18, 21, dtype).get(kind)
    for probs in (False, True):
        assert_heads(name, heads_args(2, 2, 2, 18, 21, 12, dtype, mask, kind == "causal", probs))


@pytest.mark.parametrize("D", [8, 32, 64, 80, 127, 128])
@pytest.mark.parametrize("name", BODIES)
def test_head_dims(name: str, D: int) -> None:
    """The shipped tiles, of both classes of head_dim, larger than the sequence."""
    for dtype, causal, probs in ((torch.float32, True, False), (torch.bfloat16, False, True)):
        assert_heads(name, heads_args(1, 2, 2, 9, 9, D, dtype, None, causal, probs), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_a_query_without_a_key_has_the_mean_of_all(name: str, probs: bool, dtype: torch.dtype) -> None:
    """As eager with finfo.min; rows beside it keep some keys, in the second block only."""
    mask = torch.zeros(1, 1, 20, 37, dtype=torch.bool)
    mask[..., 7:, 30:] = True
    args = heads_args(1, 2, 1, 20, 37, 8, dtype, mask, probs=probs)
    context, weights, _ = assert_heads(name, args)
    mean = args[2].double().mean(2, keepdim=True).transpose(1, 2).expand(1, 7, 2, 8)
    torch.testing.assert_close(context[:, :7].double(), mean, rtol=0, atol=2 * torch.finfo(dtype).eps)
    if probs:
        assert (weights[:, :, :7] - 1 / 37).abs().max() < torch.finfo(dtype).eps and (weights[:, :, 7:, :30] == 0).all()


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_a_row_of_minus_infinity_is_zero(name: str, probs: bool) -> None:
    mask = torch.zeros(1, 1, 18, 20)
    mask[..., 3, :] = -INF
    context, weights, lse = assert_heads(name, heads_args(1, 2, 2, 18, 20, 8, mask=mask, probs=probs))
    assert (context[:, 3] == 0).all() and (lse[:, 3] == -INF).all()
    assert not probs or (weights[:, :, 3] == 0).all()


@pytest.mark.parametrize("name", BODIES)
def test_causal_is_the_lower_triangle(name: str) -> None:
    """j <= i, from the upper left, as torch's: what lies behind the last query is no key, whatever it holds."""
    args = list(heads_args(1, 2, 1, 17, 40, 8, causal=True, probs=True))
    expected = attention_heads_ref(*args[:3], torch.ones(17, 40).tril().bool()[None, None], False, *args[5:])
    context, weights, _ = assert_heads(name, tuple(args))
    torch.testing.assert_close(context, expected[0])
    torch.testing.assert_close(weights, expected[1])
    args[1], args[2] = args[1].clone(), args[2].clone()
    args[1][:, :, 30:], args[2][:, :, 30:] = NAN, 0.0
    torch.testing.assert_close(body("attention_heads", name)(*args)[1][..., :17], weights[..., :17])


@pytest.mark.parametrize("kind", ["none", "causal", "keep", "add"])
@pytest.mark.parametrize("name", BODIES)
def test_dropout(name: str, kind: str) -> None:
    """Exactly the elements of kernels/dropout.py, numbered as attention_backward numbers them."""
    B, H, Sq, Skv, p = 2, 2, 21, 27, 0.4
    mask = masks(B, H, Sq, Skv).get(kind)
    dropped, plain = (
        assert_heads(name, heads_args(B, H, 2, Sq, Skv, 8, mask=mask, causal=kind == "causal", probs=True, p=rate))[1]
        for rate in (p, 0.0)
    )
    assert_heads(name, heads_args(B, H, 2, Sq, Skv, 8, mask=mask, causal=kind == "causal", p=p))
    block, at = torch.arange(B * H).view(B, H, 1, 1), torch.arange(Sq * Skv).view(Sq, Skv)
    kept = kept_ref(SEED, 3, block, at, p)
    torch.testing.assert_close(dropped, torch.where(kept, plain / (1 - p), 0.0))
    assert 0.5 < kept.float().mean() < 0.7


@pytest.mark.parametrize("name", BODIES)
def test_strides(name: str) -> None:
    """Contiguous heads, slices of one projection, an expanded batch: only the last stride is fixed."""
    wide = randn(2, 19, 3, 2, 24)[..., 4:14]
    q, k, v = (x.transpose(1, 2) for x in wide.unbind(2))
    half, one = (q[:, :, ::2], k[:, :, 3:], v[:, :, :16]), v[:1].expand(2, 2, 19, 10)
    for args in ((q, k, v), (q.contiguous(), k, one), (q, k.contiguous(), v), (q, k, v.contiguous()), half):
        assert_heads(name, (*args, None, False, 0.7, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BODIES)
def test_large_scores(name: str, dtype: torch.dtype) -> None:
    """Scores of several hundred, rising along the keys: the running maximum moves in every block."""
    for mask in (None, torch.ones(1, 1, 1, 40).bool(), torch.zeros(1, 1, 1, 40)):
        q, k, *rest = heads_args(1, 1, 1, 33, 40, 8, dtype, mask, probs=True)
        args = (5 * q.abs(), (k.abs() * torch.linspace(1, 10, 40)[:, None]).to(dtype), *rest)
        assert_heads(name, args)


def leaves(args: Args) -> Args:
    return tuple(
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )


GRADIENTS = [  # (Sq, Skv, mask, probs, p)
    (19, 19, "none", False, 0.0),
    (19, 19, "none", True, 0.3),
    (19, 19, "causal", True, 0.0),
    (19, 19, "causal", False, 0.3),
    (19, 19, "keep", True, 0.3),
    (19, 19, "keep nothing", False, 0.0),
    (19, 19, "add to keys", True, 0.0),
    (19, 19, "add the lowest", False, 0.3),
    (9, 14, "keep", True, 0.3),  # through the reference
    (9, 14, "causal", False, 0.0),
]


@pytest.mark.parametrize("packed", [pytest.param("triton", marks=pytest.mark.interpreter), "cpu"])
@pytest.mark.parametrize("Sq,Skv,kind,probs,p", GRADIENTS)
def test_gradients(
    Sq: int, Skv: int, kind: str, probs: bool, p: float, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of q, k, v and the mask, grouped; by the CPU body and by the kernel of attention_backward."""
    if packed == "triton":
        monkeypatch.setattr(heads, "attention_backward", lambda *a: attention_backward_triton(*a, config=SMALL))
    mask = masks(2, 4, Sq, Skv).get(kind)
    args = leaves(heads_args(2, 4, 2, Sq, Skv, 8, mask=mask, causal=kind == "causal", probs=probs, p=p))

    def first_two(*given: Any) -> tuple[torch.Tensor, ...]:
        return attention_heads(*given)[:2]  # nobody derives lse

    ours, low = gradients(first_two, args, False), gradients(attention_heads_ref_pair, args, False)
    truth = gradients(attention_heads_ref_pair, leaves(tuple(map(double, args))), False)
    assert len(ours) == 3 + (mask is not None and mask.is_floating_point())
    for what, *found in zip(("q", "k", "v", "mask"), ours, low, truth, strict=False):
        assert_error_rule(*found, what)


def attention_heads_ref_pair(*args: Any) -> tuple[torch.Tensor, ...]:
    return attention_heads_ref(*args)[:2]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", ["none", "keep"])
@pytest.mark.interpreter
def test_gradients_where_forward_is_the_kernel_too(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log-sum-exp, context and dropout of the kernel's forward, read by the kernel's backward."""
    monkeypatch.setattr(heads, "attention_backward", lambda *a: attention_backward_triton(*a, config=SMALL))
    args = heads_args(2, 2, 2, 19, 19, 8, dtype, masks(2, 2, 19, 19).get(kind), p=0.3)
    outputs, dy = attention_heads_triton(*args, config=SMALL), randn(2, 19, 2, 8, dtype=dtype)
    ours = heads._gradient([True] * 3 + [False] * 7, args, outputs, (dy, None, None))[:3]
    low, truth = (
        torch.autograd.grad(attention_heads_ref(*given)[0], given[:3], double(dy) if wide else dy)
        for given, wide in ((leaves(args), False), (leaves(tuple(map(double, args))), True))
    )
    for found in zip(ours, low, truth, strict=True):
        assert_error_rule(*found)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_query_without_a_key_has_eagers_gradient(create_graph: bool) -> None:
    """finfo.min added to a score is a constant beside it: the gradient of the score is that of the uniform weights."""
    keep = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(-1)
    q, k, v, *_ = args = leaves(heads_args(1, 2, 1, 6, 6, 8, mask=keep))
    dy = randn(1, 6, 2, 8)
    weights = torch.softmax(q @ k.transpose(2, 3) * 8**-0.5 + torch.where(keep, 0.0, torch.finfo().min), -1)
    expected = torch.autograd.grad((weights @ v).transpose(1, 2), (q, k, v), dy)
    ours = torch.autograd.grad(attention_heads(*args)[0], (q, k, v), dy, create_graph=create_graph)
    torch.testing.assert_close(ours, expected)
    assert expected[0][:, :, 0].count_nonzero()


@pytest.mark.parametrize("kind,probs,p", [("causal", True, 0.0), ("add to queries", False, 0.3)])
def test_second_derivatives(kind: str, probs: bool, p: float) -> None:
    args = heads_args(1, 2, 2, 4, 4, 4, mask=masks(1, 2, 4, 4).get(kind), causal=kind == "causal", probs=probs, p=p)
    args = leaves(tuple(map(double, args)))
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def function(*given: torch.Tensor) -> Any:
        parts = iter(given)
        return attention_heads(*(next(parts) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args))

    assert torch.autograd.gradcheck(lambda *x: function(*x)[:2], inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x)[0], inputs, fast_mode=True)


PLAIN = heads_args(2, 2, 2, 3, 5, 4)
WRONG = [
    (0, randn(2, 3, 4), r"q has shape \(2, 3, 4\).*expected \(B, heads, S, D\)"),
    (1, randn(2, 1, 4, 5).transpose(2, 3), r"k has shape \(2, 1, 5, 4\) and strides .*expected .* unit rows"),
    (2, randn(2, 1, 0, 4), r"v has shape \(2, 1, 0, 4\)"),
    (1, PLAIN[1].half(), r"k is torch.float16 on cpu, q is torch.float32 on cpu"),
    (2, PLAIN[2].to("meta"), r"v is torch.float32 on meta, q is .* on cpu"),
    (2, randn(2, 1, 4, 4), r"q, k and v have shapes \(2, 2, 3, 4\), \(2, 1, 5, 4\) and \(2, 1, 4, 4\), expected"),
    (0, randn(2, 2, 3, 8), r"q, k and v have shapes \(2, 2, 3, 8\), .*twice \(B, Hkv, Skv, D\)"),
    (3, torch.ones(2, 3, 5).bool(), r"mask has shape \(2, 3, 5\), expected one that broadcasts to \(2, 2, 3, 5\)"),
    (3, torch.ones(2, 2, 3, 4).bool(), r"mask has shape \(2, 2, 3, 4\), .*\(2, 2, 3, 5\)"),
    (3, torch.ones(2, 1, 3, 5).long(), r"mask is torch.int64 on cpu, expected bool or floating on cpu"),
    (5, 0.0, r"scale is 0.0, expected a number above 0"),
    (5, NAN, r"scale is nan, expected"),
]


@pytest.mark.parametrize("name", ["", "cpu", "triton"])
@pytest.mark.parametrize("at,value,message", WRONG)
def test_wrong_inputs(at: int, value: Any, message: str, name: str) -> None:
    if not name and isinstance(value, torch.Tensor) and value.is_meta:
        name = "cpu"  # torch would take the fake implementation
    args = (*PLAIN[:at], value, *PLAIN[at + 1 :])
    with pytest.raises(ValueError, match="attention_heads: " + message):
        body("attention_heads", name)(*args)


@pytest.mark.parametrize("name", ["", "cpu", "triton"])
def test_wrong_combinations(name: str) -> None:
    run = body("attention_heads", name)
    with pytest.raises(ValueError, match="causal=True and a mask, expected one of them"):
        run(*PLAIN[:3], torch.ones(1, 1, 1, 5).bool(), True, 0.5, False)
    with pytest.raises(ValueError, match=r"shapes \(2, 3, 3, 4\), .*H a multiple of Hkv"):
        run(randn(2, 3, 3, 4), randn(2, 2, 5, 4), randn(2, 2, 5, 4), *PLAIN[3:])
    with pytest.raises(ValueError, match="head_dim is 129, expected at most 128"):
        run(*[randn(1, 1, 2, 129)] * 3, *PLAIN[3:])
    with pytest.raises(ValueError, match=r"seed is None, expected one int64 number on cpu for p = 0.5"):
        run(*PLAIN, None, 0, 0.5)
