"""Run by test_drift.py on an altered transformers: whether bert_fast answers as that transformers does.

usage: drift_probe.py '{"BertModel": {option of the config: value}, ...}'; prints JSON: for every model its difference,
whether a call is fused, the heads compared, what is wrong with ours; and the warnings of bert_fast.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import sys
from typing import Any

import torch
import transformers
from helpers import randomise

import bert_fast
from bert_fast.explain import explanation
from bert_fast.family import FAMILIES
from bert_fast.modeling import SWAPS

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dim": 24,
    "embedding_size": 12,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
}
B, S, PAST = 3, 7, 2
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]])


def config_of(cls: type, kind: str, options: dict[str, Any]) -> Any:
    plain = cls.config_class()
    sizes = {name: size for name, size in SIZES.items() if hasattr(plain, name)}
    config = cls.config_class(**sizes, attn_implementation=kind)
    for name, value in list(vars(config).items()):
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    for name, value in options.items():
        setattr(config, name, value)
    return config


def calls(model: torch.nn.Module, kind: str) -> dict[str, dict[str, Any]]:
    """Arguments, by what they are there for."""
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(3)
    ids = {"input_ids": torch.randint(3, 30, (B, S), generator=generator)}
    table = model.base_model.embeddings.word_embeddings
    embeds = torch.randn(B, S, table.weight.shape[1], generator=generator)
    bias = torch.randn(B, 2, S, S, generator=generator)
    made: dict[str, dict[str, Any]] = {"plain": ids, "positions": ids | {"position_ids": torch.arange(S).flip(0)[None]}}
    made |= {"mask": ids | {"attention_mask": MASK}, "embeds": {"inputs_embeds": embeds, "attention_mask": MASK}}
    made |= {"bias": ids | {"attention_mask": bias}, "tuple": ids | {"return_dict": False}}
    made["hidden states"] = ids | {"attention_mask": MASK, "output_hidden_states": True}
    if kind == "eager":  # of sdpa we return real ones
        made["attentions"] = ids | {"attention_mask": MASK, "output_attentions": True}
    for name in ("token_type_ids", "segment_ids"):
        made[name] = ids | {name: torch.randint(0, 2, (B, S), generator=generator), "attention_mask": MASK}
    if "temperature" in names:
        made |= {"temperature": ids | {"temperature": 2.0}, "temperature of 1": ids | {"temperature": 1.0}}
    return made


def with_prefix(model: torch.nn.Module) -> dict[str, Any] | None:
    """A call with a prefix in its cache, as PEFT's prefix tuning makes it; anew, since it grows."""
    names = inspect.signature(model.forward).parameters
    spelled = next((name for name in ("cache", "past_key_values") if name in names), None)
    if spelled is None:
        return None
    cache, generator = transformers.DynamicCache(), torch.Generator().manual_seed(4)
    for layer in range(2):
        cache.update(*torch.randn(2, B, 2, PAST, 8, generator=generator), layer)
    mask = torch.cat([torch.ones(B, PAST, dtype=torch.long), MASK], 1)
    return {**calls(model, "sdpa")["plain"], "attention_mask": mask, spelled: cache}


def tensors(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in tensors(part)]
    return tensors(tuple(value.values())) if isinstance(value, dict) else [value]


def assert_same(ours: Any, wanted: Any, exactly: bool, what: str) -> None:
    assert type(ours) is type(wanted), what
    a, b = tensors(ours), tensors(wanted)
    assert len(a) == len(b), f"{what}: {len(a)} tensors, expected {len(b)}"
    for x, y in zip(a, b, strict=True):
        if y is None or exactly:
            assert x is y or torch.equal(x, y), what
        else:
            assert (x - y).abs().max() <= 2e-5 * y.abs().max() + 1e-9, what


def trained(model: torch.nn.Module, given: dict[str, Any]) -> list[Any]:
    model.train()
    out = model(**given)
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in tensors(out) if x is not None)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.eval()
    return gradients


