"""Shared by the tests of attention_heads on the CPU and on a GPU: arguments, masks, and the comparison."""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import INF
from kernel_helpers import assert_error_rule, body, randn, references

from bert_fast.kernels.attention_heads import attention_heads_ref
from bert_fast.kernels.configs import TileConfig

SMALL = TileConfig(16, 16, 4, 2)
SEED = torch.tensor([5**20])
Args = tuple[Any, ...]


def heads_args(
    B: int, H: int, group: int, Sq: int, Skv: int, D: int, dtype: torch.dtype = torch.float32, mask: Any = None,
    causal: bool = False, probs: bool = False, p: float = 0.0,
) -> Args:  # fmt: skip
    q, k, v = (
        randn(B, S, n, D, dtype=dtype, seed=i).transpose(1, 2)
        for i, (S, n) in enumerate(((Sq, H), (Skv, H // group), (Skv, H // group)))
    )
    return (q, k, v, mask, causal, D**-0.5, probs, *((SEED, 3, p) if p else ()))


def masks(B: int, H: int, Sq: int, Skv: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Broadcast in each dimension; bool ones with rows that keep nothing, added ones with rows of nothing but -inf."""
    keep = randn(B, H, Sq, Skv) > 0.3
    keep[0, :, 0] = False
    added = torch.where(keep, randn(B, H, Sq, Skv), -INF)
    lowest = torch.where(keep, 0.0, torch.finfo(dtype).min)
    return {
        "keep": keep,
        "keep, of all heads": keep[:, :1],
        "keep keys": keep[:, :1, -1:],
        "keep queries": keep[:, :, :, :1],
        "keep of all sequences": keep[:1, :1].expand(B, 1, Sq, Skv),
        "keep every other key": torch.ones(B, 1, Sq, 2 * Skv).bool()[..., ::2],
        "keep nothing": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
        "add": added.to(dtype),
        "add to keys": added[:, :1, -1:].to(dtype),
        "add to queries": randn(1, H, Sq, 1, dtype=dtype),
        "add, turned": randn(B, 1, Skv, Sq, dtype=dtype).transpose(2, 3),
        "add the lowest": lowest[:, :1].to(dtype),
    }


def assert_heads(name: str, args: Args, tile: TileConfig | None = SMALL) -> tuple[torch.Tensor, ...]:
    """All outputs by the rule; lse is -inf and the lowest number exactly where the reference's is."""
    ours = body("attention_heads", name)(*args, **({"config": tile} if name == "triton" else {}))
    low, truth = references(attention_heads_ref, *args)
    assert all(x.is_contiguous() for x in ours)
    assert_error_rule(ours[0], low[0], truth[0], "context")
    if args[6]:
        assert_error_rule(ours[1], low[1], truth[1], "probs")
        assert (ours[1][truth[1] == 0] == 0).all(), "a probability is not 0 where it must be"
    else:
        assert not ours[1].numel()
    lse, low_lse, true_lse = ours[2], low[2], truth[2]
    real = true_lse > torch.finfo(torch.float16).min
    assert lse.dtype == torch.float32 and lse.shape == true_lse.shape and not lse.isnan().any()
    assert torch.equal(lse == -INF, low_lse == -INF) and (lse[~real] < torch.finfo(torch.float16).min / 2).all()
    assert_error_rule(lse[real], low_lse[real], true_lse[real], "lse")
    return ours
