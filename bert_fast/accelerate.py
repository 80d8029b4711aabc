"""accelerate and restore: the class swap on models that somebody else built."""

from __future__ import annotations

import importlib
import sys
from typing import TypeVar

from torch import nn

from bert_fast.family import UPSTREAM
from bert_fast.modeling import OWN_ATTRIBUTES, SIBLINGS, fast_modules, swap_classes
from bert_fast.packing import check_padding

Model = TypeVar("Model")


def _root(model: object) -> nn.Module:
    """The module tree of a model, or of a transformers pipeline."""
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(root, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module or a pipeline around one")
    return root


def accelerate(model: Model, padding: str = "auto") -> Model:
    """Run every module of `model` that bert_fast knows on fused kernels, in place; returns the same object.

    model: any torch.nn.Module (a transformers model, a SentenceTransformer or CrossEncoder, a PEFT or DDP wrapper), or
    a transformers pipeline. Modules change class and nothing else: parameters, state_dict keys, hooks and outputs stay.
    The new classes go by transformers' names and modules; `pickle` and `torch.save` write transformers' own, so that
    what is loaded elsewhere (a spawned worker, a Ray actor) is to be accelerated there. A deepcopy stays accelerated.
    padding: as in `BertModel.set_padding`. Calling it again changes only the padding; `restore` undoes it.

    Raises TypeError when there is no module in `model`, ValueError for an unknown padding.
    """
    check_padding(padding)
    root = _root(model)
    if "sentence_transformers" in sys.modules:
        importlib.import_module("bert_fast.sentences")
    swap_classes(root, SIBLINGS)
    for module in fast_modules(root):
        module._padding = padding
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: every module gets transformers' own class again, in place; returns the same object.

    Not while another thread is inside a call of the model.
    """
    root = _root(model)
    for module in fast_modules(root):
        for name in OWN_ATTRIBUTES:
            module.__dict__.pop(name, None)
    swap_classes(root, UPSTREAM)
    return model
