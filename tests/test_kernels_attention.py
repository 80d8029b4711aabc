"""attention: every padding pattern, head_dim, bias and output, each body against the reference in float64.

A batch holds one sequence of every kind: empty, full, right padded, left padded, with holes. Small tiles bring many
blocks into short sequences.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import INF, NAN, assert_attention, biases, mask_of_every_kind, packed_args
from kernel_helpers import BODIES, DTYPES, body

from bert_fast.kernels.attention import attention_ref
from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.pack import pack_ref

SMALL = TileConfig(16, 16, 4, 2)
SHAPES = (  # (S, head_dim, heads, tile)
    (33, 20, 1, SMALL),  # three key blocks, the last of one key; head_dim padded to 32
    (1, 8, 2, None),  # one token; head_dim below the 16 of a tensor core
    (40, 64, 1, TileConfig(16, 32, 4, 2)),  # no padding of head_dim; the shipped tile is larger than the sequence
    (17, 13, 2, TileConfig(32, 16, 4, 2)),  # odd everything; one query block of which half is past the end
)


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("skip,uniform", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("S,D,H,tile", SHAPES)
@pytest.mark.parametrize("name", BODIES)
def test_padding(
    name: str, S: int, D: int, H: int, tile: TileConfig | None, skip: bool, uniform: bool, probs: bool
) -> None:
    assert_attention(name, packed_args(mask_of_every_kind(S), D, H, torch.float32, skip, probs, uniform), tile)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("skip,probs", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", BODIES)
def test_half_precision(name: str, skip: bool, probs: bool, dtype: torch.dtype) -> None:
    assert_attention(name, packed_args(mask_of_every_kind(17), 12, 2, dtype, skip, probs, True), SMALL)


@pytest.mark.parametrize("D", [8, 16, 32, 80, 127, 128])
@pytest.mark.parametrize("name", BODIES)
def test_head_dims(name: str, D: int) -> None:
    """The shipped tiles, of both classes of head_dim."""
    mask = mask_of_every_kind(9)[1:4]
    for dtype, probs in ((torch.float32, False), (torch.float16, True)):
        assert_attention(name, packed_args(mask, D, 2, dtype, True, probs, False))


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_the_batch_in_a_larger_buffer(name: str, skip: bool, uniform: bool, probs: bool) -> None:
    """`pack` with a true shape: the batch's own result whatever lies around it, zero probabilities there."""
    B, S, wide_B, wide_S, D, H = 5, 19, 8, 32, 8, 2
    mask = mask_of_every_kind(S)
    args = packed_args(mask, D, H, torch.float32, skip, probs, uniform)
    buffer = torch.ones(wide_B, wide_S)
    buffer[:B, :S] = mask
    maps = pack_ref(buffer, skip, torch.tensor([B, S], dtype=torch.int32))
    n = int(maps[1][-1])
    assert n == args[3][-1]
    qkv = torch.full((wide_B * wide_S, 3 * H * D), NAN)
    qkv[:n] = args[0][:n]
    context, weights, lse = assert_attention(name, (qkv, None, *maps, *args[6:]), SMALL)
    truth = attention_ref(*args)
    torch.testing.assert_close(context[:n], truth[0][:n])
    torch.testing.assert_close(lse[:, :n], truth[2][:, :n])
    if probs:
        torch.testing.assert_close(weights[:B, :, :S, :S], truth[1])
        assert weights[B:].count_nonzero() == weights[:, :, S:].count_nonzero() == 0
        assert weights[:, :, :, S:].count_nonzero() == 0


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_probs_are_written_everywhere_and_zero_off_the_keys(name: str, skip: bool) -> None:
    mask = mask_of_every_kind(19)
    args = packed_args(mask, 8, 2, torch.float32, skip, True, False)
    probs = assert_attention(name, args, SMALL)[1]
    is_row = mask.bool() if skip else torch.ones_like(mask, dtype=torch.bool)
    is_row[:, 0] = True
    is_row[0] = True  # the empty sequence keeps its rows; none has a key, so all is 0 there
    assert not probs.isnan().any()
    assert (probs.masked_select((mask == 0)[:, None, None, :]) == 0).all(), "padding keys"
    assert (probs.masked_select(~is_row[:, None, :, None]) == 0).all(), "queries that are no row"
    sums = probs.sum(-1)[1:].masked_select(is_row[1:, None])
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert (probs[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_fully_masked(name: str, probs: bool, dtype: torch.dtype) -> None:
    """eager's rule: the mean of V over all S positions; sdpa's: zero. Never NaN. skip drops no row of such a one."""
    S, D, H = 11, 8, 2
    for uniform, skip in ((True, True), (False, False), (False, True)):
        args = packed_args(torch.zeros(2, S, dtype=torch.long), D, H, dtype, skip, probs, uniform)
        context, weights, lse = assert_attention(name, args, SMALL)
        v = args[0].view(2, S, 3, H * D)[:, :, 2].double()
        mean = v.mean(1, keepdim=True).expand(2, S, H * D) if uniform else torch.zeros(2, S, H * D).double()
        torch.testing.assert_close(context.view(2, S, H * D).double(), mean, rtol=0, atol=2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(S) if uniform else -INF))
        if probs:
            expected = torch.full_like(weights, 1 / S if uniform else 0)
            torch.testing.assert_close(weights, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("kind", biases(2, 1, 2, torch.float32))
@pytest.mark.parametrize("name", BODIES)
def test_bias(name: str, kind: str, probs: bool) -> None:
    bias = biases(3, 2, 19, torch.float32)[kind]
    args = packed_args(torch.ones(3, 19), 12, 2, torch.float32, False, probs, False, bias)
    assert_attention(name, args, SMALL)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", ["one row per sequence", "everything", "lowest"])
@pytest.mark.parametrize("name", BODIES)
def test_bias_in_half_precision(name: str, kind: str, dtype: torch.dtype) -> None:
    """The lowest number plus a score may be -inf in fp16; it must act as a mask, not as a NaN."""
    bias = biases(3, 2, 19, dtype)[kind]
    for probs in (False, True):
        args = packed_args(torch.ones(3, 19), 12, 2, dtype, False, probs, False, bias)
        assert_attention(name, args, SMALL)


@pytest.mark.parametrize("name", BODIES)
def test_bias_of_another_dtype(name: str) -> None:
    """A float32 mask given to a bf16 model."""
    bias = biases(3, 2, 19, torch.float32)["everything"]
    for probs in (False, True):
        args = packed_args(torch.ones(3, 19), 12, 2, torch.bfloat16, False, probs, False, bias)
        assert_attention(name, args, SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_large_scores(name: str, probs: bool, dtype: torch.dtype) -> None:
    """Scores of several hundred, rising along the keys: the running maximum moves in every block."""
    args = list(packed_args(mask_of_every_kind(33), 8, 1, dtype, True, probs, False))
    n = int(args[3][-1])
    args[0][:n, :16] = args[0][:n, :16].abs() * torch.linspace(1, 10, n)[:, None]
    assert_attention(name, tuple(args), SMALL)


@pytest.mark.parametrize("name", BODIES)
def test_strided_qkv_and_scale(name: str) -> None:
    """Rows apart, at an offset; a scale that is not head_dim ** -0.5."""
    args = list(packed_args(mask_of_every_kind(17), 10, 2, torch.float32, False, True, True))
    wide = torch.full((85, 100), NAN)
    wide[:, 20:80] = args[0]
    args[0], args[7] = wide[:, 20:80], 0.7
    assert_attention(name, tuple(args), SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.interpreter
def test_scores_that_are_no_numbers(probs: bool, dtype: torch.dtype) -> None:
    """An infinite or undefined number in a query or a key makes NaN what it makes NaN in the reference, and no more."""
    args = packed_args(torch.ones(1, 40), 8, 1, dtype, False, probs, False)
    args[0][3, 0] = NAN  # a query
    args[0][5, 2] = INF
    args[0][:, 16:] = args[0][:, 16:].abs()
    ours, truth = body("attention", "triton")(*args, SMALL), attention_ref(*args)
    for x, y in zip(ours[: 1 + probs], truth, strict=False):
        assert torch.equal(x.isnan(), y.isnan()) and 0 < y.isnan().sum() < y.numel()
    args[0][21, 8:16] = -INF  # a key: scores of either infinity
    args[0][:, :8] = args[0][:, :8].nan_to_num(1.0, 1.0).abs() * torch.where(torch.arange(40) < 20, 1, -1)[:, None]
    ours, truth = body("attention", "triton")(*args, SMALL), attention_ref(*args)
    for x, y in zip(ours[: 1 + probs], truth, strict=False):
        assert torch.equal(x.isnan(), y.isnan()) and 0 < y.isnan().sum() < y.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_a_block_of_keys_without_weight(name: str, probs: bool, dtype: torch.dtype) -> None:
    """Every score of the first block of keys is -inf, without a bias: those that follow share all the weight."""
    args = list(packed_args(torch.ones(1, 40), 16, 1, dtype, False, probs, False))
    args[0] = args[0].abs()
    args[0][:16, 16] = -INF
    assert_attention(name, tuple(args), SMALL)
