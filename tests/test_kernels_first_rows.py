"""first_rows: the row of every sequence's position 0, whatever became of the padding."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import NAN, mask_of_every_kind
from kernel_helpers import BODIES, DTYPES, body, randn

from bert_fast.kernels.pack import pack_ref


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("S", [1, 9])
@pytest.mark.parametrize("name", BODIES)
def test_first_rows(name: str, S: int, skip: bool, dtype: torch.dtype) -> None:
    """Rows are numbered by their token, so that what comes back must be b * S; columns are apart."""
    mask = mask_of_every_kind(S)
    token, cu_seqlens, kv_len, _ = pack_ref(mask, skip)
    rows = token[:, None].to(dtype).repeat(1, 40)
    rows[cu_seqlens[-1] :] = NAN
    expected = torch.arange(len(mask))[:, None] * S + torch.zeros(17)
    assert torch.equal(body("first_rows", name)(rows[:, 3:20], token, cu_seqlens, kv_len), expected.to(dtype))


@pytest.mark.parametrize("name", BODIES)
def test_a_sequence_without_rows(name: str) -> None:
    """In a bucket of three sequences two exist: the third gets zeros, whatever lies past the rows."""
    token, cu_seqlens, kv_len, _ = pack_ref(torch.ones(3, 4), True, torch.tensor([2, 3]).int())
    rows = randn(12, 8)
    rows[6:] = NAN
    out = body("first_rows", name)(rows, token, cu_seqlens, kv_len)
    assert torch.equal(out[:2], rows[[0, 3]]) and not out[2].any()


def test_wrong_shapes() -> None:
    token, cu_seqlens, kv_len, _ = pack_ref(torch.ones(2, 3), False)
    run = body("first_rows", "cpu")
    with pytest.raises(ValueError, match=r"rows has shape \(5, 8\), expected \(6, N\)"):
        run(randn(5, 8), token, cu_seqlens, kv_len)
    with pytest.raises(ValueError, match="6 tokens, 2 sequences and 2 bounds"):
        run(randn(6, 8), token, cu_seqlens[:-1], kv_len)
