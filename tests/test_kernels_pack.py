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


def assert_packed(name: str, mask: torch.Tensor, skip: bool, shape: torch.Tensor | None = None) -> None:
    outputs, expected = body("pack", name)(mask, skip, shape), pack_ref(mask, skip, shape)
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
@pytest.mark.parametrize("shape", [None, (8, 10), (1, 13), (9, 3)])
@pytest.mark.parametrize("skip", [False, True])
def test_many_blocks(skip: bool, shape: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 stand for more than 1024 sequences of more than 1024 tokens: sums and counts carry over."""
    monkeypatch.setattr(import_module("bert_fast.kernels.pack"), "next_power_of_2", lambda n: 4)
    assert_packed("triton", patterns(9, 13, 0), skip, true_shape(shape))


def true_shape(shape: tuple[int, int] | None) -> torch.Tensor | None:
    return None if shape is None else torch.tensor(shape, dtype=torch.int32)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", [*BODIES, "ref"])
def test_the_batch_in_a_larger_buffer(name: str, skip: bool) -> None:
    """The rows are those of the batch alone, whatever lies around it; the rest of the buffer comes last in order."""
    for (B, S), (wide_B, wide_S) in (((3, 7), (4, 8)), ((4, 7), (4, 7)), ((1, 1), (2, 3)), ((2, 5), (2, 32))):
        for seed in range(2):
            mask = patterns(B, S, seed)
            buffer = torch.full((wide_B, wide_S), 5)  # what an earlier batch left
            buffer[:B, :S] = mask
            token, cu_seqlens, kv_len, prefix = body("pack", name)(buffer, skip, true_shape((B, S)))
            own = pack_ref(mask, skip)
            n = int(own[1][-1])
            rows = own[0][:n] // S * wide_S + own[0][:n] % S
            assert token[:n].tolist() == rows.tolist()
            assert token[n:].tolist() == sorted(set(range(wide_B * wide_S)) - set(rows.tolist()))
            assert cu_seqlens.tolist() == own[1].tolist() + [n] * (wide_B - B)
            assert kv_len.tolist() == own[2].tolist() + [0] * (wide_B - B)
            at = torch.arange(wide_S)
            for b in range(B):
                dropped = [s for s in range(wide_S) if b * wide_S + s not in rows]
                order = [r % wide_S for r in rows.tolist() if r // wide_S == b] + dropped
                assert prefix[b] == (order == at.tolist())
            assert prefix[B:].all()
            assert_packed(name, buffer, skip, true_shape((B, S)))


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
    for shape in (torch.tensor([2]).int(), torch.tensor([2, 2])):
        with pytest.raises(ValueError, match=r"pack: shape is .* expected \(2,\) torch.int32 on cpu"):
            run(torch.ones(3, 4), False, shape)
    with pytest.raises(ValueError, match=r"pack: mask has 2147483648 tokens, expected fewer than 2\*\*31"):
        run(torch.ones(1, 1, dtype=torch.int8).expand(2**16, 2**15), False)
