"""What `explain` says of a call is what runs, module by module, by the recorder in the bodies of our ops."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import recording
from test_families import FAMILIES, HEADS, TASKS, inputs_of, pair
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

import bert_fast
from bert_fast.modeling import EncoderModel

Change = Callable[[Any, random.Random], Any]


def assert_told_the_truth(model: nn.Module, inputs: dict[str, Any]) -> bert_fast.Explanation | None:
    """Returns the explanation; None where the call raises, of which nothing is told."""
    told = bert_fast.explain(model, **inputs)
    with recording() as ran:
        try:
            model(**inputs)
        except (IndexError, RuntimeError, TypeError, ValueError):
            return None
    paths = {id(m): path for path, m in model.named_modules()}
    base = next(m for m in model.modules() if isinstance(m, EncoderModel))
    running = {paths[id(m)] for m in ran.modules}
    assert (told.tier == "encoder") == (paths[id(base)] in running), f"{told.tier} ({told.reason}), ran in {running}"
    inside = f"{paths[id(base)]}." if paths[id(base)] else ""
    for path, how, why in told.rows[1:]:
        if not (told.tier == "encoder" and path.startswith(inside)):
            assert (how == "fused") == (path in running), f"{path} was said to be {how} ({why}), ran in {running}"
    silent = running - {path for path, _, _ in told.rows} - {paths[id(base)]}
    assert not silent, f"not told: {silent}"
    assert (told.tier == "upstream") == (not ran.ops), f"{told.tier} ({told.reason}), ran {set(ran.ops)}"
    return told


def layers_of(model: Any) -> Any:
    base = model.base_model
    return (base.transformer if hasattr(base, "transformer") else base.encoder).layer


def some_module(model: Any, dice: random.Random, kinds: tuple[type, ...] = (nn.Module,)) -> Any:
    return dice.choice([m for m in model.base_model.modules() if isinstance(m, kinds)])


class Wrapped(nn.Module):
    """A linear layer with something beside it, as adapters are."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.dense, self.weight = dense, dense.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x) * 1.0


def adapter(model: Any, dice: random.Random) -> None:
    parents = [m for m in model.base_model.modules() if any(type(c) is nn.Linear for c in m.children())]
    parent = dice.choice(parents)
    name = dice.choice([n for n, c in parent.named_children() if type(c) is nn.Linear])
    setattr(parent, name, Wrapped(getattr(parent, name)).train(model.training))


CHANGES: dict[str, Change] = {
    "nothing": lambda m, d: None,
    "a hook": lambda m, d: some_module(m, d).register_forward_hook(lambda *a: None),
    "a pre-hook": lambda m, d: some_module(m, d).register_forward_pre_hook(lambda *a: None),
    "a backward hook": lambda m, d: some_module(m, d).register_full_backward_hook(lambda *a: None),
    "an adapter": adapter,
    "training": lambda m, d: m.train(),
    "frozen": lambda m, d: some_module(m, d).requires_grad_(False),
    "double": lambda m, d: m.double(),
    "half": lambda m, d: m.bfloat16(),
    "one part in half": lambda m, d: some_module(m, d, (nn.Linear, nn.LayerNorm)).bfloat16(),
    "another activation": lambda m, d: [
        setattr(x, n, nn.Softplus().train(m.training))
        for x in m.modules()
        for n in ("intermediate_act_fn", "activation")
        if hasattr(x, n) and hasattr(x, "dense" if n[0] == "i" else "lin1")
    ],
    "chunks": lambda m, d: setattr(layers_of(m)[0], "chunk_size_feed_forward", 1),
    "eps": lambda m, d: setattr(some_module(m, d, (nn.LayerNorm,)), "eps", 1e-3),
    "checkpointing": lambda m, d: m.supports_gradient_checkpointing and m.train().gradient_checkpointing_enable(),
    "skip": lambda m, d: m.set_padding("skip"),
    "another forward": lambda m, d: setattr(x := some_module(m, d), "forward", type(x).forward.__get__(x)),
    "a forward of somebody's": lambda m, d: setattr(x := some_module(m, d), "forward", functools.partial(x.forward)),
    "a layer fewer": lambda m, d: layers_of(m).__delitem__(0),
    "no pooler": lambda m, d: setattr(m, "pooler", None) if hasattr(m, "pooler") else None,
}  # fmt: skip


