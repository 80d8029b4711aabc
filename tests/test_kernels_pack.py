"""pack: attention_mask to the row <-> token map and the lengths, for any pattern, dtype and stride of the mask."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from kernel_helpers import BODIES, body

from bert_fast.kernels.pack import pack, pack_ref

SHAPES = (
    (1, 1),  # the smallest call
    (3, 7),
    (5, 33),  # one past a power of two
    (2, 1030),  # two blocks of BLOCK_S = 1024
)
# (mask, skip) -> what pack promises, by hand: token, cu_seqlens, kv_len, prefix
BY_HAND = {
    "exact": (
        [[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]],
        False,
        ([0, 1, 2, 4, 5, 3, 6, 8, 7, 9, 10, 11], [0, 3, 6, 9, 12], [2, 2, 2, 0], [1, 0, 0, 1]),
    ),
    # 2 of the first; the second keeps position 0 as its last row; the third drops a hole; the fourth keeps all
    "skip": (
        [[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]],
        True,
        ([0, 1, 4, 5, 3, 6, 8, 9, 10, 11, 2, 7], [0, 2, 5, 7, 10], [2, 2, 2, 0], [1, 0, 0, 1]),
    ),
}


def patterns(B: int, S: int, seed: int) -> torch.Tensor:
    """Sequences of every density; the first is all padding, the last has none."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.linspace(0, 1, B)[:, None]
    return (torch.rand(B, S, generator=generator) < density).long()


def assert_packed(name: str, mask: torch.Tensor, skip: bool) -> None:
    outputs, expected = body("pack", name)(mask, skip), pack_ref(mask, skip)
    for what, got, want in zip(("token", "cu_seqlens", "kv_len", "prefix"), outputs, expected, strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, want), f"{what}: {got.tolist()}, expected {want.tolist()}"


@pytest.mark.parametrize("case", BY_HAND)
@pytest.mark.parametrize("name", [*BODIES, "ref"])
def test_by_hand(name: str, case: str) -> None:
    mask, skip, expected = BY_HAND[case]
    assert tuple(t.tolist() for t in body("pack", name)(torch.tensor(mask), skip)) == expected


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("B,S", SHAPES)
@pytest.mark.parametrize("name", BODIES)
def test_patterns(name: str, B: int, S: int, skip: bool) -> None:
    for seed in range(2):
        assert_packed(name, patterns(B, S, seed), skip)


@pytest.mark.interpreter
@pytest.mark.parametrize("skip", [False, True])
def test_many_blocks(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 stand for more than 1024 sequences of more than 1024 tokens: sums and counts carry over."""
    monkeypatch.setattr(import_module("bert_fast.kernels.pack"), "next_power_of_2", lambda n: 4)
    assert_packed("triton", patterns(9, 13, 0), skip)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BODIES)
def test_mask_dtypes(name: str, dtype: torch.dtype, skip: bool) -> None:
    mask = patterns(3, 9, 0)
    assert_packed(name, mask.to(dtype), skip)
    if dtype != torch.bool:
        # kept where not zero, as transformers casts to bool: 0.5 and 2 are kept, in uint8 254 too
        scaled = (mask * torch.tensor([0.5, 2.0, 254.0]).repeat(3)).to(dtype)
        assert_packed(name, scaled, skip)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_strided_masks(name: str, skip: bool) -> None:
    wide = patterns(5, 14, 1)
    for mask in (wide[:, ::2], wide[1:4].t(), wide[2:3].expand(4, 14), wide[:, 3:4].expand(5, 6)):
        before = mask.clone()
        assert_packed(name, mask, skip)
        assert torch.equal(mask, before)


@pytest.mark.parametrize("skip", [False, True])
def test_token_is_a_permutation_of_real_tokens_first(skip: bool) -> None:
    mask = patterns(6, 11, 2)
    token, cu_seqlens, kv_len, _ = pack(mask, skip)
    assert torch.equal(token.sort().values, torch.arange(66, dtype=torch.int32))
    for b, start in enumerate(cu_seqlens[:-1].tolist()):
        rows = token[start : cu_seqlens[b + 1]]
        keys = rows[: kv_len[b]] - b * 11
        assert (rows // 11 == b).all()
        assert keys.tolist() == mask[b].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_wrong_masks(name: str) -> None:
    run = body("pack", name)
    for shape in ((4,), (1, 1, 4), (0, 4), (4, 0)):
        with pytest.raises(ValueError, match=r"pack: mask has shape .* expected \(B, S\)"):
            run(torch.ones(shape), False)
    with pytest.raises(ValueError, match=r"pack: mask has 2147483648 tokens, expected fewer than 2\*\*31"):
        run(torch.ones(1, 1, dtype=torch.int8).expand(2**16, 2**15), False)
