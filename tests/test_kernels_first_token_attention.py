"""first_token_attention: one query a sequence under every mask, each body against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import NAN, mask_of_every_kind
from kernel_helpers import BODIES, DTYPES, assert_like_ref, body, randn

from bert_fast.kernels import first_token_attention as module
from bert_fast.kernels.attention import attention_ref
from bert_fast.kernels.pack import pack_ref

OP = "first_token_attention"
SHAPES = (  # (S, head_dim, heads)
    (33, 20, 1),  # head_dim padded to 32
    (1, 8, 2),  # one key
    (40, 64, 2),
    (70, 128, 1),  # the largest head_dim: two blocks of keys
)


def arguments(mask: torch.Tensor, D: int, H: int, dtype: torch.dtype, skip: bool, uniform: bool) -> tuple[Any, ...]:
    """Rows past the real ones are NaN; a row of kv is apart from the next."""
    _, cu_seqlens, kv_len, _ = pack_ref(mask, skip)
    wide = randn(mask.numel(), 2 * H * D + 7, dtype=dtype)
    wide[cu_seqlens[-1] :] = NAN
    return randn(len(mask), H * D, dtype=dtype), wide[:, 3:-4], cu_seqlens, kv_len, H, D**-0.5, uniform


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip,uniform", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("S,D,H", SHAPES)
@pytest.mark.parametrize("name", BODIES)
def test_padding(name: str, S: int, D: int, H: int, skip: bool, uniform: bool, dtype: torch.dtype) -> None:
    assert_like_ref(OP, name, *arguments(mask_of_every_kind(S), D, H, dtype, skip, uniform))


@pytest.mark.parametrize("name", BODIES)
def test_blocks_of_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, large scores that rise along the keys, a scale that is not head_dim ** -0.5."""
    monkeypatch.setattr(module, "BLOCK", 16 * 8)
    q, kv, *lengths, H, _, uniform = arguments(mask_of_every_kind(83), 8, 2, torch.float32, True, True)
    kv = kv.abs() * torch.linspace(1, 100, len(kv))[:, None]
    for sign in (1, -1):
        assert_like_ref(OP, name, q.abs() * sign, kv, *lengths, H, 0.7, uniform)
        assert_like_ref(OP, name, q.abs() * sign, kv, *lengths, H, -0.7, uniform)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", [*BODIES, "ref"])
def test_without_keys(name: str, uniform: bool) -> None:
    """No key: the mean of V over the sequence's rows, or zero. No row, as past the end of a bucket: zero."""
    _, cu_seqlens, kv_len, _ = pack_ref(torch.zeros(3, 5), True, torch.tensor([2, 4]).int())
    kv = randn(15, 2 * 24)
    kv[8:] = NAN
    out = body(OP, name)(randn(3, 24), kv, cu_seqlens, kv_len, 2, 0.3, uniform)
    expected = kv[:8, 24:].view(2, 4, 24).mean(1) if uniform else torch.zeros(2, 24)
    torch.testing.assert_close(out[:2], expected)
    assert (out[2] == 0).all()


def test_ref_is_a_row_of_attention() -> None:
    """The same definition twice: the first query of `attention_ref`, where position 0 is real."""
    mask, D, H = mask_of_every_kind(9)[[0, 1, 2]], 12, 2
    token, cu_seqlens, kv_len, prefix = pack_ref(mask, True)
    qkv = randn(27, 3 * H * D, dtype=torch.float64)
    first = cu_seqlens[:-1].long()
    for uniform in (False, True):
        full = attention_ref(qkv, None, token, cu_seqlens, kv_len, prefix, H, 0.4, False, uniform)[0][first]
        q, kv = qkv[first, : H * D], qkv[:, H * D :]
        torch.testing.assert_close(body(OP, "ref")(q, kv, cu_seqlens, kv_len, H, 0.4, uniform), full)


@pytest.mark.parametrize("name", ["", "triton"])
def test_wrong_shapes(name: str) -> None:
    q, kv, *rest = arguments(torch.ones(2, 3), 4, 2, torch.float32, False, False)
    for at, value, message in (
        (0, randn(3, 8), r"q has shape \(3, 8\), expected \(2, heads \* D\) with unit rows"),
        (0, randn(8, 2).t(), r"q has shape \(2, 8\)"),
        (0, randn(2, 258), r"q has 258 columns, expected heads \* D = 2 \* 1..128"),
        (1, randn(6, 24), r"kv has shape \(6, 24\), expected \(T, 16\)"),
        (1, kv.half(), r"kv is torch.float16 on cpu, q is torch.float32"),
        (1, kv[:5], "5 rows, 2 sequences and 3 bounds do not fit"),
        (2, rest[0][:-1], "6 rows, 2 sequences and 2 bounds"),
        (4, 3, r"q has 8 columns, expected heads \* D = 3 \*"),
    ):
        args = [q, kv, *rest]
        args[at] = value
        with pytest.raises(ValueError, match=f"first_token_attention: {message}"):
            body(OP, name)(*args)
