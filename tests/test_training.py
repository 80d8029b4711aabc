"""Training on the fused path: gradients with dropout on, the random numbers' promises, what is kept for backward."""

import contextlib
import copy

import pytest
import torch
from dropout_helpers import our_dropout
from helpers import (
    CLASSES,
    assert_close_fp32,
    assert_error_rule,
    assert_gradients_close,
    assert_tier,
    gradients,
    head_inputs,
    model_inputs,
    pair,
    ragged_mask,
    random_ids,
    tensors_of,
)
from recorder import recording
from test_contract_precision import gradient_kind, pooled

from bert_fast.packing import make_packing
from bert_fast.training import differentiable_context

FLAGS = {"output_hidden_states": True, "output_attentions": True}
HEADS = [cls for cls in CLASSES if cls != "BertModel"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}


def weighted_sum(output, mask=None):
    """A loss that depends on every number of every output differently; of padding positions only with mask None."""
    total = 0
    for t in tensors_of(output).values():
        if t is None or not t.is_floating_point():
            continue
        weight = torch.arange(1.0, 1 + t.numel()).cos().view(t.shape)
        if mask is not None and t.dim() >= 3:
            weight = weight * (mask[:, :, None] if t.dim() == 3 else mask[:, None, :, None])
        total = total + (t * weight.to(t.dtype)).sum()
    return total


def step(model, inputs, seed=3, mask=None):
    """Outputs of a training forward after manual_seed; gradients in the parameters."""
    model.train().zero_grad()
    torch.manual_seed(seed)
    output = model(**inputs)
    weighted_sum(output, mask).backward()
    return output


@pytest.mark.parametrize("flags", [{}, {"output_hidden_states": True}, {"output_attentions": True}, FLAGS], ids=str)
@pytest.mark.parametrize("kind", [None, "right", "left", "holes", "first"])
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_outputs_and_gradients_under_the_same_masks(kind, padding, flags, monkeypatch):
    """transformers with our dropout masks put in the place of its own: same outputs, same gradients."""
    upstream, ours = pair(**DROPOUT)
    ours.set_padding(padding)
    inputs = model_inputs(kind=kind, **flags)
    mask = inputs.get("attention_mask")
    seen = mask if padding == "skip" else None
    assert assert_tier(ours.train(), inputs, "encoder").padding == (padding if kind else "exact")
    got = step(ours, inputs, mask=seen)
    with our_dropout(monkeypatch, mask):
        wanted = step(upstream, inputs, mask=seen)
    if seen is None:
        assert_close_fp32(got, wanted, factor=2e-5)
    else:
        assert_close_fp32(got.last_hidden_state[mask.bool()], wanted.last_hidden_state[mask.bool()], factor=2e-5)
    assert_gradients_close(ours, upstream)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_every_head(cls, attn, monkeypatch):
    upstream, ours = pair(cls, **DROPOUT)
    ours.set_attn_implementation(attn)
    inputs = head_inputs(cls, labels=True)
    assert_tier(ours.train(), inputs, "encoder")
    found = []
    for model in (upstream.train(), ours):
        masks = our_dropout(monkeypatch, inputs["attention_mask"].view(-1, 11))
        with masks if model is upstream else contextlib.nullcontext():
            torch.manual_seed(5)
            found.append(model(**inputs).loss)
        found[-1].backward()
    assert_close_fp32(found[1], found[0], cls)
    assert_gradients_close(ours, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "outputs"])
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_the_error_rule_in_training(dtype, flags, padding):
    def make(seed):
        eager, ours = pair(dtype=dtype, seed=seed, hidden_size=64, num_attention_heads=2, **NO_DROPOUT)
        mask = ragged_mask(3, 20, ("right", "ones", "holes", "left")[seed % 4], seed)
        found = []
        for model in (ours.set_padding(padding), eager, copy.deepcopy(eager).double()):
            model.train()
            embeds = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(seed))
            embeds = embeds.to(dtype).to(model.dtype).requires_grad_()
            call = {"inputs_embeds": embeds, "attention_mask": mask, **flags}
            if model is ours:
                assert_tier(ours, call, "encoder")
            weighted_sum(model(**call), mask).backward()
            kinds = {"inputs_embeds": [embeds.grad]}
            for name, gradient in gradients(model).items():
                if gradient is not None:  # no word embeddings here
                    kinds.setdefault(gradient_kind(name), []).append(gradient)
            found.append(kinds)
        return found

    for kind, sides in pooled(make, range(3)).items():
        assert_error_rule(kind, *sides, dtype)


