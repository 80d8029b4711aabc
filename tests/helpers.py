"""Shared by the whole-model tests: twin models, masks, and the one tolerance rule (docs/design.md, "Numbers")."""

import copy
import re

import torch
import transformers

import bert_fast

transformers.logging.set_verbosity_error()

CLASSES = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertLMHeadModel",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
FIRST_TOKEN_HEADS = ("BertForSequenceClassification", "BertForNextSentencePrediction", "BertForMultipleChoice")
VOCAB = 50
MASK_KINDS = ("ones", "right", "left", "holes", "first")


def tiny_config(attn="eager", **changes):
    """A BERT of 2 layers, hidden 32, 4 heads, with every optional size set to something unusual."""
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=56,
        max_position_embeddings=24,
        type_vocab_size=3,
        num_labels=3,
    )
    return transformers.BertConfig(**{**sizes, **changes}, attn_implementation=attn)


@torch.no_grad()
def randomise(model, seed=0):
    """Weights that leave nothing hidden: biases and LayerNorms far from 0 and 1, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "LayerNorm.weight" in name:
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * noise)
        elif "embeddings" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(1.2 * noise / parameter.shape[1] ** 0.5)
    return model


def pair(cls="BertModel", attn="eager", seed=0, dtype=torch.float32, add_pooling_layer=None, **changes):
    """(transformers' model, ours), both in eval mode, with the same weights and the same configuration."""
    if cls == "BertForQuestionAnswering":
        changes.setdefault("num_labels", 2)
    config = tiny_config(attn, **changes)
    kwargs = {} if add_pooling_layer is None else {"add_pooling_layer": add_pooling_layer}
    models = []
    for package in (transformers, bert_fast):
        torch.manual_seed(seed)
        models.append(getattr(package, cls)(copy.deepcopy(config), **kwargs).eval())
    upstream, ours = models
    ours.load_state_dict(randomise(upstream, seed).state_dict())
    return upstream.to(dtype), ours.to(dtype)


def random_ids(B=3, S=11, seed=0):
    return torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(seed))


def ragged_mask(B=3, S=11, kind="right", seed=0):
    """(B, S) of 0/1. `first`: position 0 is padding. Every sequence keeps a real token; the first one is not full."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, S + 1, (B, 1), generator=generator)
    lengths[0] = max(S // 2, 1)
    at = torch.arange(S)[None]
    if kind == "ones":
        return torch.ones(B, S, dtype=torch.long)
    if kind == "right":
        return (at < lengths).long()
    if kind == "left":
        return (at >= S - lengths).long()
    mask = (torch.rand(B, S, generator=generator) < 0.6).long()
    mask[:, 0] = 0 if kind == "first" and S > 1 else 1
    mask[:, -1] = 1
    return mask


def model_inputs(B=3, S=11, kind=None, seed=0, **extra):
    inputs = {"input_ids": random_ids(B, S, seed)}
    if kind is not None:
        inputs["attention_mask"] = ragged_mask(B, S, kind, seed)
    return {**inputs, **extra}


def head_inputs(cls, labels=False, kind="right", seed=0):
    """Inputs that fit class `cls`, with its labels on request."""
    generator = torch.Generator().manual_seed(seed + 1)
    B, S = 3, 11
    if cls == "BertForMultipleChoice":
        B = 6
    inputs = model_inputs(B, S, kind, seed, token_type_ids=torch.randint(0, 3, (B, S), generator=generator))
    if cls == "BertForMultipleChoice":
        inputs = {name: value.view(3, 2, S) for name, value in inputs.items()}
    per_row, per_token = torch.tensor([0, 1, 1]), torch.randint(0, 3, (3, S), generator=generator)
    wanted = {
        "BertModel": {},
        "BertForPreTraining": {"labels": per_token, "next_sentence_label": per_row},
        "BertForQuestionAnswering": {"start_positions": per_row, "end_positions": per_row + 2},
        "BertForSequenceClassification": {"labels": per_row},
        "BertForNextSentencePrediction": {"labels": per_row},
        "BertForMultipleChoice": {"labels": per_row},
    }.get(cls, {"labels": per_token})
    return {**inputs, **wanted} if labels else inputs


def assert_tier(model, inputs, expected, reason=""):
    """The tier `explain` states; for the others than "encoder" also a pattern that the reason must match."""
    told = bert_fast.explain(model, **inputs)
    assert told.tier == expected, f"tier {told.tier!r} ({told.reason}), expected {expected!r}"
    if expected == "encoder":
        assert told.reason is None
    else:
        assert told.reason and re.search(reason, told.reason, re.IGNORECASE), f"reason {told.reason!r} lacks {reason!r}"
    return told


def leave_capture_hooks(model, inputs):
    """A call that transformers' forward drives and that asks for outputs: its hooks stay on the modules for ever."""
    layer = model.base_model.encoder.layer[0]
    handle = layer.register_forward_hook(lambda *_: None)
    model(**inputs, output_hidden_states=True, output_attentions=True)
    handle.remove()
    assert layer._forward_hooks, "upstream left no capture hooks: the test tests nothing"


