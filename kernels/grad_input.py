"""grad_input: dx = dy @ w, the data gradient of the linear ops, one to three weights summed, another gradient added.
grad_input_act: the same through the activation before the product, with the activation again.

On a GPU a plain product is torch's own, and so is fp32; what is fused, or counts rows, runs in kernels/grad_gemm.py.
Bytes of grad_input: T * parts * N + parts * N * K read, T * K written; FLOP: 2 * T * parts * N * K.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.activation import BACKWARD, TORCH, check_activation
from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.gemm import used_rows
from bert_fast.kernels.grad_activation import zeros_below
from bert_fast.kernels.grad_gemm import grad_gemm_triton
from bert_fast.kernels.registry import register_kernel

Optional = torch.Tensor | None
Pair = tuple[torch.Tensor, torch.Tensor]


def _given(w0: torch.Tensor, w1: Optional, w2: Optional) -> list[torch.Tensor]:
    return [w for w in (w0, w1, w2) if w is not None]


def grad_input_ref(
    dy: torch.Tensor, w0: torch.Tensor, w1: Optional, w2: Optional, add: Optional, n_rows: Optional
) -> torch.Tensor:
    """dy (T, parts * N); each weight (N, K), w1 and w2 or None; add (T, K) or None; n_rows int32 (1,) or None (all T).

    Returns (T, K) in the dtype of add, or of dy without it. Rows past n_rows come out zero.
    """
    n, weights = used_rows(dy, n_rows), _given(w0, w1, w2)
    dx = sum(part @ w for part, w in zip(dy[:n].split(w0.shape[0], 1), weights, strict=True))
    return zeros_below(dx if add is None else dx.to(add.dtype) + add[:n], len(dy))


def grad_input_act_ref(dy: torch.Tensor, w: torch.Tensor, pre: torch.Tensor, act: str, n_rows: Optional) -> Pair:
    """dy (T, N), w (N, K), pre (T, K), act one of activation.TORCH, n_rows int32 (1,) or None (all T).

    Returns (dy @ w * act'(pre), act(pre)), both (T, K). Rows past n_rows come out zero.
    """
    n = used_rows(dy, n_rows)
    d_pre, y = BACKWARD[act](dy[:n] @ w, pre[:n]), TORCH[act](pre[:n]).clone()
    return zeros_below(d_pre, len(dy)), zeros_below(y, len(dy))


def _check(op: str, dy: torch.Tensor, weights: list[torch.Tensor], name: str, other: Optional) -> None:
    """Shapes, dtypes and devices, before anything is launched; `other` is (T, K), of any dtype where it is `add`."""
    if weights[0].dim() != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weights[0].shape)}, expected (N, K)")
    N, K = weights[0].shape
    if dy.dim() != 2 or dy.shape[1] != len(weights) * N:
        raise ValueError(f"{op}: dy has shape {tuple(dy.shape)}, expected (T, {len(weights) * N})")
    for w in weights:
        if w.shape != (N, K) or w.dtype != dy.dtype or w.device != dy.device:
            raise ValueError(
                f"{op}: weight is {tuple(w.shape)} {w.dtype} on {w.device}, expected ({N}, {K}) {dy.dtype} on"
                f" {dy.device}"
            )
    if other is not None:
        dtypes = (dy.dtype, torch.float32) if name == "add" else (dy.dtype,)
        if other.shape != (dy.shape[0], K) or other.dtype not in dtypes or other.device != dy.device:
            raise ValueError(
                f"{op}: {name} is {tuple(other.shape)} {other.dtype} on {other.device}, expected ({dy.shape[0]}, {K})"
                f" {' or '.join(map(str, dict.fromkeys(dtypes)))} on {dy.device}"
            )


def _product(dy: torch.Tensor, weights: list[torch.Tensor], add: Optional) -> torch.Tensor:
    """torch's own GEMM, one part after the other."""
    (first, w), *others = zip(dy.split(weights[0].shape[0], 1), weights, strict=True)
    same = add is not None and add.dtype == dy.dtype
    dx = torch.addmm(add, first, w) if same else torch.mm(first, w)
    for part, w in others:
        dx.addmm_(part, w)
    return dx if same or add is None else add + dx


def grad_input_cpu(
    dy: torch.Tensor, w0: torch.Tensor, w1: Optional, w2: Optional, add: Optional, n_rows: Optional
) -> torch.Tensor:
    weights = _given(w0, w1, w2)
    _check("grad_input", dy, weights, "add", add)
    n = used_rows(dy, n_rows)
    return zeros_below(_product(dy[:n], weights, None if add is None else add[:n]), len(dy))


def grad_input_triton(
    dy: torch.Tensor, w0: torch.Tensor, w1: Optional, w2: Optional, add: Optional, n_rows: Optional,
    config: TileConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    weights = _given(w0, w1, w2)
    _check("grad_input", dy, weights, "add", add)
    return grad_gemm_triton(dy, weights, n_rows, add, config=config)[0]


def _grad_input_cuda(
    dy: torch.Tensor, w0: torch.Tensor, w1: Optional, w2: Optional, add: Optional, n_rows: Optional
) -> torch.Tensor:
    plain = n_rows is None and w1 is None and (add is None or add.dtype == dy.dtype)
    if not plain and dy.dtype != torch.float32:
        return grad_input_triton(dy, w0, w1, w2, add, n_rows)
    weights = _given(w0, w1, w2)
    _check("grad_input", dy, weights, "add", add)
    return _product(dy, weights, add)  # undefined rows stay where they are


def _grad_input_fake(
    dy: torch.Tensor, w0: torch.Tensor, w1: Optional, w2: Optional, add: Optional, n_rows: Optional
) -> torch.Tensor:
    return (dy if add is None else add).new_empty(dy.shape[0], w0.shape[1])


def grad_input_act_cpu(dy: torch.Tensor, w: torch.Tensor, pre: torch.Tensor, act: str, n_rows: Optional) -> Pair:
    check_activation(act)
    _check("grad_input_act", dy, [w], "pre", pre)
    return grad_input_act_ref(dy, w, pre, act, n_rows)


def grad_input_act_triton(
    dy: torch.Tensor, w: torch.Tensor, pre: torch.Tensor, act: str, n_rows: Optional, config: TileConfig | None = None
) -> Pair:
    check_activation(act)
    _check("grad_input_act", dy, [w], "pre", pre)
    d_pre, y = grad_gemm_triton(dy, [w], n_rows, None, pre, act, config)
    assert y is not None
    return d_pre, y


def _grad_input_act_cuda(dy: torch.Tensor, w: torch.Tensor, pre: torch.Tensor, act: str, n_rows: Optional) -> Pair:
    if dy.dtype != torch.float32:
        return grad_input_act_triton(dy, w, pre, act, n_rows)
    return grad_input_act_cpu(dy, w, pre, act, None)  # torch's own, all T rows


def _grad_input_act_fake(dy: torch.Tensor, w: torch.Tensor, pre: torch.Tensor, act: str, n_rows: Optional) -> Pair:
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape)


grad_input = register_kernel(
    "grad_input(Tensor dy, Tensor w0, Tensor? w1, Tensor? w2, Tensor? add, Tensor? n_rows) -> Tensor",
    cpu=grad_input_cpu,
    cuda=_grad_input_cuda,
    fake=_grad_input_fake,
)
grad_input_act = register_kernel(
    "grad_input_act(Tensor dy, Tensor w, Tensor pre, str act, Tensor? n_rows) -> (Tensor, Tensor)",
    cpu=grad_input_act_cpu,
    cuda=_grad_input_act_cuda,
    fake=_grad_input_act_fake,
)
