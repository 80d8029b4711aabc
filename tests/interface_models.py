"""Models of every kind of attention, from transformers alone, for the tests of attn_implementation="bert_fast"."""

from __future__ import annotations

import copy
import functools

import torch
import transformers as hf

from bert_fast.attention_interface import NAME

hf.logging.set_verbosity_error()
B, S, VOCAB = 3, 13, 50
SIZES = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=40, vocab_size=VOCAB)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = SIZES | TOKENS | dict(num_key_value_heads=2, max_position_embeddings=64)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GPT2 = dict(n_embd=32, n_head=4, n_layer=2, vocab_size=VOCAB, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
T5 = dict(d_model=32, d_kv=8, num_heads=4, d_ff=40, num_layers=2, vocab_size=VOCAB, dropout_rate=0.0)
BART = dict(d_model=32, vocab_size=VOCAB, dropout=0.0, max_position_embeddings=64)
BART |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}
BART |= dict(encoder_ffn_dim=40, decoder_ffn_dim=40, forced_eos_token_id=None)
IMAGES = dict(image_size=16, patch_size=4, num_channels=3)
MODELS = {  # class, configuration; every kind of attention there is
    "ModernBert": (hf.ModernBertModel, hf.ModernBertConfig(**SIZES, **TOKENS, local_attention=6, cls_token_id=1)),
    "ViT": (hf.ViTModel, hf.ViTConfig(**{k: n for k, n in SIZES.items() if k != "vocab_size"}, **IMAGES)),
    "Llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)),
    "Mistral": (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=5)),
    "GPT2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, **TOKENS)),
    "T5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)),
    "Bart": (hf.BartForConditionalGeneration, hf.BartConfig(**BART, **TOKENS, decoder_start_token_id=1)),
    "Bert": (hf.BertModel, hf.BertConfig(**SIZES, **NO_DROPOUT)),
    "Splinter": (hf.SplinterModel, hf.SplinterConfig(**SIZES, **NO_DROPOUT)),  # says nothing of is_causal
    "MPNet": (hf.MPNetModel, hf.MPNetConfig(**SIZES, **NO_DROPOUT)),  # adds its masks to the scores itself
    "Bloom": (hf.BloomForCausalLM, hf.BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=VOCAB)),
}
OWN_ATTENTION = ("MPNet", "Bloom")  # these do not call any attention function
DECODERS = ("T5", "Bart")


@functools.cache
def built(name, impl, dtype):
    """Random weights far from the small ones of an initialisation: attention is far from uniform."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    # not by set_attn_implementation, which in transformers 5.17 does not reach the stacks of a T5
    model = cls._from_config(copy.deepcopy(config), attn_implementation=impl)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype)


def model_of(name, impl=NAME, training=False, dtype=torch.float32):
    return built(name, impl, dtype).train(training)


def inputs_of(name, padding=None):
    g = torch.Generator().manual_seed(1)
    if name == "ViT":
        return {"pixel_values": torch.randn(B, 3, 16, 16, generator=g)}
    inputs = {"input_ids": torch.randint(3, VOCAB, (B, S), generator=g)}
    if name in DECODERS:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (B, 7), generator=g)
    if padding:
        mask = torch.ones(B, S, dtype=torch.long)
        if padding == "left":
            mask[0, :4], mask[1, :1] = 0, 0
        else:
            mask[0, 9:], mask[1, -1:] = 0, 0
        if padding == "empty":
            mask[2] = 0
        inputs["attention_mask"] = mask
    return inputs


def tensors(output):
    """Name -> tensor of all that a model returned, but the cache."""
    found = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            found |= {f"{name}[{i}]": x for i, x in enumerate(value)}
    return found


def run(model, inputs, gradients=True, **flags):
    """All tensors of a call, and the gradients of all parameters, those of the weights' own use included."""
    model.zero_grad(set_to_none=True)
    found = tensors(model(**inputs, **flags))
    if gradients:
        wanted = [x for name, x in found.items() if "attentions" in name or x is next(iter(found.values()))]
        sum((x.float() * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in wanted).backward()
        found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in found.items()}


def assert_same(ours, eager, tolerance=1e-4):
    """Relative to a tensor's largest number, which has a floor: some gradients are zero but for rounding."""
    assert list(ours) == list(eager)
    scale = max(x.abs().max().item() for x in eager.values())
    for name, x in ours.items():
        assert x.dtype == eager[name].dtype and x.shape == eager[name].shape, name
        limit = tolerance * max(eager[name].abs().max().item(), 1e-4 * scale)
        worst = (x.double() - eager[name].double()).abs().max().item()
        assert worst <= limit, f"{name}: {worst:.3g}, limit {limit:.3g}"
