"""Tiny models to compare: one of transformers', and the same on our classes with the same weights.

Whatever is drawn here comes from generators of its own: torch's global one belongs to the caller, and to other threads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast.family import Family
from bert_fast.modeling import SIBLINGS, swap_classes

VOCABULARY, TYPES, POSITIONS, HIDDEN, HEADS = 20, 2, 16, 8, 2
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 12,
    "hidden_dim": 12,
    "embedding_size": 6,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": TYPES,
}


class NotNow(Exception):
    """No comparison can be made here; says why."""


class _OwnNumbers(TorchDispatchMode):
    """Every operator that draws random numbers draws them from a generator of this mode's."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            kwargs = kwargs | {"generator": self._generator}
            if not any(argument.name == "generator" for argument in func._schema.arguments):
                func = func.overloadpacket.generator  # as torch.randn's
        return func(*args, **kwargs)


def tiny_config(family: Family, dropout: float = 0.0, **changes: Any) -> Any:
    """The default config of a family, but tiny, with one rate for all dropouts."""
    cls = family.model.config_class
    plain = cls()
    config = cls(**{name: size for name, size in _SIZES.items() if hasattr(plain, name)} | changes)
    for name, value in list(vars(config).items()):
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, dropout)
    return config


def build(cls: type, config: Any) -> Any:
    """A model of transformers' in fp32 on the CPU, in eval mode, with weights that leave nothing hidden.

    Raises NotNow where somebody has models built in another way in this process.
    """
    with _OwnNumbers():
        model = cls(config).float()  # the default dtype may be another one
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.device.type != "cpu" or not tensor.numel():
            raise NotNow("models are not built on the CPU here")
    _randomise(model)
    return model.eval()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Biases and LayerNorms far from 0 and 1, attention far from uniform."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
            if isinstance(module, nn.LayerNorm) and name == "weight":
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)


def twin(model: Any) -> Any:
    """The same model on our classes, with weights of its own."""
    ours = copy.deepcopy(model)
    swap_classes(ours, SIBLINGS)
    return ours