def test_twenty_steps_follow_transformers():
    losses = []
    for model in pair("BertForSequenceClassification", **NO_DROPOUT):
        inputs = head_inputs("BertForSequenceClassification", labels=True)
        optimizer, found = torch.optim.AdamW(model.train().parameters(), lr=1e-3), []
        for _ in range(20):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert_close_fp32(losses[1], losses[0], factor=1e-3)


def test_seeds():
    _, ours = pair(**DROPOUT)
    inputs = model_inputs(kind="right")
    first, again, other = (step(ours, inputs, seed) for seed in (1, 1, 2))
    assert torch.equal(first.last_hidden_state, again.last_hidden_state)
    assert (first.last_hidden_state - other.last_hidden_state).abs().max() > 0.1
    torch.manual_seed(1)
    twice = [ours(**inputs).last_hidden_state for _ in range(2)]
    assert not torch.equal(*twice), "two steps drop the same"
    evaluated = [ours.eval()(**inputs).last_hidden_state for _ in range(2)]
    assert torch.equal(*evaluated) and not torch.equal(evaluated[0], twice[0])


def test_dropout_without_gradients():
    """Monte Carlo dropout: a model in training mode under no_grad."""
    _, ours = pair(**DROPOUT)
    inputs = model_inputs(kind="right")
    with torch.no_grad():
        evaluated, runs = ours(**inputs).last_hidden_state, []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(ours.train()(**inputs).last_hidden_state)
        torch.manual_seed(1)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert (runs[0] - evaluated).abs().max() > 0.1
    with torch.enable_grad():
        assert torch.equal(ours(**inputs).last_hidden_state, runs[0]), "gradients change what is dropped"


def test_undefined_rows_stay_out_of_the_context_of_returned_attentions():
    """On a GPU rows past the real ones, and their gradients, may be NaN."""
    packing = make_packing(torch.tensor([[1, 1, 0], [1, 0, 0]]), 2, 3, torch.device("cpu"), True, False)
    n = int(packing.n_rows)
    qkv, probs = torch.randn(6, 24), torch.rand(2, 2, 3, 3)
    qkv[n:] = float("nan")
    qkv.requires_grad_(), probs.requires_grad_()
    context = differentiable_context(qkv, probs, packing)
    gradient = torch.randn(6, 8)
    gradient[n:] = float("nan")
    context.backward(gradient)
    assert n == 3 and context[:n].isfinite().all()
    assert qkv.grad[:n].isfinite().all() and probs.grad.isfinite().all() and probs.grad.abs().sum() > 0


def test_gradients_are_the_same_to_the_bit_for_one_seed():
    _, ours = pair(**DROPOUT)
    runs = []
    for _ in range(2):
        step(ours, model_inputs(kind="holes"))
        runs.append([g.clone() for g in gradients(ours).values() if g is not None])
    assert all(map(torch.equal, *runs))


def test_skipping_padding_draws_the_same_numbers():
    """A token's dropout does not depend on what padding there is or whether its rows are computed."""
    _, ours = pair(**DROPOUT)
    inputs = model_inputs(kind="right")
    mask = inputs["attention_mask"].bool()
    exact, skip = (step(ours.set_padding(padding), inputs).last_hidden_state for padding in ("exact", "skip"))
    assert_close_fp32(skip[mask], exact[mask])


def test_a_sequence_trains_like_its_padded_self():
    """More padding behind a sequence changes none of its numbers but those that S enters."""
    _, ours = pair(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0)
    ids = random_ids(1, 11)
    outs = []
    for S in (7, 11):
        mask = (torch.arange(S) < 7).long()[None]
        outs.append(step(ours, {"input_ids": ids[:, :S], "attention_mask": mask}).last_hidden_state[:, :7])
    assert_close_fp32(outs[1], outs[0])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_extreme_rates(p, monkeypatch):
    upstream, ours = pair(hidden_dropout_prob=0.1, attention_probs_dropout_prob=p)
    inputs = model_inputs(kind="right")
    got = step(ours, inputs)
    with our_dropout(monkeypatch, inputs["attention_mask"]):
        wanted = step(upstream, inputs)
    assert_close_fp32(got, wanted)
    assert_gradients_close(ours, upstream)


def test_a_rate_outside_its_range_is_one_clear_error():
    _, ours = pair()
    ours.train().encoder.layer[0].attention.self.dropout.p = 1.5
    with pytest.raises(ValueError, match=r"p is 1\.5, expected a probability from 0 to 1"):
        ours(**model_inputs())