def check(cls: type, kind: str, options: dict[str, Any], exactly: bool) -> None:
    """Outputs and gradients of transformers' model, of an accelerated copy, and of our class in its place."""
    config = config_of(cls, kind, options)
    torch.manual_seed(0)
    upstream = randomise(cls(config).eval())
    drop_in = SWAPS.get(cls, cls)(copy.deepcopy(config)).eval()
    drop_in.load_state_dict(upstream.state_dict())
    accelerated = bert_fast.accelerate(copy.deepcopy(upstream))
    cases = calls(upstream, kind)
    with torch.no_grad():
        wanted = {what: upstream(**given) for what, given in cases.items()}
        for what, given in cases.items():
            for ours in (accelerated, drop_in):
                assert_same(ours(**given), wanted[what], exactly, f"{cls.__name__} {kind} {what}")
        layers = accelerated.transformer.layer if hasattr(accelerated, "transformer") else accelerated.encoder.layer
        layers[0].register_forward_hook(lambda *_: None)
        for what in ("plain", "embeds", "hidden states", "token_type_ids"):
            assert_same(accelerated(**cases[what]), wanted[what], exactly, f"{cls.__name__} {kind} {what}, hooked")
        if with_prefix(upstream) is not None:
            expected = upstream(**with_prefix(upstream))
            assert_same(drop_in(**with_prefix(drop_in)), expected, exactly, f"{cls.__name__} {kind} with a prefix")
    given = cases["embeds"] if kind == "eager" else cases["plain"]
    expected = trained(upstream, given)
    floor = max(y.abs().max().item() for y in expected if y is not None)
    for ours in (accelerated, drop_in):
        for x, y in zip(trained(ours, given), expected, strict=True):
            close = x is y or (torch.equal(x, y) if exactly else (x - y).abs().max() <= 2e-5 * floor)
            assert close, f"{cls.__name__} {kind}: a gradient of {type(ours)}"


def check_heads(cls: type, options: dict[str, Any], exactly: bool) -> list[str]:
    prefix, kind = cls.__name__.removesuffix("Model"), "sdpa" if cls._supports_sdpa else "eager"
    done = []
    for suffix in ("ForSequenceClassification", "ForMaskedLM"):
        head = getattr(transformers, prefix + suffix, None)
        if head is not None:
            upstream = randomise(head(config_of(cls, kind, options)).eval())
            ours = bert_fast.accelerate(copy.deepcopy(upstream))
            given = calls(upstream, kind)["mask"]
            with torch.no_grad():
                assert_same(ours(**given), upstream(**given), exactly, head.__name__)
            done.append(head.__name__)
    return done


def probe(name: str, options: dict[str, Any]) -> dict[str, Any]:
    cls = getattr(transformers, name)
    family = next((family for family in FAMILIES if family.model is cls), None)
    difference = None if family is None else family.difference()
    exactly = family is None or difference is not None
    wrong, heads = None, []
    try:
        for kind in ("eager", "sdpa") if cls._supports_sdpa else ("eager",):
            check(cls, kind, options, exactly)
        heads = check_heads(cls, options, exactly)
    except AssertionError as problem:
        wrong = str(problem)
    fused = False
    if family is not None:
        ours = bert_fast.accelerate(cls(config_of(cls, "eager", options)).eval())
        with torch.no_grad():
            fused = explanation(ours, **calls(ours, "eager")["mask"]).tier == "encoder"
    ours = getattr(bert_fast, name, cls) is not cls
    told = {"difference": difference, "left_out": family is None, "fused": fused, "drop_in": ours}
    return told | {"heads": heads, "wrong": wrong}


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    kept = Kept()
    logging.getLogger("bert_fast").addHandler(kept)
    results = {name: probe(name, options) for name, options in json.loads(sys.argv[1]).items()}
    print(json.dumps(results | {"warnings": kept.messages, "version": transformers.__version__}))
