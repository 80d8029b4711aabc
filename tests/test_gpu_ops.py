"""Every op on a GPU: the compiled kernels through the launcher and through the registered op, by the one error rule.

Truth is the reference in float64 on the same GPU. Sizes bring every shipped tile and both load paths into play; the
interpreter's tests vary more, since every variant here is a compilation of seconds.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from heads_cases import assert_heads, heads_args, masks
from kernel_cases import (
    CASES,
    DIFFERENTIABLE,
    NAN,
    READ,
    T,
    assert_attention,
    biases,
    cases,
    chain_args,
    gradients,
    layer_chain,
    mask_of_every_kind,
    move,
    packed_args,
)
from kernel_helpers import DTYPES, assert_error_rule, assert_like_ref, body, count, outputs, references

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NAMES = ("triton", "")  # the launcher, the registered op
HIDDEN, INNER, HEADS = 768, 3072, 12
LARGE = (32, 512)
ROWS = (
    100,  # up to 128 rows: the first class of tiles
    1500,  # up to 2048
    math.prod(LARGE),  # above, by far
)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0, device: str = DEVICE) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def weights(N: int, K: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(N, K, dtype=dtype, scale=K**-0.5, seed=seed), normal(N, dtype=dtype, seed=seed + 1)


def on_device(n: int | None) -> torch.Tensor | None:
    return None if n is None else count(n).to(DEVICE)  # type: ignore[union-attr]


def affine(N: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + normal(N, dtype=dtype, scale=0.2), normal(N, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_linear_ops(name: str, rows: int, dtype: torch.dtype) -> None:
    """BERT's four products; the rows past the count are NaN. The op takes torch's own products in fp32."""
    n = rows * 3 // 4
    x, wide = normal(rows, HIDDEN, dtype=dtype), normal(rows, INNER, dtype=dtype)
    x[n:] = wide[n:] = NAN
    projections = [weights(HIDDEN, HIDDEN, dtype, seed) for seed in range(3)]
    three = [w for w, _ in projections], [b for _, b in projections]
    assert_like_ref("qkv_linear", name, x, *three[0], *three[1], on_device(n), rows=n)
    assert_like_ref("linear", name, x, *projections[0], on_device(n), rows=n)
    assert_like_ref("linear", name, wide, *weights(HIDDEN, INNER, dtype), on_device(n), rows=n)
    assert_like_ref("linear_gelu", name, x, *weights(INNER, HIDDEN, dtype), on_device(n), "gelu", rows=n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_linear_of_odd_sizes(name: str, dtype: torch.dtype) -> None:
    """What no descriptor fits: a single row, odd rows and columns, no bias, no row; activations; sliced weights."""
    for rows, K, N in ((1, 384, 3), (37, 41, 73), (0, 16, 16)):
        x, (weight, bias) = normal(rows, K, dtype=dtype), weights(N, K, dtype)
        assert_like_ref("linear", name, x, weight, None, None)
        assert_like_ref("qkv_linear", name, x, *[weight] * 3, *[bias] * 3, on_device(rows // 2), rows=rows // 2)
    for act in ("gelu_tanh", "relu", "silu"):
        assert_like_ref("linear_gelu", name, normal(37, 64, dtype=dtype), *weights(48, 64, dtype), None, act)
    sliced = normal(64, 200, dtype=dtype, scale=0.1)[:, 8:136]
    turned = normal(128, 64, dtype=dtype, scale=0.1).t()
    x = normal(70, 300, dtype=dtype)[::2, 4:132]
    assert_like_ref("qkv_linear", name, x, sliced, turned, sliced.contiguous(), None, None, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B,S,K,N", [(32, 512, HIDDEN, HIDDEN), (1, 1, 16, 8), (17, 3, 136, 33)])
@pytest.mark.parametrize("name", NAMES)
def test_pool(name: str, B: int, S: int, K: int, N: int, dtype: torch.dtype) -> None:
    hidden = normal(B, S, K, dtype=dtype)
    hidden[:, 1:] = NAN
    assert_like_ref("pool", name, hidden, *weights(N, K, dtype))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_pack(name: str, skip: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (5, 33), (33, 512), (3, 2500), (1100, 3)):
        mask = (torch.rand(shape, generator=generator) < torch.linspace(0, 1, shape[0])[:, None]).long()
        for given in (mask, mask.bool(), mask.float(), mask.repeat(1, 2)[:, ::2], mask[:1].expand(shape)):
            expected = body("pack", "ref")(given, skip)
            for got, want in zip(body("pack", name)(given.to(DEVICE), skip), expected, strict=True):
                assert got.dtype == torch.int32 and torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_attention_paddings(name: str, probs: bool, dtype: torch.dtype) -> None:
    for S, skip, uniform in ((130, True, False), (130, False, True), (1, False, True)):
        args = packed_args(mask_of_every_kind(S), 64, 2, dtype, skip, probs, uniform)
        assert_attention(name, move(args, DEVICE))


@pytest.mark.parametrize("dtype,D", [*zip(DTYPES, (20, 8, 13), strict=True), *zip(DTYPES, (128, 80, 127), strict=True)])
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_attention_head_dims(name: str, probs: bool, D: int, dtype: torch.dtype) -> None:
    """Both classes of head_dim, mostly padded ones."""
    args = packed_args(mask_of_every_kind(70), D, 2, dtype, True, probs, False)
    assert_attention(name, move(args, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_attention_biases(name: str, probs: bool, dtype: torch.dtype) -> None:
    """Strides of 0 come by expansion on the device; a float32 bias serves every dtype."""
    kinds = biases(3, 2, 96, dtype)
    given = [kinds[k].to(DEVICE) for k in ("one row per sequence", "one square per head", "everything", "lowest")]
    given += [given[0].expand(3, 2, 96, 96), biases(3, 2, 96, torch.float32)["everything"].to(DEVICE)]
    for bias in given:
        qkv, _, *others = move(packed_args(torch.ones(3, 96), 64, 2, dtype, False, probs, False), DEVICE)
        assert_attention(name, (qkv, bias, *others))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_attention_large(name: str, probs: bool, dtype: torch.dtype) -> None:
    """Base at 32 x 512, half of it padding on the right, on the left, or scattered."""
    B, S = LARGE
    at, lengths = torch.arange(S), torch.arange(B)[:, None] * (S // B) + 1
    mask = torch.where(torch.arange(B)[:, None] % 2 == 0, at < lengths, at >= S - lengths).long()
    mask[-1, ::2] = 0
    token, cu_seqlens, kv_len, prefix = (t.to(DEVICE) for t in body("pack", "ref")(mask, True))
    qkv = normal(B * S, 3 * HIDDEN, dtype=dtype)
    qkv[int(cu_seqlens[-1]) :] = NAN
    assert_attention(name, (qkv, None, token, cu_seqlens, kv_len, prefix, HEADS, 0.125, probs, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "causal", "keep, of all heads", "add to keys"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_heads(name: str, kind: str, dtype: torch.dtype) -> None:
    """Grouped heads, unequal lengths, both classes of head_dim; a token of a generation; dropout and probabilities."""
    for B, H, group, Sq, Skv, D in ((2, 4, 2, 130, 150, 64), (2, 4, 4, 70, 70, 80), (3, 8, 4, 1, 300, 128)):
        mask = masks(B, H, Sq, Skv, dtype).get(kind)
        for probs, p in ((False, 0.0), (True, 0.0), (True, 0.3)):
            args = heads_args(B, H, group, Sq, Skv, D, dtype, mask, kind == "causal", probs, p)
            assert_heads(name, move(args, DEVICE), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width", [(math.prod(LARGE), HIDDEN), (511, 384), (7, 100), (0, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_layer_norms(name: str, rows: int, width: int, dtype: torch.dtype) -> None:
    n, parameters = rows * 2 // 3, affine(width, dtype)
    x, residual = normal(rows, width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    token = torch.randperm(rows, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).int()
    assert_like_ref("gelu_layer_norm", name, x, *parameters, 1e-12, "gelu")
    assert_like_ref("residual_layer_norm", name, x, residual, *parameters, 1e-12, None, None, True, False)
    x[n:] = NAN
    args = (x, residual, *parameters, 1e-12, token, on_device(n), True, True)
    packed, padded = outputs("residual_layer_norm", name, *args)
    assert_error_rule(*(t[:n] for t in packed), "rows")
    assert_error_rule(*padded, "padded")
    assert (padded[0][token[n:].long()] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_embed_layer_norm(name: str, dtype: torch.dtype) -> None:
    B, S = LARGE
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(B, S, generator=generator) < 0.5).long()
    token, cu_seqlens, _, _ = (t.to(DEVICE) for t in body("pack", "ref")(mask, True))
    n = int(cu_seqlens[-1])
    ids = torch.randint(0, 30522, (B, S), generator=generator).to(DEVICE)
    tables = [normal(size, HIDDEN, dtype=dtype, seed=size) for size in (30522, 2, 512)]
    index = (ids % 2).int(), torch.arange(S, device=DEVICE).expand(B, S)
    for first in ((ids, None), (None, normal(B, S, HIDDEN, dtype=dtype))):
        args = (*first, *index, *tables, *affine(HIDDEN, dtype), 1e-12, 0, token, cu_seqlens[-1:], True, True)
        packed, padded, summed = outputs("embed_layer_norm", name, *args, None, 0, 0.0, -1, True)
        assert_error_rule(*(t[:n] for t in packed), "rows")
        assert_error_rule(*(t[:n] for t in summed), "sum")
        assert_error_rule(*padded, "padded")


@pytest.mark.parametrize("name", NAMES)
def test_index_outside_its_table(name: str) -> None:
    """NaN in its row, no access outside: 2**40 rows away there is no memory to read, and CUDA would report it."""
    args = list(move(cases("embed_layer_norm")["ids"], DEVICE))
    for outside in (-1, 10, 2**40, -(2**40)):
        args[0] = args[0].clone()
        args[0][1, 0] = outside
        rows, *_ = body("embed_layer_norm", name)(*args)
        torch.cuda.synchronize()
        assert rows.isnan().all(1).tolist() == [token == 3 for token in args[11].tolist()]


@pytest.mark.parametrize("op,case", CASES)
def test_fake_tensors_describe_the_outputs(op: str, case: str) -> None:
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(body(op, ""), move(cases(op, T)[case], DEVICE), test_utils=utils)


@pytest.mark.parametrize("op,case", DIFFERENTIABLE)
def test_gradients(op: str, case: str) -> None:
    args = move(cases(op)[case], DEVICE)
    ours = gradients(body(op, ""), args, False, READ.get(op))
    torch.testing.assert_close(ours, gradients(body(op, "ref"), args, False, READ.get(op)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_skip_never_synchronises(dtype: torch.dtype) -> None:
    """A layer and its surroundings: once to compile, then with every wait for the GPU an error; by the rule, too."""
    args = move(chain_args(40, HIDDEN, INNER, HEADS, dtype), DEVICE)
    layer_chain("", *args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = layer_chain("", *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    low, truth = references(partial(layer_chain, "ref"), *args)
    for what in truth:
        assert_error_rule(ours[what], low[what], truth[what], what)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_second_device(name: str) -> None:
    """Kernels run where their tensors are, not on the current device."""
    assert torch.cuda.current_device() == 0
    for op, case in CASES:
        args = move(cases(op, T)[case], "cuda:1")
        with torch.no_grad():
            out, expected = body(op, name)(*args), body(op, "ref")(*args)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