def test_a_second_derivative(monkeypatch):
    upstream, ours = pair(**DROPOUT)
    inputs, found = model_inputs(kind="right"), []
    for model in (upstream, ours):
        with our_dropout(monkeypatch, inputs["attention_mask"]) if model is upstream else contextlib.nullcontext():
            torch.manual_seed(4)
            output = model.train()(**inputs)
        parameters = [p for n, p in model.named_parameters() if "layer.1" in n or "word" in n]
        first = torch.autograd.grad(output.pooler_output.square().sum(), parameters, create_graph=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        found.append(torch.autograd.grad(penalty, parameters, allow_unused=True))
    floor = 0.01 * max(wanted.abs().max() for wanted in found[0])  # the biases of keys have noise only
    for got, wanted in zip(found[1], found[0], strict=True):
        assert (got - wanted).abs().max() <= 1e-4 * max(wanted.abs().max(), floor)


def names_of_ops(run):
    """Names of our ops that run within `run`."""
    with recording() as ran:
        run()
    return ran.ops


def test_no_gradient_is_computed_that_nobody_needs():
    _, ours = pair("BertForSequenceClassification")
    inputs = head_inputs("BertForSequenceClassification", labels=True)
    everything = names_of_ops(lambda: ours.train()(**inputs).loss.backward())
    assert everything.count("grad_weight") == 2 * 4 and everything.count("attention_backward") == 2
    ours.bert.embeddings.requires_grad_(False)
    ours.bert.encoder.layer[0].requires_grad_(False)
    partly = names_of_ops(lambda: ours(**inputs).loss.backward())
    assert partly.count("attention_backward") == 1 and partly.count("grad_weight") == 4
    assert "embed_layer_norm_backward" not in partly
    ours.bert.requires_grad_(False)
    assert not [n for n in names_of_ops(lambda: ours(**inputs).loss.backward()) if "backward" in n or "grad" in n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_kept_for_backward(dtype):
    """Per layer and token: input rows, query, key, value, context, two projections, pre-activation, log-sum-exps."""
    _, ours = pair(dtype=dtype, num_hidden_layers=4, hidden_size=64, intermediate_size=256, **DROPOUT)
    B, S = 4, 24
    owned = {t.untyped_storage().data_ptr() for t in (*ours.parameters(), *ours.buffers())}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in owned:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = ours.train()(**model_inputs(B, S, "right"))
    layer = 11 * 64 * dtype.itemsize + 4 * 4
    others = B * S * 64 * dtype.itemsize * 2 + 4096  # the summed embeddings, what leaves the layers, the maps of `pack`
    assert sum(kept.values()) <= 4 * B * S * layer + others
    assert output.last_hidden_state.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "outputs"])
def test_autocast_keeps_the_error_rule_and_the_dtypes(dtype, flags):
    def make(seed):
        eager, ours = pair(seed=seed, hidden_size=64, num_attention_heads=2, **NO_DROPOUT)
        mask = ragged_mask(3, 20, ("right", "ones", "holes")[seed % 3], seed)
        call = {"input_ids": random_ids(3, 20, seed), "attention_mask": mask, **flags}
        found, dtypes = [], []
        for model in (ours, eager, copy.deepcopy(eager).double()):
            model.train()
            with torch.autocast("cpu", dtype, enabled=model.dtype == torch.float32):
                if model is ours:
                    assert_tier(ours, call, "encoder")
                output = model(**call)
            dtypes.append({name: t.dtype for name, t in tensors_of(output).items()})
            weighted_sum(output, mask).backward()
            kinds = {}
            for name, t in tensors_of(output).items():
                kinds.setdefault(name.split(".")[0], []).append(t.detach().to(model.dtype))
            for name, gradient in gradients(model).items():
                kinds.setdefault(gradient_kind(name), []).append(gradient)
            found.append(kinds)
        assert dtypes[0] == dtypes[1]
        return found

    for kind, (ours, eager, truth) in pooled(make, range(3)).items():
        if kind == "key.bias":  # noise of half precision in both
            continue
        error = [sum((a.double() - b).square().sum() for a, b in zip(x, truth, strict=True)) for x in (ours, eager)]
        scale = sum(t.square().sum() for t in truth)
        eps = torch.finfo(dtype).eps
        assert (error[0] / scale).sqrt() <= 1.25 * (error[1] / scale).sqrt() + 4 * eps * eps, kind