def cache_of(model: Any, dice: random.Random) -> DynamicCache:
    config, cache = model.config, DynamicCache(config=model.config)
    shape = (3, config.num_attention_heads, 2, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def cached(model: Any, x: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    names = bert_fast.installed.Signature(type(model.base_model).forward).spelled
    if "cache" not in names:
        return x
    mask = torch.ones(3, 2 + x["input_ids"].shape[1], dtype=torch.long)
    return x | {names["cache"]: cache_of(model, dice), "attention_mask": mask}


Inputs = Callable[[Any, dict[str, Any], random.Random], dict[str, Any]]
CALLS: dict[str, Inputs] = {
    "plain": lambda m, x, d: x,
    "no mask": lambda m, x, d: {k: v for k, v in x.items() if k != "attention_mask"},
    "outputs": lambda m, x, d: x | {"output_attentions": True, "output_hidden_states": True},
    "unknown": lambda m, x, d: x | {"something": 1},
    "unknown None": lambda m, x, d: x | {"something": None},
    "causal": lambda m, x, d: x | {"is_causal": d.choice([True, False])},
    "use_cache": lambda m, x, d: x | {"use_cache": True},
    "prefix": cached,
    "tuple": lambda m, x, d: x | {"return_dict": False},
    "int32": lambda m, x, d: x | {"input_ids": x["input_ids"].int()},
    "float mask": lambda m, x, d: x | {"attention_mask": torch.randn(3, 1, 11, 11).to(m.dtype)},
    "half mask": lambda m, x, d: x | {"attention_mask": torch.randn(3, 1, 11, 11).half()},
    "bool mask": lambda m, x, d: x | {"attention_mask": torch.rand(3, 1, 1, 11) > 0.2},
    "integer mask": lambda m, x, d: x | {"attention_mask": torch.ones(3, 1, 1, 11, dtype=torch.long)},
    "ones of another shape": lambda m, x, d: x | {"attention_mask": torch.ones(d.choice([(1, 11), (11,), (3, 5)]))},
    "a large mask": lambda m, x, d: x | {"attention_mask": torch.ones(5, 11).tril()},
    "one row of positions": lambda m, x, d: x | {"position_ids": torch.arange(11)[None]},
    "positions past": lambda m, x, d: x | {"position_ids": torch.full((1, 11), 99)},
    "embeds": lambda m, x, d: {k: v for k, v in x.items() if k != "input_ids"}
    | {"inputs_embeds": m.get_input_embeddings()(x["input_ids"]).detach()},
    "a parameter": lambda m, x, d: x | {"input_ids": nn.Parameter(x["input_ids"], requires_grad=False)},
}  # fmt: skip


class Sees(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


AROUND: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a function mode": Sees,
    "a dispatch mode": Dispatches,
    "a default device": lambda: torch.device("cpu"),
}


def model_of(dice: random.Random) -> tuple[str, Any]:
    family, attn = dice.choice(list(FAMILIES)), dice.choice(["eager", "sdpa"])
    cls = HEADS[family] + dice.choice(TASKS) if family in HEADS and dice.random() < 0.6 else None
    return family, pair(family, attn, cls=cls, num_labels=2)[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(160))
def test_random_calls(seed: int) -> None:
    dice = random.Random(seed)
    family, model = model_of(dice)
    change, call, around = (dice.choice(list(kind)) for kind in (CHANGES, CALLS, AROUND))
    if dice.random() < 0.4:
        CHANGES[dice.choice(list(CHANGES))](model, dice)
    CHANGES[change](model, dice)
    inputs = CALLS[call](model, inputs_of(family), dice)
    with AROUND[around]():
        assert_told_the_truth(model, inputs)
