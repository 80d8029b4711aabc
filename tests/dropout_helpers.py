"""transformers' own dropout made to drop what ours drops, so that both can be compared with dropout on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bert_fast.kernels.dropout import kept_ref, make_seed, rescale


def _counters(x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(block, counter) of every element of rows (B, S, N) or weights (B, heads, S, S), as kernels/dropout.py says."""
    if x.dim() == 3:
        return torch.zeros(1, dtype=torch.long), torch.arange(x.numel()).view(x.shape)
    B, heads, S, _ = x.shape
    real = torch.ones(B, S, dtype=torch.bool) if mask is None else mask.bool()
    rank = torch.sort((~real).int(), dim=1, stable=True).indices.argsort(1)  # position -> row of the sequence
    counter = rank[:, None, :, None] * S + rank[:, None, None, :]
    return torch.arange(B * heads).view(B, heads, 1, 1), counter.expand(x.shape)


@contextlib.contextmanager
def our_dropout(
    monkeypatch, mask: torch.Tensor | None = None, per_module: bool = False, layers: int = 2, places: int = 3
) -> Iterator[None]:
    """Within, torch's dropout of an eager transformers BERT keeps what ours keeps after the same manual_seed.

    mask: (B, S) attention mask of an encoder-tier call: the weights' counters go by packed rows. per_module: as in the
    module tier, where every module draws a seed of its own and rows are tokens. places: dropouts of a layer; 2: of the
    weights and of the layer's output.
    """
    seed, site = None, 0

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        nonlocal seed, site
        here, site = site, site + 1
        if here > places * layers:  # a head's own dropout, behind the model: torch draws for both
            return original(x, p, training, inplace)
        if places == 2 and here:
            here = 1 + 3 * ((here - 1) // 2) + 2 * ((here - 1) % 2)
        if not training or not p:
            return x
        if seed is None or per_module:
            seed = make_seed(x.device)
        block, counter = _counters(x, None if per_module else mask)
        kept = kept_ref(seed, 0 if per_module else here, block, counter, p)
        return torch.where(kept, x * rescale(p), 0.0)

    original = torch.nn.functional.dropout
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", dropout)
        yield
