"""Dropout by counter: whether an element is kept is a function of (seed, site, block, counter).

No mask is stored, backward draws the same numbers again. `seed` is one int64 number of a forward, on the device
(`make_seed`); `site` names the dropout (which layer, which place); `block` and `counter` the element: for rows block 0
and token * N + column, for attention weights block b * heads + h and i * S + j, i and j counted in packed rows of the
sequence. So a token draws the same numbers whatever padding there is and whether its rows are skipped or not.

Philox4x32-10 (Salmon et al. 2011) of (seed; site, block) makes two 32-bit keys, once a program. An element then takes
a keyed 32-bit permutation of its counter (three rounds of xor-shift and multiply, the constants of Wellons' triple32)
and is kept where the result is not below p * 2^32: about a dozen integer instructions, where Philox itself would take
80, more than an attention kernel has for all else. With two rounds, neighbours are visibly correlated over 10^7 draws.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.runtime import tl, triton

_U32 = 0xFFFFFFFF
_M1 = tl.constexpr(0xED5AD4BB)
_M2 = tl.constexpr(0xAC4C1B51)
_M3 = tl.constexpr(0x31848BAB)


def make_seed(device: torch.device) -> torch.Tensor:
    """int64 (1,) from torch's generator of `device`: manual_seed, checkpointing and captures see an ordinary draw."""
    return torch.randint(2**63 - 1, (1,), device=device)


def threshold(p: float) -> int:
    """The int32 from which a number is kept; p in [0, 1]."""
    return min(round(p * 2**32), _U32) - 2**31


def rescale(p: float) -> float:
    """What kept elements are multiplied by; with p = 1 nothing is, and it is 0 for those that a threshold lets pass."""
    return 1.0 / (1.0 - p) if p < 1 else 0.0


def check_dropout(op: str, seed: torch.Tensor | None, p: float, device: torch.device) -> None:
    """p in [0, 1] and a seed (int64, one number, on the device) where p > 0."""
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: p is {p}, expected a probability from 0 to 1")
    if p and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device):
        got = "None" if seed is None else f"{tuple(seed.shape)} {seed.dtype} on {seed.device}"
        raise ValueError(f"{op}: seed is {got}, expected one int64 number on {device} for p = {p}")


def philox(seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First two words of Philox4x32-10 at the counter (c0, c1, 0, 0); int64 tensors that hold uint32."""
    c2, c3 = torch.zeros_like(c0 + c1), torch.zeros_like(c0 + c1)
    k0, k1 = seed & _U32, seed >> 32 & _U32
    for _ in range(10):
        (high0, low0), (high2, low2) = _multiply(c0, 0xD2511F53), _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & _U32, k1 + 0xBB67AE85 & _U32
    return c0, c1


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a uint32 product; int64 has no room for it in one piece."""
    high = (a >> 16) * b + ((a & 0xFFFF) * b >> 16) >> 16
    return high, a * b & _U32


def kept_ref(seed: torch.Tensor, site: int, block: torch.Tensor, counter: torch.Tensor, p: float) -> torch.Tensor:
    """Bool mask of the broadcast shape of block and counter (int64)."""
    k0, k1 = philox(seed.reshape(()), torch.full_like(block, site), block)
    x = counter + k0 & _U32
    x = (x ^ x >> 17) * _value(_M1) & _U32
    x = (x ^ x >> 11 ^ k1) * _value(_M2) & _U32
    x = (x ^ x >> 15) * _value(_M3) & _U32
    return (x ^ 2**31) - 2**31 >= threshold(p) if p else torch.ones_like(x, dtype=torch.bool)


def _value(constant: object) -> int:
    return getattr(constant, "value", constant)  # without Triton a constexpr is the number itself


def dropout_rows_ref(
    x: torch.Tensor, token: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float
) -> torch.Tensor:
    """Dropout of rows x (n, N); token (at least n,): the token of each row, None: row r is token r."""
    if not p:
        return x
    assert seed is not None
    rows = torch.arange(x.shape[0], device=x.device) if token is None else token[: x.shape[0]].long()
    counter = rows[:, None] * x.shape[1] + torch.arange(x.shape[1], device=x.device)
    kept = kept_ref(seed, site, torch.zeros_like(counter[:1, :1]), counter, p)
    return torch.where(kept, x * rescale(p), 0.0)


@triton.jit
def dropout_keys(seed_ptr, site, block):
    """The two keys of a program's elements; site and block are int32."""
    k0, k1, _, _ = tl.philox(tl.load(seed_ptr), site, block, 0, 0)
    return k0, k1


@triton.jit
def dropout_kept(counter, k0, k1, threshold):
    """Whether the elements at `counter` (int32, taken modulo 2^32) are kept."""
    x = counter.to(tl.uint32, bitcast=True) + k0
    x = (x ^ (x >> 17)) * _M1
    x = (x ^ (x >> 11) ^ k1) * _M2
    x = (x ^ (x >> 15)) * _M3
    return x.to(tl.int32, bitcast=True) >= threshold
