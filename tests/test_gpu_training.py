"""Training on a GPU: the backward kernels beside their references, whole steps beside transformers', memory, graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dropout_helpers import our_dropout
from helpers import assert_error_rule, assert_tier, gradients, model_inputs, pair, ragged_mask
from kernel_cases import biases, mask_of_every_kind, move, packed_args
from kernel_helpers import DTYPES, double, randn
from test_contract_precision import gradient_kind, pooled
from test_gpu_model import BASE, DEVICE, on_device
from test_training import weighted_sum

from bench import training_cases
from bench.kernel_cases import TRAINING_OPS, Shape
from bench.kernels import check
from bert_fast.kernels import dropout
from bert_fast.kernels.attention import attention, attention_ref
from bert_fast.kernels.residual_layer_norm_backward import residual_layer_norm_backward

pytestmark = pytest.mark.gpu
# BERT-base's sizes with rows that are no multiple of a tile; one whose rows are no multiple of 16 bytes
SHAPES = (Shape("base", 3, 157, 768, 3072, 12, words=999), Shape("odd", 3, 19, 100, 72, 5, words=99))
SEED = torch.tensor([0x0123456789ABCDEF])


@pytest.mark.parametrize("op", TRAINING_OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops(op: str, shape: Shape, dtype: torch.dtype) -> None:
    device, generator = torch.device(DEVICE), torch.Generator().manual_seed(0)

    def rand(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    for case in training_cases.cases(op, shape, device, dtype, rand):
        error, limit = check(case, dtype)
        assert error <= limit, f"{case.label}: error {error:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("bias", [None, "everything", "one row per sequence"])
def test_attention(dtype: torch.dtype, skip: bool, probs: bool, bias: str | None) -> None:
    """Gradients with dropout: every kind of mask, or a bias that hides whole rows."""
    if bias is None:
        args: tuple[Any, ...] = packed_args(mask_of_every_kind(150), 64, 3, dtype, skip, probs, True)
    else:
        added = biases(3, 3, 150, dtype)[bias]
        args = packed_args(torch.ones(3, 150), 64, 3, dtype, skip, probs, False, added)
    args = (args[0].nan_to_num(), *args[1:], SEED, 4, 0.2)
    n, found = int(args[3][-1]), []
    grads = randn(*attention_ref(*args)[0].shape, seed=3), randn(5 if bias is None else 3, 3, 150, 150, seed=4)
    for function, given in ((attention, args), (attention_ref, args), (attention_ref, tuple(map(double, args)))):
        qkv, *rest = move(given, DEVICE)
        qkv.requires_grad_()
        outputs = [o for o in function(qkv, *rest)[:2] if o.numel()]
        weights = [g.to(o) for g, o in zip(grads, outputs, strict=False)]
        weights[0][n:] = 0
        found.append(torch.autograd.grad(outputs, qkv, weights)[0][:n].cpu())
    assert_error_rule("d_qkv", *([x] for x in found), dtype)


@pytest.mark.parametrize("padding", ["exact", "skip"])
@pytest.mark.parametrize(
    "dtype, autocast", [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True), (torch.float16, True)], ids=str
)
def test_gradients_of_a_model(dtype: torch.dtype, padding: str, autocast: bool) -> None:
    """Without dropout, by the error rule; under autocast the parameters are fp32 and `dtype` is the products'."""
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def make(seed: int) -> list[dict[str, list[torch.Tensor]]]:
        eager, ours = pair(seed=seed, dtype=torch.float32 if autocast else dtype, **BASE, **rates)
        mask = ragged_mask(3, 130, ("right", "left", "holes")[seed % 3], seed)
        inputs, found = on_device({**model_inputs(3, 130, seed=seed), "attention_mask": mask}), []
        for model in (ours.set_padding(padding), eager, copy.deepcopy(eager).double()):
            model.to(DEVICE).train()
            with torch.autocast(DEVICE, dtype, enabled=autocast and model.dtype == torch.float32):
                if model is ours:
                    assert_tier(ours, inputs, "encoder")
                output = model(**inputs)
            weighted_sum({k: v.cpu() for k, v in output.items()}, mask).backward()
            kinds: dict[str, list[torch.Tensor]] = {}
            for name, gradient in gradients(model).items():
                if not name.endswith("key.bias"):
                    kinds.setdefault(gradient_kind(name), []).append(gradient)
            found.append(kinds)
        return found

    for kind, (ours, eager, truth) in pooled(make, range(3)).items():
        side = [[t.to(dtype) for t in x] if autocast else x for x in (ours, eager)]
        assert_error_rule(kind, *side, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gpu_drops_what_the_cpu_drops(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers on the CPU with our masks of the same seed gives the same losses and gradients as ours on a GPU."""
    seed = torch.tensor([1234567])
    for module in ("bert_fast.training", "dropout_helpers"):
        monkeypatch.setattr(f"{module}.make_seed", lambda device: seed.to(device))
    upstream, ours = pair(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    inputs = model_inputs(kind="right")
    with our_dropout(monkeypatch, inputs["attention_mask"]):
        wanted = upstream.train()(**inputs)
    got = ours.to(DEVICE, dtype).train()(**on_device(inputs))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for output in (wanted, got):
        weighted_sum({k: v.float().cpu() for k, v in output.items()}).backward()
    assert (got.pooler_output.cpu().float() - wanted.pooler_output).abs().max() <= tolerance
    scale = max(g.abs().max() for g in gradients(upstream).values())
    for name, gradient in gradients(upstream).items():
        assert (gradients(ours)[name].cpu().float() - gradient).abs().max() <= tolerance * scale, name


def test_frequencies_and_determinism() -> None:
    seed = dropout.make_seed(torch.device(DEVICE))
    x = torch.ones(4096, 2560, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.ones(2560, device=DEVICE)
    dy = torch.randn(4096, 2560, device=DEVICE)
    runs = [
        residual_layer_norm_backward(dy, False, x, dy, weight, 1e-5, None, None, seed, 3, 0.1, True) for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))
    dropped = (runs[0][0] == 0).double().mean().item()
    assert abs(dropped - 0.1) < 4 * (0.09 / x.numel()) ** 0.5 + 1e-4  # a gradient may be zero by itself


def test_a_step_does_not_wait_for_the_gpu() -> None:
    _, ours = pair("BertForSequenceClassification", **BASE)
    ours.to(DEVICE, torch.bfloat16).train()
    inputs = on_device({**model_inputs(4, 64, "right"), "labels": torch.tensor([0, 1, 1, 0])})
    ours(**inputs).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = ours.bert(inputs["input_ids"], inputs["attention_mask"])
        output.pooler_output.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_step() -> None:
    """No more than what layer.py says it keeps, the gradients, and what one layer needs while it is at work."""
    _, ours = pair(**{**BASE, "num_hidden_layers": 6})
    ours.to(DEVICE, torch.bfloat16).train()
    inputs = on_device(model_inputs(16, 512))
    for _ in range(2):  # the second step has gradients to add to
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ours(**inputs).last_hidden_state.sum().backward()
    rows, h = 16 * 512, 768
    kept = 6 * rows * (11 * h * 2 + 12 * 4)
    working = rows * h * 2 * 20  # twice a pre-activation and its gradient, some rows
    parameters = sum(p.numel() * 2 for p in ours.parameters())
    assert torch.cuda.max_memory_allocated() - held <= kept + working + parameters