def tensors_of(output, prefix=""):
    """{path: tensor} of a ModelOutput, tuple or tensor; None is kept, so that structures can be compared."""
    if torch.is_tensor(output) or output is None:
        return {prefix or "output": output}
    items = output.items() if hasattr(output, "items") else enumerate(output)
    found = {}
    for key, value in items:
        found.update(tensors_of(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def assert_close_fp32(ours, eager, what="output", factor=1e-5):
    """Largest difference at most `factor` times the largest magnitude of eager's tensor; structures must be equal.

    Two correct fp32 orders of summation differ by up to 2e-6 of it on these models, the nearest wrong formula
    (the other GELU) by more than 1e-4.
    """
    ours, eager = tensors_of(ours, what), tensors_of(eager, what)
    assert list(ours) == list(eager)
    for name, wanted in eager.items():
        got = ours[name]
        assert (got is None) == (wanted is None), name
        if wanted is None:
            continue
        assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
        assert got.dtype == wanted.dtype, f"{name}: {got.dtype}, expected {wanted.dtype}"
        if wanted.numel() == 0:
            continue
        assert torch.isfinite(got).all(), f"{name}: not finite"
        worst = (got.detach().double() - wanted.detach().double()).abs().max().item()
        scale = wanted.detach().abs().max().item()
        assert worst <= factor * scale + 1e-12, f"{name}: differs by {worst:.3g} at scale {scale:.3g}"


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_close(ours, upstream, factor=2e-5):
    """Every parameter's gradient, None where upstream's is None.

    A gradient under 1% of the model's largest is measured against that: some are zero in exact arithmetic (those of
    `key.bias` always, those of query and key for S = 1) and hold rounding noise only.
    """
    ours, wanted = gradients(ours), gradients(upstream)
    assert {n for n, g in ours.items() if g is None} == {n for n, g in wanted.items() if g is None}
    wanted = {name: gradient for name, gradient in wanted.items() if gradient is not None}
    floor = 0.01 * max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert ours[name].dtype == gradient.dtype and torch.isfinite(ours[name]).all(), name
        worst, scale = (ours[name] - gradient).abs().max().item(), gradient.abs().max().item()
        assert worst <= factor * max(scale, floor), f"{name}: differs by {worst:.3g} at {scale:.3g}, floor {floor:.3g}"


def relative_error(tensors, truth64):
    """Relative L2 distance to the float64 truth, pooled over a list of tensors."""
    distance = sum((t.detach().double() - r).pow(2).sum() for t, r in zip(tensors, truth64, strict=True))
    return (distance / sum(r.pow(2).sum() for r in truth64)).sqrt().item()


def assert_error_rule(kind, ours, eager, truth64, dtype):
    """The one rule: error of ours <= 1.25 x error of eager in the same dtype + 4 eps of the dtype.

    Arguments are lists of tensors of one kind, pooled over layers and at least 3 seeds. `key.bias`, whose gradient
    is zero in exact arithmetic, is held to the rule by its root mean square: the largest of a few hundred numbers of
    pure rounding noise varies by a factor of 2 from one correct order of summation to another.
    """
    eps = torch.finfo(dtype).eps
    for got in ours:
        assert got.dtype == dtype and torch.isfinite(got).all(), kind
    if kind == "key.bias":
        error, reference = (
            torch.cat([t.detach().double() for t in side]).square().mean().sqrt().item() for side in (ours, eager)
        )
    else:
        error, reference = relative_error(ours, truth64), relative_error(eager, truth64)
    assert error <= 1.25 * reference + 4 * eps, f"{kind} in {dtype}: error {error:.3g}, eager's {reference:.3g}"
