"""Right before fast: an op against its reference in float64, by the error rule of docs/design.md."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch

FACTOR, EPS = 1.25, 4  # times the framework's own error in that dtype, plus this many eps


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that an output nobody wrote cannot pass for the last call's."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations without a deterministic form: no matter here
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill


def error_and_limit(
    ours: Sequence[torch.Tensor], low: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """The output nearest its limit: (error, limit), relative L2 distances to `truth`; `low`: the reference in dtype."""
    if not ours[0].is_floating_point():
        return float(any(not torch.equal(a, b) for a, b in zip(ours, low, strict=True))), 0.0
    slack = EPS * torch.finfo(dtype).eps
    worst = (0.0, slack)
    for o, r, t in zip(ours, low, truth, strict=True):
        norm = t.norm().item()
        error, limit = ((x.double() - t).norm().item() / norm for x in (o, r))
        limit = FACTOR * limit + slack
        if not error / limit <= worst[0] / worst[1]:  # NaN is the worst
            worst = (error, limit)
    return worst
